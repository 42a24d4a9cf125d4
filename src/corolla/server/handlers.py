"""What a server does with each message of a stream.

Invariant: no input of a client ends a server or leaves a session half stepped: a request is checked in full
before anything is enqueued, refused with a typed `Failure` that names the field, and a step that breaks
off in the middle takes its session's cache with it (the client replays). All computing happens in the engine.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from corolla import __version__
from corolla.errors import PeerDisconnected, PeerSilent, ProtocolError, RequestRefused
from corolla.models.span import Span
from corolla.server.engine import Engine, Kind
from corolla.server.kv_cache import CacheBudget, CachedSession
from corolla.swarm.channel import Channel
from corolla.swarm.transport.base import Stream
from corolla.wire.frames import Packet
from corolla.wire.messages import (
    Backward,
    Closed,
    CloseSession,
    Failure,
    FailureCode,
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

log = logging.getLogger(__name__)

FLOATING = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


@dataclass
class Counters:
    """Totals since the server's start, in rows × tokens; and what is open now."""

    sessions: int = 0
    inference: int = 0
    forward: int = 0
    backward: int = 0


class BlockServer:
    """Answers requests for the blocks of one span. `model` is the identity of its checkpoint."""

    def __init__(self, span: Span, engine: Engine, budget: CacheBudget, *, model: str) -> None:
        self.span = span
        self.engine = engine
        self.budget = budget
        self.model = model
        self.counters = Counters()
        self.draining = False
        self._open_requests = 0
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
            if not self._open_requests:
                self._idle.set()

    async def until_idle(self) -> None:
        """Wait until no request is being answered."""
        await self._idle.wait()

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
        while True:
            try:
                packet = await self._channel.receive(timeout=None)
            except (PeerDisconnected, PeerSilent):
                return
            except ProtocolError as error:
                await self._refuse(_failure_of(error))
                return
            try:
                with self._server.request_open():
                    if not await self._answer(packet):
                        return
            except (PeerDisconnected, PeerSilent):
                return

    async def _answer(self, packet: Packet) -> bool:
        """Answer one request; False when the stream is over."""
        try:
            async with self._channel.heartbeat(lambda: self._server.engine.waiting):
                reply = await self._reply(packet)
        except RequestRefused as refusal:
            reply = Packet(
                Failure(
                    code=refusal.code,  # type: ignore[arg-type]
                    message=str(refusal)[:2048],
                    field=refusal.field,
                    retry_after=refusal.retry_after,
                )
            )
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
        if self._server.draining:
            raise RequestRefused("This server is going away; use another.", code="draining")
        prompts = tensors.get("prompts")
        _check_prompts(prompts, span)
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
        _check_hidden(hidden, session.span)
        _check_step(message, tensors, session)
        session.reserve(rows, max(message.reserve, message.position + count))
        arguments = {name: tensors.get(name) for name in ("rows", "mask", "positions")}
        device, dtype = session.span.device, session.span.dtype
        moved = {name: None if tensor is None else tensor.to(device) for name, tensor in arguments.items()}

        def compute() -> Tensor:
            output = session.step(hidden.to(device, dtype), position=message.position, **moved)
            return output.to("cpu", hidden.dtype)

        kind = Kind.DECODE if count == 1 else Kind.PREFILL
        output = await self._server.engine.submit(kind, compute)
        self._server.counters.inference += rows * count
        return Packet(Output(), {"hidden": output})

    def close_session(self) -> None:
        """Free the session's cache, if there is one."""
        if self._session is not None:
            self._session.close()
            self._session = None
            self._server.counters.sessions -= 1

    # --- training -------------------------------------------------------------------------------------------

    async def _forward(self, message: Forward, tensors: dict[str, Tensor]) -> Packet:
        span = self._checked_span(message)
        work = _Sequences(span, tensors)
        output = await self._server.engine.submit(Kind.TRAINING, work.forward)
        self._server.counters.forward += work.tokens
        return Packet(Output(), {"hidden": output})

    async def _backward(self, message: Backward, tensors: dict[str, Tensor]) -> Packet:
        span = self._checked_span(message)
        work = _Sequences(span, tensors)
        grads = await self._server.engine.submit(
            Kind.TRAINING, lambda: work.backward(tensors["grad"], message.prompt_gradient)
        )
        self._server.counters.backward += work.tokens
        return Packet(Gradients(), grads)

    def _checked_span(self, message: OpenSession | Forward | Backward) -> Span:
        server = self._server
        if message.model != server.model:
            raise RequestRefused("This server serves another model.", code="wrong_model", field="model")
        if not server.span.start <= message.start < message.end <= server.span.end:
            raise RequestRefused(
                f"Blocks {message.start}:{message.end} are not all served here; this server has "
                f"{server.span.start}:{server.span.end}.",
                code="wrong_blocks",
                field="start",
            )
        return server.span.view(message.start, message.end)


