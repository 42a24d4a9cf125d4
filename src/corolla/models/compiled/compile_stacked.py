"""Makes a program of a span's blocks that keep states, for steps of one token.

Invariant: as in `compile.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from corolla.models.attention.one_token_rows import Rules
from corolla.models.attention.span_cache import SpanCache
from corolla.models.attention.stacked import StackedCaches
from corolla.models.compiled.operators import NotCompilable, Recording
from corolla.models.compiled.program import Program
from corolla.models.compiled.record import record

RECORDED = (3, 5)  # rows; unlike each other, one, and the sizes of a model
COMPARED = (1, 2, 7)  # rows
PAST = 5  # tokens a row before those that are recorded
STEPS = 2  # that are compared: the second finds the states that the first has left


class StackableBlocks(Protocol):
    """What is asked of the span whose blocks are compiled (`models/span.py: Span`)."""

    @property
    def blocks(self) -> nn.ModuleList: ...

    @property
    def hidden_size(self) -> int: ...

    @property
    def latent_blocks(self) -> frozenset[int]: ...

    def new_cache(self) -> SpanCache: ...

    def forward(self, hidden: Tensor, *, cache: SpanCache | None = None) -> Tensor: ...

    def run_stacked(self, hidden: Tensor, stacked: StackedCaches, *, positions: Tensor) -> Tensor: ...


def stacked_program(span: StackableBlocks, most: int) -> Program:
    """For steps of up to `most` rows. Raises `NotCompilable`, or whatever the code makes of being watched."""
    return Program([_record(span, rows) for rows in RECORDED], RECORDED, most=most)


def same_steps(span: StackableBlocks, program: Program, tolerance: float) -> bool:
    """Whether steps of rows, each behind a past of another length, give the same in both ways."""
    caches = [_begun(span, PAST + 3 * row) for row in range(max(COMPARED))]
    return all(_is_same(span, program, caches[:rows], tolerance) for rows in COMPARED)


class _Watched(StackedCaches):
    """Tells the recorder of attention, which goes to the caches."""

    recorder: Any = None

    def __init__(self, caches: Sequence[SpanCache], latent: frozenset[int]) -> None:
        super().__init__(caches, latent)
        self._kept: dict[int, tuple[Tensor, Tensor]] = {}

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *_others: Any, **_more: Any
    ) -> tuple[Tensor, Tensor]:
        self._kept[layer_idx] = key_states, value_states
        return key_states, value_states

    def attend(self, block: int, query: Tensor, _key: Tensor, _value: Tensor, rules: Rules) -> Tensor:
        found: Tensor = self.recorder.attend_each(block, query, *self._kept[block], rules)
        return found

    def attend_latents(self, *_given: Any) -> Tensor:
        raise NotCompilable("attention over latents beside states")


def _record(span: StackableBlocks, rows: int) -> Recording:
    with torch.inference_mode():
        begun = _begun(span, PAST)
        watched = _Watched([begun.fork() for _ in range(rows)], span.latent_blocks)

    def run(hidden: Tensor, positions: Tensor, recorder: Any) -> Tensor:
        watched.recorder = recorder
        return span.run_stacked(hidden, watched, positions=positions)

    return record(
        run, _noise(span, rows, 1), torch.arange(PAST, PAST + rows)[:, None], lambda: watched.states
    )


def _is_same(span: StackableBlocks, program: Program, begun: Sequence[SpanCache], tolerance: float) -> bool:
    rows, pasts = len(begun), [one.tokens for one in begun]
    caches, twins = ([one.fork() for one in begun] for _ in range(2))
    for step in range(STEPS):
        hidden = _noise(span, rows, 1 + step)[:, -1:]
        places = [torch.tensor([[past + step]]) for past in pasts]
        outputs = []
        for own, run in ((caches, program.run_stacked), (twins, span.run_stacked)):
            stacked = StackedCaches(own, span.latent_blocks)
            if not program.takes(rows, stacked.states):
                return False
            outputs.append(run(hidden, stacked=stacked, positions=torch.cat(places)))
            stacked.commit(outputs[-1], torch.split(hidden, 1), places)
        found, wanted = outputs
        if not bool((found - wanted).norm() <= tolerance * wanted.norm()):
            return False
    return True


def _begun(span: StackableBlocks, length: int) -> SpanCache:
    cache = span.new_cache()
    span.forward(_noise(span, 1, length), cache=cache)
    return cache


def _noise(span: StackableBlocks, rows: int, tokens: int) -> Tensor:
    generator = torch.Generator().manual_seed(rows + tokens)
    return torch.randn(rows, tokens, span.hidden_size, generator=generator, dtype=torch.float32)
