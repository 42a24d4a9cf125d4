"""One inference session over the chain of servers that holds its caches; mends itself.

Invariant: between two steps every span's history is exactly what the user's tokens made of it, so a span
whose server is lost can be rebuilt anywhere: its replacement is given the history and the deep prompts,
the other servers keep their caches.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from dataclasses import replace
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor

from corolla.client.audits.audit import Observer
from corolla.client.local_blocks import LocalSession
from corolla.client.retry import Retry
from corolla.client.sessions.named_prompt import NamedPrompt
from corolla.client.sessions.span_session import History, Progress, SpanSession, order_of
from corolla.client.training import step_answer
from corolla.client.view import SwarmView
from corolla.errors import RemoteError
from corolla.models.cache import BlocksCall, on_cpu
from corolla.models.prompts import BlockVectors
from corolla.swarm.directory.routing import Hop
from corolla.wire.messages import SILENCE_SECONDS, Origin, Step

MESSAGE_BYTES = 32 * 1024 * 1024  # hidden states that one message carries at most

T = TypeVar("T")
Run = Callable[[Coroutine[Any, Any, Tensor]], Tensor]


class SessionChain:
    """A session over blocks [start, end), a `models.cache.BlocksSession`.

    `step`, `reorder` and `reserve` are for the thread that calls the model, all else runs on the event loop.
    """

    def __init__(
        self,
        view: SwarmView,
        retry: Retry,
        audits: Observer | None,
        run: Run,
        *,
        start: int,
        end: int,
        vectors: BlockVectors | None,
        front: LocalSession | None = None,
    ) -> None:
        """`run` waits for work on the event loop. `vectors` are what all the model's blocks are given besides, a
        snapshot, None to take that from the first step; `front` is what this client runs itself, before these."""
        self._view = view
        self._retry = retry
        self._audits = audits
        self._run = run
        self._front = front
        self._start, self._end, self._vectors = start, end, vectors
        self._bundle: NamedPrompt | None = None  # the prompt that the session begins with
        self.spans: list[SpanSession] = []  # in the order of the blocks
        self._order: Tensor | None = None  # of rows, which the spans' histories have not been told yet
        self._reserved = 0  # tokens a row that the present call may reach
        self._authors: dict[str, int] = {}  # peers that computed something of it, from which block on
        self.version = 0  # steps that took something back or reordered it
        self.stopped = False  # nothing is waited for; to be set on any thread, before `stop` runs
        self._numerics: str | None = None  # the arithmetic in which it was begun
        self._under_way: asyncio.Task[Any] | None = None
        self._closing: list[asyncio.Task[None]] = []

    @property
    def hops(self) -> list[Hop]:
        """Whose caches hold the session, in the order of the blocks."""
        return [span.hop for span in self.spans if span.hop.peer_id]

    @property
    def _rows(self) -> int:
        """Sequences that the next step continues; 0 where there are none yet."""
        if self._order is not None:
            return len(self._order)
        return self.spans[0].history.rows if self.spans else 0

    def reorder(self, rows: Tensor) -> None:
        """See `models.cache.BlocksSession`."""
        if self._front is not None:
            self._front.reorder(rows)
        if self._start < self._end:
            self._order = rows if self._order is None else self._order[rows]

    def reserve(self, tokens: int) -> None:
        """See `models.cache.BlocksSession`."""
        self._reserved = max(self._reserved, tokens)

    @torch.no_grad()
    def step(self, hidden: Tensor, call: BlocksCall) -> Tensor:
        """See `models.cache.BlocksSession`. Raises `SwarmUnavailable` when patience ends, `LyingServer` when what is
        cached came from a peer that was found lying; the next step is all right."""
        if self._vectors is None and call.start == 0 and not self.spans:
            self._vectors = None if call.vectors is None else call.vectors.kept()
        if self._front is not None:  # whose caches, too, are of what the session began with
            hidden = self._front.step(hidden, replace(call, vectors=self._vectors))
        if self._start == self._end:  # nothing is left to the swarm
            return hidden
        if call.start == 0:
            self._begin_with(call, hidden)
        positions = None if call.positions is None else call.positions.expand(hidden.shape[0], -1)
        steps = self._in_chunks(on_cpu(hidden), call.start, on_cpu(call.mask), on_cpu(positions))
        return self._run(self.unless_stopped(steps)).to(hidden.device)

    def caches_of(self, hidden: Tensor) -> Tensor:
        """The keys and values of what enters the blocks [1, T, H], as a prefix fp32 [blocks, T, D].

        For a session that has taken no step. Raises as `step`.
        """
        self.step(hidden, BlocksCall(None, None, None, None, 0))
        parts = [] if self._front is None else [self._front.read(hidden.shape[1])]
        if self._start < self._end:
            last = self.spans[0].history.last()
            parts.append(self._run(self._read(Progress(last, int(hidden.shape[1]) - 1, None, None))))
        return torch.cat(parts)

    async def _read(self, progress: Progress) -> Tensor:
        """All spans' caches. The last token is given once more first: that finds, and mends, what is lost."""

        async def attempt() -> Tensor:
            for span in self.spans:
                span.history.truncate(progress.start)
            progress.begin_anew()
            await self._advance(progress)
            return torch.cat([await span.read(progress.start + 1) for span in self.spans])

        return await self._retry.run(attempt, what="reading caches", done=lambda: progress.reached)

    async def unless_stopped(self, work: Coroutine[Any, Any, T]) -> T:
        """The result of `work`, which ends with `CancelledError` as soon as the session is stopped."""
        if self.stopped:
            work.close()
            raise asyncio.CancelledError
        self._under_way = asyncio.current_task()
        try:
            return await work
        finally:
            self._under_way = None

    async def stop(self) -> None:
        """Give up what the session waits for; what is cached is as after any error."""
        if self._under_way is not None:
            self._under_way.cancel()

    def _begin_with(self, call: BlocksCall, hidden: Tensor) -> None:
        """The next step is `hidden` [R, T, H] from position 0 on.

        Servers that have computed its prompt by themselves will not be sent it: where that gives what sending
        gives, so not if activations are rounded on the way, nor behind blocks that run here.
        """
        self._bundle = None
        if call.prompt is not None and self._start == 0 and self._view.takes_bundles:
            self._bundle = NamedPrompt.of(
                call.prompt, None if self._vectors is None else self._vectors.values, hidden
            )

    async def _in_chunks(
        self, hidden: Tensor, start: int, mask: Tensor | None, positions: Tensor | None
    ) -> Tensor:
        """A step, in pieces where it is too large for one message."""
        width = max(1, MESSAGE_BYTES // (hidden[:, :1].numel() * hidden.element_size()))
        outputs = []
        for first in range(0, hidden.shape[1], width):
            last = min(first + width, hidden.shape[1])
            whole_mask = None if mask is None else mask[:, : start + last]
            ids = None if positions is None else positions[:, first:last]
            part = Progress(hidden[:, first:last], start + first, whole_mask, ids)
            outputs.append(await self._take_step(part))
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=1)

    async def _take_step(self, progress: Progress) -> Tensor:
        await self._disown_liars()
        start, rows = progress.start, int(progress.value.shape[0])
        if start == 0 and self._rows not in (0, rows):  # nothing of what is cached is needed
            await self._forget()
        known, order = self._rows, self._take_order(rows)
        self.version += order is not None or any(span.history.length > start for span in self.spans)
        for span in self.spans:
            if order is not None:
                span.history.select_rows(order)
            span.history.truncate(start)
        self.reserve(start + int(progress.value.shape[1]))
        try:
            await self._retry.run(
                lambda: self._advance(progress), what="a generation step", done=lambda: progress.reached
            )
        except BaseException:
            self._reserved = 0  # the next call may need less
            if known not in (0, rows):  # its caller knows the rows that were to become more
                self.reorder(torch.arange(0, rows, rows // known))
            raise
        return progress.value

    async def _forget(self) -> None:
        """Give all caches up."""
        spans, self.spans, self._order = self.spans, [], None
        for span in spans:
            await span.drop()

    def _take_order(self, rows: int) -> Tensor | None:
        """The reorder to send with this step."""
        cached, order = self._rows, self._order
        self._order = None
        return order_of(rows, cached, order)

    async def _advance(self, progress: Progress) -> None:
        """Take the step through the remaining spans; what is done stays done when a span fails."""
        if progress.start == 0 and 0 < progress.done < len(self.spans):
            block = self.spans[progress.done].hop.start
            if self._view.restarts_elsewhere(self._numerics, block, self._start, self._end):
                await self._forget()
                progress.begin_anew()
        if not self.spans:
            self._numerics = None
            self.spans = [_unassigned(self._start, self._end, History())]
        while progress.done < len(self.spans):
            span = self.spans[progress.done]
            if self._is_lost(span):
                span, output = await self._mend(progress)
            else:
                output = await self._step(span, progress)
            self._note_author(span.hop)
            if self._audits is not None and not self._has_steps_that_differ(span.history):
                past = span.history.copy(span.history.length)  # the session goes on
                self._audits.saw(partial(step_answer, span.hop, past, progress.mask, self._vectors, output))
            progress.value = output
            progress.advance()
            if self._view.should_leave(span.hop):
                await span.drop()  # the next step goes to its replacement
        self._view.settle_numerics(self._numerics, self._start, self._end)

    async def _step(self, span: SpanSession, progress: Progress) -> Tensor:
        began = self._view.now()
        message = Step(position=progress.start, reserve=self._reserved)
        output = await span.step(progress.value, message, progress.mask, progress.positions)
        tokens = int(output.shape[0] * output.shape[1])
        self._view.answered(span.hop, tokens, 2 * output.nbytes, self._view.now() - began)
        return output

    def _has_steps_that_differ(self, history: History) -> bool:
        """Whether not all of it is what a pass over the whole would give, to which answers are compared."""
        return self._view.steps_differ and history.at_once < history.length

    @property
    def at_once(self) -> int:
        """Of the first columns, those that are what a pass over all of them would give."""
        history = (
            self._front.entered if self._front is not None else self.spans[0].history if self.spans else None
        )
        if history is None:
            return 0
        return history.at_once if self._view.steps_differ else history.length

    def _is_lost(self, span: SpanSession) -> bool:
        """Whether another server must be found: this one has no cache, or asked to be left alone.

        While there is no other, the cache of a busy server stays, and the step waits for it.
        """
        return span.channel is None or self._view.health.is_busy(span.hop.peer_id)

    async def _mend(self, progress: Progress) -> tuple[SpanSession, Tensor]:
        """Have the step taken by a server that is up in the place of the span at `progress.done`; and its outputs.

        Its cache is brought to the present first. If it serves only a part of the blocks, the rest is nobody's yet.
        """
        lost = self.spans[progress.done]

        async def replacement(hop: Hop, _careful: bool) -> tuple[SpanSession, History, Tensor]:
            span, rest = SpanSession(hop, History()), History()
            rows = int(progress.value.shape[0])
            try:
                await span.open(
                    self._view,
                    rows=rows,
                    max_tokens=self._reserved,
                    vectors=self._vectors,
                    bundle=self._bundle,
                )
                await span.replay(lost.history, rest, progress, self._reserved)
                return span, rest, await self._step(span, progress)
            except BaseException:
                await span.drop()
                raise

        rows, length = progress.value.shape[:2]
        span, rest, output = await self._view.first(
            lost.hop.start,
            lost.hop.end,
            replacement,
            tokens=int(rows * (length + lost.history.length)),
            numerics=self._numerics,
            discard=lambda late: late[0].drop(),
        )
        self._numerics = self._numerics or self._view.numerics_of(span.hop.peer_id)
        later = [_unassigned(span.hop.end, lost.hop.end, rest)] if span.hop.end < lost.hop.end else []
        self.spans[progress.done : progress.done + 1] = [span, *later]
        await lost.drop()
        return span, output

    def _note_author(self, hop: Hop) -> None:
        self._authors[hop.peer_id] = min(hop.start, self._authors.get(hop.peer_id, hop.start))

    async def _disown_liars(self) -> None:
        """Give up all that a condemned peer has had a part in. Raises `LyingServer` if there was anything.

        What the first of them was sent came from honest ones, so the next step rebuilds the caches from
        there, at others.
        """
        if self._audits is None or not self.spans:
            return
        finding = self._view.verdicts.against(self._authors)
        if finding is None:
            return
        start = min(block for peer, block in self._authors.items() if peer in self._view.verdicts.condemned)
        first = next(index for index, span in enumerate(self.spans) if span.hop.end > start)
        for span in self.spans[first:]:
            await span.drop()
        block = self.spans[first].hop.start
        self.spans[first:] = [_unassigned(block, self._end, self.spans[first].history)]
        self._authors = {peer: begun for peer, begun in self._authors.items() if begun < block}
        self.version += 1
        raise self._view.verdicts.error(finding)

    async def fork_from(self, other: SessionChain, tokens: int, version: int) -> bool:
        """Begin with the first `tokens` columns of another session of the same blocks and prompts.

        The servers that hold them are asked to share them; one that does not is replayed with the first
        step. False, and nothing has changed, where the other does not hold so many, or no longer what it
        held at `version`.
        """
        if self.spans or other.version != version or not other.can_be_forked(tokens, self._vectors):
            return False
        self._order, self._bundle = other._order, other._bundle
        self.reserve(tokens)
        # All at one moment: while servers are asked, the other may go on or take something back.
        self.spans = [SpanSession(source.hop, source.history.copy(tokens)) for source in other.spans]
        self._authors = dict(other._authors)
        if self._front is not None and other._front is not None:
            self._front.fork_from(other._front, tokens)
        origins = [source.origin(tokens) for source in other.spans]
        for span, origin in zip(self.spans, origins, strict=True):
            if origin is not None:
                await self._share(span, origin)
        return True

    async def _share(self, span: SpanSession, origin: Origin) -> None:
        """Open a span's session as its server's copy of another; left closed if that cannot be had."""
        try:
            async with asyncio.timeout(2 * SILENCE_SECONDS):
                shared = await span.open(
                    self._view,
                    rows=self._rows,
                    max_tokens=self._reserved,
                    vectors=self._vectors,
                    origin=origin,
                    bundle=self._bundle,
                )
        except (RemoteError, TimeoutError):
            return
        if not shared:
            await span.drop()

    def can_be_forked(self, tokens: int, vectors: BlockVectors | None) -> bool:
        """Whether another session whose blocks are given this may begin with the first `tokens` of this one."""
        if self._view.verdicts.against(self._authors) is not None:
            return False
        held = min((span.history.length for span in self.spans), default=0)
        same = vectors is self._vectors or (vectors is not None and vectors.same(self._vectors))
        return 0 < tokens <= held and same

    def entered(self, tokens: int) -> Tensor | None:
        """What the first `tokens` columns were when they entered the first block, [R, tokens, H]; None if unknown."""
        first = self._front.entered if self._front is not None else None
        if first is None and self.spans:
            first = self.spans[0].history
        known = None if first is None else first.copy(tokens).inputs()
        return None if known is None or known[0].shape[1] != tokens else known[0]

    def history_bytes(self) -> int:
        """Memory that the inputs of all spans take at the client."""
        return sum(span.history.nbytes for span in self.spans)

    @property
    def is_open(self) -> bool:
        """Whether servers, or this client's own blocks, may hold something of the session."""
        return bool(self.spans) or (self._front is not None and self._front.entered.length > 0)

    async def close(self, *, keep: bool = False, seconds: float | None = None) -> None:
        """Free all caches; with `keep`, the servers may keep them for others to begin with.

        Waits for their answers, for so many `seconds` at most. Safe to call twice; a kept chain still knows what it
        held (`fork_from`).
        """
        spans = list(self.spans)
        if not keep:
            self.spans = []
            if self._front is not None:
                self._front.clear()
        self._closing = [asyncio.ensure_future(span.close(self._view, keep=keep)) for span in spans]
        if self._closing:
            await asyncio.wait(self._closing, timeout=seconds)


def _unassigned(start: int, end: int, history: History) -> SpanSession:
    """Blocks that no server holds yet."""
    return SpanSession(Hop("", start, end), history)
