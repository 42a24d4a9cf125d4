"""Experts as frozen layers: the family's own results, gradients and names, or the family's own module."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch
from tests.tiny_models import tiny_config, tiny_model
from torch import Tensor, nn

from corolla.models.kernels.apply import pack_linears, weight_bytes
from corolla.models.kernels.experts import Experts

FAMILIES = ["mixtral", "qwen3_moe", "gpt_oss"]
each_family = pytest.mark.parametrize("family", FAMILIES)


def experts_of(family: str) -> tuple[nn.Module, nn.Module]:
    """A parent with a family's experts, random and frozen, and another with the same ones."""
    config = tiny_config(family)

    def parent() -> nn.Module:
        model: Any = tiny_model(config).requires_grad_(False)
        found = next(one for one in model.modules() if hasattr(one, "_apply_gate"))
        return nn.ModuleDict({"experts": found})

    plain, other = parent(), parent()
    torch.manual_seed(5)
    for one in plain.parameters():
        one.copy_(torch.randn(one.shape) * 0.2)
    other.load_state_dict(plain.state_dict())
    return plain, other


def sent(rows: int, experts: int, width: int) -> tuple[Tensor, Tensor, Tensor]:
    """Rows, and two experts for each."""
    chosen = torch.rand(rows, experts).topk(2) if rows else torch.rand(0, experts).topk(2)
    return torch.randn(rows, width), chosen.indices, chosen.values


@each_family
@pytest.mark.parametrize("rows", [1, 2, 9, 150])
def test_they_compute_what_the_familys_do(family: str, rows: int) -> None:
    plain, packed = experts_of(family)
    assert pack_linears(packed) == 1
    assert isinstance(packed.experts, Experts)
    count, width = len(packed.experts.down_proj), packed.experts.down_proj[0].out_features
    values, index, weights = sent(rows, count, width)
    results = []
    for model in (plain, packed):
        given, by = values.clone().requires_grad_(), weights.clone().requires_grad_()
        found = model.experts(given, index, by)  # type: ignore[operator]
        results.append((found, *torch.autograd.grad(found.square().sum(), (given, by))))
    for wanted, own in zip(*results, strict=True):
        torch.testing.assert_close(own, wanted, atol=1e-5, rtol=1e-4)


@each_family
def test_a_number_that_is_nobodys_is_left_out(family: str) -> None:
    """So transformers says that another machine has the expert."""
    _, packed = experts_of(family)
    pack_linears(packed)
    experts: Any = packed.experts
    values, index, weights = sent(4, len(experts.down_proj), experts.down_proj[0].out_features)
    without = weights.clone()
    without[1, 0] = 0
    wanted = experts(values, index, without)
    index[1, 0] = len(experts.down_proj)
    torch.testing.assert_close(experts(values, index, weights), wanted)


@each_family
def test_no_rows(family: str) -> None:
    _, packed = experts_of(family)
    pack_linears(packed)
    experts: Any = packed.experts
    values, index, weights = sent(0, len(experts.down_proj), experts.down_proj[0].out_features)
    assert experts(values, index, weights).shape == values.shape


@each_family
def test_the_state_dict_and_memory_are_as_before(family: str) -> None:
    plain, packed = experts_of(family)
    weights = [weakref.ref(one) for one in packed.parameters()]
    size = weight_bytes(packed)
    pack_linears(packed)
    gc.collect()
    assert not any(one() is not None for one in weights)
    assert weight_bytes(packed) == size
    before, after = plain.state_dict(), packed.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def changed(kind: type[nn.Module]) -> type[nn.Module]:
    class Changed(kind):  # type: ignore[valid-type,misc]
        def forward(self, *arguments: Any) -> Tensor:
            found: Tensor = super().forward(*arguments)
            return found * 1.01

    return Changed


@each_family
def test_what_computes_something_else_is_left_alone(family: str) -> None:
    _, packed = experts_of(family)
    experts = packed.experts
    assert isinstance(experts, nn.Module)
    experts.__class__ = changed(type(experts))
    assert pack_linears(packed) == 0
    assert packed.experts is experts


@pytest.mark.parametrize("what", ["trained", "hooked", "double", "biased"])
def test_what_is_not_understood_is_left_alone(what: str) -> None:
    _, packed = experts_of("mixtral")
    experts: Any = packed.experts
    if what == "trained":
        experts.requires_grad_()
    elif what == "hooked":
        experts.register_forward_hook(lambda _module, _arguments, output: output * 2)
    elif what == "double":
        experts.double()
    else:
        experts.has_bias = True
    assert pack_linears(packed) == 0
    assert packed.experts is experts
