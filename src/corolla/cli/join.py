"""`corolla join`: become a member of a guarded swarm."""

from __future__ import annotations

from typing import Annotated

import typer

from corolla.cli.common import ended_by_signals
from corolla.cli.members import MemberOption, make_folder, own_identity, redeem_invitation
from corolla.cli.terminal import say


def join(
    token: Annotated[
        str | None,
        typer.Argument(help="What `corolla invite` printed; without it, only your peer id is shown."),
    ] = None,
    identity: MemberOption = None,
) -> None:
    """Redeem an invitation; without one, print the peer id that the owner of a swarm can put on a list."""
    with ended_by_signals():
        from corolla.swarm.access.invitations import read_invitation
        from corolla.swarm.transport.identity import prepare_identity

    path = identity or make_folder(own_identity())
    if token is None:
        say(prepare_identity(path).peer_id)
        return
    redeem_invitation(token, path)
    options = "" if identity is None else f" --identity {path}"
    say(f"Joined as {prepare_identity(path).peer_id}")
    say(f"Chat with: corolla chat --peers {read_invitation(token).addresses[0]}{options}")
