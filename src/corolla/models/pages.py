"""Keys and values of many sequences in pages of one store.

Invariant: a page is free, or every row that lists it counts as one of its holders; a row writes only into
pages that it alone holds (a page that others hold too is copied first). What a row has cached is never
changed by another. One thread at a time uses a pool: the compute thread.

Pages as in Kwon et al. 2023 (arXiv:2309.06180). A page holds `PAGE` tokens of one row for all blocks of a
span, so one table serves every block. Pages that follow each other are read in place, others are gathered.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

PAGE = 16  # tokens


def pages_for(tokens: int) -> int:
    """Pages that hold so many tokens of one row."""
    return -(-tokens // PAGE)


class PagePool:
    """`pages` pages for the blocks of a span. Memory is taken from the system as pages are first written."""

    def __init__(self, pages: int, *, dtype: torch.dtype, device: torch.device) -> None:
        self.pages = pages
        self._dtype = dtype
        self._device = device
        self._holders = np.zeros(pages, dtype=np.int32)
        self._stores: dict[int, tuple[Tensor, Tensor]] = {}
        self._search_from = 0

    @property
    def free(self) -> int:
        """Pages that no row holds."""
        return int(self.pages - np.count_nonzero(self._holders))

    def take(self, count: int, *, after: int | None = None) -> list[int]:
        """`count` pages with one holder each: those behind `after` if they are free, else one stretch, else any.

        Raises `MemoryError` when fewer are free; whoever reserves before taking never sees it.
        """
        first = self._stretch_after(after, count)
        if first is None:
            first = self._stretch(count)
        if first is not None:
            chosen = list(range(first, first + count))
        else:
            chosen = np.flatnonzero(self._holders == 0)[:count].tolist()
            if len(chosen) < count:
                raise MemoryError(f"{count} pages were asked for and {len(chosen)} are free.")
        self._holders[chosen] = 1
        self._search_from = chosen[-1] + 1 if chosen else self._search_from
        return chosen

    def _stretch_after(self, after: int | None, count: int) -> int | None:
        if after is None or after + 1 + count > self.pages:
            return None
        return None if self._holders[after + 1 : after + 1 + count].any() else after + 1

    def _stretch(self, count: int) -> int | None:
        """The first page of `count` free ones in a row; the search goes on where the last one ended."""
        for begin in (self._search_from, 0):
            taken = np.flatnonzero(self._holders[begin:] != 0) + begin
            edges = np.concatenate(([begin - 1], taken, [self.pages]))
            fits = np.flatnonzero(np.diff(edges) > count)
            if len(fits):
                return int(edges[fits[0]]) + 1
        return None

    def hold(self, pages: Sequence[int]) -> None:
        """One more holder for each page."""
        self._holders[list(pages)] += 1

    def release(self, pages: Sequence[int]) -> None:
        """One holder less for each page."""
        self._holders[list(pages)] -= 1

    def shared(self, page: int) -> bool:
        """Whether others hold the page too."""
        return bool(self._holders[page] > 1)

    def copy(self, source: int, target: int) -> None:
        """Give page `target` the content of `source`, in all blocks."""
        for store in self._stores.values():
            for side in store:
                side[target * PAGE : (target + 1) * PAGE] = side[source * PAGE : (source + 1) * PAGE]

    def store(self, block: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Where keys and values like these, [1, heads, N, D], of one block are kept: a pair [pages × PAGE, heads, D].

        Slot i is token i % PAGE of page i // PAGE.
        """
        if block not in self._stores:
            self._stores[block] = (self._new_store(keys), self._new_store(values))
        return self._stores[block]

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


class CachedRow:
    """The pages of one sequence, `length` tokens long."""

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
            self._own(self.length // PAGE)
        if len(self.pages) < pages_for(end):
            missing = pages_for(max(end, room)) - len(self.pages)
            self.pages += self.pool.take(missing, after=self.pages[-1] if self.pages else None)
        slots = self._slots(self.length, end)
        self.length = end
        return slots

    def _own(self, index: int) -> None:
        """Make sure that nobody else holds the page at `index`, since it will be written."""
        page = self.pages[index]
        if self.pool.shared(page):
            (own,) = self.pool.take(1)
            self.pool.copy(page, own)
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

    def fork(self) -> CachedRow:
        """Another row with the same tokens, on the same pages."""
        twin = CachedRow(self.pool)
        twin.pages = self.pages[: pages_for(self.length)]
        twin.length = self.length
        self.pool.hold(twin.pages)
        return twin

    def free(self) -> None:
        """Give all pages back; safe to call twice."""
        self.pool.release(self.pages)
        self.pages = []
        self.length = 0

    def stretch(self) -> int | None:
        """The first page, if the row's tokens lie on pages that follow each other."""
        used = self.pages[: pages_for(self.length)]
        first = used[0]
        return (
            first if used[-1] - first == len(used) - 1 and used == list(range(first, used[-1] + 1)) else None
        )


def shared_pages(rows: Sequence[CachedRow], length: int) -> int:
    """How many whole pages, of those within the first `length` tokens, all rows have in common."""
    limit = min([length // PAGE, *(len(row.pages) for row in rows)])
    first = rows[0].pages
    for index in range(limit):
        if any(row.pages[index] != first[index] for row in rows[1:]):
            return index
    return limit
