"""A session's attention cache over the blocks of a span.

Invariant: it holds exactly the tokens of the steps that were answered, or it is gone. What a step says is
checked on the event loop; rows and pages are touched by the compute thread alone, so what ends a session
on the loop is handed over to it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from corolla.models.attention.pages import PAGE, CachedSequence, PageLayout, PagePool, common_pages, pages_for
from corolla.models.attention.prefixes import put, take
from corolla.models.attention.snapshots import SNAPSHOTS
from corolla.models.attention.span_cache import SpanCache
from corolla.models.lora import Adapter
from corolla.models.span import Span
from corolla.server.scheduler.execution import PASS_TOKENS, Request
from corolla.server.sessions.kv_cache import IDLE_SECONDS, CacheBudget
from corolla.wire.messages import Origin

SNAPSHOT_SHARE = 8  # a session whose snapshots would need more than this part of all room has none

Post = Callable[[Callable[[], None]], None]


@dataclass
class Client:
    """Who asks, on one stream."""

    peer: str
    session: Session | None = None  # that is open on the stream


class Session:
    """What a server keeps of one session. Made by `OpenSession`, filled by steps (`server/sessions/step.py`)."""

    def __init__(
        self,
        span: Span,
        budget: CacheBudget,
        pool: PagePool,
        post: Post,
        *,
        prompts: Tensor | None,
        prefix: Tensor | None = None,
        lora: Tensor | None = None,
        targets: Tensor | None = None,
        held: int = 0,
        peer: str = "",
        name: str | None = None,
    ) -> None:
        """`peer` is whose session it is, who may call it `name`; `prompts` are the deep prompts [blocks, P, H] of
        these blocks, `prefix` [blocks, P, D] is what stands before every row, `lora` [blocks, R, F] the adapter of
        the layers `targets`, `held` the bytes of these that nobody else answers for; `post` hands work to the
        compute thread."""
        self.span = span
        self.peer = peer
        self.name = name
        self.prompts = prompts
        self.prefix = prefix
        self.lora, self.targets, self.adapter = lora, targets, None
        if lora is not None and targets is not None:
            self.adapter = Adapter.of(lora, targets, span.device, span.dtype)
            self.lora = self.adapter.values  # kept once, as it is computed with
        self._held_pages = -(-held * pool.layout.tables // (bytes_per_token(span) * PAGE))
        self.before = 0 if prefix is None else int(prefix.shape[1])  # positions that come before column 0
        self.pool = pool
        self.rows = 0  # sequences
        self.length = 0  # columns: tokens a row, padding included
        self.mask: Tensor | None = None  # bool [rows, length], None while all tokens are real
        self.pages = 0
        self.last_used = 0.0
        self.evicted = False
        self.users = 0  # requests that work on it now
        self.steps = 0  # that were begun
        self.step: Request | None = None  # that is being taken
        self.closed = False
        self.epoch = 0  # see `wire.messages.Origin`
        self.block_tables: list[CachedSequence] = []  # of a family that can be packed
        self._prefix_pages: CachedSequence | None = None  # the prefix, from which its rows begin
        self.plain: SpanCache = span.new_cache()  # of one that cannot
        self._budget = budget
        self._post = post

    @property
    def idle_after(self) -> float | None:
        """See `kv_cache.Holder`."""
        if self.users:
            return None
        return 0.0 if self.closed else IDLE_SECONDS

    @contextlib.contextmanager
    def in_use(self) -> Iterator[None]:
        """It is not evicted inside."""
        self.users += 1
        try:
            yield
        finally:
            self.users -= 1
            self.last_used = self._budget.clock()

    @contextlib.contextmanager
    def taking(self, step: Request) -> Iterator[None]:
        """It takes this step, and no other, inside."""
        self.step = step
        self.steps += 1
        try:
            yield
        finally:
            self.step = None

    async def reserve(
        self, rows: int, tokens: int, field: str, *, position: int = 0, order: Tensor | None = None
    ) -> None:
        """Make sure that `rows` may reach `tokens` each, the cached rows in `order` kept up to `position`.

        Raises `RequestRefused`, naming `field`.
        """
        pages = self.pages_needed(rows, tokens, position, order)
        if pages > self.pages:
            await self._budget.reserve(self, pages, field)

    def reserve_now(self, rows: int, tokens: int, *, position: int, order: Tensor | None) -> bool:
        """The same where that needs no waiting; False, and nothing changes, where it does."""
        pages = self.pages_needed(rows, tokens, position, order)
        return pages <= self.pages or self._budget.reserve_now(self, pages)

    def pages_needed(self, rows: int, tokens: int, position: int, order: Tensor | None) -> int:
        """At most so many distinct pages: what all rows have in common counts once.

        Never fewer than are reserved already: pages lie with the rows until these are freed.
        """
        layout, before = self.pool.layout, self.before
        if not self.span.packable:
            whole = self._pages_of_own(rows, before + tokens, SNAPSHOTS if self.span.remembers else 0)
            if whole > self._budget.capacity // SNAPSHOT_SHARE:
                whole = self._pages_of_own(rows, before + tokens, 0)
            return max(self.pages, whole + self._held_pages)
        common = [before // PAGE] * layout.tables
        if rows > 1 and self.block_tables and position:
            chosen = self._chosen(order)
            kept = min(self.cached_tokens(row, position) for row in set(chosen))
            common = common_pages([self.block_tables[row] for row in chosen], kept)
        pages = layout.most_pages(rows, before + tokens, tokens - position, PASS_TOKENS, common)
        # The prefix's own pages stay when all rows have a copy of its last one, or have left it behind.
        pages += layout.tables * (pages_for(before) if not layout.plain else int(before % PAGE > 0))
        return max(self.pages, pages + self._held_pages)

    def _pages_of_own(self, rows: int, tokens: int, snapshots: int) -> int:
        """Pages that are as large as a family's own caches of `rows` of so many tokens, by the byte."""
        token, states = self.span.cache_bytes
        return -(-rows * (tokens * token + states * (1 + snapshots)) // (bytes_per_token(self.span) * PAGE))

    def _chosen(self, order: Tensor | None) -> list[int]:
        """The cached rows that the next ones continue."""
        return list(range(self.rows)) if order is None else order.tolist()

    def real_tokens(self, row: int, columns: int) -> int:
        """How many of a row's first `columns` cached columns are tokens, not padding."""
        return columns if self.mask is None else int(self.mask[row, :columns].sum())

    def cached_tokens(self, row: int, columns: int) -> int:
        """The length of a row's sequence with its first `columns` columns: the prefix and the tokens among them."""
        return self.before + self.real_tokens(row, columns)

    def same_past(self, mask: Tensor | None, position: int, order: Tensor | None) -> bool:
        """Whether a step's mask [R, S] says of the cached columns what was true when they were computed."""
        if position == 0:
            return True
        past = None if self.mask is None else self.mask[:, :position]
        if past is not None and order is not None:
            past = past[order]
        given = None if mask is None else mask[:, :position]
        if past is None:
            return given is None or bool(given.all())
        return bool(past.all()) if given is None else torch.equal(past, given)

    def reaches(self, position: int, order: Tensor | None = None) -> bool:
        """Whether the cached rows in `order` can go on from column `position`: where blocks have a window, what lies
        far behind it is given back; where they have a state, it is that of the last token, or of a snapshot."""
        if not self.span.packable:
            return self.plain.reaches(position)
        if not position:
            return True
        chosen = [
            (self.block_tables[row], self.cached_tokens(row, position)) for row in set(self._chosen(order))
        ]
        return all(row.reaches(kept) for row, kept in chosen)

    def stacks_from(self, position: int) -> bool:
        """Whether a step of one token at this column needs nothing but its caches, so that it may be stacked."""
        prompts = 0 if self.prompts is None else int(self.prompts.shape[1])
        return self.lora is None and self.prefix is None and self.mask is None and position >= max(1, prompts)

    def can_be_forked(self, origin: Origin, other: Session) -> bool:
        """Whether another session over the same span, with the same prompts, may begin as `origin` says."""
        same_prompts = all(_same(one, its) for one, its in zip(self._given(), other._given(), strict=True))
        fits = origin.tokens <= self.length and origin.epoch == self.epoch and not self.evicted
        fits = fits and other.span is self.span and same_prompts
        return fits and self.reaches(origin.tokens)

    def _given(self) -> tuple[Tensor | None, ...]:
        return self.prompts, self.prefix, self.lora, self.targets

    # --- on the compute thread --------------------------------------------------------------------------

    def fork_from(self, other: Session, origin: Origin) -> bool:
        """Hold what another session does, on its pages; False, and nothing changes, if it is not as `origin` says."""
        if not other.can_be_forked(origin, self):
            return False
        self._prefix_pages = None if other._prefix_pages is None else other._prefix_pages.fork()
        tokens = origin.tokens
        if not self.span.packable:
            with torch.inference_mode():
                self.plain = other.plain.fork()
            self._go_back(tokens, other.mask)
        for index, row in enumerate(other.block_tables):
            twin = row.fork()
            twin.truncate(other.cached_tokens(index, tokens))
            self.block_tables.append(twin)
        self.rows, self.length = other.rows, tokens
        self.mask = None if other.mask is None else other.mask[:, :tokens]
        return True

    def start_on(self, row: CachedSequence, rows: int) -> None:
        """Hold in each of `rows` rows what `row` does, on its pages."""
        self.block_tables = [row.fork() for _ in range(rows)]
        self.rows, self.length = rows, row.length

    def write_prefix(self) -> None:
        """Have the prefix in pages, once, for all rows to begin with."""
        form = self.span.key_values
        if self.prefix is not None and self._prefix_pages is None and form is not None and self.span.packable:
            self._prefix_pages = put(self.span.by_block(self.prefix), form, self.pool)

    def read(self, tokens: int) -> Tensor:
        """What the only row's first `tokens` tokens have left in the caches, as a prefix fp32 [blocks, tokens, D]."""
        form = self.span.key_values
        assert form is not None  # `ReadRequest` asked
        if self.span.packable:
            blocks = range(self.span.start, self.span.end)
            return take(self.block_tables[0], blocks, self.before, self.before + tokens, form)
        return self.plain.read(tokens)

    def rearrange(self, rows: int, position: int, order: Tensor | None) -> None:
        """Reorder or repeat the cached rows, then forget what stands from column `position` on."""
        self.epoch += self.length > 0 and (order is not None or position < self.length)
        if self.span.packable:
            self._rearrange_pages(rows, position, order)
        if order is not None and self.mask is not None:
            self.mask = self.mask[order]
        self.mask = None if self.mask is None or not position else self.mask[:, :position]
        if not self.span.packable:
            self._rearrange_plain(position, order)

    def _rearrange_pages(self, rows: int, position: int, order: Tensor | None) -> None:
        before = self.block_tables
        if position == 0 or not before:
            self.write_prefix()
            begun = self._prefix_pages
            self.block_tables = [
                CachedSequence(self.pool) if begun is None else begun.fork() for _ in range(rows)
            ]
        elif order is not None:
            self.block_tables = []
            for source in order.tolist():
                row = before[source].fork()
                row.truncate(self.cached_tokens(source, position))
                self.block_tables.append(row)
        else:
            for index, row in enumerate(before):
                row.truncate(self.cached_tokens(index, position))
            return
        for row in before:
            row.free()

    def _rearrange_plain(self, position: int, order: Tensor | None) -> None:
        if order is not None and self.length:
            self.plain.reorder_cache(order)
        if position == 0:
            self.plain = self.span.new_cache()
        else:
            self._go_back(position, self.mask)

    def _go_back(self, position: int, mask: Tensor | None) -> None:
        with torch.inference_mode():
            given = {"prompts": self.prompts, "lora": self.lora, "targets": self.targets}
            self.span.go_back(self.plain, position, mask=mask, given=given)

    def remember(self, rows: int, *, turn: bool) -> None:
        """Take a snapshot of the rows' states, if one is due and room was reserved (`attention/snapshots.py`)."""
        span = self.span
        if not span.packable and span.remembers:
            length = self.plain.get_seq_length()
            if self._pages_of_own(rows, length, SNAPSHOTS) <= self.pages:
                self.plain.remember(turn=turn)

    # --- its end ----------------------------------------------------------------------------------------

    def on_evicted(self) -> None:
        """See `kv_cache.Holder`."""
        self._post(self._free)

    def close(self) -> None:
        """Free the cache, and give up the step that is in the engine; safe to call twice."""
        if self.step is not None:
            self.step.done.cancel()
        self._budget.release(self)
        self._post(self._free)

    def give_up(self) -> None:
        """What is cached is not what the client thinks: free it, and say so to whoever asks."""
        self.evicted = True
        self.close()

    def _free(self) -> None:
        for row in self.block_tables:
            row.free()
        if self._prefix_pages is not None:
            self._prefix_pages.free()
        self.block_tables, self._prefix_pages = [], None
        self.plain = self.span.new_cache()
        self.prompts = self.prefix = self.mask = None
        self.lora = self.targets = self.adapter = None  # an evicted session's stream may stay open for long
        self.length = self.rows = 0


def _same(one: Tensor | None, other: Tensor | None) -> bool:
    return one is other or (one is not None and other is not None and torch.equal(one, other))


def default_capacity(span: Span, free_bytes: int, layout: PageLayout) -> int:
    """Pages that half of the free memory can hold, by the span's own keys and values."""
    blocks = span.end - span.start
    page_bytes = bytes_per_token(span) * PAGE * (layout.depth or blocks) // blocks
    return max(1, free_bytes // 2 // page_bytes)


MOST_STATE_TOKENS = 256  # a sequence's states are never reckoned as more tokens than these


def bytes_per_token(span: Span) -> int:
    """Memory that one token of one row takes in the caches of all blocks, measured on the span itself."""
    token, states = span.cache_bytes
    return max(token, states // MOST_STATE_TOKENS, 1)
