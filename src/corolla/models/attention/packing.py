"""Tokens of many sequences in one pass: `[1, N, H]` without padding, attention per sequence.

Invariant: a sequence's tokens see themselves, what the same sequence has cached, and nothing else; its
outputs do not depend on the others. Everything but attention treats the N packed tokens alike, so the
family's own code runs over them unchanged; attention reaches `attend` through transformers'
registry of attention functions, by the name `PACKED`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from corolla.errors import UsageError
from corolla.models.attention.latent import absorbed
from corolla.models.attention.one_sequence import TableSegment, attend_one, torch_knows
from corolla.models.attention.one_token_rows import OneTokenRows, Rules, attend_stretch, can_attend
from corolla.models.attention.pages import CachedSequence, PagePool, pages_for
from corolla.models.attention.prefixes import KeyValueForm

# No mask function belongs to this name, so the family's code builds no masks: each sequence has its own here.
PACKED = "corolla_packed"
FEWEST_ROWS = 16  # queries that share keys, from which our kernel for several tokens is quicker than torch's
AT_ONCE = 256  # tokens that it is given in training, where others are let in between


@dataclass
class Segment:
    """`count` new tokens of one sequence, from packed token `begin` on; `sequence` holds what came before."""

    begin: int
    count: int
    sequence: CachedSequence | None = None
    room: int = 0  # tokens that the sequence may reach in the present call
    past: int = 0
    prepared: bool = False
    parts: list[TableSegment] = field(default_factory=list)  # one for each of the sequence's tables

    @property
    def end(self) -> int:
        """The packed token behind the last one."""
        return self.begin + self.count

    def prepare(self, before: int = 0) -> None:
        """Take slots for the new tokens; once, before the first block. A prefix is `before` what is not cached."""
        if self.sequence is None:
            self.parts = [TableSegment(self.begin, self.count, past=before)]
            return
        self.past, self.prepared = self.sequence.length, True
        self.parts = [
            TableSegment(self.begin, self.count).grow(table, room)
            for table, room in self.sequence.with_rooms(self.room)
        ]
        self.sequence.length = self.past + self.count


def segments_of(lengths: Sequence[int], sequences: Sequence[CachedSequence] | None = None) -> list[Segment]:
    """Segments of these lengths, one behind the other."""
    segments, begin = [], 0
    for index, length in enumerate(lengths):
        segments.append(Segment(begin, length, None if sequences is None else sequences[index]))
        begin += length
    return segments


class _Table:
    """The new tokens as the blocks of one of the pool's tables see them."""

    def __init__(self, parts: Sequence[TableSegment]) -> None:
        self.parts = list(parts)
        slots = [one.slots for one in self.parts if one.slots is not None]
        self.slots = torch.cat(slots) if slots else None
        # Generation: sequences with one new token each, which one kernel takes together.
        self.ones = [one for one in self.parts if one.count == 1]
        self._rows: OneTokenRows | None = None

    def rows(self) -> OneTokenRows:
        """The sequences of `ones`."""
        if self._rows is None:
            self._rows = OneTokenRows([one.table for one in self.ones if one.table is not None])
        return self._rows


