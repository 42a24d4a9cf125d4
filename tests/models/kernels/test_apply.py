"""What `pack_linears` replaces, what it leaves alone, and that a family's model computes the same after it."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch
from tests.tiny_models import tiny_config, tiny_model
from torch import nn

from corolla.errors import UsageError
from corolla.models.kernels.apply import Quantization, pack_linears, supported, weight_bytes
from corolla.models.kernels.int8 import Int8Linear, has_int8
from corolla.models.kernels.linear import FrozenLinear, NarrowLinear, is_packable

pytestmark = pytest.mark.skipif(
    not (is_packable(torch.device("cpu"), torch.float32) and has_int8()), reason="torch without these kernels"
)
FAMILIES = [
    "bloom",
    "llama",
    "qwen2",
    "qwen3",
    "gemma2",
    "gemma3_text",
    "mistral",
    "mixtral",
    "qwen3_moe",
    "gpt_neox",
    "gpt2",
    "falcon",
    "phi3",
    "olmo2",
    "cohere",
    "granite",
    "opt",
    "gpt_oss",
]


def frozen(*layers: nn.Module) -> nn.Module:
    return nn.Sequential(*layers).requires_grad_(False)


def family_model(family: str) -> nn.Module:
    return tiny_model(tiny_config(family)).requires_grad_(False)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("quantization", ["none", "int8"])
def test_a_family_computes_the_same(family: str, quantization: Quantization) -> None:
    """fp32: logits and gradients are the plain model's; int8: they point the same way, and differ."""
    ids = torch.randint(3, 200, (2, 7), generator=torch.Generator().manual_seed(1))
    plain, packed = family_model(family), family_model(family)
    replaced = pack_linears(packed, quantization=quantization)
    # falcon has a subclass of its own; tied heads stay too.
    assert (replaced > 0) == (family != "falcon") or replaced == 1
    before, after = plain.state_dict(), packed.state_dict()
    assert before.keys() == after.keys()
    assert all(one.shape == after[name].shape for name, one in before.items())
    assert quantization == "int8" or all(torch.equal(one, after[name]) for name, one in before.items())
    outputs, gradients = [], []
    for model in (plain, packed):
        embedded = model.get_input_embeddings()(ids).requires_grad_()  # type: ignore[operator]
        logits = model(inputs_embeds=embedded).logits
        outputs.append(logits.detach())
        gradients.append(torch.autograd.grad(logits.square().mean(), embedded)[0])
    for expected, found in (outputs, gradients):
        error = float((found - expected).norm() / expected.norm())
        if quantization == "none":
            # Rounding: from float64, gradients of gpt_oss are 8e-6 away in torch's float32, and 6e-6 in ours (AVX2).
            assert error < 3e-5
        elif replaced > 1:
            assert error > 1e-4
            assert bool(found.isfinite().all())
    if quantization == "int8":  # gradients of these random models are too sensitive to rounding to compare
        assert float(torch.cosine_similarity(outputs[0].flatten(), outputs[1].flatten(), dim=0)) > 0.7


@pytest.mark.parametrize("quantization", ["none", "int8"])
def test_every_plain_weight_is_freed_while_the_next_is_still_there(quantization: Quantization) -> None:
    """Peak memory is one layer more: when layer n is packed, layers before n are gone."""
    model = frozen(*(nn.Linear(16, 16) for _ in range(4)))
    weights = [weakref.ref(layer.weight) for layer in model]  # type: ignore[attr-defined]
    alive: list[int] = []
    original = NarrowLinear.__init__ if quantization == "none" else Int8Linear.__init__
    kind = NarrowLinear if quantization == "none" else Int8Linear

    def counting(self: FrozenLinear, *arguments: Any, **options: Any) -> None:
        gc.collect()
        alive.append(sum(one() is not None for one in weights))
        original(self, *arguments, **options)  # type: ignore[arg-type]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kind, "__init__", counting)
        assert pack_linears(model, quantization=quantization) == 4
    gc.collect()
    assert alive == [4, 3, 2, 1]
    assert not any(one() is not None for one in weights)


def test_what_is_left_alone() -> None:
    class Own(nn.Linear):
        pass

    tied = nn.Linear(8, 8)
    trainable = nn.Linear(8, 8)
    hooked = nn.Linear(8, 8)
    hooked.register_forward_hook(lambda _module, _arguments, output: output * 2)
    second = nn.Linear(8, 8)
    second.weight = tied.weight
    model = frozen(Own(8, 8), tied, second, hooked, nn.Linear(8, 8).double(), nn.Linear(8, 8).bfloat16())
    model.append(trainable)  # type: ignore[operator]
    before = list(model.children())
    assert pack_linears(model) == 0
    assert list(model.children()) == before
    trainable.requires_grad_(False)
    assert pack_linears(model) == 1
    assert pack_linears(model) == 0


