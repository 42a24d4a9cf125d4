"""What the commands that guard a swarm, and those that enter one, have in common.

Invariant: the files of a client's membership lie in the user's data folder, in a folder that others cannot read.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import typer

from corolla.cli.common import CacheDirOption, DtypeOption, PeersOption, RevisionOption, TokenOption
from corolla.config import GuardConfig, NodeConfig, SwarmConfig
from corolla.errors import UsageError
from corolla.places import data_root

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


@dataclass(frozen=True)
class MemberOptions:
    """Where a client's part of a model comes from, and as whom it takes part."""

    peers: PeersOption = None
    revision: RevisionOption = None
    token: TokenOption = None
    identity: MemberOption = None
    invite: InviteOption = None
    trust: TrustOption = None
    dtype: DtypeOption = "auto"
    cache_dir: CacheDirOption = None

    def swarm(self, more: Mapping[str, Any]) -> SwarmConfig:
        """Checked, with the options of `SwarmConfig` itself; nobody's identity yet. Raises `UsageError`."""
        return SwarmConfig(**more, trust=trusted_servers(self.trust), peers=tuple(self.peers or ()))

    def identified(self, swarm: SwarmConfig) -> SwarmConfig:
        """The same with the identity that the client goes by. Raises as `client_identity`."""
        return replace(swarm, identity=client_identity(self.identity, self.invite))

    def source(self) -> dict[str, Any]:
        """Where the files come from, as `open_checkpoint` takes it."""
        return {"revision": self.revision, "token": self.token, "cache_dir": self.cache_dir}


@dataclass(frozen=True)
class ClientOptions(MemberOptions):
    """The same of a client that generates."""

    quantization: Annotated[str, "Of the embedding and the head, here: none, bfloat16 or int8."] = "none"

    def swarm(self, more: Mapping[str, Any]) -> SwarmConfig:
        """See `MemberOptions.swarm`."""
        return replace(super().swarm(more), quantization=self.quantization)


@dataclass(frozen=True)
class NodeOptions:
    """How a peer that others join through takes part in the network."""

    listen: Annotated[
        list[str] | None, "HOST:PORT or multiaddress to listen on (default: this machine only)."
    ] = None
    announce: Annotated[list[str] | None, "Address that others reach this machine at."] = None
    identity: Annotated[Path | None, "File that keeps the peer id; made when it is not there."] = None
    guarded: Annotated[
        bool, "--guarded", "Let only members in: whom --allow lists, and who has a certificate."
    ] = False
    allow: Annotated[Path | None, "File of peer ids that may come in, one a line; implies --guarded."] = None
    trust_issuer: Annotated[
        list[str] | None,
        "Peer whose certificates count, besides this one's own; may be repeated; implies --guarded.",
    ] = None
    ready_file: Annotated[Path | None, "JSON file that is there while the process is ready."] = None

    def config(self, peers: Sequence[str] | None) -> NodeConfig:
        """Checked. Raises `UsageError`, also for what is no address, no peer id or no such file."""
        from corolla.swarm.directory.addresses import join_multiaddr, listen_multiaddr

        for address in peers or ():
            join_multiaddr(address)
        for address in (*(self.listen or ()), *(self.announce or ())):
            listen_multiaddr(address)
        return NodeConfig(
            tuple(peers or ()),
            tuple(self.listen or ()),
            tuple(self.announce or ()),
            self.identity,
            self.ready_file,
            self._guard(),
        )

    def _guard(self) -> GuardConfig | None:
        """Whom to let in; None for everybody."""
        from corolla.swarm.access.membership import PeerFile
        from corolla.swarm.transport.identity import is_peer_id

        issuers = tuple(self.trust_issuer or ())
        for issuer in issuers:
            if not is_peer_id(issuer):
                raise UsageError(f"--trust-issuer is {issuer!r}, which is not a peer id.")
        if self.allow is not None:
            PeerFile(self.allow)
        return GuardConfig(self.allow, issuers) if self.guarded or self.allow or issuers else None


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

    from corolla.swarm.access.admission import join

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
    from corolla.swarm.access.membership import PeerFile

    return None if path is None else tuple(sorted(PeerFile(path).content))
