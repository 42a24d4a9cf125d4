"""`corolla bootstrap`: a peer that serves no blocks, only the swarm's directory."""

from __future__ import annotations

import asyncio
import os

from corolla.cli.common import (
    AnnounceOption,
    DieWithParentOption,
    IdentityOption,
    ListenOption,
    OwnPeersOption,
    ReadyFileOption,
    ended_by_signals,
    run_until_stopped,
)
from corolla.cli.members import AllowOption, GuardedOption, TrustIssuerOption, guard_config
from corolla.cli.terminal import say
from corolla.config import NodeConfig


def bootstrap(
    peers: OwnPeersOption = None,
    listen: ListenOption = None,
    announce: AnnounceOption = None,
    identity: IdentityOption = None,
    guarded: GuardedOption = False,
    allow: AllowOption = None,
    trust_issuer: TrustIssuerOption = None,
    ready_file: ReadyFileOption = None,
    die_with_parent: DieWithParentOption = False,
) -> None:
    """Start a peer that others join the swarm through; prints the line to paste."""
    node_config = NodeConfig(
        tuple(peers or ()),
        tuple(listen or ()),
        tuple(announce or ()),
        identity,
        ready_file,
        guard=guard_config(guarded, allow, trust_issuer),
    )
    with ended_by_signals(die_with_parent=die_with_parent):
        from corolla.files import ready_file as announced
        from corolla.swarm.node import Node

    async def run(stop: asyncio.Event) -> None:
        node = await Node.create(
            initial_peers=peers or (),
            listen=listen,
            announce=announce,
            identity=identity,
            guard=node_config.guard,
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