def test_a_head_tied_to_the_embedding_stays_tied() -> None:
    model = family_model("llama")
    model.config.tie_word_embeddings = True
    model.lm_head.weight = model.get_input_embeddings().weight  # type: ignore[operator,union-attr]
    pack_linears(model)
    assert model.lm_head.weight is model.get_input_embeddings().weight  # type: ignore[operator,union-attr]


def test_a_layer_used_twice_is_still_one_layer() -> None:
    layer = nn.Linear(8, 8).requires_grad_(False)
    model = frozen(layer, nn.ReLU(), layer)
    value = torch.randn(2, 8)
    expected = model(value)
    pack_linears(model)
    assert model[0] is model[2]  # type: ignore[index]
    torch.testing.assert_close(model(value), expected)


def test_where_packing_applies() -> None:
    assert supported("cpu", torch.float32)
    assert supported(torch.device("cpu"), torch.float32, "int8")
    for dtype in (torch.float64, torch.bfloat16, torch.float16):
        assert not supported("cpu", dtype)
        assert pack_linears(frozen(nn.Linear(4, 4).to(dtype))) == 0
    assert not supported("cuda", torch.float32)
    assert not supported("meta", torch.float32, "int8")


def test_an_unknown_quantization_is_refused() -> None:
    with pytest.raises(UsageError, match="Unknown quantization 'int3'; use one of none, int8"):
        pack_linears(frozen(nn.Linear(4, 4)), quantization="int3")  # type: ignore[arg-type]


def test_memory_is_counted() -> None:
    model = frozen(nn.Linear(256, 512), nn.LayerNorm(512))
    plain = sum(one.nbytes for one in model.parameters())
    assert weight_bytes(model) == plain
    pack_linears(model)
    assert weight_bytes(model) == plain
    model = frozen(nn.Linear(256, 512), nn.LayerNorm(512))
    pack_linears(model, quantization="int8")
    assert plain / 4 < weight_bytes(model) < plain / 3.5


def test_a_packed_model_writes_a_whole_checkpoint() -> None:
    model = family_model("qwen3")
    before = {name: one.clone() for name, one in model.state_dict().items()}
    pack_linears(model)
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


class Attention(nn.Module):
    """Calls its projections as the families do."""

    def __init__(self, *, bias: bool = True, width: int = 16) -> None:
        super().__init__()
        self.q_proj = nn.Linear(16, 24, bias=bias)
        self.k_proj = nn.Linear(16, 8, bias=bias)
        self.v_proj = nn.Linear(width, 8, bias=bias)

    def forward(self, value: torch.Tensor) -> torch.Tensor:
        return torch.cat([self.v_proj(value).tanh(), self.q_proj(value), self.k_proj(value)], dim=-1)


@pytest.mark.parametrize("bias", [True, False])
def test_siblings_are_one_product(bias: bool) -> None:
    model = Attention(bias=bias).requires_grad_(False)
    weights = [weakref.ref(one.weight) for one in (model.q_proj, model.k_proj, model.v_proj)]
    before = {name: one.clone() for name, one in model.state_dict().items()}
    size = weight_bytes(model)
    value = torch.randn(2, 5, 16, requires_grad=True)
    expected = model(value)
    (gradient,) = torch.autograd.grad(expected.square().sum(), value)
    del expected
    assert pack_linears(model) == 3
    gc.collect()
    assert not any(one() is not None for one in weights)
    assert weight_bytes(model) == size
    assert all(torch.equal(one, before[name]) for name, one in model.state_dict().items())
    assert model.q_proj.weight.shape == (24, 16)
    for _ in range(2):
        found = model(value)
        torch.testing.assert_close(torch.autograd.grad(found.square().sum(), value)[0], gradient)


def test_siblings_with_different_inputs_are_computed_apart() -> None:
    plain = Attention().requires_grad_(False)
    packed = Attention().requires_grad_(False)
    packed.load_state_dict(plain.state_dict())
    pack_linears(packed)
    values = [torch.randn(3, 16) for _ in range(3)]
    for query, key in ((0, 1), (1, 1), (1, 2), (2, 0), (2, 2)):
        torch.testing.assert_close(packed.q_proj(values[query]), plain.q_proj(values[query]))
        torch.testing.assert_close(packed.k_proj(values[key]), plain.k_proj(values[key]))
    # Nothing is kept for a later input, nor between modes.
    with torch.no_grad():
        assert not packed.q_proj(values[0].requires_grad_()).requires_grad
    assert packed.k_proj(values[0]).requires_grad


def test_a_group_keeps_nothing_when_all_have_asked() -> None:
    model = Attention().requires_grad_(False)
    pack_linears(model)
    value = torch.randn(2, 16)
    held = weakref.ref(value)
    model(value)
    del value
    assert held() is None


def test_siblings_of_other_widths_are_packed_one_by_one() -> None:
    model = Attention(width=12).requires_grad_(False)
    assert pack_linears(model) == 3
    assert isinstance(model.q_proj, NarrowLinear)
