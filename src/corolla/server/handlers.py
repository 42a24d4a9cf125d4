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
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor

from corolla import __version__
from corolla.errors import PeerDisconnected, PeerSilent, ProtocolError, RequestRefused
from corolla.models.span import Span
from corolla.server.checks import (
    check_hidden,
    check_memory,
    check_prompts,
    check_step,
    failure_from,
    failure_of,
)
from corolla.server.engine import Engine, Kind
from corolla.server.kv_cache import CacheBudget, CachedSession
from corolla.server.sequences import Sequences
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
    Output,
    Ping,
    ServerStatus,
    Step,
)
from corolla.wire.session import FATAL_CODES, HARMLESS_CODES

T = TypeVar("T")

log = logging.getLogger(__name__)

PREFILL_TOKENS = 512  # rows x tokens that are computed at once, so that others' decode steps come in between
WORKING_BYTES = 4 * 2**30


@dataclass
class Counters:
    """Totals since the server's start, in rows × tokens; and what is open now."""

    sessions: int = 0
    inference: int = 0
    forward: int = 0
    backward: int = 0


class BlockServer:
    """Answers requests for the blocks of one span."""

    def __init__(
        self,
        span: Span,
        engine: Engine,
        budget: CacheBudget,
        *,
        model: str,
        working_bytes: int = WORKING_BYTES,
    ) -> None:
        """`model` is the identity of the span's checkpoint; a computation that would need more than
        `working_bytes` beside weights and caches is refused."""
        self.working_bytes = working_bytes
        self.span = span
        self.engine = engine
        self.budget = budget
        self.model = model
        self.counters = Counters()
        self.draining = False
        self._open_requests = 0
        self._last_request = -float("inf")
        self._idle = asyncio.Event()
        self._idle.set()

    @contextlib.contextmanager
    def request_open(self) -> Iterator[None]:
        """Counts a request while it is being answered."""
        self._open_requests += 1
        self._idle.clear()
        try:
            yield
        finally:
            self._open_requests -= 1
            self._last_request = asyncio.get_running_loop().time()
            if not self._open_requests:
                self._idle.set()

    async def until_idle(self, quiet: float = 0.0) -> None:
        """Wait until no request is being answered and, for `quiet` seconds, none was.

        Between two steps of a reply, or a forward and its backward, a client computes too.
        """
        loop = asyncio.get_running_loop()
        while True:
            await self._idle.wait()
            missing = self._last_request + quiet - loop.time()
            if missing <= 0:
                return
            await asyncio.sleep(missing)

    async def handle(self, stream: Stream) -> None:
        """Serve one stream until it ends. A `StreamHandler` for `Transport.serve`."""
        conversation = _Stream(self, Channel(stream, side="server"))
        try:
            await conversation.run()
        finally:
            conversation.close_session()

    def status(self) -> ServerStatus:
        """What `Ping` is answered with."""
        return ServerStatus(
            model=self.model,
            start=self.span.start,
            end=self.span.end,
            dtype=str(self.span.dtype).removeprefix("torch."),
            version=__version__,
            sessions=self.counters.sessions,
            free_cache_tokens=self.free_tokens,
            tokens_inference=self.counters.inference,
            tokens_forward=self.counters.forward,
            tokens_backward=self.counters.backward,
        )

    @property
    def free_tokens(self) -> int:
        """Tokens that still fit, for a session over all of the span's blocks."""
        return self.budget.free // (self.span.end - self.span.start)


