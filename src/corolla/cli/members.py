"""What the commands that guard a swarm, and those that enter one, have in common.

Invariant: the files of a client's membership lie in the user's data folder, in a folder that others cannot read.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from corolla.config import GuardConfig
from corolla.errors import UsageError
from corolla.places import data_root

GuardedOption = Annotated[
    bool,
    typer.Option("--guarded", help="Let only members in: whom --allow lists, and who has a certificate."),
]
AllowOption = Annotated[
    Path | None,
    typer.Option("--allow", help="File of peer ids that may come in, one a line; implies --guarded."),
]
TrustIssuerOption = Annotated[
    list[str] | None,
    typer.Option(
        "--trust-issuer",
        help="Peer whose certificates count, besides this one's own; may be repeated; implies --guarded.",
    ),
]
InviteOption = Annotated[
    str | None, typer.Option("--invite", help="Invitation to redeem first, as by corolla join.")
]
TrustOption = Annotated[
    Path | None, typer.Option("--trust", help="File of peer ids, one a line: use only these servers.")
]
MemberOption = Annotated[
    Path | None,
    typer.Option(
        "--identity", help="File that keeps this client's peer id (default: the one that corolla join made)."
    ),
]


def guard_config(guarded: bool, allow: Path | None, issuers: Sequence[str] | None) -> GuardConfig | None:
    """Whom to let in; None for everybody. Raises `UsageError` for what is no peer id or no such file."""
    from corolla.swarm.access.membership import peer_file
    from corolla.swarm.transport.identity import is_peer_id

    for issuer in issuers or ():
        if not is_peer_id(issuer):
            raise UsageError(f"--trust-issuer is {issuer!r}, which is not a peer id.")
    if allow is not None:
        peer_file(allow)
    if not (guarded or allow or issuers):
        return None
    return GuardConfig(allow, tuple(issuers or ()))


def own_identity() -> Path:
    """Where `corolla join` keeps this user's identity."""
    return data_root() / "identity"


def client_identity(identity: Path | None, invite: str | None = None) -> Path | None:
    """The identity that a client goes by; None for one of its own that is forgotten afterwards.

    An invitation is redeemed first. Raises `UsageError`, `NotAdmitted`, `SwarmUnavailable`.
    """
    if invite is not None:
        return redeem_invitation(invite, identity)
    return identity or (own_identity() if own_identity().exists() else None)


def redeem_invitation(token: str, identity: Path | None) -> Path:
    """Redeem an invitation for an identity, made if it is not there; its file."""
    import asyncio

    from corolla.swarm.access.join import join

    path = identity or make_folder(own_identity())
    asyncio.run(join(token, path))
    return path


def make_folder(path: Path) -> Path:
    """`path`, whose folder is there now, for its owner only. Raises `UsageError`."""
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"The folder {path.parent} cannot be made: {error.strerror}.") from error
    return path


def trusted_servers(path: Path | None) -> tuple[str, ...] | None:
    """The peers in a --trust file. Raises `UsageError`."""
    from corolla.swarm.access.membership import peer_file

    return None if path is None else tuple(sorted(peer_file(path).content))