class PackedBatch:
    """The segments of one pass, in the order of their tokens."""

    def __init__(
        self,
        segments: Sequence[Segment],
        pool: PagePool | None = None,
        prefix: Mapping[int, Tensor] | None = None,
    ) -> None:
        """`pool` is where the sequences are cached; without one, nothing is, and `prefix` [P, D] may say of each
        block what stands before every sequence."""
        self.segments = list(segments)
        self.pool = pool
        self._prefix = prefix
        for segment in self.segments:
            segment.prepare(0 if prefix is None else len(next(iter(prefix.values()))))
        by_table = zip(*(segment.parts for segment in self.segments), strict=True)
        self._tables = [_Table(parts) for parts in by_table]
        # Of blocks whose attention keeps latents: where they lie, once this pass's are there.
        self._latents: dict[int, tuple[_Table, tuple[Tensor, Tensor]]] = {}

    @property
    def one_each(self) -> bool:
        """Whether this is generation and nothing else: each sequence has one new token, and is cached."""
        return self.pool is not None and all(one.count == 1 for one in self.segments)

    @property
    def goes_on(self) -> bool:
        """Whether sequences see more than the pass's tokens, before or after it."""
        return self.pool is not None or self._prefix is not None

    def rows(self, table: int) -> OneTokenRows:
        """The sequences with one new token, as one of the pool's tables has them."""
        return self._tables[table].rows()

    def keep(self, block: int, latent: Tensor, rotary: Tensor) -> None:
        """Cache the new tokens' latents [1, 1, N, L] and rotary parts [1, 1, N, E], which `held` gives."""
        if self.pool is None:
            self._latents[block] = self._tables[0], (latent, rotary)
            return
        index, place = self.pool.layout.place(block, None)
        table, cache = self._tables[index], self.pool.store(place, latent, rotary)
        _write(table, cache, (latent, rotary))
        self._latents[block] = table, cache

    def has_latents(self, block: int) -> bool:
        """Whether `keep` was given any in this pass."""
        return block in self._latents

    def held(self, block: int) -> list[tuple[TableSegment, Tensor, Tensor]]:
        """Each sequence's new tokens, with all its latents [1, 1, S, L] and rotary parts."""
        table, (latents, rotary) = self._latents[block]
        if self.pool is not None:
            latents, rotary = (side.transpose(0, 1).unsqueeze(0) for side in (latents, rotary))
            return [(one, one.cached(latents), one.cached(rotary)) for one in table.parts]
        sides = _by_segment(table.parts, latents, rotary)
        both = [(one, new, turned) for one, (new, turned) in zip(table.parts, sides, strict=True)]
        if self._prefix is None:
            return both
        first, second = KeyValueForm.of(latents, rotary).split(self._prefix[block].to(latents.dtype))
        return [
            (one, torch.cat([first, new], 2), torch.cat([second, turned], 2)) for one, new, turned in both
        ]

    def attend(self, block: int, query: Tensor, key: Tensor, value: Tensor, rules: Rules) -> Tensor:
        """Attention of `query` [1, heads, N, D] over `key` and `value` [1, kv_heads, N, D]: [1, N, heads, D]."""
        if self.pool is None:
            return self._attend_new(block, query, key, value, rules)
        index, place = self.pool.layout.place(block, rules.window)
        table, cache = self._tables[index], self.pool.store(place, key, value)
        if not table.ones or not can_attend(query, cache):
            _write(table, cache, (key, value))
            return side_by_side([_attend_cached(one, query, cache, rules) for one in table.parts])
        if len(table.ones) == len(table.parts):
            return table.rows().attend(query, cache, rules, (key, value))
        _write(table, cache, (key, value))
        return _attend_mixed(
            table,
            query,
            lambda own: table.rows().attend(own, cache, rules, None),
            lambda one: _attend_cached(one, query, cache, rules),
        )

    def attend_latents(
        self, attention: Any, query: Tensor, new: tuple[Tensor, Tensor], rules: Rules
    ) -> Tensor:
        """The same over the latents that `keep` was given; of the new ones the family's code has made `new`."""
        block = int(attention.layer_idx)
        table, (latents, rotary) = self._latents[block]
        rules = replace(rules, scale=query.shape[-1] ** -0.5 if rules.scale is None else rules.scale)

        def ones(own: Tensor) -> Tensor:
            short = absorbed(attention, latents, rotary)
            found = table.rows().attend(short.queries(own), (latents, latents), rules, None, rotary)
            return short.outputs(found.transpose(1, 2)).transpose(1, 2)

        together = bool(self.pool and table.ones) and can_attend(query, (latents, rotary))
        if together and len(table.ones) == len(table.parts):
            return ones(query)
        held = self.held(block)
        sides = _by_segment(table.parts, query, *new)

        def alone(at: int) -> Tensor:
            one, own, turned = held[at]
            if one.past == 0:  # all that there is to see is new
                mine, keys, values = sides[at]
                return attend_one(mine, keys, values, one, rules)
            return attend_latents(attention, sides[at][0], rules, one, own, turned)

        if not together:
            return side_by_side([alone(at) for at in range(len(held))])
        return _attend_mixed(table, query, ones, lambda one: alone(table.parts.index(one)))

    def _attend_new(self, block: int, query: Tensor, key: Tensor, value: Tensor, rules: Rules) -> Tensor:
        """Every sequence over its own new tokens, and over the prefix."""
        before = None
        if self._prefix is not None:
            before = KeyValueForm.of(key, value).split(self._prefix[block].to(key.dtype))
        parts, found = self._tables[0].parts, []
        for one, (own, keys, values) in zip(parts, _by_segment(parts, query, key, value), strict=True):
            if before is not None:
                keys, values = torch.cat([before[0], keys], 2), torch.cat([before[1], values], 2)
            found.append(_attend_new(own, keys, values, one, rules))
        return side_by_side(found)


_batch: ContextVar[PackedBatch | None] = ContextVar("corolla_packed_batch", default=None)


@contextmanager
def packed(batch: PackedBatch) -> Iterator[None]:
    """Attention inside works on `batch`."""
    token = _batch.set(batch)
    try:
        yield
    finally:
        _batch.reset(token)


