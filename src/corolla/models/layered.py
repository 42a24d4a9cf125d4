"""Rows of a span some of whose blocks see only a window of tokens.

Invariant: each table of a row holds the row's tokens from `begins` on, with all that any later token may see
unless the row goes back by more than the layout's margin; `reaches` tells whether it can. What lies behind
that is given back, whole pages at a time. A table is a `CachedRow` of what is left: it counts from there.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TypeAlias

from corolla.models.attention.pages import PAGE, CachedRow, PagePool, shared_pages


class LayeredRow:
    """The pages of one sequence, `length` tokens long, in the tables of its pool's layout."""

    def __init__(self, pool: PagePool) -> None:
        self.pool = pool
        self.tables = [CachedRow(pool) for _ in pool.layout.windows]
        self.begins = [0] * len(self.tables)  # each table's first token, on a page's border
        self.length = 0

    def with_rooms(self, room: int) -> Iterator[tuple[CachedRow, int]]:
        """Each table, and the room to give to its `grow` where the row may reach `room` tokens."""
        for table, begin, window in zip(self.tables, self.begins, self.pool.layout.windows, strict=True):
            own = room - begin
            if window is not None:
                own = min(own, self.pool.layout.pages_at_rest(window) * PAGE)
            yield table, own

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
        """Whether the row can go on from its first `length` tokens."""
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

    def fork(self) -> LayeredRow:
        """Another row with the same tokens, on the same pages."""
        twin = LayeredRow(self.pool)
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


Row: TypeAlias = CachedRow | LayeredRow


def new_row(pool: PagePool) -> Row:
    """An empty row, as the pool's layout has them."""
    return CachedRow(pool) if pool.layout.plain else LayeredRow(pool)


def common_pages(rows: Sequence[Row], length: int) -> list[int]:
    """For each table: before which page, within the first `length` tokens, all rows list the same ones."""
    plain = [row for row in rows if isinstance(row, CachedRow)]
    if plain:
        return [shared_pages(plain, length)]
    layered = [row for row in rows if isinstance(row, LayeredRow)]
    found = []
    for index, begin in enumerate(layered[0].begins):
        tables = [row.tables[index] for row in layered]
        alike = all(row.begins[index] == begin for row in layered)
        found.append(begin // PAGE + shared_pages(tables, length - begin) if alike and length > begin else 0)
    return found
