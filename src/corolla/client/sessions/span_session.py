"""The part of an inference session that one server holds.

Invariant: the server holds what was sent through this object, or nothing: after an error its cache is given up,
and the history, which stays here, is what another server is given.
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import takewhile

import torch
from torch import Tensor

from corolla.client.sessions.named_prompt import NamedPrompt, PromptOutputs, ask_to_open
from corolla.client.sessions.step_batcher import StepBatcher
from corolla.client.view import SwarmView
from corolla.errors import ProtocolError, RemoteError, RequestRefused, UsageError
from corolla.models.attention.passes import in_groups, lengths_of
from corolla.models.prompts import BlockVectors
from corolla.swarm.channel import Channel, request
from corolla.swarm.directory.routing import Hop
from corolla.wire.failures import Remedy, keeps_session, meaning
from corolla.wire.frames import Packet
from corolla.wire.messages import (
    SILENCE_SECONDS,
    CloseSession,
    Opened,
    OpenSession,
    Origin,
    Part,
    ReadCache,
    Step,
)

REPLAY_TOKENS = 2048  # rows × tokens that a replay sends at once


@dataclass(frozen=True)
class _StepInputs:
    """The inputs of one step, as they were sent; `rows` says which of them the cached rows continue."""

    hidden: Tensor  # [r, T, H]
    positions: Tensor | None  # int64 [r, T]
    rows: Tensor | None = None  # int64 [R]
    cut: bool = False  # whether more tokens came in the same pass

    @property
    def length(self) -> int:
        return int(self.hidden.shape[1])

    def first(self, count: int) -> _StepInputs:
        positions = None if self.positions is None else self.positions[:, :count]
        return replace(self, hidden=self.hidden[:, :count], positions=positions, cut=True)

    def select(self, rows: Tensor) -> _StepInputs:
        return replace(self, rows=rows if self.rows is None else self.rows[rows])

    def tensors(self, start: int) -> tuple[Tensor, Tensor]:
        """Inputs [R, T, H] and position ids [R, T] in the present order of rows."""
        hidden, positions = self.hidden, self.positions
        if positions is None:
            positions = torch.arange(start, start + self.length).expand(hidden.shape[0], -1)
        if self.rows is not None:
            hidden, positions = hidden[self.rows], positions[self.rows]
        return hidden, positions


class History:
    """The inputs of one span's session, in order, and how far its server is behind them.

    `inputs()` equals what the span's cache was computed from, or will be once its server has heard of the next step:
    rolled-back tokens are gone and rows stand in the order of the latest reorder, which costs nothing until a
    replay needs the tensors.
    """

    def __init__(self) -> None:
        self._steps: list[_StepInputs] = []
        self.length = 0  # tokens a row
        self.rows = 0  # sequences; 0 before the first step
        self.held = 0  # tokens a row that the server holds; more than `length` until it hears of a rollback
        # How the server is to reorder its rows, int64 [R], with the next step.
        self.order: Tensor | None = None
        self.epoch = 0  # steps that took something back or reordered it, as the server counts them

    @property
    def nbytes(self) -> int:
        """Memory of the inputs."""
        return sum(one.hidden.nbytes for one in self._steps)

    def copy(self, length: int) -> History:
        """Another history of the first `length` tokens; tensors are shared, they never change.

        The order is still to be told to whoever begins with what this one's server holds.
        """
        twin = History()
        twin._steps, twin.length = list(self._steps), self.length
        twin.rows, twin.order = self.rows, self.order
        twin.truncate(length)
        return twin

    def append(
        self,
        hidden: Tensor,
        positions: Tensor | None,
        known: int = 0,
        lengths: Sequence[int] | None = None,
    ) -> None:
        """A step has been taken, its inputs are [R, T, H]; `positions` None means that they follow on from `length`.

        The server held the first `known` of its tokens already. Of a replay, they came in passes of `lengths`.
        """
        self.epoch += self.held > 0 and (self.length + known < self.held or self.order is not None)
        parts = [int(hidden.shape[1])] if lengths is None else list(lengths)
        ids = [None] * len(parts) if positions is None else torch.split(positions, parts, 1)
        self._steps += map(_StepInputs, torch.split(hidden, parts, 1), ids)
        self.length += int(hidden.shape[1])
        self.rows, self.held, self.order = int(hidden.shape[0]), self.length, None

    def truncate(self, length: int) -> None:
        """Keep the first `length` tokens."""
        while self.length > length:
            last = self._steps.pop()
            self.length -= last.length
            if self.length < length:
                kept = last.first(length - self.length)
                self._steps.append(kept)
                self.length += kept.length

    def select_rows(self, rows: Tensor) -> None:
        """Rows now continue the former rows that int64 [R] names."""
        self._steps = [one.select(rows) for one in self._steps]
        self.order = rows if self.order is None else self.order[rows]
        self.rows = len(rows)

    def last(self) -> Tensor:
        """The input of the newest token, [R, 1, H]; there is one."""
        return self._steps[-1].tensors(0)[0][:, -1:]

    def lengths(self) -> list[int]:
        """In passes of how many tokens the inputs came."""
        return lengths_of((one.length, one.cut) for one in self._steps)

    @property
    def at_once(self) -> int:
        """Tokens a row that came before the first step of one token."""
        return sum(takewhile(lambda length: length > 1, self.lengths()))

    def inputs(self) -> tuple[Tensor, Tensor] | None:
        """Inputs [R, length, H] and position ids [R, length]; None when there are none."""
        parts, start = [], 0
        for one in self._steps:
            parts.append(one.tensors(start))
            start += one.length
        if not parts:
            return None
        return torch.cat([hidden for hidden, _ in parts], 1), torch.cat([ids for _, ids in parts], 1)


def order_of(rows: int, cached: int, order: Tensor | None) -> Tensor | None:
    """The reorder that makes `rows` rows of so many cached ones, which stand in `order`; one may become many (beams,
    samples). Raises `UsageError`."""
    if cached in (0, rows):
        return order
    if rows % cached:
        raise UsageError(f"This session holds {cached} sequences; a batch of {rows} cannot continue it.")
    repeat = torch.arange(cached).repeat_interleave(rows // cached)
    return repeat if order is None else order[repeat]


class SpanSession:
    """The part of a session that one server holds. `channel` is None when that server has no cache."""

    def __init__(self, hop: Hop, history: History) -> None:
        self.hop = hop
        self.history = history
        self.channel: Channel | None = None
        self.kept = False  # closed, but the server may have kept it
        self.name = secrets.token_hex(16)  # by which the server knows this part of the session
        self._batcher: StepBatcher | None = None  # of this client's sessions at the same server
        self._batchable = True  # whether the server takes steps of this session among others'
        self._prefilled: PromptOutputs | None = None  # what the server holds before the first step

    def origin(self, tokens: int) -> Origin | None:
        """How the server may be told to begin another session with the first `tokens` of this one."""
        if (self.channel is None and not self.kept) or tokens > self.history.held:
            return None
        return Origin(name=self.name, tokens=tokens, epoch=self.history.epoch)

    async def open(
        self,
        view: SwarmView,
        *,
        rows: int,
        max_tokens: int,
        vectors: BlockVectors | None,
        origin: Origin | None = None,
        bundle: NamedPrompt | None = None,
    ) -> bool:
        """Reserve a cache; whether it holds what `origin` says. Raises `RemoteError`."""
        channel = await view.channels.take(self.hop.peer_id)
        message = OpenSession(
            model=view.model,
            start=self.hop.start,
            end=self.hop.end,
            rows=rows,
            max_tokens=max(1, max_tokens),
            name=self.name,
            origin=origin,
        )
        tensors = {} if vectors is None else vectors.of(self.hop.start, self.hop.end)
        packet = Packet(message, tensors)
        try:
            if bundle is not None:
                reply, self._prefilled = await ask_to_open(channel, packet, bundle, view.lacking_bundles)
            elif vectors is not None and vectors.kept_by_servers:
                ask = partial(request, channel)
                reply = await view.sent_vectors.ask(self.hop, packet, vectors, ask, curious=True)
            else:
                reply = await request(channel, packet)
        except BaseException:
            await channel.close()
            raise
        self.channel = channel
        self._output_of = view.output_of
        self._batchable = view.cuts.plain
        self._steps_differ = view.steps_differ
        self._batcher = view.batcher(self.hop.peer_id)
        self._batcher.enter(self.name)
        self.history.held = reply.message.position if isinstance(reply.message, Opened) else 0
        return origin is not None and self.history.held == origin.tokens

    async def step(
        self,
        hidden: Tensor,
        step: Step,
        mask: Tensor | None,
        positions: Tensor | None,
        lengths: Sequence[int] | None = None,
    ) -> Tensor:
        """Outputs [R, T, H] of this span for `hidden` [R, T, H] from the history's end on, which is noted there.

        `mask` is bool [R, position + T], `positions` int64 [R, T], `lengths` as in `History.append`. After an error
        the server's cache is given up, unless the refusal says that it is as it was before the step.
        """
        optional = {"mask": mask, "positions": positions, "rows": self.history.order}
        if lengths is not None and len(lengths) > 1 and self._steps_differ:
            optional["lengths"] = torch.tensor(lengths)
        tensors = {"hidden": hidden} | {name: one for name, one in optional.items() if one is not None}
        prefilled = self._prefilled
        if prefilled is not None and not prefilled.begins(step, hidden):
            prefilled = None
        if prefilled is not None:
            step, tensors = prefilled.left_to_send(step, tensors)
        try:
            output = await self._ask(step, tensors)
        except BaseException as error:
            if not keeps_session(error):
                await self.drop()
            raise
        self._prefilled = None
        known = 0 if prefilled is None else prefilled.columns
        self.history.append(hidden, positions, known, lengths)
        return output if prefilled is None else prefilled.with_outputs(output)

    async def replay(self, history: History, rest: History, progress: Progress, reserve: int) -> None:
        """Give the server what the history says; its outputs are noted in `rest`, the history of what comes after it.

        `progress` is the step that comes next, with its mask.
        """
        past, mask = history.inputs(), progress.mask
        if past is None:
            return
        hidden, positions = past
        width, start = max(1, REPLAY_TOKENS // hidden.shape[0]), 0
        for lengths in in_groups(history.lengths(), width):
            stop = start + sum(lengths)
            ids = positions[:, start:stop]
            covered = None if mask is None else mask[:, :stop]
            message = Step(position=start, reserve=reserve)
            value = await self.step(hidden[:, start:stop], message, covered, ids, lengths)
            rest.append(value, ids, lengths=lengths)
            progress.replayed_up_to(stop)
            start = stop

    async def read(self, tokens: int) -> Tensor:
        """What the server's caches hold of the first `tokens` tokens, as a prefix fp32 [blocks, tokens, D].

        After an error the server's cache is given up.
        """
        assert self.channel is not None
        try:
            reply = await request(self.channel, Packet(ReadCache(tokens=tokens), {}))
            found = reply.tensors.get("prefix")
            if found is None or found.shape[:2] != (self.hop.end - self.hop.start, tokens):
                raise ProtocolError(
                    f"{self.hop.peer_id} did not answer with the keys and values of {tokens} tokens.",
                    field="prefix",
                    peer_id=self.hop.peer_id,
                )
        except BaseException:
            await self.drop()
            raise
        return found.float()

    async def _ask(self, step: Step, tensors: dict[str, Tensor]) -> Tensor:
        hidden = tensors["hidden"]
        batcher = self._batcher_for(step, tensors)
        if batcher is not None:
            part = Part(
                name=self.name, position=step.position, rows=int(hidden.shape[0]), reserve=step.reserve
            )
            try:
                return await batcher.step(part, hidden)
            except RequestRefused as refusal:
                if meaning(refusal).remedy is not Remedy.SEND_MORE:
                    raise
                self._batchable = refusal.field == "reserve"  # the next may need no more room
        assert self.channel is not None
        if batcher is None and self._batcher is not None:
            self._batcher.went_alone(self.name, int(hidden.shape[1]))
        reply = await request(self.channel, Packet(step, tensors))
        return self._output_of(reply, hidden, self.hop)

    def _batcher_for(self, step: Step, tensors: dict[str, Tensor]) -> StepBatcher | None:
        """Where the step may travel with those of other sessions: one token a row, and nothing special."""
        batcher = self._batcher
        if batcher is None or len(batcher.members) < 2 or not self._batchable:
            return None
        plain = tensors["hidden"].shape[1] == 1 and len(tensors) == 1
        return batcher if plain else None

    async def drop(self) -> None:
        """Give the server's cache up (it is freed when the stream ends); the history stays."""
        channel = self._leave()
        if channel is not None:
            await channel.close()

    def _leave(self) -> Channel | None:
        """The stream, which the session no longer uses."""
        channel, self.channel = self.channel, None
        if self._batcher is not None:
            self._batcher.leave(self.name)
        return channel

    async def close(self, view: SwarmView, *, keep: bool = False) -> None:
        """Let the server free the cache, or keep it while it has room, and give the stream back."""
        channel = self._leave()
        if channel is None:
            return
        try:
            async with asyncio.timeout(SILENCE_SECONDS):
                await request(channel, Packet(CloseSession(keep=keep), {}))
            view.channels.give(channel)
            self.kept = keep
        except (RemoteError, TimeoutError):
            await channel.close()


class Progress:
    """How far one step has come along the chain."""

    def __init__(self, hidden: Tensor, start: int, mask: Tensor | None, positions: Tensor | None) -> None:
        self.value = self._first = hidden  # input of the span at index `done`
        self.start = start
        self.mask = mask
        self.positions = positions
        self.done = 0
        self.reached = (0, 0)  # spans done, and tokens a row that were replayed to the next one; never falls

    def begin_anew(self) -> None:
        """Nothing of the step is done, and nothing of it was noted."""
        self.value, self.done = self._first, 0

    def advance(self) -> None:
        """The next span is done; `value` is its output."""
        self.done += 1
        self.reached = max(self.reached, (self.done, 0))

    def replayed_up_to(self, tokens: int) -> None:
        """The replacement of the next span holds so many tokens a row."""
        self.reached = max(self.reached, (self.done, tokens))
