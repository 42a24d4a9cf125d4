"""Spans that keep only windows give what they give with everything kept; mistakes in it are seen."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.covering import covering
from tests.models.attention.pools import FilledPool
from tests.mutants import Mistakes, Plant, no_mistake, passes
from tests.tiny_models import write_tiny
from torch import Tensor

from corolla.models.attention import windows
from corolla.models.attention.one_sequence import TableSegment
from corolla.models.attention.one_token_rows import Rules
from corolla.models.attention.packing import PackedBatch, Segment, segments_of
from corolla.models.attention.pages import PAGE, CachedSequence, PageLayout
from corolla.models.attention.windows import MOST_TABLES, layout_of
from corolla.models.checkpoints.checkpoint import open_checkpoint
from corolla.models.checks.selfcheck import check_family
from corolla.models.families import has_experts
from corolla.models.span import Span, load_span

WINDOW = 6  # of the tiny models
WINDOWED = {
    "mistral": (WINDOW,),
    "qwen2": (WINDOW, None),
    "gemma2": (WINDOW, None),
    "gemma3_text": (WINDOW, None),
    "gpt_oss": (WINDOW, None),
}
EXACT = 1e-4  # of the largest value; mistakes show in the first digits
each_family = pytest.mark.parametrize("family", WINDOWED)


@cache
def span_of(family: str, start: int = 0, end: int = 4, kinds: tuple[str, ...] = ()) -> Span:
    """Blocks of a tiny random model; `kinds` are all its layers' types, where they are not the usual ones."""
    changes: dict[str, Any] = {"layers": len(kinds), "layer_types": list(kinds)} if kinds else {}
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = open_checkpoint(str(write_tiny(family, Path(folder), **changes)))
        # Code of experts takes no float64; elsewhere it keeps the order of summation from showing.
        dtype = torch.float32 if has_experts(checkpoint.config) else torch.float64
        span = load_span(checkpoint, start, end, dtype=dtype, packable=check_family(checkpoint.config))
        return span


