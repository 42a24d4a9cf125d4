"""What the requests of a server have in common, and what is asked of them before anything is computed.

Invariant: a request that passes its checks fits the span and the session it is for, and its computation fits into
memory. Every refusal is typed and names the field that was wrong. Nothing here computes or changes anything.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from corolla.errors import OutOfOrder, ProtocolError, RequestRefused
from corolla.models.span import Span
from corolla.server.block_server import BlockServer
from corolla.server.sessions.session import Session
from corolla.wire.frames import Packet
from corolla.wire.messages import Backward, Failure, FailureCode, Forward, OpenSession


class Answered(Protocol):
    """A request as the stream sees it (`server/handlers.py`)."""

    def check(self) -> None:
        """Raises `RequestRefused`; nothing has changed then, and `run` must not be called."""

    async def run(self) -> Packet:
        """The answer. Raises `RequestRefused`. Cancelled, it leaves nothing behind."""


@dataclass
class Client:
    """Who asks, on one stream."""

    peer: str
    session: Session | None = None  # that is open on the stream


def served_part(server: BlockServer, message: OpenSession | Forward | Backward) -> Span:
    """The part of the server's span that the message is for. Raises `RequestRefused`."""
    served = server.span
    if message.model != server.model:
        raise RequestRefused("This server serves another model.", code="wrong_model", field="model")
    if not served.start <= message.start < message.end <= served.end:
        raise RequestRefused(
            f"Blocks {message.start}:{message.end} are not all served here; this server has "
            f"{served.start}:{served.end}.",
            code="wrong_blocks",
            field="end" if served.start <= message.start < served.end else "start",
        )
    return served.view(message.start, message.end)


def check_staying(server: BlockServer) -> None:
    """That the server takes new work. Raises `RequestRefused`."""
    if server.draining:
        raise RequestRefused("This server is going away; use another.", code="draining")


def check_hidden(hidden: Tensor, span: Span) -> None:
    """Hidden states as wide as the span's. Raises `RequestRefused`."""
    if hidden.shape[2] != span.hidden_size:
        raise RequestRefused(
            f"Hidden states are {span.hidden_size} wide here, not {hidden.shape[2]}.",
            code="malformed",
            field="hidden",
        )


def check_prompts(prompts: Tensor | None, span: Span, *, at_most: int | None = None) -> None:
    """Deep prompts [blocks, P, H] for exactly the span's blocks, or none. Raises `RequestRefused`.

    P may be bounded: a session keeps its prompts, so their room must be bounded by that of its tokens.
    """
    if prompts is None:
        return
    if prompts.shape[0] != span.end - span.start or prompts.shape[2] != span.hidden_size:
        raise RequestRefused(
            f"Deep prompts for these blocks are {span.end - span.start} by tokens by {span.hidden_size}.",
            code="malformed",
            field="prompts",
        )
    if at_most is not None and prompts.shape[1] > at_most:
        raise RequestRefused(
            f"Deep prompts for {prompts.shape[1]} tokens are more than the {at_most} that the session holds.",
            code="malformed",
            field="prompts",
        )


def check_memory(span: Span, *, rows: int, tokens: int, total: int, with_gradients: bool, limit: int) -> None:
    """That `rows` of `tokens` new tokens, of `total` so far, can be computed in `limit` bytes at once.

    Raises `RequestRefused` (too_large). Without it, one client's single long request would end the process:
    memory that the kernel takes back is no exception that could be answered.
    """
    needed = working_bytes(span, rows=rows, tokens=tokens, total=total, with_gradients=with_gradients)
    if needed > limit:
        raise RequestRefused(
            f"Computing {rows} x {tokens} tokens here would take about {needed / 2**30:.1f} GiB of "
            f"{limit / 2**30:.1f}: send fewer rows or shorter sequences.",
            code="too_large",
            field="hidden",
        )


def working_bytes(span: Span, *, rows: int, tokens: int, total: int, with_gradients: bool) -> int:
    """About what a computation takes beyond weights and cache; an estimate on the high side.

    Gradients keep every block's activations; otherwise one block's at a time are there. Attention code that
    writes its weights out takes rows x heads x tokens x total of them, fused code only a mask.
    """
    config, size = span.config, span.dtype.itemsize
    blocks = span.end - span.start if with_gradients else 1
    inner = getattr(config, "intermediate_size", None) or 4 * span.hidden_size
    activations = rows * tokens * (8 * span.hidden_size + 3 * int(inner)) * size
    if getattr(config, "_attn_implementation", "eager") == "eager":
        # The products, and their softmax, which is computed in float32 at least.
        attention = rows * int(config.num_attention_heads) * tokens * total * (size + max(4, size))
        return blocks * (activations + attention)
    return blocks * activations + rows * tokens * total * size


def failure_of(error: ProtocolError) -> Failure:
    """The typed answer to bytes that could not be taken."""
    code: FailureCode = "version" if error.field == "version" else "malformed"
    if isinstance(error, OutOfOrder):
        code = "out_of_order"
    # A field's name may come from the peer, at any length.
    field = None if error.field is None else error.field[:128]
    return Failure(code=code, message=str(error)[:2048], field=field)


def failure_from(refusal: RequestRefused) -> Failure:
    """The typed answer to a request that was refused."""
    return Failure(
        code=refusal.code,  # type: ignore[arg-type]
        message=str(refusal)[:2048],
        field=refusal.field,
        retry_after=refusal.retry_after,
    )
