"""One peer of a swarm: its transport and its view of the directory, made and ended together.

Invariant: after `close()`, or after a `create` that failed, no process, socket or file of the peer is left.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from corolla.swarm.directory import Directory
from corolla.swarm.loop import EventLoopThread
from corolla.swarm.transport.base import Transport

__all__ = ["EventLoopThread", "Node"]


class Node:
    """A transport and a directory. Over libp2p by `create`; of the in-memory twins by the constructor."""

    def __init__(self, transport: Transport, directory: Directory) -> None:
        self.transport = transport
        self.directory = directory

    @classmethod
    async def create(
        cls,
        *,
        initial_peers: Sequence[str] = (),
        listen: Sequence[str] | None = None,
        announce: Sequence[str] | None = None,
        identity: Path | None = None,
        client_only: bool = False,
    ) -> Node:
        """Join the swarm through `initial_peers`, or begin one when there are none.

        `listen` and `announce` are addresses (`HOST:PORT` or multiaddresses; by default 127.0.0.1 and a free
        port); `identity` is a file that keeps the peer id, written when it is not there. With `client_only`
        the peer is not asked to keep the swarm's records. Raises `UsageError` for a malformed address, a
        port in use or an unusable identity file, `SwarmUnavailable` when none of the peers answers.
        """
        # Importing the network layer takes seconds; who only wants the in-memory twins does not pay for it.
        from corolla.swarm.directory_dht import DHTDirectory
        from corolla.swarm.transport.libp2p import Libp2pTransport

        transport = await Libp2pTransport.create(
            initial_peers=initial_peers,
            listen=listen,
            announce=announce,
            identity=identity,
            client_only=client_only,
        )
        try:
            directory = await DHTDirectory.create(
                transport, initial_peers=initial_peers, client_only=client_only
            )
        except BaseException:
            await transport.close()
            raise
        return cls(transport, directory)

    @property
    def peer_id(self) -> str:
        """This peer's id."""
        return self.transport.peer_id

    async def join_addresses(self) -> list[str]:
        """Addresses that others can join through."""
        return await self.transport.addresses()

    async def close(self) -> None:
        """Leave the swarm; safe to call twice."""
        await self.directory.close()
        await self.transport.close()
