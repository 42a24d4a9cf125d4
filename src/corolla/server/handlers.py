"""What a server does with each message of a stream: it reads requests (`REQUESTS`), and answers.

Invariant: no input of a client ends a server or leaves a session half stepped: a request is checked in full
before anything is enqueued, refused with a typed `Failure` that names the field, and a step that breaks
off in the middle takes its session's cache with it (the client replays). All computing happens in the engine;
work whose client has gone is not computed.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
from collections.abc import Callable
from typing import Any, Protocol

from corolla.errors import PeerDisconnected, PeerSilent, ProtocolError, RequestRefused
from corolla.server.block_server import BlockServer
from corolla.server.peers import InFlight
from corolla.server.sessions.kv_cache import IDLE_SECONDS
from corolla.server.sessions.opening import OpenRequest
from corolla.server.sessions.reading import ReadRequest
from corolla.server.sessions.session import Client
from corolla.server.sessions.step import StepRequest
from corolla.server.sessions.steps import StepsRequest
from corolla.server.training import BackwardRequest, ForwardRequest
from corolla.swarm.channel import Channel, RefusedPacket
from corolla.swarm.transport.base import Stream
from corolla.text import get_logger
from corolla.wire.failures import failure_from, failure_of, meaning
from corolla.wire.frames import Packet
from corolla.wire.messages import (
    Backward,
    Closed,
    CloseSession,
    Failure,
    Forward,
    Message,
    OpenSession,
    Ping,
    ReadCache,
    Step,
    Steps,
)

log = get_logger(__name__)

IDLE_STREAM_SECONDS = (
    1.0  # a client that is not waiting for an answer asks again, or can do with another stream
)
LONG_AGO = 3600.0


class Answered(Protocol):
    """A request that has been read."""

    def check(self) -> None:
        """Raises `RequestRefused`; nothing has changed then, and `run` must not be called."""

    async def run(self) -> Packet:
        """The answer. Raises `RequestRefused`. Cancelled, it leaves nothing behind."""


# Made of (server, client, message, tensors). Raises `RequestRefused`.
REQUESTS: dict[type[Message], Callable[[BlockServer, Client, Any, Any], Answered]] = {
    OpenSession: OpenRequest,
    Step: StepRequest.of,
    Steps: StepsRequest,
    ReadCache: ReadRequest,
    Forward: ForwardRequest,
    Backward: BackwardRequest,
}


async def handle(server: BlockServer, stream: Stream) -> None:
    """Serve one stream until it ends. With its first argument bound, a `StreamHandler` for `Transport.serve`."""
    conversation = _Stream(server, stream)
    try:
        with server.limits.stream(conversation), server.usage.stream(stream.peer_id):
            await conversation.run()
    except RequestRefused as refusal:
        await conversation.refuse(failure_from(refusal))
    finally:
        conversation.close_session()


class _Stream:
    """The requests of one stream, one after the other. See `peers.Holder`."""

    def __init__(self, server: BlockServer, stream: Stream) -> None:
        self.peer = stream.peer_id
        self._server = server
        self._client = Client(stream.peer_id)
        self._asked = False
        self._last_asked = server.limits.clock() - LONG_AGO
        self._answering = False
        self._in_flight = InFlight(server.limits.in_flight, self, server.limits.clock)
        self._channel = Channel(stream, side="server", silence=server.silence, admit=self._in_flight.admit)
        self._incoming: asyncio.Task[Packet] | None = None

    @property
    def last_used(self) -> float:
        """When it, or its session on whatever stream, was last worked for; long ago, if it has asked nothing."""
        if self._in_flight.since is not None:
            return self._in_flight.since
        session = self._client.session
        return self._last_asked if session is None else max(self._last_asked, session.last_used)

    @property
    def idle_after(self) -> float | None:
        """See `peers.Holder`."""
        session = self._client.session
        if self._answering or (session is not None and session.users):
            return math.inf
        unused = session is None and self._in_flight.since is None
        return IDLE_STREAM_SECONDS if unused else IDLE_SECONDS

    async def run(self) -> None:
        """Answer requests until the stream ends. Cancelled, it leaves nothing running."""
        self._incoming = incoming = self._listen()
        try:
            while await self._has_come(incoming):
                packet = await incoming
                counted = self._in_flight.complete()
                self._incoming = incoming = self._listen()
                if not await self._answer_while_wanted(packet, incoming):
                    return
                self._in_flight.answered(counted)
        except ProtocolError as error:
            await self.refuse(failure_of(error))
        except (PeerDisconnected, PeerSilent):
            return
        finally:
            await cancel_and_wait(incoming)

    def on_evicted(self) -> None:
        """Let `run` return, whatever it does."""
        if self._incoming is not None:
            self._incoming.cancel()

    def _listen(self) -> asyncio.Task[Packet]:
        return asyncio.create_task(self._channel.receive(timeout=None))

    async def _has_come(self, incoming: asyncio.Task[Packet]) -> bool:
        """Wait for a request to be there; False for a stream that was ended, or that nobody uses.

        A client that is silent for long loses its session first.
        """
        budgets = self._server.limits.budgets
        while True:
            session = self._client.session
            patience = budgets.stream_silence if session is None else budgets.session_silence
            if not self._asked:
                patience = min(patience, budgets.first_request)
            steps = 0 if session is None else session.steps
            await asyncio.wait({incoming}, timeout=patience)
            if incoming.done():
                return not incoming.cancelled()
            if self._channel.receiving:  # for that there are limits of its own
                continue
            if session is None:
                return False
            if session.steps == steps:  # otherwise its steps come together with others', on another stream
                self.close_session()

    async def _answer_while_wanted(self, packet: Packet, incoming: asyncio.Task[Packet]) -> bool:
        """Answer one request; False when the stream is over.

        While the answer is due nothing may come in. What does come is the stream's end, or a message out of
        order: then the answer is given up, and whoever awaits `incoming` hears why.
        """
        answer = asyncio.create_task(self._answer(packet))
        self._answering = self._asked = True
        try:
            with self._server.request_open():
                await asyncio.wait({answer, incoming}, return_when=asyncio.FIRST_COMPLETED)
                if not answer.done() and (incoming.cancelled() or incoming.exception() is not None):
                    return True
                return await answer  # when a request came in, its client has the answer to this one already
        finally:
            await cancel_and_wait(answer)
            self._answering = False
            if not isinstance(packet.message, Ping):
                self._last_asked = self._server.limits.clock()

    async def _answer(self, packet: Packet) -> bool:
        """Answer one request; False when the stream is over."""
        try:
            async with self._channel.heartbeat(self._ahead):
                reply = await self._reply(packet)
        except RequestRefused as refusal:
            reply = Packet(failure_from(refusal))
        except (PeerDisconnected, asyncio.CancelledError):
            raise
        except Exception as error:  # a bug or exhausted memory: the client is told, the server lives on
            log.exception("A %s from %s failed", type(packet.message).__name__, self._client.peer)
            reply = Packet(Failure(code="internal", message=f"The server failed: {type(error).__name__}."))
        if isinstance(reply.message, Failure):
            means = meaning(reply.message)
            if means.session_lost and isinstance(packet.message, Step | CloseSession):
                self.close_session()
            if means.stream_lost:
                await self.refuse(reply.message)
                return False
        await self._channel.send(reply)
        return True

    def _ahead(self) -> int:
        """Requests that come before this stream's: in the line for room, else for the compute thread."""
        session = self._client.session
        in_line = 0 if session is None else self._server.budget.ahead(session)
        return in_line or max(0, self._server.engine.waiting - 1)

    async def refuse(self, failure: Failure) -> None:
        """Say why the stream ends here, if its peer listens."""
        with contextlib.suppress(PeerDisconnected, PeerSilent, ProtocolError):
            await self._channel.send(Packet(failure))
        if meaning(failure).garbage:
            self._server.limits.malformed(self._client.peer)

    async def _reply(self, packet: Packet) -> Packet:
        if isinstance(packet, RefusedPacket) and packet.refusal is not None:
            raise packet.refusal
        match packet.message:
            case Ping():
                return Packet(self._server.status())
            case CloseSession():
                self.close_session(keep=packet.message.keep)
                return Packet(Closed())
        peer, message = self._client.peer, packet.message
        what, tokens = _work_of(packet)
        with self._server.usage.work(peer, what, tokens):
            request = REQUESTS[type(message)](self._server, self._client, message, packet.tensors)
            request.check()
            if isinstance(request, ReadRequest):
                self._in_flight.expect_reply(request.nbytes)
            return await request.run()

    def close_session(self, keep: bool = False) -> None:
        """Free what the client holds here."""
        session, self._client.session = self._client.session, None
        if session is not None:
            self._server.sessions.close(session, keep=keep)


def _work_of(packet: Packet) -> tuple[str, int]:
    """What a request is for, and how many tokens it takes through the blocks."""
    hidden = packet.tensors.get("grad" if isinstance(packet.message, Backward) else "hidden")
    tokens = 0 if hidden is None or not hidden.ndim else hidden.numel() // max(hidden.shape[-1], 1)
    return ("training" if isinstance(packet.message, Forward | Backward) else "sessions"), tokens


async def cancel_and_wait(task: asyncio.Task[Any]) -> None:
    """End a task whose result nobody wants any more; none is left behind."""
    task.cancel()
    await asyncio.wait({task})
    if not task.cancelled():
        task.exception()  # seen, so that asyncio does not report it
