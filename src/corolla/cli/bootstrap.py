"""`corolla bootstrap`: a peer that serves no blocks, only the swarm's directory."""

from __future__ import annotations

import asyncio
import os
from typing import Annotated, Any

from corolla.cli.common import DieWithParentOption, OwnPeersOption, ended_by_signals, run_until_stopped
from corolla.cli.fields import Fields, with_fields
from corolla.cli.members import NodeOptions
from corolla.cli.terminal import say


@with_fields
def bootstrap(
    *,
    peers: OwnPeersOption = None,
    options: Annotated[dict[str, Any], Fields(NodeOptions)],
    die_with_parent: DieWithParentOption = False,
) -> None:
    """Start a peer that others join the swarm through; prints the line to paste."""
    config = NodeOptions(**options).config(peers)
    with ended_by_signals(die_with_parent=die_with_parent):
        from corolla.files import ready_file as announced
        from corolla.swarm.node import Node

    async def run(stop: asyncio.Event) -> None:
        node = await Node.create(
            initial_peers=config.initial_peers,
            listen=config.listen or None,
            announce=config.announce or None,
            identity=config.identity,
            guard=config.guard,
        )
        try:
            addresses = await node.join_addresses()
            about = {"peer_id": node.peer_id, "addresses": addresses, "blocks": None, "pid": os.getpid()}
            with announced(config.ready_file, about):
                say(f"--peers {addresses[0]}")
                await stop.wait()
        finally:
            await node.close()

    run_until_stopped(run, die_with_parent=die_with_parent)
