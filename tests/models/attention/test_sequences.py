"""Rows in several tables under random use, against plain lists of tokens: what may be read is there, no more is."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from corolla.models.attention.packing import Segment
from corolla.models.attention.pages import (
    PAGE,
    CachedSequence,
    PageLayout,
    PagePool,
    common_pages,
    pages_for,
)

PAGES = 60
WINDOWS = (None, 20, 5)
MARGIN = 9
# Five blocks; the first two lie together and keep everything, as the last table's only one has a page half empty.
LAYOUT = PageLayout(WINDOWS, {3: (0, 0), 4: (0, 1), 5: (1, 0), 6: (1, 1), 7: (2, 0)}, MARGIN)
AT_ONCE = 40
Tokens = list[int]


def new_pool(pages: int = PAGES, layout: PageLayout = LAYOUT) -> PagePool:
    return PagePool(pages, dtype=torch.float64, device=torch.device("cpu"), layout=layout)


def pass_of(rows: list[CachedSequence], tokens: Tokens, room: int = 0) -> int:
    """Have each row cache the tokens, as one pass does; gives the pages in use in its middle.

    A token's keys are its number, each block's its own, and its values their negatives.
    """
    pool = rows[0].pool
    segments = [Segment(0, len(tokens), row, room) for row in rows]
    for segment in segments:
        segment.prepare()
    numbers = torch.tensor(tokens, dtype=torch.float64)[:, None, None]
    for segment in segments:
        for block, (table, place) in pool.layout.places.items():
            slots = segment.parts[table].slots
            assert slots is not None
            like = numbers.view(1, 1, -1, 1)
            store = pool.store(place, like, like)
            store[0].index_copy_(0, slots, numbers + block / 8)
            store[1].index_copy_(0, slots, -numbers - block / 8)
    used = pool.pages - pool.free
    for row in rows:
        row.trim()
    return used


def read(row: CachedSequence, block: int) -> Tokens:
    """What the row's table of that block holds."""
    number, place = row.pool.layout.places[block]
    table, seen = row.tables[number], []
    for side, sign in zip(row.pool._stores[place], (1, -1), strict=True):
        seen.append((side.view(-1, PAGE)[table.pages].flatten()[: table.length] * sign - block / 8).tolist())
    assert seen[0] == seen[1]
    return [int(number) for number in seen[0]]