class _Stream:
    """The requests of one stream, one after the other."""

    def __init__(self, server: BlockServer, channel: Channel) -> None:
        self._server = server
        self._channel = channel
        self._session: CachedSession | None = None

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
            async with self._channel.heartbeat(lambda: self._server.engine.waiting):
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

    async def _refuse(self, failure: Failure) -> None:
        try:
            await self._channel.send(Packet(failure))
        except (PeerDisconnected, PeerSilent, ProtocolError):
            return

    async def _reply(self, packet: Packet) -> Packet:
        match packet.message:
            case OpenSession():
                return self._open(packet.message, packet.tensors)
            case Step():
                return await self._step(packet.message, packet.tensors)
            case CloseSession():
                self.close_session()
                return Packet(Closed())
            case Forward():
                return await self._forward(packet.message, packet.tensors)
            case Backward():
                return await self._backward(packet.message, packet.tensors)
            case Ping():
                return Packet(self._server.status())
        raise RequestRefused("This server does not answer such a message.", code="malformed", field="type")

    # --- sessions -------------------------------------------------------------------------------------------

    def _open(self, message: OpenSession, tensors: dict[str, Tensor]) -> Packet:
        span = self._checked_span(message)
        self._check_staying()
        prompts = tensors.get("prompts")
        check_prompts(prompts, span, at_most=message.max_tokens)
        self.close_session()
        self._session = CachedSession(
            span,
            self._server.budget,
            rows=message.rows,
            max_tokens=message.max_tokens,
            prompts=None if prompts is None else prompts.to(span.device),
        )
        self._server.counters.sessions += 1
        return Packet(Opened())

    async def _step(self, message: Step, tensors: dict[str, Tensor]) -> Packet:
        session = self._session
        if session is None:
            raise RequestRefused("The session's cache is gone; replay it.", code="evicted")
        hidden = tensors["hidden"]
        rows, count = int(hidden.shape[0]), int(hidden.shape[1])
        check_hidden(hidden, session.span)
        check_step(message, tensors, session)
        width = max(1, PREFILL_TOKENS // rows)
        total = message.position + count
        limit = self._server.working_bytes
        check_memory(
            session.span,
            rows=rows,
            tokens=min(width, count),
            total=total,
            with_gradients=False,
            limit=limit,
        )
        session.reserve(rows, max(message.reserve, total))
        kind = Kind.DECODE if count == 1 else Kind.PREFILL
        pieces = _pieces(session, message.position, tensors, width)
        outputs = await _in_order([self._server.engine.submit(kind, piece) for piece in pieces])
        self._server.counters.inference += rows * count
        return Packet(Output(), {"hidden": torch.cat(outputs, dim=1)})

    def close_session(self) -> None:
        """Free the session's cache, if there is one."""
        if self._session is not None:
            self._session.close()
            self._session = None
            self._server.counters.sessions -= 1

    # --- training -------------------------------------------------------------------------------------------

    async def _forward(self, message: Forward, tensors: dict[str, Tensor]) -> Packet:
        span = self._checked_span(message)
        self._check_staying()
        work = Sequences(span, tensors, with_gradients=False, memory_limit=self._server.working_bytes)
        output = await self._server.engine.submit(Kind.TRAINING, work.forward)
        self._server.counters.forward += work.tokens
        return Packet(Output(), {"hidden": output})

    async def _backward(self, message: Backward, tensors: dict[str, Tensor]) -> Packet:
        span = self._checked_span(message)  # not refused while draining: its forward may have been done here
        work = Sequences(span, tensors, with_gradients=True, memory_limit=self._server.working_bytes)
        grads = await self._server.engine.submit(
            Kind.TRAINING, lambda: work.backward(message.prompt_gradient)
        )
        self._server.counters.backward += work.tokens
        return Packet(Gradients(), grads)

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


def _pieces(
    session: CachedSession, position: int, tensors: dict[str, Tensor], width: int
) -> Iterator[Callable[[], Tensor]]:
    """A step cut into computations of at most `width` tokens a row, to be run one after the other.

    Each gives its outputs [R, T', H] on the CPU, in the dtype of the inputs.
    """
    device, dtype = session.span.device, session.span.dtype
    hidden, mask, ids = tensors["hidden"], tensors.get("mask"), tensors.get("positions")
    rows = tensors.get("rows")

    def piece(begin: int, end: int) -> Tensor:
        output = session.step(
            hidden[:, begin:end].to(device, dtype),
            position=position + begin,
            rows=rows.to(device) if rows is not None and begin == 0 else None,
            mask=None if mask is None else mask[:, : position + end].to(device),
            positions=None if ids is None else ids[:, begin:end].to(device),
        )
        return output.to("cpu", hidden.dtype)

    for begin in range(0, int(hidden.shape[1]), width):
        yield partial(piece, begin, min(begin + width, int(hidden.shape[1])))


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
