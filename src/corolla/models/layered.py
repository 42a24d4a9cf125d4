"""Sequences of a span some of whose blocks see only a window of tokens.

Invariant: each table of a sequence holds the sequence's tokens from `begins` on, with all that any later token may see
unless the sequence goes back by more than the layout's margin; `reaches` tells whether it can. What lies behind
that is given back, whole pages at a time. A table is a `BlockTable` of what is left: it counts from there.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TypeAlias

from corolla.models.attention.pages import PAGE, BlockTable, PagePool, shared_pages


class LayeredBlockTable:
    """The pages of one sequence, `length` tokens long, in the tables of its pool's layout."""

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

    def fork(self) -> LayeredBlockTable:
        """Another sequence with the same tokens, on the same pages."""
        twin = LayeredBlockTable(self.pool)
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


AnyBlockTable: TypeAlias = BlockTable | LayeredBlockTable


def new_block_table(pool: PagePool) -> AnyBlockTable:
    """Of an empty sequence, as the pool's layout has them."""
    return BlockTable(pool) if pool.layout.plain else LayeredBlockTable(pool)


def common_pages(sequences: Sequence[AnyBlockTable], length: int) -> list[int]:
    """For each table: before which page, within the first `length` tokens, all sequences list the same ones."""
    plain = [sequence for sequence in sequences if isinstance(sequence, BlockTable)]
    if plain:
        return [shared_pages(plain, length)]
    layered = [sequence for sequence in sequences if isinstance(sequence, LayeredBlockTable)]
    found = []
    for index, begin in enumerate(layered[0].begins):
        tables = [sequence.tables[index] for sequence in layered]
        alike = all(sequence.begins[index] == begin for sequence in layered)
        found.append(begin // PAGE + shared_pages(tables, length - begin) if alike and length > begin else 0)
    return found
