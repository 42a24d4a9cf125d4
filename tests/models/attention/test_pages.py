"""Pages under random rows, against plain lists of tokens: no content is lost or shared by mistake, no page leaks."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from corolla.models.attention.pages import PAGE, BlockTable, PagePool, pages_for, shared_pages

PAGES = 12
BLOCKS = (3, 4)  # as a span's blocks are counted
Tokens = list[int]


@dataclass(eq=False)
class Row:
    """A row and what it should hold."""

    cached: BlockTable
    tokens: Tokens


def new_pool(pages: int = PAGES) -> PagePool:
    return PagePool(pages, dtype=torch.float64, device=torch.device("cpu"))


def write(pool: PagePool, slots: torch.Tensor, tokens: Tokens) -> None:
    """A token's keys are its number and its values the number's negative; each block's are its own."""
    numbers = torch.tensor(tokens, dtype=torch.float64)[:, None, None]
    for block in BLOCKS:
        like = numbers.view(1, 1, -1, 1)
        store = pool.store(block, like, like)
        store[0].index_copy_(0, slots, numbers + block / 8)
        store[1].index_copy_(0, slots, -numbers - block / 8)


def read(row: BlockTable) -> Tokens:
    """What stands in the row's pages, which must be the same in all blocks."""
    seen = []
    for block in BLOCKS:
        for side, sign in zip(row.pool._stores.get(block, ()), (1, -1), strict=False):
            paged = side.view(-1, PAGE)[row.pages].flatten()[: row.length]
            seen.append(((paged * sign) - block / 8).tolist())
    if not row.length:
        return []
    assert all(one == seen[0] for one in seen)
    return [int(number) for number in seen[0]]