def current_batch() -> PackedBatch | None:
    """The batch whose pass is running, if one is."""
    return _batch.get()


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    _attention_mask: Tensor | None = None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **_others: Any,
) -> tuple[Tensor, None]:
    """An attention function as transformers' registry takes them; see `PackedBatch.attend`."""
    batch = current_batch()
    if batch is None:
        raise UsageError("The blocks of a packed span were called without a packed batch.")
    rules = Rules(scaling, sliding_window, softcap, s_aux)
    block: Any = module.layer_idx
    if batch.has_latents(block):
        return batch.attend_latents(module, query, (key, value), rules), None
    return batch.attend(block, query, key, value, rules), None


def attend_latents(
    attention: Any, query: Tensor, rules: Rules, one: TableSegment, latents: Tensor, rotary: Tensor
) -> Tensor:
    """A segment's `query` over latents [1, 1, S, L] and rotary parts; in the form that is fewer products."""
    short = absorbed(attention, latents, rotary)
    if not short.pays(one.count, int(latents.shape[2])):
        keys, values = attention.expand_kv(latents, rotary)
        return attend_one(query, keys, values, one, rules)
    rules = replace(rules, scale=query.shape[-1] ** -0.5 if rules.scale is None else rules.scale)
    both = torch.cat([latents, rotary], -1)
    return short.outputs(attend_one(short.queries(query), both, latents, one, rules))


def _write(table: _Table, cache: tuple[Tensor, Tensor], new: tuple[Tensor, Tensor]) -> None:
    """Put the new tokens' [1, heads, N, D] where the table has slots for them."""
    assert table.slots is not None
    slots = table.slots.to(new[0].device)
    for side, one in zip(cache, new, strict=True):
        side.index_copy_(0, slots, one[0].transpose(0, 1))


def _by_segment(parts: Sequence[TableSegment], *packed: Tensor) -> list[tuple[Tensor, ...]]:
    """What each segment has of packed [1, heads, N, D]; all at once, so that a gradient is put together once."""
    counts = [one.count for one in parts]
    return list(zip(*(torch.split(side, counts, dim=2) for side in packed), strict=True))


def side_by_side(parts: list[Tensor]) -> Tensor:
    """[1, heads, T, D] each, in order, to [1, N, heads, D]."""
    turned = [part.transpose(1, 2) for part in parts]
    return turned[0].contiguous() if len(turned) == 1 else torch.cat(turned, dim=1)


def _attend_cached(one: TableSegment, query: Tensor, cache: tuple[Tensor, Tensor], rules: Rules) -> Tensor:
    """A segment over what its table holds, its new tokens included."""
    own = query.narrow(2, one.begin, one.count)
    if _is_stretch(one, query, cache, rules):
        return attend_stretch(own, cache, one.pages, one.past, rules).transpose(1, 2)
    keys, values = (one.cached(side.transpose(0, 1).unsqueeze(0)) for side in cache)
    return attend_one(own, keys, values, one, rules)


def _attend_new(query: Tensor, keys: Tensor, values: Tensor, one: TableSegment, rules: Rules) -> Tensor:
    """The same over keys and values [1, kv_heads, S, D] that nobody caches: a bundle has the bits of a session."""
    turned = keys[0].transpose(0, 1), values[0].transpose(0, 1)
    if torch.is_grad_enabled() or not _is_stretch(one, query, turned, rules):
        return attend_one(query, keys, values, one, rules)
    cache = turned[0].contiguous(), turned[1].contiguous()
    pages, found = torch.arange(pages_for(int(keys.shape[2])), dtype=torch.int32), []
    for begin in range(0, one.count, AT_ONCE):
        some = query[:, :, begin : begin + AT_ONCE]
        found.append(attend_stretch(some, cache, pages, one.past + begin, rules))
    return torch.cat(found, 1).transpose(1, 2)


def _is_stretch(one: TableSegment, query: Tensor, cache: tuple[Tensor, Tensor], rules: Rules) -> bool:
    """Whether several tokens' attention over a cache [slots, kv_heads, D] is left to our kernel."""
    sharing = one.count * query.shape[1] // cache[0].shape[1]
    quick = one.count > 1 and (sharing >= FEWEST_ROWS or not torch_knows(rules))
    return quick and can_attend(query, cache)


def _attend_mixed(
    table: _Table,
    query: Tensor,
    together: Callable[[Tensor], Tensor],
    alone: Callable[[TableSegment], Tensor],
) -> Tensor:
    """Sequences with one new token, `together`, beside others that have more; see `PackedBatch.attend`."""
    places = torch.tensor([one.begin for one in table.ones])
    found = together(query[:, :, places])
    result = found.new_empty(1, query.shape[2], *found.shape[2:])
    result[:, places] = found
    for one in table.parts:
        if one.count > 1:
            result[:, one.begin : one.end] = alone(one).transpose(1, 2)
    return result


ALL_ATTENTION_FUNCTIONS.register(PACKED, packed_attention)
