"""A prefix's way into the pages of a pool, and a sequence's way out of them again.

Invariant: pages that a prefix was put into hold what `PackedBatch.attend` would have kept of those tokens; what is
read of a sequence is what a prefix put in its place would hold. Run on the compute thread, as whatever touches pages.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from corolla.models.attention.pages import PAGE, CachedSequence, PageLayout, PagePool, pages_for


@dataclass(frozen=True)
class KeyValueForm:
    """What a token's keys and values in one block's cache look like."""

    heads: int
    key_dim: int
    value_dim: int
    expanded: int = 0  # numbers that attention makes of it at once, where it does not read it as it is

    @staticmethod
    def of(keys: Tensor, values: Tensor) -> KeyValueForm:
        """That of keys [R, heads, T, key_dim] and values [R, heads, T, value_dim]."""
        return KeyValueForm(int(keys.shape[1]), int(keys.shape[3]), int(values.shape[3]))

    @property
    def width(self) -> int:
        """D, the numbers that a prefix has for a position of a block."""
        return self.heads * (self.key_dim + self.value_dim)

    def split(self, prefix: Tensor) -> tuple[Tensor, Tensor]:
        """One block's prefix [P, D] as a cache has it: keys and values [1, heads, P, dim]."""
        width, shape = self.heads * self.key_dim, (1, len(prefix), self.heads, -1)
        keys, values = prefix[:, :width].reshape(shape), prefix[:, width:].reshape(shape)
        return keys.transpose(1, 2), values.transpose(1, 2)


def as_prefix(keys: Tensor, values: Tensor) -> Tensor:
    """A block's keys and values [heads, P, dim] as a prefix of it, fp32 [P, D]."""
    return torch.cat([one.transpose(0, 1).flatten(1).float() for one in (keys, values)], dim=1)


def put(prefix: Mapping[int, Tensor], form: KeyValueForm, pool: PagePool) -> CachedSequence:
    """A sequence of P tokens of which each block holds what `prefix` [P, D] says of it."""
    row = CachedSequence(pool)
    length = len(next(iter(prefix.values())))
    slots = [table.grow(length, room) for table, room in row.with_rooms(length)]
    row.length = length
    for block, own in prefix.items():
        table, place = _place(pool.layout, block)
        new = form.split(own)
        for side, tokens in zip(pool.store(place, *new), new, strict=True):
            side.index_copy_(0, slots[table].to(side.device), tokens[0].transpose(0, 1).to(side))
    return row


def take(row: CachedSequence, blocks: range, first: int, last: int, form: KeyValueForm) -> Tensor:
    """What blocks hold of tokens [first, last) of a sequence, fp32 [blocks, last - first, D] on the CPU.

    Zero where a window has passed over them: nobody who comes after the sequence's last token sees them.
    """
    found = torch.zeros(len(blocks), last - first, form.width, dtype=torch.float32)
    for index, block in enumerate(blocks):
        table, place = _place(row.pool.layout, block)
        begin = max(first, row.begins[table])
        if begin >= last:
            continue
        pages = torch.tensor(row.tables[table].pages[: pages_for(last - row.begins[table])])
        slots = (pages[:, None] * PAGE + torch.arange(PAGE)).flatten()
        slots = slots[begin - row.begins[table] : last - row.begins[table]]
        kept = row.pool.kept(place)
        keys, values = (side.index_select(0, slots.to(side.device)).transpose(0, 1) for side in kept)
        found[index, begin - first :] = as_prefix(keys, values)
    return found


def _place(layout: PageLayout, block: int) -> tuple[int, int]:
    """The table and the place in a page of what a block keeps, however far back it looks."""
    return (0, block) if layout.plain else layout.places[block]
