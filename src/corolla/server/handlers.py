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
from collections.abc import Callable
from functools import partial

from torch import Tensor

from corolla.errors import PeerDisconnected, PeerSilent, ProtocolError, RequestRefused
from corolla.models.span import Span
from corolla.server.checks import (
    check_prompts,
    check_span,
    failure_from,
    failure_of,
)
from corolla.server.limits import InFlight
from corolla.server.scheduler.block_server import BlockServer
from corolla.server.scheduler.tasks import give_up
from corolla.server.sessions.bundles import find
from corolla.server.sessions.opening import begin, in_use, tokens_of
from corolla.server.sessions.sessions import CachedSession
from corolla.server.sessions.stepping import take_step, take_steps
from corolla.server.training.sequences import Sequences, backward_of
from corolla.swarm.channel import Channel, TurnedAway
from corolla.swarm.transport.base import Stream
from corolla.wire.failures import meaning
from corolla.wire.frames import Packet
from corolla.wire.messages import (
    Backward,
    Closed,
    CloseSession,
    Failure,
    Forward,
    Gradients,
    OpenSession,
    Output,
    Ping,
    Step,
    Steps,
)

log = logging.getLogger(__name__)


async def handle(server: BlockServer, stream: Stream) -> None:
    """Serve one stream until it ends. With its first argument bound, a `StreamHandler` for `Transport.serve`."""
    conversation = _Stream(server, stream)
    try:
        with server.limits.stream(stream.peer_id, conversation.end), server.diary.stream(stream.peer_id):
            await conversation.run()
    except RequestRefused as refusal:
        await conversation.refuse(failure_from(refusal))
    finally:
        conversation.leave()


