"""Keys and values of many sequences in pages of one store.

Invariant: a page's reference count is the number of block tables that list it, 0 for a free one; a sequence writes
only into pages that nobody else lists (others are copied first: copy-on-write). What a sequence has cached is never
changed by another. One thread at a time uses a pool: the compute thread.

Pages as in Kwon et al. 2023 (arXiv:2309.06180). A page holds `PAGE` tokens of one sequence for all blocks of a
span, so one table serves every block; where some blocks see a window only, for those of one of several tables
(`PageLayout`). Each of those holds the sequence's tokens from `begins` on, with all that any later token may see
unless the sequence goes back by more than the layout's margin; what lies behind that is given back, by whole pages.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

PAGE = 16  # tokens
MARGIN = 256  # tokens that a sequence can go back by although it keeps only a window


def pages_for(tokens: int) -> int:
    """Pages that hold so many tokens of one sequence."""
    return -(-tokens // PAGE)


@dataclass(frozen=True)
class PageLayout:
    """Which blocks of a span share a page. A sequence has a table of pages for each set of blocks that do.

    Blocks of one table see equally far back. All tables take their pages from one pool, so none has room that
    another lacks. What a table with a window keeps is what its next tokens may see when the sequence first goes back
    by up to `margin` tokens.
    """

    windows: tuple[int | None, ...] = (None,)  # of each table's blocks; None where they see everything
    places: Mapping[int, tuple[int, int]] = field(default_factory=dict)  # of a block: table, place in a page
    margin: int = MARGIN

    @property
    def plain(self) -> bool:
        """Whether one table serves every block, and keeps everything."""
        return self.windows == (None,)

    @property
    def tables(self) -> int:
        """Tables of a sequence, each with pages of its own."""
        return len(self.windows)

    @property
    def depth(self) -> int | None:
        """Blocks that a page has room for; None for all of the span's."""
        return max(place for _, place in self.places.values()) + 1 if self.places else None

    def place(self, block: int, window: int | None) -> tuple[int, int]:
        """The block's table and its place there, for attention that sees `window` tokens.

        Raises `RuntimeError` when that is more than the table keeps.
        """
        if self.plain:
            return 0, block
        table, place = self.places[block]
        kept = self.windows[table]
        if kept is not None and (window is None or window > kept):
            raise RuntimeError(f"Block {block} looks {window} tokens back, where {kept} are kept.")
        return table, place

    def kept(self, window: int) -> int:
        """Tokens at a sequence's end that a table with this window keeps, at least."""
        return window - 1 + self.margin

    def cached_of(self, tokens: int) -> int:
        """Of a sequence of so many tokens, at least so many are cached, on the average of its tables."""
        each = [tokens if window is None else min(tokens, self.kept(window)) for window in self.windows]
        return sum(each) // self.tables

    def pages_at_rest(self, window: int) -> int:
        """Pages that such a table takes at most between two passes, the next token's included."""
        return pages_for(self.kept(window) + PAGE)

    def most_pages(self, sequences: int, tokens: int, new: int, at_once: int, common: Sequence[int]) -> int:
        """Distinct pages that `sequences` sequences take at most on their way to `tokens` tokens each.

        `new` tokens a sequence are still to come, all sequences together `at_once` in one pass. `common` says of each
        table before which page, counted from a sequence's beginning, all sequences list the same ones.
        """
        total, whole = 0, pages_for(tokens)
        for window, shared in zip(self.windows, common, strict=True):
            most = shared + sequences * (whole - shared)
            if window is not None:
                stays = max(0, shared - max(0, tokens - self.kept(window)) // PAGE)
                passing = sequences + pages_for(min(at_once, sequences * new)) if new > 1 else 0
                most = min(most, stays + sequences * (self.pages_at_rest(window) - stays) + passing)
            total += most
        return total


class PagePool:
    """`pages` pages for the blocks of a span. Memory is taken from the system as pages are first written."""

    def __init__(
        self, pages: int, *, dtype: torch.dtype, device: torch.device, layout: PageLayout | None = None
    ) -> None:
        """`layout` is for a span whose blocks do not share all pages."""
        self.pages = pages
        self.layout = layout or PageLayout()
        self._dtype = dtype
        self._device = device
        self._refcounts = np.zeros(pages, dtype=np.int32)
        self._stores: dict[int, tuple[Tensor, Tensor]] = {}  # by place in a page

    @property
    def free(self) -> int:
        """Pages that no sequence lists."""
        return int(self.pages - np.count_nonzero(self._refcounts))

    def take(self, count: int, *, after: int | None = None) -> list[int]:
        """`count` pages with one reference each: those behind `after` if they are free, else one run, else any.

        Raises `MemoryError` when fewer are free; whoever reserves before taking never sees it.
        """
        first = self._run_after(after, count)
        if first is None:
            first = self._run(count)
        if first is not None:
            chosen = list(range(first, first + count))
        else:
            chosen = np.flatnonzero(self._refcounts == 0)[:count].tolist()
            if len(chosen) < count:
                raise MemoryError(f"{count} pages were asked for and {len(chosen)} are free.")
        self._refcounts[chosen] = 1
        return chosen

    def _run_after(self, after: int | None, count: int) -> int | None:
        if after is None or after + 1 + count > self.pages:
            return None
        return None if self._refcounts[after + 1 : after + 1 + count].any() else after + 1

    def _run(self, count: int) -> int | None:
        """The first page of `count` free ones in a row, in the middle of the most that there are: so the sequence
        before them has room to grow on behind itself, and so have they."""
        edges = np.concatenate(([-1], np.flatnonzero(self._refcounts), [self.pages]))
        gaps = np.diff(edges) - 1
        longest = int(gaps.argmax())
        spare = int(gaps[longest]) - count
        if spare < 0:
            return None
        before = int(edges[longest]) + 1
        return before + spare // 2 if before else 0  # nobody is before the first page

    def take_together(self, count: int) -> list[int] | None:
        """As `take`, but only pages that follow each other; None where there are none."""
        return None if self._run(count) is None else self.take(count)

    def follows(self, page: int, count: int) -> bool:
        """Whether the `count` pages behind a page are free."""
        return count <= 0 or self._run_after(page, count) is not None

    def retain(self, pages: Sequence[int]) -> None:
        """One more reference to each page."""
        self._refcounts[list(pages)] += 1

    def release(self, pages: Sequence[int]) -> None:
        """One reference less to each page."""
        self._refcounts[list(pages)] -= 1

    def shared(self, page: int) -> bool:
        """Whether more than one block table lists the page."""
        return bool(self._refcounts[page] > 1)

    def copy(self, sources: Sequence[int], targets: Sequence[int]) -> None:
        """Give the pages `targets` the content of `sources`, in all blocks."""
        old, new = (torch.tensor(list(pages), device=self._device) for pages in (sources, targets))
        for store in self._stores.values():
            for side in store:
                pages = side.view(-1, PAGE, *side.shape[1:])
                pages.index_copy_(0, new, pages.index_select(0, old))

    def store(self, place: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Where keys and values like these, [1, heads, N, D], of one block are kept: a pair [pages × PAGE, heads, D].

        `place` is the block's in a page. Slot i is token i % PAGE of page i // PAGE.
        """
        if place not in self._stores:
            self._stores[place] = (self._new_store(keys), self._new_store(values))
        return self._stores[place]

    def kept(self, place: int) -> tuple[Tensor, Tensor]:
        """What the block at that place has kept, as `store` gives it."""
        return self._stores[place]

    def _new_store(self, like: Tensor) -> Tensor:
        # An ordinary tensor, so that it can be written both in and outside of inference mode.
        with torch.inference_mode(False):
            return torch.empty(
                self.pages * PAGE,
                like.shape[1],
                like.shape[3],
                dtype=self._dtype,
                device=self._device,
                requires_grad=False,
            )


class BlockTable:
    """Where tokens of one sequence that follow each other lie, `length` of them, for blocks that share pages."""

    def __init__(self, pool: PagePool) -> None:
        self.pool = pool
        self.pages: list[int] = []
        self.length = 0

    def grow(self, count: int, room: int = 0) -> Tensor:
        """Slots int64 [count] for the next `count` tokens, which count as cached from now on.

        Where pages are missing, enough for `room` tokens are taken at once, so that they lie together.
        """
        end = self.length + count
        if self.length % PAGE:
            self._copy_on_write(self.length // PAGE)
        if len(self.pages) < pages_for(end):
            missing = pages_for(max(end, room)) - len(self.pages)
            self.pages += self.pool.take(missing, after=self.pages[-1] if self.pages else None)
        slots = self._slots(self.length, end)
        self.length = end
        return slots

    def bring_together(self, room: int) -> None:
        """Lie on pages of its own that follow each other up to `room` tokens, if it does not and there are such.

        That is as dear as reading all of it once where it lies apart.
        """
        missing = pages_for(room) - len(self.pages)
        if not self.length or (
            self.contiguous_from() is not None and self.pool.follows(self.pages[-1], missing)
        ):
            return
        pages = self.pool.take_together(len(self.pages) + max(0, missing))
        if pages is not None:
            used = pages_for(self.length)
            self.pool.copy(self.pages[:used], pages[:used])
            self.pool.release(self.pages)
            self.pages = pages

    def _copy_on_write(self, index: int) -> None:
        """Make sure that nobody else lists the page at `index`, since it will be written."""
        page = self.pages[index]
        if self.pool.shared(page):
            (own,) = self.pool.take(1)
            self.pool.copy([page], [own])
            self.pool.release([page])
            self.pages[index] = own

    def _slots(self, begin: int, end: int) -> Tensor:
        if end - begin == 1:
            return torch.tensor([self.pages[begin // PAGE] * PAGE + begin % PAGE])
        tokens = torch.arange(begin, end)
        pages = torch.tensor(self.pages[begin // PAGE : pages_for(end)])
        return pages[tokens // PAGE - begin // PAGE] * PAGE + tokens % PAGE

    def truncate(self, length: int) -> None:
        """Keep the first `length` tokens."""
        if length < self.length:
            kept = pages_for(length)
            self.pool.release(self.pages[kept:])
            del self.pages[kept:]
            self.length = length

    def drop(self, count: int) -> None:
        """Give the first `count` pages back, all of them full; the tokens behind them are counted anew from 0."""
        self.pool.release(self.pages[:count])
        del self.pages[:count]
        self.length -= count * PAGE

    def fork(self) -> BlockTable:
        """Another sequence with the same tokens, on the same pages."""
        twin = BlockTable(self.pool)
        twin.pages = self.pages[: pages_for(self.length)]
        twin.length = self.length
        self.pool.retain(twin.pages)
        return twin

    def free(self) -> None:
        """Give all pages back; safe to call twice."""
        self.pool.release(self.pages)
        self.pages = []
        self.length = 0

    def contiguous_from(self) -> int | None:
        """The first page, if the sequence's tokens lie on pages that follow each other."""
        used = self.pages[: pages_for(self.length)]
        first = used[0]
        return (
            first if used[-1] - first == len(used) - 1 and used == list(range(first, used[-1] + 1)) else None
        )


class CachedSequence:
    """One sequence, `length` tokens long: its pages, in the tables of its pool's layout."""

    def __init__(self, pool: PagePool) -> None:
        self.pool = pool
        self.tables = [BlockTable(pool) for _ in pool.layout.windows]
        self.begins = [0] * len(self.tables)  # each table's first token, on a page's border
        self.length = 0

    def with_rooms(self, room: int) -> Iterator[tuple[BlockTable, int]]:
        """Each table, and the room to give to its `grow` where the sequence may reach `room` tokens."""
        for table, begin, window in zip(self.tables, self.begins, self.pool.layout.windows, strict=True):
            own = room - begin
            if window is not None:
                own = min(own, self.pool.layout.pages_at_rest(window) * PAGE)
            yield table, own

    def bring_together(self, room: int) -> None:
        """See `BlockTable`. For a sequence whose pages were reserved as if nobody shared them."""
        for table, own in self.with_rooms(room):
            table.bring_together(own)

    def trim(self) -> None:
        """Give back what nothing can see that comes after the present tokens, or after the margin's."""
        layout = self.pool.layout
        for index, window in enumerate(layout.windows):
            if window is not None:
                count = (self.length - layout.kept(window) - self.begins[index]) // PAGE
                if count > 0:
                    self.tables[index].drop(count)
                    self.begins[index] += count * PAGE

    def reaches(self, length: int) -> bool:
        """Whether the sequence can go on from its first `length` tokens."""
        if not 0 < length < self.length:
            return True
        return all(
            window is None or begin <= max(0, length - window + 1)
            for begin, window in zip(self.begins, self.pool.layout.windows, strict=True)
        )

    def truncate(self, length: int) -> None:
        """Keep the first `length` tokens. Raises `ValueError` where `reaches` says no."""
        if not self.reaches(length):
            raise ValueError(f"What comes before token {length} of {self.length} was given back.")
        if not length:
            return self.free()
        for table, begin in zip(self.tables, self.begins, strict=True):
            table.truncate(length - begin)
        self.length = min(self.length, length)

    def fork(self) -> CachedSequence:
        """Another sequence with the same tokens, on the same pages."""
        twin = CachedSequence(self.pool)
        twin.tables = [table.fork() for table in self.tables]
        twin.begins = list(self.begins)
        twin.length = self.length
        return twin

    def free(self) -> None:
        """Give all pages back; safe to call twice."""
        for table in self.tables:
            table.free()
        self.begins = [0] * len(self.tables)
        self.length = 0


def common_pages(sequences: Sequence[CachedSequence], length: int) -> list[int]:
    """For each table: before which page, within the first `length` tokens, all sequences list the same ones."""
    found = []
    for index, begin in enumerate(sequences[0].begins):
        tables = [sequence.tables[index] for sequence in sequences]
        alike = all(sequence.begins[index] == begin for sequence in sequences)
        found.append(begin // PAGE + shared_pages(tables, length - begin) if alike and length > begin else 0)
    return found


def shared_pages(tables: Sequence[BlockTable], length: int) -> int:
    """How many whole pages, of those within the first `length` tokens, all tables list alike."""
    limit = min([length // PAGE, *(len(table.pages) for table in tables)])
    first = tables[0].pages
    for index in range(limit):
        if any(table.pages[index] != first[index] for table in tables[1:]):
            return index
    return limit
