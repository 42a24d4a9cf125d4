"""A session's keys and values are read by its own client, who starts a prefix from them.

Invariant: a stream's own session is read and no other; what goes out is bounded by what a frame may hold.
"""

from __future__ import annotations

from torch import Tensor

from corolla.errors import RequestRefused
from corolla.server.block_server import BlockServer, malformed
from corolla.server.scheduler.execution import Kind
from corolla.server.sessions.session import Client
from corolla.server.sessions.step import ready
from corolla.wire.frames import LIMITS, Packet
from corolla.wire.messages import CacheContents, ReadCache


class ReadRequest:
    """A `ReadCache`."""

    def __init__(
        self, server: BlockServer, client: Client, message: ReadCache, _tensors: dict[str, Tensor]
    ) -> None:
        """Raises `RequestRefused` where the session is gone."""
        self._server = server
        self._session = ready(client.session)
        self._tokens = message.tokens

    def check(self) -> None:
        """See `handlers.Answered`."""
        session, span, tokens = self._session, self._session.span, self._tokens
        if tokens > session.length or session.rows != 1 or session.mask is not None:
            raise malformed(
                "tokens",
                f"Caches are read of a session of one row without padding; this one has {session.rows} rows of "
                f"{session.length} tokens.",
            )
        if span.key_values is None:
            raise malformed(
                "tokens",
                f"Blocks of {span.config.model_type} models keep other things than keys and values of one form.",
            )
        if self.nbytes > LIMITS.max_payload_bytes:
            raise RequestRefused(
                f"The keys and values of {tokens} tokens take {self.nbytes / 2**20:.0f} MiB, and a message holds "
                f"{LIMITS.max_payload_bytes / 2**20:.0f}: ask for fewer tokens.",
                code="too_large",
                field="tokens",
            )

    @property
    def nbytes(self) -> int:
        """Of the answer."""
        span = self._session.span
        width = 0 if span.key_values is None else span.key_values.width
        return 4 * self._tokens * (span.end - span.start) * width

    async def run(self) -> Packet:
        """The keys and values, as a prefix."""
        session, tokens = self._session, self._tokens
        with session.in_use():
            found: Tensor = await self._server.engine.submit(
                Kind.DECODE, lambda: session.read(tokens), peer=session.peer
            )
        return Packet(CacheContents(), {"prefix": found})
