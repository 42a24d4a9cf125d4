"""The client's two large tables, embedding and head, in less memory or with faster products.

Invariant: `embedding.weight` and `head.weight` stay readable parameters [V, H], and stay one where a model ties
them; the embedding gives the dtype that it gave before. What is kept in 16 bit is multiplied in float32, so a
checkpoint that was published in bfloat16 loses nothing by it.
"""

from __future__ import annotations

from typing import Any, get_args

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from corolla.config import ClientQuantization
from corolla.errors import UsageError
from corolla.models.kernels.apply import exact_linear
from corolla.models.kernels.autotune import Autotuner
from corolla.models.kernels.int8 import Int8Linear
from corolla.models.kernels.linear import FrozenLinear, NarrowLinear, is_packable, multiply
from corolla.models.kernels.narrow import as_it_is

CHUNK = 4096  # rows of a 16-bit weight that are widened at a time; 9.4 MB for SmolLM2


def quantize_client(model: PreTrainedModel, quantization: str = "none") -> FrozenLinear | None:
    """Prepare a client's model for its machine; gives the head's product, float32 [..., H] to [..., V], or None.

    `none`: the head's weight in fewer bits beside the shared embedding, where it has such a form; else in the very
    memory of the head, so the product is right for as long as nobody changes that. Nothing else changes.
    `bfloat16`: both tables in 16 bit, one memory where they are tied, products in float32. `int8`: the head
    multiplies in 8 bit; the embedding (and what reads as the head's weight) is kept in 16 bit.

    A model that is not float32 on a CPU, or whose head is trained or no plain linear layer, is left as it is
    (None). The head is not replaced: hand the product to whatever calls it. Raises `UsageError` for an unknown
    name and where the machine has no int8 kernel.
    """
    if quantization not in get_args(ClientQuantization):
        raise UsageError(
            f"Unknown quantization {quantization!r}; use one of {', '.join(get_args(ClientQuantization))}."
        )
    head: Any = model.get_output_embeddings()
    if not isinstance(head, nn.Linear) or head.weight.requires_grad:
        return None
    if not is_packable(head.weight.device, head.weight.dtype):
        return None
    # A bias of its own: what is made here must not change when the head is changed.
    bias = None if head.bias is None else head.bias.detach().clone()
    if quantization == "none":
        return exact_linear(head.weight, bias, autotuner=Autotuner())
    product = Int8Linear(head.weight, bias) if quantization == "int8" else None
    halve_tables(model, head)
    return product or HalfLinear(head.weight, head.bias)


def product_for(copied: nn.Linear, head: nn.Linear, product: FrozenLinear) -> FrozenLinear:
    """The `product` of `head` for a copy of it: what reads the head's own memory reads the copy's instead."""
    if isinstance(product, NarrowLinear) and product.narrow.values.data_ptr() == head.weight.data_ptr():
        return NarrowLinear(as_it_is(copied.weight), product.bias, product.backends)
    return product


def halve_tables(model: PreTrainedModel, head: nn.Linear) -> None:
    """Keep the embedding and the head's weight in bfloat16, tied if they were.

    An embedding of a family's own class stays as it is, and so does a head that is tied to it.
    """
    embedding: Any = model.get_input_embeddings()
    tied = embedding.weight is head.weight
    if type(embedding) is nn.Embedding and not embedding.weight.requires_grad:
        half = HalfEmbedding.like(embedding)
        model.set_input_embeddings(half)
        if tied:
            head.weight = half.weight
    if not tied:
        head.weight = _halved(head.weight)


def _halved(weight: Tensor) -> nn.Parameter:
    return nn.Parameter(weight.detach().to(torch.bfloat16), requires_grad=False)


class HalfEmbedding(nn.Embedding):
    """An embedding kept in bfloat16 that gives float32 [..., H], or what the model is converted to later."""

    gives = torch.float32

    @classmethod
    def like(cls, embedding: nn.Embedding) -> HalfEmbedding:
        """One with the rows of `embedding` rounded to 16 bit."""
        made = cls(
            embedding.num_embeddings,
            embedding.embedding_dim,
            padding_idx=embedding.padding_idx,
            device="meta",
        )
        made.weight = _halved(embedding.weight)
        return made.train(embedding.training)

    def forward(self, input: Tensor) -> Tensor:
        """int64 [...] to [..., H]."""
        return super().forward(input).to(self.gives)

    def _apply(self, fn: Any, recurse: bool = True) -> HalfEmbedding:
        self.gives = fn(torch.empty(0, dtype=self.gives)).dtype
        return super()._apply(fn, recurse)  # type: ignore[no-any-return, no-untyped-call]


class HalfLinear(FrozenLinear):
    """A linear layer on a bfloat16 weight that is somebody else's too; products in float32."""

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        """`weight` [out, in] is kept by reference, so that a tied table is in memory once."""
        super().__init__(int(weight.shape[0]), int(weight.shape[1]), bias)
        self._weight = (weight.detach(),)  # in a tuple: not part of the state, which is the owner's

    @property
    def weight(self) -> Tensor:
        """The weight as float32 [out, in]; made anew at each reading."""
        return self._weight[0].float()

    def weight_bytes(self) -> int:
        """Nothing but the bias: the weight is counted where it lives."""
        return 0 if self.bias is None else self.bias.nbytes

    def multiply(self, value: Tensor) -> Tensor:
        weight = self._weight[0]
        result = value.new_empty(*value.shape[:-1], weight.shape[0])
        for rows, part in zip(torch.split(weight, CHUNK), torch.split(result, CHUNK, dim=-1), strict=True):
            part.copy_(multiply(value, rows.float(), None))
        return result if self.bias is None else result.add_(self.bias)

    def multiply_back(self, gradient: Tensor) -> Tensor:
        weight = self._weight[0]
        result = gradient.new_zeros(*gradient.shape[:-1], weight.shape[1])
        for rows, part in zip(torch.split(weight, CHUNK), torch.split(gradient, CHUNK, dim=-1), strict=True):
            result += multiply(part.contiguous(), rows.float().t(), None)
        return result
