"""The part of an inference session that one server holds.

Invariant: the server holds what was sent through this object, or nothing: after an error its cache is given up,
and the history, which stays here, is what another server is given.
"""

from __future__ import annotations

import secrets

from torch import Tensor

from corolla.client.sessions.bundles import Begun, Bundle, ask_to_open
from corolla.client.sessions.history import History
from corolla.client.sessions.step_batcher import StepBatcher
from corolla.client.view import SwarmView
from corolla.errors import RemoteError, RequestRefused
from corolla.swarm.channel import Channel, checked, request
from corolla.swarm.directory.routing import Hop
from corolla.wire.failures import Remedy, keeps_session, meaning
from corolla.wire.frames import Packet
from corolla.wire.messages import CloseSession, Opened, OpenSession, Origin, Part, Step


class SpanSession:
    """The part of a session that one server holds. `channel` is None when that server has no cache."""

    def __init__(self, hop: Hop, history: History) -> None:
        self.hop = hop
        self.history = history
        self.channel: Channel | None = None
        self.kept = False  # closed, but the server may have kept it
        self.name = secrets.token_hex(16)  # by which the server knows this part of the session
        self._epoch = 0  # steps that took something back or reordered it, as the server counts them
        self._cached = 0  # tokens a row that the server holds
        self._batcher: StepBatcher | None = None  # of this client's sessions at the same server
        self._reserved = 0  # as it was sent last
        self._batchable = True  # whether the server takes steps of this session among others'
        self.order: Tensor | None = None  # how its cached rows are to be reordered with the next step
        self._begun: Begun | None = None  # a bundle's columns, which the server holds before the first step

    def rearrange(self, length: int, order: Tensor | None) -> None:
        """Go on from the first `length` tokens of the rows that int64 `order` names, from the next step on."""
        if order is not None:
            self.history.select_rows(order)
            self.order = order if self.order is None else self.order[order]
        self.history.truncate(length)

    def origin(self, tokens: int) -> Origin | None:
        """How the server may be told to begin another session with the first `tokens` of this one."""
        if (self.channel is None and not self.kept) or tokens > self._cached:
            return None
        return Origin(name=self.name, tokens=tokens, epoch=self._epoch)

    async def open(
        self,
        view: SwarmView,
        *,
        rows: int,
        max_tokens: int,
        deep: Tensor | None,
        origin: Origin | None = None,
        bundle: Bundle | None = None,
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
        tensors = {} if deep is None else {"prompts": deep[self.hop.start : self.hop.end]}
        try:
            reply, self._begun = await ask_to_open(channel, message, tensors, bundle, view.lacking)
        except BaseException:
            await channel.close()
            raise
        self.channel = channel
        self._batcher = view.channels.batcher(self.hop.peer_id)
        self._batcher.enter(self.name)
        self._epoch = self._reserved = 0
        self._cached = reply.message.position if isinstance(reply.message, Opened) else 0
        return origin is not None and self._cached == origin.tokens

    async def step(self, hidden: Tensor, step: Step, extra: dict[str, Tensor]) -> Tensor:
        """Outputs [R, T, H] of this span.

        After an error the server's cache is given up, unless the refusal says that it is as it was before the step.
        """
        assert self.channel is not None
        begun, end = self._begun, step.position + int(hidden.shape[1])
        tensors = {"hidden": hidden} | extra | ({} if self.order is None else {"rows": self.order})
        if begun is not None and begun.covered(step, hidden):
            step, tensors = begun.behind(step, tensors)
        try:
            output = await self._ask(step, tensors)
        except BaseException as error:
            if not keeps_session(error):
                await self.drop()
            raise
        self._epoch += self._cached > 0 and (step.position < self._cached or self.order is not None)
        self._cached, self._begun, self.order = end, None, None
        return output if begun is None or tensors["hidden"] is hidden else begun.whole(output)

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
                self._batchable = False
        assert self.channel is not None
        reply = await request(self.channel, Packet(step, tensors))
        self._reserved = step.reserve
        return checked(reply, "hidden", hidden, self.hop.peer_id)

    def _batcher_for(self, step: Step, tensors: dict[str, Tensor]) -> StepBatcher | None:
        """Where the step may travel with those of other sessions: one token a row, and nothing special."""
        batcher = self._batcher
        if batcher is None or len(batcher.members) < 2 or not self._batchable:
            return None
        plain = tensors["hidden"].shape[1] == 1 and len(tensors) == 1
        return batcher if plain and step.reserve <= self._reserved else None

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
            await request(channel, Packet(CloseSession(keep=keep), {}))
            view.channels.give(channel)
            self.kept = keep
        except RemoteError:
            await channel.close()
