"""The experts of a mixture as frozen layers, each of which is read only for the rows that were sent to it.

Invariant: they stand in for a family's own module of experts only where, with its very weights, they give what that
gives; the weights have the same names and values for whoever saves the model.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from corolla.models.kernels.linear import FrozenLinear, is_packable
from corolla.text import get_logger

log = get_logger(__name__)

# [experts, 2 * I, H] and [experts, H, I], or each the other way round; there may be a bias [experts, out] of each.
WEIGHTS = ("gate_up_proj", "down_proj")
BIASES = tuple(f"{name}_bias" for name in WEIGHTS)
# What transformers says of such a module, where it is of the usual kind.
USUAL = {"has_gate": True, "has_post_expert_norm": False}
TRIED_ROWS = 3
SAME = 1e-4  # of the largest output

Make = Callable[[Tensor, Tensor | None], FrozenLinear]  # of weight and bias
Expert = Callable[[int, Tensor], Tensor]  # of its number and the rows sent to it


class Experts(nn.Module):
    """Called as a family's own: rows [N, H], the experts of each int64 [N, k], their weights [N, k]; gives [N, H]."""

    def __init__(self, gate: nn.Module, gate_up: _Stack, down: _Stack) -> None:
        """`gate` is the family's module, for what stands between the two products; its weights may be gone."""
        super().__init__()
        self.gate_up_proj, self.down_proj = gate_up, down
        self._gate = (gate,)  # in a tuple: not part of the model any more

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """See the class; differentiable in rows and weights."""
        return routed(hidden_states, top_k_index, top_k_weights, self._expert, len(self.down_proj))

    def gate(self, inner: Tensor) -> Tensor:
        """What stands between the two products, [n, 2 * I] to [n, I]: the family's own code."""
        own: Any = self._gate[0]
        found: Tensor = own._apply_gate(inner)
        return found

    def _expert(self, number: int, rows: Tensor) -> Tensor:
        found: Tensor = self.down_proj[number](self.gate(self.gate_up_proj[number](rows)))
        return found


class _Stack(nn.ModuleList):
    """One layer an expert, saved as the one tensor, or two, that it was."""

    def __init__(self, layers: list[FrozenLinear], *, transposed: bool) -> None:
        super().__init__(layers)
        self._transposed = transposed

    def state_dict(
        self, *args: Any, destination: Any = None, prefix: str = "", keep_vars: bool = False
    ) -> Any:
        destination = {} if destination is None else destination
        name = prefix.removesuffix(".")
        weights = torch.stack([layer.weight for layer in self])  # type: ignore[misc]
        destination[name] = weights.mT.contiguous() if self._transposed else weights
        if self[0].bias is not None:
            destination[f"{name}_bias"] = torch.stack([layer.bias for layer in self])  # type: ignore[misc]
        return destination


def routed(rows: Tensor, index: Tensor, weights: Tensor, expert: Expert, experts: int) -> Tensor:
    """The sum over k of what the experts in `index` [N, k] make of `rows` [N, H], by `weights` [N, k].

    There are so many `experts`; a number beyond them is nobody's, as in the families' own code.
    """
    result = torch.zeros_like(rows)
    order = index.flatten().argsort(stable=True)
    counts: list[int] = torch.bincount(index.flatten(), minlength=experts).tolist()
    for number, places in enumerate(torch.split(order, counts)[:experts]):
        if len(places):
            tokens = places // index.shape[1]
            part = expert(number, rows[tokens]) * weights.flatten()[places, None]
            result.index_add_(0, tokens, part.to(result.dtype))
    return result


def replace_experts(parent: nn.Module, make: Make) -> int:
    """Put frozen experts in the place of all that are understood below `parent`; returns how many."""
    names = [name for name, module in parent.named_modules() if name and _is_understood(module)]
    for name in names:
        parent.set_submodule(name, _made(parent.get_submodule(name), make))
    return len(names)


def _is_understood(module: Any) -> bool:
    weights = dict(module.named_parameters())
    names = {*WEIGHTS, *(BIASES if getattr(module, "has_bias", False) else ())}
    if weights.keys() != names or any(getattr(module, name, None) != one for name, one in USUAL.items()):
        return False
    if module._forward_hooks or module._forward_pre_hooks or not hasattr(module, "_apply_gate"):
        return False
    if any(one.requires_grad or not is_packable(one.device, one.dtype) for one in weights.values()):
        return False
    return _is_same(module)


def _linear(module: Any, name: str, number: int) -> tuple[Tensor, Tensor | None]:
    """An expert's weight [out, in] and bias [out]."""
    weight = getattr(module, name)[number]
    bias = getattr(module, f"{name}_bias", None)
    return weight.t() if module.is_transposed else weight, None if bias is None else bias[number]


@torch.no_grad()
def _is_same(module: Any) -> bool:
    """Whether `routed` does with the module's weights what the module does."""
    count = len(module.down_proj)
    width = _linear(module, WEIGHTS[0], 0)[0].shape[1]
    generator = torch.Generator().manual_seed(count)
    rows = torch.randn(TRIED_ROWS, width, generator=generator, dtype=torch.float32)
    chosen = torch.rand(TRIED_ROWS, count, generator=generator, dtype=torch.float32).topk(min(2, count))

    def expert(number: int, rows: Tensor) -> Tensor:
        up, down = (_linear(module, name, number) for name in WEIGHTS)
        gated: Tensor = module._apply_gate(F.linear(rows, *up))
        return F.linear(gated, *down)

    try:
        wanted = module(rows, chosen.indices, chosen.values)
        found = routed(rows, chosen.indices, chosen.values, expert, count)
        same = bool((found - wanted).abs().max() <= SAME * wanted.abs().max())
    except Exception as reason:  # another release, or a family, that calls its experts otherwise
        log.info("The experts of %s stay as they are: %s", type(module).__name__, reason)
        return False
    if not same:
        log.info("The experts of %s stay as they are: they compute something else.", type(module).__name__)
    return same


def _made(module: Any, make: Make) -> Experts:
    stacks = []
    for name in WEIGHTS:
        layers = [make(*_linear(module, name, number)) for number in range(len(getattr(module, name)))]
        stacks.append(_Stack(layers, transposed=module.is_transposed))
        for own in {name, f"{name}_bias"} & dict(module.named_parameters()).keys():
            delattr(module, own)  # freed, but for what the layers keep as it was
    return Experts(module, *stacks)
