"""`corolla status`: the swarm's map."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from statistics import mode
from typing import TYPE_CHECKING, Annotated, Any

import typer

from corolla.cli.common import PeersOption
from corolla.cli.members import MemberOption, client_identity
from corolla.cli.terminal import console, say
from corolla.errors import UsageError
from corolla.text import get_logger

if TYPE_CHECKING:
    from corolla.swarm.directory.directory import ServerRecord

log = get_logger(__name__)


def status(
    peers: PeersOption = None,
    identity: MemberOption = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the records as JSON.")] = False,
) -> None:
    """Show which servers hold which blocks, and which blocks nobody serves."""
    if not peers:
        raise UsageError(
            "Give --peers, the address that `corolla bootstrap` or `corolla serve` printed (or COROLLA_PEERS)."
        )
    records = asyncio.run(fetch(peers, client_identity(identity)))
    if as_json:
        say(json.dumps(as_plain(records), indent=2))
        return
    from corolla.cli.swarm_map import swarm_map

    console.print(swarm_map(records))


async def fetch(peers: list[str], identity: Path | None = None) -> list[ServerRecord]:
    """All servers that the swarm's directory names."""
    from corolla.swarm.node import Node

    node = await Node.create(initial_peers=peers, identity=identity, client_only=True)
    try:
        found = await node.directory.all_servers()
        if node.directory.cut_short:
            log.warning("The directory was cut short: there are more servers than these; ask again.")
        return found
    finally:
        await node.close()


def as_plain(records: list[ServerRecord]) -> dict[str, Any]:
    """The map as JSON: servers, and for each model the ranges that nobody serves."""
    import msgspec

    from corolla.cli.swarm_map import by_model, missing_blocks

    return {
        "servers": [msgspec.to_builtins(record) for record in records],
        "models": [
            {
                "model": model,
                "name": mode(record.model_name for record in group),
                "blocks": group[0].num_blocks,
                "missing": missing_blocks(group),
            }
            for model, group in by_model(records).items()
        ],
    }
