"""`corolla invite`: make a token that lets one peer into a guarded swarm."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated

import typer

from corolla.cli.common import OwnPeersOption
from corolla.cli.terminal import say
from corolla.errors import UsageError

_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400}


def invite(
    identity: Annotated[
        Path, typer.Option("--identity", help="The identity of a running peer of the swarm.")
    ],
    peers: OwnPeersOption = None,
    expires: Annotated[
        str, typer.Option(help="How long the token can be redeemed, as 30m, 24h or 7d.")
    ] = "24h",
    valid: Annotated[
        str, typer.Option(help="How long the certificate is good that it is redeemed for.")
    ] = "90d",
    output: Annotated[Path | None, typer.Option(help="File for the token, instead of the terminal.")] = None,
) -> None:
    """Invite somebody: a token that one peer can redeem once, with corolla join."""
    from corolla.files import write_private
    from corolla.swarm.access.invitations import sign_invitation
    from corolla.swarm.access.membership import read_addresses
    from corolla.swarm.directory.addresses import join_multiaddr
    from corolla.swarm.transport.identity import Identity

    seconds, certificate_seconds = duration("--expires", expires), duration("--valid", valid)
    issuer = Identity.read(identity)
    addresses = [join_multiaddr(address) for address in peers or read_addresses(identity)]
    if not any(address.endswith(f"/p2p/{issuer.peer_id}") for address in addresses):
        raise UsageError(
            f"The token is redeemed at peer {issuer.peer_id}: start it with --identity {identity}, or give its "
            "address with --peers."
        )
    token = sign_invitation(issuer, addresses, seconds=seconds, certificate_seconds=certificate_seconds)
    if output is None:
        say(token)
        return
    try:
        write_private(output, token.encode() + b"\n")
    except OSError as error:
        raise UsageError(f"The file {output} cannot be written: {error.strerror}.") from error


def duration(option: str, text: str) -> float:
    """`24h` to seconds. Raises `UsageError`."""
    match = re.fullmatch(r"(\d{1,6})([smhd])", text.strip())
    if match is None or not int(match[1]):
        raise UsageError(f"{option} is {text!r}; give a number and a unit, such as 30m, 24h or 7d.")
    return float(int(match[1]) * _UNITS[match[2]])
