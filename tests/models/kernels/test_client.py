"""The client's tables: the same logits and gradients, weights that others can read, less memory."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch
from tests.tiny_models import tiny_config, tiny_model
from torch import nn

from corolla.config import ClientQuantization
from corolla.errors import UsageError
from corolla.models.kernels import client
from corolla.models.kernels.client import HalfEmbedding, HalfLinear, quantize_client
from corolla.models.kernels.int8 import has_int8
from corolla.models.kernels.linear import is_packable

pytestmark = pytest.mark.skipif(
    not (is_packable(torch.device("cpu"), torch.float32) and has_int8()), reason="torch without these kernels"
)
KINDS: list[ClientQuantization] = ["none", "int8", "bfloat16"]
TOLERANCE = {"none": 1e-5, "int8": 2e-2, "bfloat16": 5e-3}


def frozen_model(family: str = "llama", *, tied: bool = True) -> Any:
    return tiny_model(tiny_config(family, tie_word_embeddings=tied)).requires_grad_(False)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_logits_and_their_gradient(kind: ClientQuantization, tied: bool) -> None:
    model = frozen_model(tied=tied)
    weight = model.lm_head.weight.clone()
    product = quantize_client(model, kind)
    assert product is not None
    hidden = torch.randn(2, 5, 32, requires_grad=True)
    logits = product(hidden)
    outer = torch.randn_like(logits)
    (gradient,) = torch.autograd.grad(logits, hidden, outer)
    for found, expected in ((logits.detach(), hidden.detach() @ weight.t()), (gradient, outer @ weight)):
        assert float((found - expected).norm() / expected.norm()) < TOLERANCE[kind]
    # The gradient is exactly that of the weight that the product reads.
    torch.testing.assert_close(gradient, outer @ product.weight, atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_weights_stay_readable_and_tied(kind: ClientQuantization, tied: bool) -> None:
    model = frozen_model(tied=tied)
    before = model.lm_head.weight.clone()
    quantize_client(model, kind)
    embedding = model.get_input_embeddings()
    assert (model.lm_head.weight is embedding.weight) == tied
    assert isinstance(embedding, nn.Embedding)
    assert model.lm_head.weight.shape == before.shape
    torch.testing.assert_close(model.lm_head.weight.float(), before, atol=1e-3, rtol=8e-3)
    assert embedding(torch.tensor([[3, 4]])).dtype == torch.float32


@pytest.mark.parametrize("kind", ["int8", "bfloat16"])
def test_the_wide_table_is_freed(kind: ClientQuantization) -> None:
    model = frozen_model()
    wide = weakref.ref(model.lm_head.weight)
    product = quantize_client(model, kind)
    gc.collect()
    assert product is not None
    assert wide() is None
    assert model.lm_head.weight.dtype == torch.bfloat16


def test_nothing_is_lost_of_a_16_bit_checkpoint() -> None:
    model = frozen_model().bfloat16().float()
    hidden = torch.randn(3, 32)
    expected = (model.lm_head(hidden), model.get_input_embeddings()(torch.arange(9)))
    product = quantize_client(model, "bfloat16")
    assert product is not None
    torch.testing.assert_close(product(hidden), expected[0])
    assert torch.equal(model.get_input_embeddings()(torch.arange(9)), expected[1])


@pytest.mark.parametrize("shape", [(1,), (0,), (2, 3)], ids=str)
@pytest.mark.parametrize("bias", [True, False])
def test_chunks(shape: tuple[int, ...], bias: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, "CHUNK", 7)  # three chunks, the last one short
    weight = torch.randn(17, 5).bfloat16()
    offsets = torch.randn(17) if bias else None
    value = torch.randn(*shape, 5, requires_grad=True)
    found = HalfLinear(weight, offsets)(value)
    expected = torch.nn.functional.linear(value, weight.float(), offsets)
    torch.testing.assert_close(found, expected)
    outer = torch.randn(*shape, 17)
    torch.testing.assert_close(
        torch.autograd.grad(found, value, outer)[0], torch.autograd.grad(expected, value, outer)[0]
    )


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_left_alone(kind: ClientQuantization) -> None:
    trained = tiny_model(tiny_config("llama"))
    assert trained.get_output_embeddings().weight.requires_grad  # type: ignore[union-attr]
    for model in (trained, frozen_model().double()):
        before = model.get_input_embeddings()
        assert quantize_client(model, kind) is None
        assert model.get_input_embeddings() is before


def test_a_familys_own_embedding_stays() -> None:
    model = frozen_model("gemma2")
    before = model.get_input_embeddings()
    assert quantize_client(model, "bfloat16") is not None
    assert model.get_input_embeddings() is before
    assert not isinstance(before, HalfEmbedding)


def test_an_unknown_name_is_refused() -> None:
    with pytest.raises(UsageError, match="use one of none, bfloat16, int8"):
        quantize_client(frozen_model(), "int3")  # type: ignore[arg-type]