@dataclass(eq=False)
class Twin:
    """A row, what it should hold, and before which token each table may have let go."""

    row: CachedSequence
    tokens: Tokens
    gone: list[int] = field(default_factory=lambda: [0] * len(WINDOWS))
    longest: int = 0

    def passed(self) -> None:
        """Whole pages that no token can see, not even after a step back of the margin, are gone."""
        self.longest = max(self.longest, len(self.tokens))
        for table, window in enumerate(WINDOWS):
            if window is not None:
                seen = len(self.tokens) - MARGIN - (window - 1)
                self.gone[table] = max(self.gone[table], seen // PAGE * PAGE)

    def can_go_back_to(self, length: int) -> bool:
        """Whether the token at `length` would find all that it sees."""
        if length in (0, len(self.tokens)):
            return True
        return all(
            window is None or all(seen >= gone for seen in range(max(0, length - window + 1), length + 1))
            for window, gone in zip(WINDOWS, self.gone, strict=True)
        )


class LayeredMachine(RuleBasedStateMachine):
    """Rows come, grow, split, go back, change places and go."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = new_pool()
        self.rows: list[Twin] = []
        self.next = 1

    def teardown(self) -> None:
        for one in self.rows:
            one.row.free()
            one.row.free()  # safe to do twice
        assert self.pool.free == PAGES

    def _pick(self, data: st.DataObject) -> Twin:
        return data.draw(st.sampled_from(self.rows))

    @precondition(lambda self: len(self.rows) < 4)
    @rule()
    def open(self) -> None:
        row = CachedSequence(self.pool)
        self.rows.append(Twin(row, []))

    @precondition(lambda self: self.rows)
    @rule(data=st.data(), count=st.integers(1, AT_ONCE), more=st.integers(0, 30))
    def append(self, data: st.DataObject, count: int, more: int) -> None:
        one = self._pick(data)
        tokens = list(range(self.next, self.next + count))
        before = [self._listed(other) for other in self.rows]
        try:
            pass_of([one.row], tokens, len(one.tokens) + count + more)
        except MemoryError:  # some tables have grown; what the engine does then
            one.row.truncate(len(one.tokens))
            assert [self._listed(other)[0] for other in self.rows] == [length for length, _ in before]
            return
        self.next += count
        one.tokens += tokens
        one.passed()

    @staticmethod
    def _listed(one: Twin) -> tuple[int, int]:
        return one.row.length, sum(len(table.pages) for table in one.row.tables)

    @precondition(lambda self: self.rows and len(self.rows) < 4)
    @rule(data=st.data())
    def fork(self, data: st.DataObject) -> None:
        one, free = self._pick(data), self.pool.free
        self.rows.append(Twin(one.row.fork(), list(one.tokens), list(one.gone), one.longest))
        assert self.pool.free == free  # nothing is copied

    @precondition(lambda self: self.rows)
    @rule(data=st.data())
    def go_back(self, data: st.DataObject) -> None:
        """By up to the margin always, further if that is still there, and never to what is not whole."""
        one = self._pick(data)
        length = data.draw(st.integers(max(0, len(one.tokens) - 3 * MARGIN), len(one.tokens)))
        self._go_back(one, length)

    @precondition(lambda self: self.rows)
    @rule(data=st.data())
    def go_far_back(self, data: st.DataObject) -> None:
        one = self._pick(data)
        self._go_back(one, data.draw(st.integers(0, len(one.tokens))))

    def _go_back(self, one: Twin, length: int) -> None:
        assert one.row.reaches(length) == one.can_go_back_to(length)
        if not one.can_go_back_to(length):
            with pytest.raises(ValueError, match="was given back"):
                one.row.truncate(length)
            return
        one.row.truncate(length)
        del one.tokens[length:]
        if not length:
            one.gone, one.longest = [0] * len(WINDOWS), 0

    @precondition(lambda self: self.rows)
    @rule(data=st.data(), wide=st.integers(1, 4))
    def reorder(self, data: st.DataObject, wide: int) -> None:
        """As beam search does: each new row continues an old one, and the old ones go."""
        chosen = [self._pick(data) for _ in range(wide)]
        forks = [Twin(one.row.fork(), list(one.tokens), list(one.gone), one.longest) for one in chosen]
        for one in self.rows:
            one.row.free()
        self.rows = forks

    @precondition(lambda self: self.rows)
    @rule(data=st.data())
    def free(self, data: st.DataObject) -> None:
        one = self._pick(data)
        self.rows.remove(one)
        one.row.free()
        assert (one.row.length, one.row.begins) == (0, [0] * len(WINDOWS))

    @invariant()
    def tables_hold_what_may_be_read_and_no_more(self) -> None:
        for one in self.rows:
            assert one.row.length == len(one.tokens)
            assert one.row.begins == one.gone
            for block, (table, _) in LAYOUT.places.items():
                if one.tokens:
                    assert read(one.row, block) == one.tokens[one.gone[table] :]

    @invariant()
    def the_margin_is_always_there(self) -> None:
        """Counted from where the row was longest."""
        for one in self.rows:
            for length in range(max(0, one.longest - MARGIN), len(one.tokens)):
                assert one.row.reaches(length)

    @invariant()
    def every_page_is_held_by_the_tables_that_list_it(self) -> None:
        listed = [page for one in self.rows for table in one.row.tables for page in table.pages]
        assert self.pool._refcounts.tolist() == [listed.count(page) for page in range(PAGES)]

    @invariant()
    def a_table_with_a_window_is_short(self) -> None:
        for one in self.rows:
            for table, window in zip(one.row.tables, WINDOWS, strict=True):
                if window is not None:
                    assert table.length <= MARGIN + (window - 1) + PAGE - 1
                    assert len(table.pages) <= LAYOUT.pages_at_rest(window)


TestLayered = LayeredMachine.TestCase
TestLayered.settings = settings(max_examples=50, stateful_step_count=40)


def test_a_row_can_always_go_back_by_the_margin() -> None:
    """Whatever its length; and to where it cannot go back, some block would miss a token."""
    for window in (1, 2, 16, 17, 31):
        pool = new_pool(layout=PageLayout((window,), {0: (0, 0)}, MARGIN))
        row = CachedSequence(pool)
        for length in range(1, 120):
            pass_of([row], [length])
            reached = [back for back in range(1, length) if row.reaches(length - back)]
            assert reached == list(range(1, len(reached) + 1))
            assert len(reached) >= min(length - 1, MARGIN)
            (begin,) = row.begins
            assert read(row, 0) == list(range(begin + 1, length + 1))
            if begin:
                nearest = length - len(reached)
                assert nearest - (window - 1) - begin == 0  # one token further back and one is missing


@pytest.mark.parametrize("rows", [1, 2, 5])
@pytest.mark.parametrize("begun", [0, 1, 16, 50, 130])
@pytest.mark.parametrize("new", [1, 2, 17, 40, 150])
@pytest.mark.parametrize("together", [True, False], ids=["together", "one after the other"])
def test_no_more_pages_are_taken_than_are_reckoned(rows: int, begun: int, new: int, together: bool) -> None:
    """Rows that fork from one go on by `new` tokens, in passes of at most `AT_ONCE` tokens in all."""
    pool = new_pool(pages=400)
    first = CachedSequence(pool)
    for start in range(0, begun, AT_ONCE):
        pass_of([first], list(range(start, min(begun, start + AT_ONCE))))
    own = [first.fork() for _ in range(rows)]
    first.free()
    tokens = begun + new
    common = common_pages(own, begun)
    if begun >= 2 * PAGE and rows > 1:
        assert any(common)
    most = LAYOUT.most_pages(rows, tokens, new, AT_ONCE, common)
    width, used = AT_ONCE // rows if together else AT_ONCE, 0
    for group in [own] if together else [[row] for row in own]:
        for start in range(0, new, width):
            piece = list(range(begun + start, begun + min(new, start + width)))
            used = max(used, pass_of(group, piece, tokens))
    assert used <= most
    assert most <= sum(rows * pages_for(tokens) for _ in WINDOWS)
    longest = 3 * sum(map(LAYOUT.pages_at_rest, (20, 5))) + pages_for(tokens)
    assert rows > 1 or most <= longest + 2 * (1 + pages_for(AT_ONCE))


def test_what_a_very_long_row_needs_is_its_window() -> None:
    layout = PageLayout((4096,), {0: (0, 0)})
    most = layout.most_pages(1, 1_000_000, 200, 512, [0])
    assert (most - 2) * PAGE <= 4096 + 256 + 200 + 2 * PAGE
    assert layout.cached_of(1_000_000) == 4095 + 256
    two = PageLayout((None, 512), {0: (0, 0), 1: (1, 0)})
    assert two.most_pages(1, 160_000, 200, 512, [0, 0]) == 10_000 + layout_pages(512, 200)
    assert two.most_pages(1, 100, 100, 512, [0, 0]) == 2 * pages_for(100)


def layout_pages(window: int, new: int) -> int:
    """Of one row: its window and margin, a page's rest, and what comes."""
    return -(-(window - 1 + 256 + PAGE) // PAGE) + 1 + pages_for(new)


def test_a_plain_layout_has_one_table() -> None:
    pool = PagePool(4, dtype=torch.float64, device=torch.device("cpu"))
    row = CachedSequence(pool)
    assert pool.layout.place(7, 5) == (0, 7)
    (table,) = row.tables
    table.grow(20)
    assert common_pages([row, row.fork()], 20) == [1]


def test_a_block_that_looks_further_than_its_pages_last_is_refused() -> None:
    assert LAYOUT.place(5, 20) == (1, 0)
    assert LAYOUT.place(5, 19) == (1, 0)
    assert LAYOUT.place(4, 99) == LAYOUT.place(4, None) == (0, 1)
    for window in (21, None):
        with pytest.raises(RuntimeError, match="Block 5 looks"):
            LAYOUT.place(5, window)