class _Sequences:
    """Whole sequences on their way through a span, without a cache."""

    def __init__(self, span: Span, tensors: dict[str, Tensor]) -> None:
        """Raises `RequestRefused` for tensors that do not fit the span."""
        _check_hidden(tensors["hidden"], span)
        _check_prompts(tensors.get("prompts"), span)
        self._span = span
        self._tensors = tensors
        self.tokens = int(tensors["hidden"].shape[0] * tensors["hidden"].shape[1])

    def forward(self) -> Tensor:
        """Outputs [R, T, H] in the dtype of the inputs; runs on the compute thread."""
        hidden = self._tensors["hidden"]
        with torch.inference_mode():
            output = self._run(self._moved(hidden), self._tensors.get("prompts"))
        return output.to("cpu", hidden.dtype)

    def backward(self, grad: Tensor, prompt_gradient: bool) -> dict[str, Tensor]:
        """Gradients for the inputs and, where wanted, the deep prompts; computes the span again."""
        sent = self._tensors["hidden"]
        hidden = self._moved(sent).requires_grad_()
        prompts = self._tensors.get("prompts")
        if prompts is not None:
            prompts = prompts.to(self._span.device).requires_grad_(prompt_gradient)
        wanted = [hidden] if prompts is None or not prompt_gradient else [hidden, prompts]
        with torch.enable_grad():
            output = self._run(hidden, prompts)
        grads = torch.autograd.grad(output, wanted, self._moved(grad))
        answer = {"grad": grads[0].to("cpu", sent.dtype)}
        if len(grads) > 1:
            answer["prompts"] = grads[1].to("cpu", torch.float32)
        return answer

    def _moved(self, tensor: Tensor) -> Tensor:
        return tensor.to(self._span.device, self._span.dtype).detach()

    def _run(self, hidden: Tensor, prompts: Tensor | None) -> Tensor:
        mask, positions = self._tensors.get("mask"), self._tensors.get("positions")
        device = self._span.device
        return self._span.forward(
            hidden,
            mask=None if mask is None else mask.to(device),
            positions=None if positions is None else positions.to(device),
            prompts=None if prompts is None else prompts.to(device),
        )


# --- checks -----------------------------------------------------------------------------------------------


def _check_hidden(hidden: Tensor, span: Span) -> None:
    if hidden.shape[2] != span.hidden_size or hidden.dtype not in FLOATING:
        raise RequestRefused(
            f"Hidden states are {span.hidden_size} wide here, not {hidden.shape[2]}.",
            code="malformed",
            field="hidden",
        )


def _check_prompts(prompts: Tensor | None, span: Span) -> None:
    if prompts is not None and (
        prompts.shape[0] != span.end - span.start or prompts.shape[2] != span.hidden_size
    ):
        raise RequestRefused(
            f"Deep prompts for these blocks are {span.end - span.start} by tokens by {span.hidden_size}.",
            code="malformed",
            field="prompts",
        )


def _check_step(message: Step, tensors: dict[str, Tensor], session: CachedSession) -> None:
    """Everything about a step that depends on the session's state."""
    count = int(tensors["hidden"].shape[1])
    if message.position > session.length:
        raise RequestRefused(
            f"The session holds {session.length} tokens; a step cannot begin at {message.position}.",
            code="malformed",
            field="position",
        )
    rows, cached = tensors.get("rows"), session.rows
    if rows is not None and (int(rows.min()) < 0 or int(rows.max()) >= cached):
        raise RequestRefused(f"The session holds rows 0 to {cached - 1}.", code="malformed", field="rows")
    expected = cached if rows is None else int(rows.shape[0])
    if session.length and int(tensors["hidden"].shape[0]) != expected:
        raise RequestRefused(f"The session has {expected} rows.", code="malformed", field="hidden")
    mask = tensors.get("mask")
    if mask is not None and int(mask.shape[1]) != message.position + count:
        raise RequestRefused(
            f"The mask must cover all {message.position + count} tokens.", code="malformed", field="mask"
        )


def _failure_of(error: ProtocolError) -> Failure:
    code: FailureCode = (
        "version" if error.field == "version" else "out_of_order" if error.field == "type" else "malformed"
    )
    return Failure(code=code, message=str(error)[:2048], field=error.field)


def _ends_session(request: Message, failure: Failure) -> bool:
    """As `wire/session.py` says: a refused step that computed nothing leaves the session as it was."""
    return isinstance(request, Step | CloseSession) and failure.code not in HARMLESS_CODES
