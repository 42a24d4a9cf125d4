"""Tokens of many sequences in one pass: `[1, N, H]` without padding, attention per sequence.

Invariant: a sequence's tokens see themselves, what the same sequence has cached, and nothing else; its
outputs do not depend on the company. Everything but attention treats the N packed tokens alike, so the
family's own code runs over them unchanged; attention reaches `attend` as `registry.py` says.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from corolla.models.attention.pages import PAGE, BlockTable, CachedSequence, PagePool, pages_for
from corolla.models.kernels.native import library, pointer

QUERY_TOKENS = 1024  # of one sequence, whose attention is computed at once

LANES = 16  # heads are a multiple of this wide where a kernel reads them
THREADED = 2**13  # weights (tokens times heads) from which threads are worth their waking


@dataclass(frozen=True)
class Rules:
    """How one block's scores become weights, beyond the plain softmax(scale · q·k)."""

    scale: float | None = None
    window: int | None = None  # a token sees this many newest ones, itself included
    softcap: float | None = None
    sinks: Tensor | None = None  # [heads], a score of each head that takes weight and gives nothing
    slopes: Tensor | None = None  # [heads], alibi


@dataclass
class Stretch:
    """New tokens of one sequence as blocks that share pages see them, behind the `past` ones of their table."""

    begin: int
    count: int
    table: BlockTable | None = None
    past: int = 0
    slots: Tensor | None = None
    _pages: Tensor | None = None  # where its pages do not follow each other
    _first: int | None = None
    _masks: dict[int | None, Tensor] = field(default_factory=dict)

    @property
    def end(self) -> int:
        """The packed token behind the last one."""
        return self.begin + self.count

    def grow(self, table: BlockTable, room: int) -> Stretch:
        """Take slots for the new tokens in that table."""
        self.table, self.past = table, table.length
        self.slots = table.grow(self.count, room)
        self._first = table.stretch()
        if self._first is None:
            self._pages = torch.tensor(table.pages[: pages_for(table.length)])
        return self

    def cached(self, turned: Tensor) -> Tensor:
        """All tokens of the table, past and new, [1, heads, past + count, D], of a block's [1, heads, slots, D]."""
        total = self.past + self.count
        if self._first is not None:
            return turned.narrow(2, self._first * PAGE, total)
        assert self._pages is not None
        store = turned[0].transpose(0, 1)
        paged = store.view(-1, PAGE, *store.shape[1:])
        found = paged.index_select(0, self._pages.to(store.device)).flatten(0, 1)[:total]
        return found.transpose(0, 1).unsqueeze(0)

    def visible(self, window: int | None, device: torch.device) -> Tensor:
        """bool [count, past + count]: which cached token each new one sees."""
        if window not in self._masks:
            total = self.past + self.count
            seen = torch.ones(self.count, total, dtype=torch.bool, device=device).tril_(self.past)
            if window is not None:
                seen = seen.triu_(self.past - window + 1)
            self._masks[window] = seen
        return self._masks[window]


