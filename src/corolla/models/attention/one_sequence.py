"""Attention of one sequence's new tokens over all that they see.

Invariant: what is computed in pieces is what one piece would give, to rounding: queries are taken some after the
other, each piece with the keys that any of its queries sees and no others.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn.functional import pad, scaled_dot_product_attention

from corolla.models.attention.one_token_rows import Rules
from corolla.models.attention.pages import PAGE, BlockTable, pages_for

# Queries whose attention is computed at once. torch's fused kernel for CPUs computes all scores of 512 keys, seen or
# not, and with a mask all that there are. Given few queries at a time it is spared most of them; but each piece costs
# a gradient of all keys, which is felt where these are many (`python -m benchmarks.attention`).
QUERY_TOKENS = 1024
CPU_TOKENS = 256
FEW_KEYS, FEW_KEYS_TOKENS = 1024, 64


@dataclass
class TableSegment:
    """New tokens of one sequence as blocks that share pages see them, behind the `past` ones of their table."""

    begin: int
    count: int
    table: BlockTable | None = None
    past: int = 0
    slots: Tensor | None = None
    _pages: Tensor | None = None  # int32, of all its tokens
    _first: int | None = None
    _masks: dict[int | None, Tensor] = field(default_factory=dict)
    _pieces: dict[tuple[int, int | None], list[Piece]] = field(default_factory=dict)

    @property
    def end(self) -> int:
        """The packed token behind the last one."""
        return self.begin + self.count

    def grow(self, table: BlockTable, room: int) -> TableSegment:
        """Take slots for the new tokens in that table."""
        self.table, self.past = table, table.length
        self.slots = table.grow(self.count, room)
        self._first = table.contiguous_from()
        return self

    @property
    def pages(self) -> Tensor:
        """Where all its tokens lie, int32."""
        if self._pages is None:
            assert self.table is not None
            self._pages = torch.tensor(
                self.table.pages[: pages_for(self.past + self.count)], dtype=torch.int32
            )
        return self._pages

    def cached(self, turned: Tensor) -> Tensor:
        """All tokens of the table, past and new, [1, heads, past + count, D], of a block's [1, heads, slots, D]."""
        total = self.past + self.count
        if self._first is not None:
            return turned.narrow(2, self._first * PAGE, total)
        store = turned[0].transpose(0, 1)
        paged = store.view(-1, PAGE, *store.shape[1:])
        found = paged.index_select(0, self.pages.to(store.device)).flatten(0, 1)[:total]
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

    def pieces(self, most: int, window: int | None) -> list[Piece]:
        """The new tokens, at most so many at a time, with the keys that each piece sees."""
        if (most, window) not in self._pieces:
            self._pieces[most, window] = list(self._cut(most, window))
        return self._pieces[most, window]

    def _cut(self, most: int, window: int | None) -> Iterator[Piece]:
        for begin in range(0, self.count, most):
            end = min(begin + most, self.count)
            first = 0 if window is None else max(0, self.past + begin - window + 1)
            piece = TableSegment(0, end - begin, past=self.past + begin - first)
            yield Piece(piece, slice(begin, end), slice(first, self.past + end))


@dataclass(frozen=True)
class Piece:
    """Some of a segment's new tokens, and the keys that any of them sees."""

    segment: TableSegment
    queries: slice
    keys: slice


def attend_one(query: Tensor, keys: Tensor, values: Tensor, one: TableSegment, rules: Rules) -> Tensor:
    """One sequence's attention: `query` [1, heads, T, D] at the end of `keys` [1, kv_heads, S, D]."""
    on_cpu, window = query.device.type == "cpu", rules.window
    if window is not None and keys.shape[2] <= window:
        window = None
    known = torch_knows(rules)
    if known and on_cpu and one.count > 1 and (more := query.shape[-1] - values.shape[-1]) > 0:
        # torch's fused kernel for CPUs takes heads of one width only.
        return attend_one(query, keys, pad(values, (0, more)), one, rules)[..., :-more]
    most = _queries_at_once(int(keys.shape[2]), window) if on_cpu else QUERY_TOKENS
    if one.count > most:
        parts = [
            attend_one(query[:, :, of.queries], keys[:, :, of.keys], values[:, :, of.keys], of.segment, rules)
            for of in one.pieces(most, window)
        ]
        return torch.cat(parts, dim=2)
    if not known:
        return _attend_plainly(query, keys, values, one, rules, window)
    return _attend_fused(query, keys, values, one, rules, window)


def _queries_at_once(keys: int, window: int | None) -> int:
    """On a CPU."""
    return FEW_KEYS_TOKENS if min(keys, window or keys) <= FEW_KEYS else CPU_TOKENS


def torch_knows(rules: Rules) -> bool:
    """Whether torch's own attention, in one call, does all that they say."""
    return rules.softcap is None and rules.sinks is None and rules.slopes is None


def _attend_fused(
    query: Tensor, keys: Tensor, values: Tensor, one: TableSegment, rules: Rules, window: int | None
) -> Tensor:
    """In one call of torch's own attention."""
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


def _attend_plainly(
    query: Tensor, keys: Tensor, values: Tensor, one: TableSegment, rules: Rules, window: int | None
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