class PagesMachine(RuleBasedStateMachine):
    """Rows come, grow, split, go back, change places and go."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = new_pool()
        self.rows: list[Row] = []
        self.next = 1

    def teardown(self) -> None:
        for row in self.rows:
            row.cached.free()
            row.cached.free()  # safe to do twice
        assert self.pool.free == PAGES

    def _pick(self, data: st.DataObject) -> Row:
        return data.draw(st.sampled_from(self.rows))

    @precondition(lambda self: len(self.rows) < 6)
    @rule()
    def open(self) -> None:
        self.rows.append(Row(BlockTable(self.pool), []))

    @precondition(lambda self: self.rows)
    @rule(data=st.data(), count=st.integers(1, 2 * PAGE + 3), room=st.integers(0, 5 * PAGE))
    def append(self, data: st.DataObject, count: int, room: int) -> None:
        """As many as fit: whoever reserves before taking never asks for more."""
        row = self._pick(data)
        length = len(row.tokens)
        copied = length % PAGE > 0 and self.pool.shared(row.cached.pages[length // PAGE])
        missing = max(0, pages_for(max(length + count, room)) - len(row.cached.pages))
        before = self._counts()
        if pages_for(length + count) <= len(row.cached.pages):
            missing = 0
        if missing + copied > self.pool.free:
            with pytest.raises(MemoryError):
                row.cached.grow(count, room)
            assert len(row.tokens) == row.cached.length
            if not copied:
                assert self._counts() == before
            return
        tokens = list(range(self.next, self.next + count))
        self.next += count
        slots = row.cached.grow(count, room)
        assert len(slots) == count
        write(self.pool, slots, tokens)
        row.tokens += tokens

    @precondition(lambda self: self.rows and len(self.rows) < 6)
    @rule(data=st.data())
    def fork(self, data: st.DataObject) -> None:
        row, free = self._pick(data), self.pool.free
        self.rows.append(Row(row.cached.fork(), list(row.tokens)))
        assert self.pool.free == free  # nothing is copied

    @precondition(lambda self: self.rows)
    @rule(data=st.data())
    def truncate(self, data: st.DataObject) -> None:
        row = self._pick(data)
        length = data.draw(st.integers(0, len(row.tokens) + 1))
        row.cached.truncate(length)
        del row.tokens[length:]

    @precondition(lambda self: self.rows)
    @rule(data=st.data())
    def drop(self, data: st.DataObject) -> None:
        """Pages at the front, as a row does that keeps a window."""
        row = self._pick(data)
        count = data.draw(st.integers(0, len(row.tokens) // PAGE))
        row.cached.drop(count)
        del row.tokens[: count * PAGE]

    @precondition(lambda self: self.rows)
    @rule(data=st.data(), room=st.integers(0, 4 * PAGE))
    def bring_together(self, data: st.DataObject, room: int) -> None:
        self._pick(data).cached.bring_together(room)

    @precondition(lambda self: self.rows)
    @rule(data=st.data(), wide=st.integers(1, 6))
    def reorder(self, data: st.DataObject, wide: int) -> None:
        """As beam search does: each new row continues an old one, and the old ones go."""
        chosen = [self._pick(data) for _ in range(wide)]
        forks = [Row(row.cached.fork(), list(row.tokens)) for row in chosen]
        for row in self.rows:
            row.cached.free()
        self.rows = forks

    @precondition(lambda self: self.rows)
    @rule(data=st.data())
    def free(self, data: st.DataObject) -> None:
        row = self._pick(data)
        self.rows.remove(row)
        row.cached.free()
        assert (row.cached.length, row.cached.pages) == (0, [])

    @invariant()
    def rows_hold_what_was_written(self) -> None:
        for row in self.rows:
            assert row.cached.length == len(row.tokens)
            assert read(row.cached) == row.tokens

    def _counts(self) -> list[int]:
        return self.pool._refcounts.tolist()

    @invariant()
    def every_page_is_held_by_the_rows_that_list_it(self) -> None:
        listed = [page for row in self.rows for page in row.cached.pages]
        assert self._counts() == [listed.count(page) for page in range(PAGES)]
        assert self.pool.free == PAGES - len(set(listed))
        assert [self.pool.shared(page) for page in range(PAGES)] == [
            listed.count(page) > 1 for page in range(PAGES)
        ]
        for row in self.rows:
            assert len(row.cached.pages) == len(set(row.cached.pages)) >= pages_for(len(row.tokens))

    @invariant()
    def a_stretch_is_one(self) -> None:
        for row in self.rows:
            if row.tokens:
                used = row.cached.pages[: pages_for(len(row.tokens))]
                apart = used != list(range(used[0], used[0] + len(used)))
                assert row.cached.contiguous_from() == (None if apart else used[0])

    @invariant()
    def whole_pages_in_common_hold_the_same_tokens(self) -> None:
        if len(self.rows) < 2:
            return
        rows = [row.cached for row in self.rows]
        shortest = min(len(row.tokens) for row in self.rows)
        common = shared_pages(rows, shortest)
        assert 0 <= common <= shortest // PAGE
        for place in range(common):
            assert len({row.pages[place] for row in rows}) == 1
        if common < shortest // PAGE:
            assert len({row.pages[common] for row in rows}) > 1


TestPages = PagesMachine.TestCase
TestPages.settings = settings(max_examples=50, stateful_step_count=40)


def test_pages_that_follow_each_other_are_preferred() -> None:
    pool = new_pool()
    first, second = BlockTable(pool), BlockTable(pool)
    first.grow(PAGE)
    second.grow(1, room=3 * PAGE)
    assert len(second.pages) == 3  # all that the call may need, so that they lie together
    first.grow(4 * PAGE)
    assert first.contiguous_from() == 0  # what came later left room behind it
    first.grow(PAGE)
    assert first.contiguous_from() is None  # the page behind its own was taken
    assert second.contiguous_from() is not None
    second.free()
    third = BlockTable(pool)
    third.grow(4 * PAGE)
    assert third.contiguous_from() is not None


def test_a_sequence_in_pieces_is_brought_together_once() -> None:
    pool = new_pool()
    first, second = BlockTable(pool), BlockTable(pool)
    write(pool, first.grow(PAGE), list(range(PAGE)))
    second.grow(1)
    fork = first.fork()
    write(pool, fork.grow(1), [90])
    write(pool, first.grow(1), [80])
    assert fork.contiguous_from() is None or first.contiguous_from() is None
    for table, last in ((first, 80), (fork, 90)):
        table.bring_together(3 * PAGE)
        pages = list(table.pages)
        assert table.contiguous_from() == pages[0]
        assert len(pages) == 3
        assert read(table) == [*range(PAGE), last]
        table.bring_together(3 * PAGE)
        assert table.pages == pages
    assert not any(pool.shared(page) for page in first.pages + fork.pages)
    assert pool.free == PAGES - 7


def test_a_sequence_stays_in_pieces_where_there_is_no_other_place() -> None:
    pool = new_pool(pages=4)
    first, second = BlockTable(pool), BlockTable(pool)
    first.grow(PAGE)
    second.grow(1)
    write(pool, first.grow(2 * PAGE), list(range(2 * PAGE)))
    pages = list(first.pages)
    first.bring_together(3 * PAGE)
    assert first.pages == pages


def test_a_full_pool_says_so_and_gives_nothing_away() -> None:
    pool = new_pool(pages=3)
    row = BlockTable(pool)
    row.grow(2 * PAGE)
    with pytest.raises(MemoryError, match="2 pages were asked for and 1 are free"):
        row.grow(PAGE + 1)
    assert (row.length, pool.free) == (2 * PAGE, 1)
    row.grow(PAGE)
    assert pool.free == 0


def test_the_last_page_of_two_is_copied_once() -> None:
    """The first to write takes a copy; the other then holds the page alone and writes in place."""
    pool = new_pool(pages=3)
    one = BlockTable(pool)
    write(pool, one.grow(PAGE + 2), list(range(PAGE + 2)))
    other = one.fork()
    write(pool, one.grow(1), [100])
    assert pool.free == 0
    write(pool, other.grow(1), [200])
    assert read(one) == [*range(PAGE + 2), 100]
    assert read(other) == [*range(PAGE + 2), 200]
    assert one.pages[0] == other.pages[0]
