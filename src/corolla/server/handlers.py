"""What a server does with each message of a stream.

Invariant: no input of a client ends a server or leaves a session half stepped: a request is checked in full
before anything is enqueued, refused with a typed `Failure` that names the field, and a step that breaks
off in the middle takes its session's cache with it (the client replays). All computing happens in the engine;
work whose client has gone is not computed.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable, Coroutine, Iterator, Sequence
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor

from corolla.errors import PeerDisconnected, PeerSilent, ProtocolError, RequestRefused
from corolla.models.span import Span
from corolla.server.block_server import BlockServer
from corolla.server.checks import (
    check_hidden,
    check_memory,
    check_prompts,
    check_step,
    failure_from,
    failure_of,
)
from corolla.server.engine import Kind
from corolla.server.sequences import Sequences, backward_of
from corolla.server.sessions import CachedSession
from corolla.server.steps import PackedStep, kind_of, pieces
from corolla.swarm.channel import Channel
from corolla.swarm.transport.base import Stream
from corolla.wire.frames import Packet
from corolla.wire.messages import (
    Backward,
    Closed,
    CloseSession,
    Failure,
    Forward,
    Gradients,
    Message,
    Opened,
    OpenSession,
    Origin,
    Output,
    Ping,
    Step,
)
from corolla.wire.session import FATAL_CODES, HARMLESS_CODES

T = TypeVar("T")

log = logging.getLogger(__name__)

PREFILL_TOKENS = 512  # rows x tokens that are computed at once, so that others' decode steps come in between


async def handle(server: BlockServer, stream: Stream) -> None:
    """Serve one stream until it ends. With its first argument bound, a `StreamHandler` for `Transport.serve`."""
    conversation = _Stream(server, Channel(stream, side="server"))
    try:
        await conversation.run()
    finally:
        conversation.close_session()


class _Stream:
    """The requests of one stream, one after the other."""

    def __init__(self, server: BlockServer, channel: Channel) -> None:
        self._server = server
        self._channel = channel
        self._session: CachedSession | None = None
        self._name: str | None = None

    async def run(self) -> None:
        """Answer requests until the stream ends. Cancelled, it leaves nothing running."""
        incoming = self._listen()
        try:
            while True:
                packet = await incoming
                incoming = self._listen()
                if not await self._answer_while_wanted(packet, incoming):
                    return
        except ProtocolError as error:
            await self._refuse(failure_of(error))
        except (PeerDisconnected, PeerSilent):
            return
        finally:
            await _give_up(incoming)

    def _listen(self) -> asyncio.Task[Packet]:
        return asyncio.create_task(self._channel.receive(timeout=None))

    async def _answer_while_wanted(self, packet: Packet, incoming: asyncio.Task[Packet]) -> bool:
        """Answer one request; False when the stream is over.

        While the answer is due nothing may come in. What does come is the stream's end, or a message out of
        order: then the answer is given up, and whoever awaits `incoming` hears why.
        """
        answer = asyncio.create_task(self._answer(packet))
        try:
            with self._server.request_open():
                await asyncio.wait({answer, incoming}, return_when=asyncio.FIRST_COMPLETED)
                if not answer.done() and incoming.exception() is not None:
                    return True
                return await answer  # when a request came in, its client has the answer to this one already
        finally:
            await _give_up(answer)

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
            log.exception("A %s from %s failed", type(packet.message).__name__, self._channel.peer_id)
            reply = Packet(Failure(code="internal", message=f"The server failed: {type(error).__name__}."))
        if isinstance(reply.message, Failure) and _ends_session(packet.message, reply.message):
            self.close_session()
        await self._channel.send(reply)
        return not (isinstance(reply.message, Failure) and reply.message.code in FATAL_CODES)

    def _ahead(self) -> int:
        """Requests that come before this stream's: in the line for room, else for the compute thread."""
        in_line = 0 if self._session is None else self._server.budget.ahead(self._session)
        return in_line or max(0, self._server.engine.waiting - 1)

    async def _refuse(self, failure: Failure) -> None:
        try:
            await self._channel.send(Packet(failure))
        except (PeerDisconnected, PeerSilent, ProtocolError):
            return

    async def _reply(self, packet: Packet) -> Packet:
        match packet.message:
            case OpenSession():
                return await self._open(packet.message, packet.tensors)
            case Step():
                return await self._step(packet.message, packet.tensors)
            case CloseSession():
                self.close_session(keep=packet.message.keep)
                return Packet(Closed())
            case Forward():
                return await self._forward(packet.message, packet.tensors)
            case Backward():
                return await self._backward(packet.message, packet.tensors)
            case Ping():
                return Packet(self._server.status())
        raise RequestRefused("This server does not answer such a message.", code="malformed", field="type")

    # --- sessions -------------------------------------------------------------------------------------------

    async def _open(self, message: OpenSession, tensors: dict[str, Tensor]) -> Packet:
        server, span = self._server, self._checked_span(message)
        self._check_staying()
        prompts = tensors.get("prompts")
        check_prompts(prompts, span, at_most=message.max_tokens)
        self.close_session()
        session = CachedSession(
            span,
            server.budget,
            server.pool,
            server.engine.post,
            prompts=None if prompts is None else prompts.to(span.device),
        )
        self._session = session
        server.counters.sessions += 1
        tokens = (
            message.max_tokens if message.origin is None else max(message.max_tokens, message.origin.tokens)
        )
        try:
            with self._in_use(session):
                await session.reserve(message.rows, tokens, "max_tokens")
                position = 0 if message.origin is None else await self._begin_as(session, message.origin)
        except BaseException:
            self.close_session()
            raise
        if message.name is not None:
            self._name = message.name
            server.named.add(self._channel.peer_id, message.name, session)
        return Packet(Opened(position=position))

    async def _begin_as(self, session: CachedSession, origin: Origin) -> int:
        """Begin with what another session of this peer holds, if that is still there; tokens a row."""
        peer = self._channel.peer_id
        other = self._server.named.find(peer, origin.name)
        if other is None:
            return 0
        with self._in_use(other):
            begin = partial(session.begin_as, other, origin)
            return origin.tokens if await self._server.engine.submit(Kind.DECODE, begin, peer=peer) else 0

    @contextlib.contextmanager
    def _in_use(self, session: CachedSession) -> Iterator[None]:
        """The session is not evicted inside."""
        session.users += 1
        try:
            yield
        finally:
            session.users -= 1
            self._server.budget.used(session)

    async def _step(self, message: Step, tensors: dict[str, Tensor]) -> Packet:
        server, session = self._server, self._session
        if session is None or session.evicted:
            raise RequestRefused("The session's cache is gone; replay it.", code="evicted")
        hidden = tensors["hidden"]
        rows, count = int(hidden.shape[0]), int(hidden.shape[1])
        check_hidden(hidden, session.span)
        check_step(message, tensors, session)
        width = max(1, PREFILL_TOKENS // rows)
        total = message.position + count
        check_memory(
            session.span,
            rows=rows,
            tokens=min(width, count),
            total=total,
            with_gradients=False,
            limit=server.working_bytes,
        )
        room, order = max(message.reserve, total), tensors.get("rows")
        await session.reserve(rows, room, "reserve", position=message.position, order=order)
        with self._in_use(session):
            output = await self._compute(session, message, tensors, room=room, width=width)
        server.counters.inference += rows * count
        return Packet(Output(), {"hidden": output})

    async def _compute(
        self, session: CachedSession, message: Step, tensors: dict[str, Tensor], *, room: int, width: int
    ) -> Tensor:
        """The step's outputs [R, T, H]: packed with others' where the family allows it, else in pieces."""
        engine, peer, hidden = self._server.engine, self._channel.peer_id, tensors["hidden"]
        arguments: dict[str, Any] = {
            "position": message.position,
            "order": tensors.get("rows"),
            "mask": tensors.get("mask"),
            "positions": tensors.get("positions"),
        }
        if session.span.packable:
            output: Tensor = await engine.step(PackedStep(session, hidden, **arguments, room=room), peer=peer)
            return output
        kind = kind_of(int(hidden.shape[1]))
        parts = pieces(session, hidden, **arguments, width=width)
        return torch.cat(await _in_order([engine.submit(kind, part, peer=peer) for part in parts]), dim=1)

    def close_session(self, keep: bool = False) -> None:
        """Free the session's cache, if there is one; or keep it under its name for as long as there is room."""
        if self._session is None:
            return
        session, name, peer = self._session, self._name, self._channel.peer_id
        self._session = self._name = None
        self._server.counters.sessions -= 1
        self._server.engine.forget(session)
        kept = keep and name is not None and self._server.named.keep(peer, name, session)
        if not kept:
            if name is not None:
                self._server.named.remove(peer, name, session)
            session.close()

    # --- training -------------------------------------------------------------------------------------------

    async def _forward(self, message: Forward, tensors: dict[str, Tensor]) -> Packet:
        span = self._checked_span(message)
        self._check_staying()
        work = self._sequences(span, tensors, with_gradients=False)
        output = await self._server.engine.submit(
            Kind.TRAINING,
            work.forward if message.lease is None else partial(self._lend, work, message.lease),
            peer=self._channel.peer_id,
        )
        self._server.counters.forward += work.tokens
        return Packet(Output(), {"hidden": output})

    def _lend(self, work: Sequences, name: str) -> Tensor:
        """Compute a forward and keep its graph if there is room, on the compute thread."""
        if not self._server.leases.may_fit(work.tokens):
            return work.forward()
        output, lease = work.forward_kept()
        if lease is not None:
            self._server.leases.keep(self._channel.peer_id, name, lease)
        return output

    async def _backward(self, message: Backward, tensors: dict[str, Tensor]) -> Packet:
        span = self._checked_span(message)  # not refused while draining: its forward may have been done here
        if message.lease is not None:
            run: Callable[[], dict[str, Tensor]] = partial(self._redeem, message, tensors["grad"])
            tokens = int(tensors["grad"].shape[1])
        else:
            if "hidden" not in tensors or "lengths" not in tensors:
                raise RequestRefused(
                    "A backward without a lease needs its inputs.", code="malformed", field="hidden"
                )
            work = self._sequences(span, tensors, with_gradients=True)
            run, tokens = partial(work.backward, message.prompt_gradient, tensors["grad"]), work.tokens
        grads = await self._server.engine.submit(Kind.TRAINING, run, peer=self._channel.peer_id)
        self._server.counters.backward += tokens
        return Packet(Gradients(), grads)

    def _redeem(self, message: Backward, grad: Tensor) -> dict[str, Tensor]:
        """The backward of a kept graph, on the compute thread."""
        lease = self._server.leases.take(self._channel.peer_id, message.lease or "")
        if lease is None or lease.blocks != (message.start, message.end):
            raise RequestRefused("The forward's graph is gone; send its inputs.", code="no_lease")
        if grad.shape != lease.output.shape:
            raise RequestRefused(
                f"The gradient must be {list(lease.output.shape)}, as the forward's output was.",
                code="malformed",
                field="grad",
            )
        self._server.counters.redeemed += lease.tokens
        return backward_of(lease, grad, message.prompt_gradient)

    def _sequences(self, span: Span, tensors: dict[str, Tensor], *, with_gradients: bool) -> Sequences:
        return Sequences(
            span,
            tensors,
            with_gradients=with_gradients,
            memory_limit=self._server.working_bytes,
            between=self._server.engine.let_in,
        )

    def _check_staying(self) -> None:
        if self._server.draining:
            raise RequestRefused("This server is going away; use another.", code="draining")

    def _checked_span(self, message: OpenSession | Forward | Backward) -> Span:
        server = self._server
        if message.model != server.model:
            raise RequestRefused("This server serves another model.", code="wrong_model", field="model")
        if not server.span.start <= message.start < message.end <= server.span.end:
            raise RequestRefused(
                f"Blocks {message.start}:{message.end} are not all served here; this server has "
                f"{server.span.start}:{server.span.end}.",
                code="wrong_blocks",
                field="end" if server.span.start <= message.start < server.span.end else "start",
            )
        return server.span.view(message.start, message.end)


async def _in_order(work: Sequence[Coroutine[Any, Any, T]]) -> list[T]:
    """All results; everything waits from the start, so that less urgent work does not come in between.

    The first error gives the rest up.
    """
    tasks = [asyncio.create_task(item) for item in work]
    try:
        return [await task for task in tasks]
    finally:
        for task in tasks:
            await _give_up(task)


async def _give_up(task: asyncio.Task[Any]) -> None:
    """End a task whose result nobody wants any more."""
    task.cancel()
    await asyncio.wait({task})
    if not task.cancelled():
        task.exception()  # seen, so that asyncio does not report it


def _ends_session(request: Message, failure: Failure) -> bool:
    """As `wire/session.py` says: a refused step that computed nothing leaves the session as it was."""
    return isinstance(request, Step | CloseSession) and failure.code not in HARMLESS_CODES
