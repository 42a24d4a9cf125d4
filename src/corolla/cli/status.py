"""`corolla status`: the swarm's map."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from corolla.cli.common import PeersOption
from corolla.cli.members import MemberOption, client_identity
from corolla.cli.terminal import console, say
from corolla.errors import UsageError
from corolla.text import get_logger

if TYPE_CHECKING:
    from rich.console import RenderableType

    from corolla.swarm.directory.directory import ServerRecord

log = get_logger(__name__)

WATCH_SECONDS = 2.0


def status(
    peers: PeersOption = None,
    identity: MemberOption = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the records as JSON.")] = False,
    watch: Annotated[bool, typer.Option("--watch", help="Show it again and again, until Ctrl-C.")] = False,
) -> None:
    """Show which servers hold which blocks, and which blocks nobody serves."""
    if not peers:
        raise UsageError(
            "Give --peers, the address that `corolla bootstrap` or `corolla serve` printed (or COROLLA_PEERS)."
        )
    if watch and as_json:
        raise UsageError("--watch is for people; ask for --json as often as you need it.")
    if watch:
        with contextlib.suppress(KeyboardInterrupt):
            asyncio.run(follow(peers, client_identity(identity)))
        return
    records = asyncio.run(fetch(peers, client_identity(identity)))
    if as_json:
        from corolla.swarm.directory.summary import as_plain

        say(json.dumps(as_plain(records), indent=2))
        return
    from corolla.cli.swarm_map import swarm_map

    console.print(swarm_map(records))


async def follow(peers: list[str], identity: Path | None = None) -> None:
    """Draw the map anew every few seconds."""
    from rich.live import Live

    from corolla.cli.swarm_map import swarm_map
    from corolla.swarm.node import Node

    node = await Node.create(initial_peers=peers, identity=identity, client_only=True)
    try:
        with contextlib.ExitStack() as stack:
            show: Callable[[RenderableType], object] = (
                console.print
            )  # where there is no screen, one map after the other
            if console.is_terminal:
                live = stack.enter_context(Live(console=console, auto_refresh=False, screen=True))
                show = partial(live.update, refresh=True)
            while True:
                show(swarm_map(await node.directory.all_servers()))
                await asyncio.sleep(WATCH_SECONDS)
    finally:
        await node.close()


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