def noise(span: Span, tokens: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(tokens, span.hidden_size, generator=generator, dtype=span.dtype)


def alone(span: Span, sequence: Tensor) -> Tensor:
    """The family's own code and masks, without a cache."""
    with torch.inference_mode():
        return span.forward(sequence[None])[0]


class Rows:
    """Rows of one pool, and what each was given."""

    def __init__(self, span: Span, layout: PageLayout, *, pages: int = 200) -> None:
        self.span = span
        self.pool = FilledPool(pages, dtype=span.dtype, device=span.device, layout=layout)
        self.rows: list[CachedSequence] = []
        self.gathered = 0  # times that the pages of a table did not follow each other
        self.given: list[Tensor] = []

    def open(self, count: int = 1) -> None:
        self.rows += [CachedSequence(self.pool) for _ in range(count)]
        self.given += [noise(self.span, 0)] * count

    def step(self, counts: dict[int, int], seed: int) -> float:
        """The next tokens of some rows in one pass; how far they are from what the whole sequences give."""
        parts = {row: noise(self.span, count, seed + row) for row, count in counts.items()}
        own, lengths = [self.rows[row] for row in parts], list(counts.values())
        places = [
            torch.arange(row.length, row.length + count) for row, count in zip(own, lengths, strict=True)
        ]
        with torch.inference_mode():
            batch = PackedBatch(segments_of(lengths, own), self.pool)
            self.gathered += sum(part._first is None for one in batch.segments for part in one.parts)
            output = self.span.forward_packed(
                torch.cat(list(parts.values())),
                batch,
                positions=torch.cat(places),
            )
        furthest = 0.0
        for row, found in zip(parts, torch.split(output, lengths), strict=True):
            cached = self.rows[row]
            cached.trim()
            self.given[row] = torch.cat([self.given[row], parts[row]])
            wanted = alone(self.span, self.given[row])[-len(found) :]
            furthest = max(furthest, float((found - wanted).abs().max() / (1 + wanted.abs().max())))
        return furthest

    def fork(self, row: int) -> None:
        self.rows.append(self.rows[row].fork())
        self.given.append(self.given[row])

    def go_back(self, row: int, length: int) -> None:
        self.rows[row].truncate(length)
        self.given[row] = self.given[row][:length]

    @property
    def used(self) -> int:
        return self.pool.pages - self.pool.free


# --- which blocks lie together -----------------------------------------------------------------------------


@each_family
def test_windows_are_read_from_the_familys_own_code(family: str) -> None:
    layout = layout_of(span_of(family))
    assert layout.windows == WINDOWED[family]
    both = {0: (0, 0), 2: (0, 1), 1: (1, 0), 3: (1, 1)}
    assert layout.places == (both if None in layout.windows else {block: (0, block) for block in range(4)})


@pytest.mark.parametrize("family", ["llama", "bloom", "falcon", "qwen3", "mixtral"])
def test_blocks_without_windows_share_all_pages(family: str) -> None:
    assert layout_of(span_of(family)).plain


def test_a_span_of_one_kind_of_blocks_has_one_table() -> None:
    assert layout_of(span_of("gemma2", 0, 1)).windows == (WINDOW,)
    assert layout_of(span_of("gemma2", 1, 2)).plain


def test_a_page_is_as_deep_as_the_smallest_group() -> None:
    """Six blocks to one, as in gemma3: those with the window lie in tables of as many blocks as the others have."""
    kinds = (["sliding_attention"] * 5 + ["full_attention"]) * 2
    span = span_of("gemma3_text", 0, 12, kinds=tuple(kinds))
    layout = layout_of(span)
    assert sorted(layout.windows, key=str) == [WINDOW] * 5 + [None]
    assert layout.depth == 2
    assert len(set(layout.places.values())) == 12


def test_tables_do_not_grow_without_end() -> None:
    kinds = ["sliding_attention"] * 19 + ["full_attention"]
    layout = layout_of(span_of("gemma2", 0, 20, kinds=tuple(kinds)))
    assert layout.depth == 3
    assert layout.tables == 8 <= MOST_TABLES


def test_windows_that_change_on_the_way_are_not_trusted(monkeypatch: pytest.MonkeyPatch) -> None:
    attend = PackedBatch.attend

    def changing(self: PackedBatch, block: int, q: Tensor, k: Tensor, v: Tensor, rules: Rules) -> Tensor:
        wider = rules.window if q.shape[2] > 1 else 2 * WINDOW
        self.calls.add((block, (wider, k[0, :, 0].shape, v[0, :, 0].shape)))  # type: ignore[attr-defined]
        return attend(self, block, q, k, v, rules)

    monkeypatch.setattr(windows._WatchedBatch, "attend", changing)
    assert layout_of(span_of("mistral")).plain


def test_blocks_with_keys_of_other_shapes_share_no_store(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = {(0, (WINDOW, torch.Size([2, 8]), torch.Size([2, 8])))}
    monkeypatch.setattr(windows, "_calls", lambda _span: calls)
    assert layout_of(span_of("mistral")).windows == (WINDOW,)
    calls.add((1, (None, torch.Size([2, 16]), torch.Size([2, 16]))))
    assert layout_of(span_of("mistral")).plain


def test_a_span_without_attention_has_pages_of_the_plain_kind(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(windows, "_calls", lambda _span: set())
    assert layout_of(span_of("mistral")).plain


# --- exactness ---------------------------------------------------------------------------------------------


def prefill_and_decode(span: Span, layout: PageLayout) -> float:
    """One row in pieces longer and shorter than the window, then token by token over several pages."""
    rows = Rows(span, layout)
    rows.open()
    pieces = [1, 50, 3, WINDOW, 40, 17, *[1] * 40]
    return max(rows.step({0: count}, seed) for seed, count in enumerate(pieces))


def together(span: Span, layout: PageLayout) -> float:
    """Rows of other lengths in the same passes; pages that never follow each other."""
    rows = Rows(span, layout)
    rows.pool.release(rows.pool.take(rows.pool.pages)[::2])  # what is free lies apart
    rows.open(3)
    turns = [
        {0: 30, 1: 1, 2: 70},
        {0: 1, 1: 33, 2: 2},
        *[{0: 3, 1: 5, 2: 1}] * 12,
        {2: 90},
        *[{0: 1, 2: 1}] * 20,
    ]
    furthest = max(rows.step(counts, 10 * seed) for seed, counts in enumerate(turns))
    assert rows.gathered
    return furthest


def going_back(span: Span, layout: PageLayout) -> float:
    """As far as there is, from wherever a row stands, and on from there."""
    rows, furthest = Rows(span, layout), 0.0
    rows.open()
    for length in range(60, 80):
        rows.go_back(0, 0)
        rows.step({0: length}, length)
        back = min((at for at in range(1, length) if rows.rows[0].reaches(at)), default=length)
        assert length - back >= layout.margin
        rows.go_back(0, back)
        furthest = max(furthest, rows.step({0: 2}, length + 1))
    return furthest


def forks(span: Span, layout: PageLayout) -> float:
    """As beams do: copies that go on by themselves, and one that goes back first."""
    rows = Rows(span, layout)
    rows.open()
    rows.step({0: 84}, 1)  # its windows' table still holds more than a page
    rows.fork(0)
    rows.fork(0)
    rows.go_back(2, 84 - layout.margin)
    furthest = max(rows.step({0: 1, 1: 2, 2: 3}, 10 * seed) for seed in range(12))
    rows.fork(1)
    rows.rows[1].free()
    return max(furthest, *(rows.step({0: 1, 2: 1, 3: 1}, 500 + 10 * seed) for seed in range(12)))


CHECKS = (prefill_and_decode, together, going_back, forks)


@pytest.mark.parametrize(("family", "margin", "check"), covering(list(WINDOWED), [0, 9], CHECKS))
def test_what_is_kept_is_enough(family: str, margin: int, check: Callable[[Span, PageLayout], float]) -> None:
    span = span_of(family)
    layout = layout_of(span, margin)
    assert layout.windows == WINDOWED[family]
    assert check(span, layout) < EXACT


def test_a_view_uses_the_whole_spans_layout() -> None:
    span = span_of("gemma2")
    rows = Rows(span.view(1, 4), layout_of(span, 5))
    rows.open()
    assert max(rows.step({0: count}, count) for count in (30, 1, 25, 2, 40, 3)) < EXACT


@each_family
def test_memory_is_given_back(family: str) -> None:
    """Pages that a long row takes: its window's and the margin's; without windows, all."""
    span = span_of(family)
    layout, width = layout_of(span, 16), 64
    rows = Rows(span, layout)
    rows.open()
    for seed in range(6):
        rows.step({0: width}, seed)
    tokens = 6 * width
    windowed = -(-(16 + WINDOW - 1 + PAGE) // PAGE)
    assert layout.pages_at_rest(WINDOW) == windowed
    full = sum(window is None for window in layout.windows) * tokens // PAGE
    assert full < rows.used <= full + windowed
    rows.rows[0].free()
    assert rows.used == 0


def test_a_pool_that_is_full_in_the_middle_of_a_row_gives_back_what_the_row_took() -> None:
    """The first table has taken its pages, the second finds none; undone, the row is as it was."""
    span = span_of("gemma2")
    rows = Rows(span, layout_of(span, 0), pages=7)
    rows.open()
    assert rows.step({0: 30}, 1) < EXACT
    before, row = rows.used, rows.rows[0]
    with pytest.raises(MemoryError):
        PackedBatch(segments_of([50], [row]), rows.pool)
    row.truncate(30)
    assert (row.length, rows.used) == (30, before)
    assert rows.step({0: 20}, 2) < EXACT


# --- mistakes ----------------------------------------------------------------------------------------------


def one_token_too_few_kept(patch: Mistakes) -> None:
    kept = PageLayout.kept
    patch.setattr(PageLayout, "kept", lambda self, window: kept(self, window) - 1)


def a_page_freed_too_early(patch: Mistakes) -> None:
    trim = CachedSequence.trim

    def eager(self: CachedSequence) -> None:
        trim(self)
        for index, window in enumerate(self.pool.layout.windows):
            if window is not None and self.tables[index].length > PAGE:
                self.tables[index].drop(1)
                self.begins[index] += PAGE

    patch.setattr(CachedSequence, "trim", eager)


def a_rollback_too_far_allowed(patch: Mistakes) -> None:
    reaches = CachedSequence.reaches
    patch.setattr(CachedSequence, "reaches", lambda self, length: reaches(self, length + (length > 0)))


def window_of_the_wrong_blocks(patch: Mistakes) -> None:
    place = PageLayout.place

    def swapped(self: PageLayout, block: int, _window: int | None) -> tuple[int, int]:
        table, inside = place(self, block, 1)
        return (table + 1) % self.tables, inside

    patch.setattr(PageLayout, "place", swapped)


def window_off_by_one(patch: Mistakes) -> None:
    """Attention sees one token more than the family's own."""
    visible = TableSegment.visible

    def wider(self: TableSegment, window: int | None, device: torch.device) -> Tensor:
        return visible(self, None if window is None else window + 1, device)

    patch.setattr(TableSegment, "visible", wider)


def position_for_what_is_held(patch: Mistakes) -> None:
    """A table's first token is taken for the sequence's first."""
    prepare = Segment.prepare

    def whole(self: Segment, before: int = 0) -> None:
        prepare(self, before)
        for part in self.parts:
            part.past = self.past

    patch.setattr(Segment, "prepare", whole)


def a_fork_that_begins_later(patch: Mistakes) -> None:
    """A fork's tables are taken to begin a page later than they do."""
    fork = CachedSequence.fork

    def forgetful(self: CachedSequence) -> CachedSequence:
        twin = fork(self)
        twin.begins = [begin and begin + PAGE for begin in twin.begins]
        return twin

    patch.setattr(CachedSequence, "fork", forgetful)


CAUGHT_BY: dict[Plant, set[str]] = {
    no_mistake: set(),
    one_token_too_few_kept: {"prefill_and_decode", "together"},
    a_page_freed_too_early: {"prefill_and_decode", "together", "forks"},
    a_rollback_too_far_allowed: {"going_back"},
    window_of_the_wrong_blocks: {"prefill_and_decode"},
    window_off_by_one: {"prefill_and_decode", "together"},
    position_for_what_is_held: {"prefill_and_decode", "together"},
    a_fork_that_begins_later: {"forks"},
}


@pytest.mark.parametrize("plant", CAUGHT_BY, ids=lambda plant: plant.__name__)
def test_mutant(plant: Plant, mistakes: Mistakes) -> None:
    span = span_of("gemma2")
    layout = layout_of(span, 0)
    plant(mistakes)
    due = CAUGHT_BY[plant]
    tried = [check for check in CHECKS if check.__name__ in due or not due]
    failed = {check.__name__ for check in tried if not passes(partial(_is_exact, check, span, layout))}
    assert failed == due


def _is_exact(check: Callable[[Span, PageLayout], float], span: Span, layout: PageLayout) -> bool:
    return check(span, layout) < EXACT
