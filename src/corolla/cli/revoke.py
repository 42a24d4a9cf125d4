"""`corolla revoke`: take a peer's certificate back."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from corolla.cli.terminal import say
from corolla.errors import UsageError


def revoke(
    peer_id: Annotated[str, typer.Argument(help="The peer that shall not come in any more.")],
    identity: Annotated[Path, typer.Option("--identity", help="The identity of the guarded peer.")],
) -> None:
    """Shut a peer out of the guarded peers that run with this identity, within seconds."""
    from corolla.swarm.access.membership import beside
    from corolla.swarm.access.membership import revoke as run
    from corolla.swarm.transport.identity import Identity, is_peer_id

    if not is_peer_id(peer_id):
        raise UsageError(f"{peer_id!r} is not a peer id.")
    Identity.read(identity)
    new = run(identity, peer_id)
    say(f"{peer_id} {'is' if new else 'was already'} revoked in {beside(identity, 'revoked')}")
