"""LoRA (Hu et al. 2021, arXiv:2106.09685): linear layers of the blocks, changed by products of low rank beside them.

Invariant: a layer gives W·x + s·B·(A·x), the second part in float32 at least, whatever W is kept in; a token whose
sequence has no adapter, or another one, gets nothing of it.

An adapter is fp32 [blocks, R, F]. A block's numbers stand side by side, layer after layer in the order of the names
(`targets`, as in the family's own code, counted from the block: `self_attn.q_proj`) of those that it has: for each
of R ranks what A [R, in] has of it, and then what s·B [out, R] has. What is behind the last of them is zero.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig
from transformers.pytorch_utils import Conv1D

from corolla.errors import CorollaError
from corolla.models.attention.packed_bloom import named_as_loaded
from corolla.models.families import structure
from corolla.models.kernels.linear import FrozenLinear
from corolla.models.prompts import LoraAdapter

Layers = Mapping[str, nn.Module]  # of a block, by name
Hook = Callable[[nn.Module, tuple[Any, ...], Tensor], Tensor | None]


@dataclass(frozen=True)
class Place:
    """One layer's numbers among its block's: so many of A, and behind them so many of B."""

    name: str
    inputs: int
    outputs: int


def named_parts(block: nn.Module) -> Iterator[str]:
    """The names of all modules of a block, as the family's own code has them."""
    return (named_as_loaded(name) for name, _ in block.named_modules())


def linear_layers(block: nn.Module) -> dict[str, nn.Module]:
    """The linear layers of a block, by name, replaced ones too; none that are numbered, as experts are."""
    return {
        named_as_loaded(name): layer
        for name, layer in block.named_modules()
        if isinstance(layer, nn.Linear | Conv1D | FrozenLinear)
        and not any(part.isdigit() for part in name.split("."))
    }


def linear_layers_of(config: PretrainedConfig) -> list[dict[str, nn.Module]]:
    """Those of each block of a whole model, without weights."""
    place = structure(config)
    with torch.device("meta"):
        whole = place.causal_lm(copy.deepcopy(config))
    blocks: Any = whole.get_submodule(place.prefix)
    return [linear_layers(block) for block in blocks]


def places(layers: Layers, targets: Sequence[str]) -> list[Place]:
    """Those of the `targets` that a block has, in their order."""
    return [Place(name, *_sizes(layers[name])) for name in targets if name in layers]


def width(blocks: Sequence[Layers], targets: Sequence[str]) -> int:
    """F, of the block that has most."""
    return max(sum(one.inputs + one.outputs for one in places(layers, targets)) for layers in blocks)


def pieces(own: Tensor, order: Sequence[Place]) -> Iterator[tuple[str, Tensor, Tensor]]:
    """The layers' names, A [R, in] and (s·B)ᵗ [R, out] of one block's numbers [R, F], of which they are views."""
    sizes = [size for one in order for size in (one.inputs, one.outputs)]
    # Split at once: the gradient of each slice by itself would be as large as the whole.
    parts = torch.split(own, [*sizes, own.shape[1] - sum(sizes)], dim=1)
    for one, down, up in zip(order, parts[::2], parts[1::2], strict=False):
        yield one.name, down, up


def _sizes(layer: Any) -> tuple[int, int]:
    """Numbers that go in and come out."""
    if isinstance(layer, Conv1D):
        return int(layer.weight.shape[0]), int(layer.weight.shape[1])
    return int(layer.in_features), int(layer.out_features)


def names_in(targets: Tensor) -> tuple[str, ...]:
    """The layers' names of a tensor that has travelled. Raises `ValueError`."""
    return tuple(bytes(targets.tolist()).decode().split("\n"))


def initial(
    config: PretrainedConfig, targets: Sequence[str], rank: int, scaling: float, seed: int
) -> LoraAdapter:
    """An adapter that changes nothing yet: A is drawn as peft draws it, uniform to 1/√in, and B is zero."""
    blocks, names = linear_layers_of(config), tuple(sorted(targets))
    values = torch.zeros(len(blocks), rank, width(blocks, names), dtype=torch.float32)
    scale, generator = torch.zeros_like(values), torch.Generator().manual_seed(seed)
    for index, layers in enumerate(blocks):
        order = places(layers, names)
        for (_, down, _), (_, once, scaled) in zip(
            pieces(values[index], order), pieces(scale[index], order), strict=True
        ):
            bound = down.shape[1] ** -0.5
            down.uniform_(-bound, bound, generator=generator)
            once.fill_(1.0)
            scaled.fill_(scaling)
    return LoraAdapter(values, scale, names)


@dataclass(frozen=True)
class Adapter:
    """What the blocks of a span are given: `values` [blocks, R, F] of the layers `targets`."""

    values: Tensor
    targets: tuple[str, ...]

    @staticmethod
    def of(values: Tensor, targets: Tensor, device: torch.device, dtype: torch.dtype) -> Adapter:
        """As it is computed with beside weights of that `dtype`: no digit of a float64 span is lost."""
        return Adapter(values.to(device, torch.promote_types(values.dtype, dtype)), names_in(targets))

    def is_same(self, other: Adapter) -> bool:
        """Whether both lie in the same memory."""
        mine, its = self.values, other.values
        return (mine.data_ptr(), mine.shape, self.targets) == (its.data_ptr(), its.shape, other.targets)


class AdapterRows:
    """The adapters of a pass, and which of its tokens, in the order in which layers see them, have them."""

    def __init__(self, parts: Sequence[tuple[Adapter, Sequence[range]]], total: int) -> None:
        """`parts` are stretches of the pass's `total` tokens; those of one adapter are multiplied together."""
        self._total = total
        grouped: list[tuple[Adapter, list[range]]] = []
        for adapter, stretches in parts:
            own = next((known for one, known in grouped if one.is_same(adapter)), None)
            if own is None:
                grouped.append((adapter, own := []))
            own += stretches
        self._groups = [(adapter, self._tokens(stretches, adapter)) for adapter, stretches in grouped]

    def _tokens(self, stretches: Sequence[range], adapter: Adapter) -> Tensor | None:
        """The tokens, int64; None for all."""
        if sum(map(len, stretches)) == self._total:
            return None
        tokens = torch.cat([torch.arange(one.start, one.stop) for one in stretches])
        return tokens.to(adapter.values.device)

    def hooks(self, blocks: Sequence[Layers]) -> Iterator[tuple[nn.Module, Hook]]:
        """For `BlocksPass`: what is added behind which layers."""
        for adapter, tokens in self._groups:
            for layers, own in zip(blocks, adapter.values.unbind(), strict=True):
                for name, down, up in pieces(own, places(layers, adapter.targets)):
                    yield layers[name], self._adder(down, up, tokens)

    def _adder(self, down: Tensor, up: Tensor, tokens: Tensor | None) -> Hook:
        def add(_layer: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
            value: Tensor = args[0]
            entered = value.reshape(-1, value.shape[-1]).to(down.dtype)
            if tokens is None:
                changed = output + (entered @ down.t() @ up).view(output.shape)
                return changed.to(output.dtype)
            if len(entered) != self._total:
                raise CorollaError("A layer with an adapter has not seen each token of its pass once.")
            whole = output.reshape(-1, output.shape[-1]).to(down.dtype)
            whole = whole.index_add(0, tokens, entered[tokens] @ down.t() @ up)
            return whole.view(output.shape).to(output.dtype)

        return add


def of_all(adapter: Adapter | None, tokens: int) -> AdapterRows | None:
    """The same adapter for every token of a pass."""
    return None if adapter is None else AdapterRows([(adapter, [range(tokens)])], tokens)