@dataclass
class Segment:
    """`count` new tokens of one sequence, from packed token `begin` on; `sequence` holds what came before."""

    begin: int
    count: int
    sequence: CachedSequence | None = None
    room: int = 0  # tokens that the sequence may reach in the present call
    past: int = 0
    prepared: bool = False
    parts: list[Stretch] = field(default_factory=list)  # one for each of the sequence's tables

    @property
    def end(self) -> int:
        """The packed token behind the last one."""
        return self.begin + self.count

    def prepare(self) -> None:
        """Take slots for the new tokens; once, before the first block."""
        if self.sequence is None:
            self.parts = [Stretch(self.begin, self.count)]
            return
        self.past, self.prepared = self.sequence.length, True
        self.parts = [
            Stretch(self.begin, self.count).grow(table, room)
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

    def __init__(self, parts: Sequence[Stretch]) -> None:
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

    def __init__(self, segments: Sequence[Segment], pool: PagePool | None = None) -> None:
        """`pool` is where the sequences are cached; without one, nothing is."""
        self.segments = list(segments)
        self.pool = pool
        for segment in self.segments:
            segment.prepare()
        by_table = zip(*(segment.parts for segment in self.segments), strict=True)
        self._tables = [_Table(parts) for parts in by_table]
        # Of blocks whose attention keeps latents: where they lie, once this pass's are there.
        self._latents: dict[int, tuple[_Table, tuple[Tensor, Tensor]]] = {}

    @property
    def one_each(self) -> bool:
        """Whether this is generation and nothing else: each sequence has one new token, and is cached."""
        return self.pool is not None and all(one.count == 1 for one in self.segments)

    def rows(self, table: int) -> OneTokenRows:
        """The sequences with one new token, as one of the pool's tables has them."""
        return self._tables[table].rows()

    def keep(self, block: int, latent: Tensor, rotary: Tensor) -> None:
        """Cache the new tokens' latents [1, 1, N, L] and rotary parts [1, 1, N, E], which `attend_latents` reads."""
        assert self.pool is not None
        index, place = self.pool.layout.place(block, None)
        table, cache = self._tables[index], self.pool.store(place, latent, rotary)
        _write(table, cache, (latent, rotary))
        self._latents[block] = table, cache

    def held(self, block: int) -> list[tuple[Stretch, Tensor, Tensor]]:
        """Each sequence's new tokens, with all latents [1, 1, S, L] and rotary parts that `keep` has cached of it."""
        if block not in self._latents:
            return []
        table, cache = self._latents[block]
        latents, rotary = (side.transpose(0, 1).unsqueeze(0) for side in cache)
        return [(one, one.cached(latents), one.cached(rotary)) for one in table.parts]

    def attend(self, block: int, query: Tensor, key: Tensor, value: Tensor, rules: Rules) -> Tensor:
        """Attention of `query` [1, heads, N, D] over `key` and `value` [1, kv_heads, N, D]: [1, N, heads, D]."""
        if self.pool is None:
            return side_by_side([_attend_new(one, query, key, value, rules) for one in self._tables[0].parts])
        index, place = self.pool.layout.place(block, rules.window)
        table, cache = self._tables[index], self.pool.store(place, key, value)
        as_wide = cache[0].shape[-1] == cache[1].shape[-1]  # keys and values, for the kernel
        together = bool(table.ones) and as_wide and can_attend(query, cache[0])
        if together and len(table.ones) == len(table.parts):
            return table.rows().attend(query, cache, rules, (key, value))
        _write(table, cache, (key, value))
        if together:
            return _attend_mixed(table, query, cache, rules)
        return side_by_side([_attend_cached(one, query, cache, rules) for one in table.parts])


def _write(table: _Table, cache: tuple[Tensor, Tensor], new: tuple[Tensor, Tensor]) -> None:
    """Put the new tokens' [1, heads, N, D] where the table has slots for them."""
    assert table.slots is not None
    slots = table.slots.to(new[0].device)
    for side, one in zip(cache, new, strict=True):
        side.index_copy_(0, slots, one[0].transpose(0, 1))


def side_by_side(parts: list[Tensor]) -> Tensor:
    """[1, heads, T, D] each, in order, to [1, N, heads, D]."""
    turned = [part.transpose(1, 2) for part in parts]
    return turned[0].contiguous() if len(turned) == 1 else torch.cat(turned, dim=1)


def _attend_new(one: Stretch, query: Tensor, key: Tensor, value: Tensor, rules: Rules) -> Tensor:
    """A stretch over its own new tokens."""
    query, key, value = (tensor.narrow(2, one.begin, one.count) for tensor in (query, key, value))
    return attend_one(query, key, value, one, rules)


def _attend_cached(one: Stretch, query: Tensor, cache: tuple[Tensor, Tensor], rules: Rules) -> Tensor:
    """A stretch over what its table holds, its new tokens included."""
    keys, values = (one.cached(side.transpose(0, 1).unsqueeze(0)) for side in cache)
    return attend_one(query.narrow(2, one.begin, one.count), keys, values, one, rules)


def _attend_mixed(table: _Table, query: Tensor, cache: tuple[Tensor, Tensor], rules: Rules) -> Tensor:
    """Sequences with one new token beside others that have more."""
    result = query.new_empty(1, query.shape[2], query.shape[1], query.shape[3])
    places = torch.tensor([one.begin for one in table.ones])
    result[:, places] = table.rows().attend(query[:, :, places], cache, rules, None)
    for one in table.parts:
        if one.count > 1:
            result[:, one.begin : one.end] = _attend_cached(one, query, cache, rules).transpose(1, 2)
    return result


def attend_one(query: Tensor, keys: Tensor, values: Tensor, one: Stretch, rules: Rules) -> Tensor:
    """One sequence's attention: `query` [1, heads, T, D] at the end of `keys` [1, kv_heads, S, D]."""
    if one.count > QUERY_TOKENS:
        return _attend_in_pieces(query, keys, values, one, rules)
    window, total = rules.window, int(keys.shape[2])
    if window is not None and total <= window:
        window = None
    if any(one is not None for one in (rules.softcap, rules.sinks, rules.slopes)):  # not in the fused kernel
        return _attend_plainly(query, keys, values, one, rules, window)
    grouped = query.shape[1] != keys.shape[1]
    if one.count == 1:  # sees everything, or the newest of it
        if window is not None:
            keys, values = keys[:, :, -window:], values[:, :, -window:]
        return scaled_dot_product_attention(query, keys, values, scale=rules.scale, enable_gqa=grouped)
    if one.past == 0 and window is None:
        return scaled_dot_product_attention(
            query, keys, values, is_causal=True, scale=rules.scale, enable_gqa=grouped
        )
    mask = one.visible(window, query.device)
    return scaled_dot_product_attention(
        query, keys, values, attn_mask=mask, scale=rules.scale, enable_gqa=grouped
    )


def _attend_in_pieces(query: Tensor, keys: Tensor, values: Tensor, one: Stretch, rules: Rules) -> Tensor:
    """A long sequence, some new tokens after the other: no operator takes long, and scores that are written out are
    fewer at a time."""
    parts = []
    for begin in range(0, one.count, QUERY_TOKENS):
        end = min(begin + QUERY_TOKENS, one.count)
        seen = one.past + end
        piece = Stretch(0, end - begin, past=one.past + begin)
        parts.append(attend_one(query[:, :, begin:end], keys[:, :, :seen], values[:, :, :seen], piece, rules))
    return torch.cat(parts, dim=2)


def _attend_plainly(
    query: Tensor, keys: Tensor, values: Tensor, one: Stretch, rules: Rules, window: int | None
) -> Tensor:
    """With the scores written out; softmax in float32 at least, as the families' own eager code does."""
    groups = query.shape[1] // keys.shape[1]
    if groups > 1:
        keys, values = keys.repeat_interleave(groups, dim=1), values.repeat_interleave(groups, dim=1)
    scale = query.shape[-1] ** -0.5 if rules.scale is None else rules.scale
    scores = torch.matmul(query, keys.transpose(2, 3)) * scale
    if rules.slopes is not None:
        places = torch.arange(keys.shape[2], device=scores.device)
        scores = scores + (rules.slopes[:, None, None] * places).to(scores.dtype)
    if rules.softcap is not None:
        scores = rules.softcap * torch.tanh(scores / rules.softcap)
    scores = scores.masked_fill(~one.visible(window, scores.device), torch.finfo(scores.dtype).min)
    if rules.sinks is not None:
        sinks = rules.sinks.to(scores.dtype).view(1, -1, 1, 1).expand(*scores.shape[:3], 1)
        scores = torch.cat([scores, sinks], dim=-1)
    wide = torch.promote_types(scores.dtype, torch.float32)
    weights = scores.softmax(dim=-1, dtype=wide).to(values.dtype)
    return torch.matmul(weights[..., : keys.shape[2]], values)


# --- sequences with one new token each, in one call of a kernel -----------------------------------------------


class OneTokenRows:
    """Rows that have been given one token each, as the kernel reads them; prepared once for all blocks of a pass."""

    def __init__(self, rows: Sequence[BlockTable]) -> None:
        """`rows` already count their new token."""
        used = [pages_for(row.length) for row in rows]
        self._most = max(used)
        table = [
            row.pages[:count] + [0] * (self._most - count) for row, count in zip(rows, used, strict=True)
        ]
        self._pages = torch.tensor(table, dtype=torch.int32)
        self._lengths = torch.tensor([row.length for row in rows])
        self._count = len(rows)
        self._total = sum(row.length for row in rows)
        # Scores of one head, with space behind the longest row's.
        self.room = -(-max(row.length for row in rows) // LANES) * LANES

    def described(self) -> tuple[int | None, ...]:
        """Pages and lengths, pages of a row in the table, a head's room and the sum: see `run_program`."""
        return (pointer(self._pages), pointer(self._lengths), self._most, self.room, self._total)

    def attend(
        self, query: Tensor, cache: tuple[Tensor, Tensor], rules: Rules, new: tuple[Tensor, Tensor] | None
    ) -> Tensor:
        """[1, R, heads, D] for `query` [1, heads, R, D] over a block's `cache`, two of [slots, kv_heads, D].

        `new` are the tokens' keys and values [1, kv_heads, R, D] if they have yet to be put into the cache.
        """
        heads, dim, kv_heads = query.shape[1], query.shape[3], cache[0].shape[1]
        threads = torch.get_num_threads() if self._total * heads >= THREADED else 1
        scores = torch.empty(threads, heads // kv_heads, self.room)
        result = torch.empty(1, self._count, heads, dim)
        tokens = [_strided(one) for one in (query, *(new or ()))]
        numbers, sinks, slopes = kernel_rules(rules, dim)
        kernels = library()
        assert kernels is not None  # `can_attend` asked
        kernels.attend_rows(
            *(argument for one in tokens for argument in (pointer(one), one.stride(1), one.stride(2))),
            *(() if new else (None, 0, 0) * 2),
            *(pointer(one) for one in (*cache, self._pages, self._lengths)),
            *(self._count, heads, kv_heads, dim, PAGE, self._most),
            *(*numbers, pointer(sinks), pointer(slopes)),
            *(pointer(scores), self.room, pointer(result), threads),
        )
        return result


def kernel_rules(rules: Rules, dim: int) -> tuple[tuple[float, float, int], Tensor | None, Tensor | None]:
    """Rules for heads `dim` wide as the kernels take them: scale, softcap and window, 0 for none; sinks and slopes."""
    scale = dim**-0.5 if rules.scale is None else rules.scale
    return (scale, rules.softcap or 0.0, rules.window or 0), _plain(rules.sinks), _plain(rules.slopes)


def can_attend(query: Tensor, cache: Tensor) -> bool:
    """Whether the kernel computes attention of this kind here."""
    return (
        query.dtype == cache.dtype == torch.float32
        and query.device.type == "cpu"
        and query.shape[-1] % LANES == 0
        and library() is not None
    )


def _strided(tokens: Tensor) -> Tensor:
    return tokens if tokens.stride(3) == 1 else tokens.contiguous()


def _plain(values: Tensor | None) -> Tensor | None:
    return None if values is None else values.detach().float().contiguous()
