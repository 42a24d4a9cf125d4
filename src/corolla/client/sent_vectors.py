"""Prefixes and adapters travel once: a server that has one is told its name, and sent it when it says that it has not.

Invariant: a name stands for the same vectors, number for number: what is computed does not depend on which was sent.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable

import msgspec
from cachetools import LRUCache
from torch import Tensor

from corolla.errors import RequestRefused
from corolla.models.prompts import BlockVectors
from corolla.swarm.directory.routing import Hop
from corolla.wire.failures import Remedy, meaning
from corolla.wire.frames import Packet
from corolla.wire.messages import Backward, Forward, OpenSession

Send = Callable[[Packet], Awaitable[Packet]]

MOST_HOPS = 512  # of which it is remembered what they have; others are sent it again


class SentVectors:
    """Which vectors this client's servers have. On the event loop only."""

    def __init__(self) -> None:
        # Of each server's blocks, the digest that was last spoken of, and whether the server has it.
        self._last: LRUCache[Hop, tuple[str, bool]] = LRUCache(MOST_HOPS)

    async def ask(
        self,
        hop: Hop,
        packet: Packet,
        vectors: BlockVectors,
        send: Send,
        *,
        curious: bool = False,
    ) -> Packet:
        """The answer to a request with those of the `vectors` that the hop's blocks are given. Raises as `send`.

        `curious` asks a server by name first, though it was not sent them: its operator may have given them to it.
        """
        message = packet.message
        assert isinstance(message, OpenSession | Forward | Backward)
        named = Packet(msgspec.structs.replace(message, known=vectors.digest), packet.tensors)
        digest, has_it = self._last.get(hop, ("", False))
        if has_it if digest == vectors.digest else curious:
            try:
                return await send(Packet(named.message, _without(packet.tensors, vectors)))
            except RequestRefused as refusal:
                if meaning(refusal).remedy is not Remedy.SEND_MORE:
                    raise
        self._last[hop] = (vectors.digest, False)
        reply = await send(named)
        self._last[hop] = (vectors.digest, True)
        return reply


def _without(tensors: dict[str, Tensor], vectors: BlockVectors) -> dict[str, Tensor]:
    return {name: one for name, one in tensors.items() if name not in vectors.tensor_names}
