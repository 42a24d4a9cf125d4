"""`corolla bootstrap`: a peer that serves no blocks, only the swarm's directory."""

from __future__ import annotations

import asyncio
import os

from corolla.cli.common import (
    AnnounceOption,
    DieWithParentOption,
    IdentityOption,
    ListenOption,
    PeersOption,
    ReadyFileOption,
    ended_by_signals,
    run_until_stopped,
    say,
)


def bootstrap(
    peers: PeersOption = None,
    listen: ListenOption = None,
    announce: AnnounceOption = None,
    identity: IdentityOption = None,
    ready_file: ReadyFileOption = None,
    die_with_parent: DieWithParentOption = False,
) -> None:
    """Start a peer that others join the swarm through; prints the line to paste."""
    with ended_by_signals():
        from corolla.swarm.node import Node
        from corolla.swarm.ready_file import ready_file as announced

    async def run(stop: asyncio.Event) -> None:
        node = await Node.create(
            initial_peers=peers or (), listen=listen, announce=announce, identity=identity
        )
        try:
            addresses = await node.join_addresses()
            about = {"peer_id": node.peer_id, "addresses": addresses, "blocks": None, "pid": os.getpid()}
            with announced(ready_file, about):
                say(f"--peers {addresses[0]}")
                await stop.wait()
        finally:
            await node.close()

    run_until_stopped(run, die_with_parent=die_with_parent)