class _Stream:
    """The requests of one stream, one after the other."""

    def __init__(self, server: BlockServer, stream: Stream) -> None:
        self._server = server
        self._peer = stream.peer_id
        self._in_flight = InFlight(server.limits.in_flight, stream.peer_id)
        self._channel = Channel(stream, side="server", silence=server.silence, admit=self._in_flight.admit)
        self._session: CachedSession | None = None
        self._name: str | None = None
        self._incoming: asyncio.Task[Packet] | None = None

    async def run(self) -> None:
        """Answer requests until the stream ends. Cancelled, it leaves nothing running."""
        self._incoming = incoming = self._listen()
        try:
            while await self._begun(incoming):
                packet = await incoming
                self._incoming = incoming = self._listen()
                if not await self._answer_while_wanted(packet, incoming):
                    return
                if packet.tensors:
                    self._in_flight.answered()
        except ProtocolError as error:
            await self.refuse(failure_of(error))
        except (PeerDisconnected, PeerSilent):
            return
        finally:
            await give_up(incoming)

    def end(self) -> None:
        """Let `run` return, whatever it does."""
        if self._incoming is not None:
            self._incoming.cancel()

    def leave(self) -> None:
        """Give everything back that the stream has taken."""
        self.close_session()
        self._in_flight.close()

    def _listen(self) -> asyncio.Task[Packet]:
        return asyncio.create_task(self._channel.receive(timeout=None))

    async def _begun(self, incoming: asyncio.Task[Packet]) -> bool:
        """Wait for a request to be there; False for a stream that was ended, or that nobody uses.

        A client that is silent for long loses its session first.
        """
        budgets = self._server.limits.budgets
        while True:
            session = self._session
            patience = budgets.stream_silence if session is None else budgets.session_silence
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
        try:
            with self._server.request_open():
                await asyncio.wait({answer, incoming}, return_when=asyncio.FIRST_COMPLETED)
                if not answer.done() and (incoming.cancelled() or incoming.exception() is not None):
                    return True
                return await answer  # when a request came in, its client has the answer to this one already
        finally:
            await give_up(answer)

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
            log.exception("A %s from %s failed", type(packet.message).__name__, self._peer)
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
        in_line = 0 if self._session is None else self._server.budget.ahead(self._session)
        return in_line or max(0, self._server.engine.waiting - 1)

    async def refuse(self, failure: Failure) -> None:
        """Say why the stream ends here, if its peer listens."""
        with contextlib.suppress(PeerDisconnected, PeerSilent, ProtocolError):
            await self._channel.send(Packet(failure))
        if meaning(failure).garbage:
            self._server.limits.malformed(self._peer)

    async def _reply(self, packet: Packet) -> Packet:
        if isinstance(packet, TurnedAway) and packet.refusal is not None:
            raise packet.refusal
        match packet.message:
            case Ping():
                return Packet(self._server.status())
            case CloseSession():
                self.close_session(keep=packet.message.keep)
                return Packet(Closed())
        amount = len(packet.message.parts) if isinstance(packet.message, Steps) else 1
        what, tokens = _work_of(packet)
        with (
            self._server.limits.requests.held(self._peer, amount),
            self._server.diary.work(self._peer, what, tokens),
        ):
            return await self._computed(packet)

    async def _computed(self, packet: Packet) -> Packet:
        match packet.message:
            case OpenSession():
                return await self._open(packet.message, packet.tensors)
            case Step():
                output = await take_step(self._server, self._session, packet.message, packet.tensors)
                return Packet(Output(), {"hidden": output})
            case Steps():
                return await take_steps(self._server, self._peer, packet.message, packet.tensors["hidden"])
            case Forward():
                return await self._forward(packet.message, packet.tensors)
            case Backward():
                return await self._backward(packet.message, packet.tensors)
        raise RequestRefused("This server does not answer such a message.", code="malformed", field="type")

    # --- sessions -------------------------------------------------------------------------------------------

    async def _open(self, message: OpenSession, tensors: dict[str, Tensor]) -> Packet:
        server = self._server
        span = check_span(message, server.span, server.model)
        self._check_staying()
        bundle = find(server.bundles, message.bundle)
        prompts = tensors.get("prompts")
        check_prompts(prompts, span, at_most=server.pool.layout.cached_of(message.max_tokens))
        if bundle is not None:
            prompts = bundle.deep_of(span)
        self.close_session()
        session = CachedSession(
            span,
            server.budget,
            server.pool,
            server.engine.post,
            prompts=None if prompts is None else prompts.to(span.device),
            peer=self._peer,
        )
        server.limits.sessions.take(self._peer)
        self._session = session
        server.counters.sessions += 1
        try:
            with in_use(server, session):
                await session.reserve(message.rows, tokens_of(message, bundle), "max_tokens")
                reply = await begin(server, session, message, bundle)
        except BaseException:
            self.close_session()
            raise
        if message.name is not None:
            self._name = message.name
            server.named.add(self._peer, message.name, session)
        return reply

    def close_session(self, keep: bool = False) -> None:
        """Free the session's cache, if there is one; or keep it under its name for as long as there is room."""
        if self._session is None:
            return
        session, name, peer = self._session, self._name, self._peer
        self._session = self._name = None
        self._server.counters.sessions -= 1
        self._server.limits.sessions.give(self._peer)
        self._server.engine.forget(session)
        kept = keep and name is not None and self._server.named.keep(peer, name, session)
        if not kept:
            if name is not None:
                self._server.named.remove(peer, name, session)
            session.close()

    # --- training -------------------------------------------------------------------------------------------

    async def _forward(self, message: Forward, tensors: dict[str, Tensor]) -> Packet:
        server = self._server
        span = check_span(message, server.span, server.model)
        self._check_staying()
        work = self._sequences(span, tensors, with_gradients=False)
        run = work.forward if message.lease is None else partial(self._lend, work, message.lease)
        output = await server.train(run, self._peer)
        self._server.counters.forward += work.tokens
        return Packet(Output(), {"hidden": output})

    def _lend(self, work: Sequences, name: str) -> Tensor:
        """Compute a forward and keep its graph if there is room, on the compute thread."""
        if not self._server.leases.may_fit(work.tokens):
            return work.forward()
        output, lease = work.forward_kept()
        if lease is not None:
            self._server.leases.keep(self._peer, name, lease)
        return output

    async def _backward(self, message: Backward, tensors: dict[str, Tensor]) -> Packet:
        server = self._server
        span = check_span(
            message, server.span, server.model
        )  # not refused while draining: its forward may have been done here
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
        grads = await server.train(run, self._peer)
        self._server.counters.backward += tokens
        return Packet(Gradients(), grads)

    def _redeem(self, message: Backward, grad: Tensor) -> dict[str, Tensor]:
        """The backward of a kept graph, on the compute thread."""
        lease = self._server.leases.take(self._peer, message.lease or "")
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
            between=self._server.pause,
        )

    def _check_staying(self) -> None:
        if self._server.draining:
            raise RequestRefused("This server is going away; use another.", code="draining")


def _work_of(packet: Packet) -> tuple[str, int]:
    """What a request is for, and how many tokens it takes through the blocks."""
    hidden = packet.tensors.get("grad" if isinstance(packet.message, Backward) else "hidden")
    tokens = 0 if hidden is None or not hidden.ndim else hidden.numel() // max(hidden.shape[-1], 1)
    return ("training" if isinstance(packet.message, Forward | Backward) else "sessions"), tokens
