"""What a session holds when it opens: nothing, what another of its peer's holds, or a bundle.

Invariant: a session begins with what its own peer has given or with what this server has computed by itself,
never with anything of another peer.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from functools import partial

from corolla.server.scheduler.block_server import BlockServer
from corolla.server.scheduler.engine import Kind
from corolla.server.sessions.bundles import Bundle
from corolla.server.sessions.sessions import CachedSession
from corolla.wire.frames import Packet
from corolla.wire.messages import Opened, OpenSession, Origin


@contextlib.contextmanager
def in_use(server: BlockServer, session: CachedSession) -> Iterator[None]:
    """The session is not evicted inside."""
    session.users += 1
    try:
        yield
    finally:
        session.users -= 1
        server.budget.used(session)


def tokens_of(message: OpenSession, bundle: Bundle | None) -> int:
    """How many tokens a row the session must hold."""
    begun = 0 if message.origin is None else message.origin.tokens
    return max(message.max_tokens, begun, 0 if bundle is None else bundle.row.length)


async def begin(
    server: BlockServer, session: CachedSession, message: OpenSession, bundle: Bundle | None
) -> Packet:
    """Fill the session, for which there is room, as its client asks; the answer to that."""
    if message.origin is not None:
        return Packet(Opened(position=await _begin_as(server, session, message.origin)))
    if bundle is None:
        return Packet(Opened())
    share = partial(session.begin_with, bundle.row, message.rows)
    await server.engine.submit(Kind.DECODE, share, peer=session.peer)
    return Packet(Opened(position=bundle.row.length), {"hidden": bundle.outputs_of(session.span)})


async def _begin_as(server: BlockServer, session: CachedSession, origin: Origin) -> int:
    """Begin with what another session of this peer holds, if that is still there; tokens a row."""
    other = server.named.find(session.peer, origin.name)
    if other is None:
        return 0
    with in_use(server, other):
        begun = await server.engine.submit(
            Kind.DECODE, partial(session.begin_as, other, origin), peer=session.peer
        )
    return origin.tokens if begun else 0
