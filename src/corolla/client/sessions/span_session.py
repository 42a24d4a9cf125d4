"""The part of an inference session that one server holds.

Invariant: the server holds what was sent through this object, or nothing: after an error its cache is given up,
and the history, which stays here, is what another server is given.
"""

from __future__ import annotations

import secrets

from torch import Tensor

from corolla.client.sessions.bundles import Bundle, PrefilledPrompt, ask_to_open
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
        self._batcher: StepBatcher | None = None  # of this client's sessions at the same server
        self._batchable = True  # whether the server takes steps of this session among others'
        self._reserved = 0  # tokens a row that the server was asked to have room for
        self._prefilled: PrefilledPrompt | None = None  # what the server holds before the first step

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
            reply, self._prefilled = await ask_to_open(
                channel, message, tensors, bundle, view.lacking_bundles
            )
        except BaseException:
            await channel.close()
            raise
        self.channel = channel
        self._batcher = view.batcher(self.hop.peer_id)
        self._batcher.enter(self.name)
        self.history.held = reply.message.position if isinstance(reply.message, Opened) else 0
        return origin is not None and self.history.held == origin.tokens

    async def step(self, hidden: Tensor, step: Step, mask: Tensor | None, positions: Tensor | None) -> Tensor:
        """Outputs [R, T, H] of this span for `hidden` [R, T, H] from the history's end on, which is noted there.

        `mask` is bool [R, position + T], `positions` int64 [R, T]. After an error the server's cache is given up,
        unless the refusal says that it is as it was before the step.
        """
        optional = {"mask": mask, "positions": positions, "rows": self.history.order}
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
        self.history.append(hidden, positions, known=0 if prefilled is None else prefilled.columns)
        return output if prefilled is None else prefilled.with_outputs(output)

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
