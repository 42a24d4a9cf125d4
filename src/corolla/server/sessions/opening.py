"""A session opens, and holds from the start nothing, what another of its peer's holds, or a bundle.

Invariant: a session begins with what its own peer has given or with what this server has computed by itself,
never with anything of another peer.
"""

from __future__ import annotations

from functools import cached_property

from torch import Tensor

from corolla.models.span import Span
from corolla.server.block_server import BlockServer, check_given, malformed
from corolla.server.scheduler.execution import Kind
from corolla.server.sessions.prefilled import PrefilledPrompt, find
from corolla.server.sessions.session import Client, Session
from corolla.wire.frames import Packet
from corolla.wire.messages import Opened, OpenSession, Origin


class OpenRequest:
    """An `OpenSession`; the session is the client's from `run` on."""

    def __init__(
        self, server: BlockServer, client: Client, message: OpenSession, tensors: dict[str, Tensor]
    ) -> None:
        self._server = server
        self._client = client
        self._message = message
        self._given = tensors
        if message.known is not None:
            self._given = server.kept.with_known(client.peer, message, tensors)

    @cached_property
    def span(self) -> Span:
        """The blocks that it is for. Raises `RequestRefused`."""
        return self._server.part(self._message)

    @cached_property
    def bundle(self) -> PrefilledPrompt | None:
        """What it begins with. Raises `RequestRefused` (no_bundle)."""
        return find(self._server.bundles, self._message.bundle)

    def check(self) -> None:
        """See `handlers.Answered`."""
        span = self.span
        self._server.check_staying()
        most = self._server.pool.layout.cached_of(self._message.max_tokens)
        limit = self._server.budget.tokens(self._server.budget.capacity)
        check_given(self._given, span, prompts_at_most=most, prefix_at_most=limit)
        if self.bundle is not None and self._given:
            raise malformed(
                next(iter(self._given)),
                "A session begins with a bundle's prompt, or blocks are given something else.",
            )

    async def run(self) -> Packet:
        """The answer to a client whose session is open now."""
        server, message, session = self._server, self._message, self._session()
        server.sessions.add(session)
        self._client.session = session
        try:
            with session.in_use():
                await session.reserve(message.rows, self._tokens(), "max_tokens")
                answer = await self._begin(session)
        except BaseException:
            server.sessions.close(session)
            self._client.session = None
            raise
        server.sessions.publish(session)
        return answer

    def _session(self) -> Session:
        server, given, message = self._server, self._given, self._message
        prompts = given.get("prompts") if self.bundle is None else self.bundle.deep_of(self.span)
        public, lora = server.kept.of_operator(message) is not None, given.get("lora")
        return Session(
            self.span,
            server.budget,
            server.pool,
            server.engine.post,
            prompts=None if prompts is None else prompts.to(self.span.device),
            prefix=given.get("prefix"),
            lora=lora,
            targets=given.get("targets"),
            # It is widened to float32.
            held=0 if public or lora is None else lora.numel() * max(4, lora.itemsize),
            peer=self._client.peer,
            name=message.name,
        )

    def _tokens(self) -> int:
        """How many tokens a row the session must hold."""
        message, bundle = self._message, self.bundle
        begun = 0 if message.origin is None else message.origin.tokens
        return max(message.max_tokens, begun, 0 if bundle is None else bundle.row.length)

    async def _begin(self, session: Session) -> Packet:
        """Fill the session, for which there is room, as its client asks."""
        if self._message.origin is not None:
            return Packet(Opened(position=await self._fork_from(session, self._message.origin)))
        bundle, rows = self.bundle, self._message.rows
        if bundle is None:
            return Packet(Opened())
        row = bundle.row
        await self._server.engine.submit(Kind.DECODE, lambda: session.start_on(row, rows), peer=session.peer)
        return Packet(Opened(position=row.length), {"hidden": bundle.outputs_of(session.span)})

    async def _fork_from(self, session: Session, origin: Origin) -> int:
        """Begin with what another session of this peer holds, if that is still there; tokens a row."""
        other = self._server.sessions.find(session.peer, origin.name)
        if other is None:
            return 0
        with other.in_use():
            begun = await self._server.engine.submit(
                Kind.DECODE, lambda: session.fork_from(other, origin), peer=session.peer
            )
        return origin.tokens if begun else 0
