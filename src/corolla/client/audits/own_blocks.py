"""Blocks that the client computes by itself, from the checkpoint, to check what a server said.

Invariant: nothing is loaded before it is needed, nor what would take more than half of the free memory;
the arithmetic is that of the server in question where this machine has it, or else the client's own in
float32 at least.
"""

from __future__ import annotations

import psutil
import torch
from torch import Tensor

from corolla.client.audits.audit import Answer
from corolla.models.checkpoints.checkpoint import Checkpoint
from corolla.models.families import block_key_pattern
from corolla.models.kernels.apply import supported, use_kernels
from corolla.models.numerics import dtype_name
from corolla.models.prompts import GIVEN
from corolla.models.span import Span, load_span

CPU = torch.device("cpu")
FREE_SHARE = 0.5  # of the memory that is free, at most, for weights that may be needed only once


class OwnBlocks:
    """Spans of one checkpoint. `answer` is for one thread at a time."""

    def __init__(self, checkpoint: Checkpoint, dtype: torch.dtype) -> None:
        """`dtype` is that of the client's part; narrower ones than float32 are widened."""
        self._checkpoint = checkpoint
        self._dtype = torch.promote_types(dtype, torch.float32)
        self._span: Span | None = None
        self._kind = ""

    def kind_for(self, kind: str) -> str:
        """The arithmetic (`ServerRecord.numerics`) in which `answer` can check one of `kind`.

        8-bit servers differ from float32 by more than many lies do, so they are checked in 8 bits.
        """
        own = dtype_name(self._dtype)
        if kind.endswith("+int8") and supported(CPU, self._dtype, "int8"):
            return f"{own}+int8"
        return own

    def fits(self, start: int, end: int) -> bool:
        """Whether blocks [start, end) are loaded, or may be."""
        if self._holds(start, end):
            return True
        pattern = block_key_pattern(self._checkpoint.config)

        def wanted(key: str) -> bool:
            match = pattern.match(key)
            return match is not None and start <= int(match["index"]) < end

        needed = self._checkpoint.elements(wanted) * self._dtype.itemsize
        return needed < FREE_SHARE * int(psutil.virtual_memory().available)

    def _holds(self, start: int, end: int) -> bool:
        return self._span is not None and self._span.start <= start and end <= self._span.end

    def _load(self, start: int, end: int, kind: str) -> Span:
        """Blocks [start, end), those of the last time given up first."""
        if self._span is None or self._kind != kind or not self._holds(start, end):
            self._span = None
            span = load_span(self._checkpoint, start, end, dtype=self._dtype)
            if kind.endswith("+int8"):
                use_kernels(span.model, "int8", CPU)
            self._span, self._kind = span, kind
        return self._span.view(start, end)

    def answer(self, answer: Answer, kind: str) -> dict[str, Tensor]:
        """What `answer.claimed` should be, in the arithmetic that `kind_for` gave."""
        span = self._load(answer.hop.start, answer.hop.end, kind)
        hidden = answer.inputs["hidden"].to(self._dtype).requires_grad_(answer.backward)
        given = {
            name: answer.inputs[name].detach().requires_grad_(answer.backward)
            for name in GIVEN
            if name in answer.inputs
        }
        with torch.set_grad_enabled(answer.backward):
            output = _each_sequence(span, hidden, given, answer.inputs)
        if not answer.backward:
            return {"hidden": output}
        wanted = {"grad": hidden} | {name: one for name, one in given.items() if name in answer.claimed}
        grad = answer.inputs["grad"].to(self._dtype)
        grads = torch.autograd.grad(output, list(wanted.values()), grad, materialize_grads=True)
        return dict(zip(wanted, grads, strict=True))


def _each_sequence(span: Span, hidden: Tensor, given: dict[str, Tensor], inputs: dict[str, Tensor]) -> Tensor:
    """The packed sequences one by one, [1, N, H]."""
    lengths = inputs["lengths"].tolist()
    parts = torch.split(hidden, lengths, dim=1)
    positions: list[Tensor | None] = [None] * len(parts)
    if "positions" in inputs:
        positions = list(torch.split(inputs["positions"], lengths, dim=1))
    outputs = []
    for part, ids in zip(parts, positions, strict=True):
        # With position ids of its own a family may take a sequence without a mask for packed ones.
        mask = None if ids is None else torch.ones(part.shape[:2], dtype=torch.bool)
        beside = {"targets": inputs["targets"]} if "targets" in inputs else {}
        outputs.append(span.forward(part, mask=mask, positions=ids, cache=None, **given, **beside))
    return torch.cat(outputs, dim=1)
