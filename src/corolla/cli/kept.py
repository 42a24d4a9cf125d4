"""What a chat and a bundle keep of their swarm, so that nobody has to give it again.

Invariant: what is typed goes before what a chat has kept, and that before the environment and the config file; a
bundle, which may come from others, is asked last.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from corolla.cli.common import ClientOptions
from corolla.cli.terminal import console
from corolla.errors import UsageError

if TYPE_CHECKING:
    from corolla.chat.transcript import SavedChat
    from corolla.cli.chat import Partner

LOCAL = "local"  # for --peers: a swarm on this machine, whatever else is set


@dataclass(frozen=True)
class KeptSwarm:
    """Where the servers are, and how they are used; the names are those of `ClientOptions`."""

    peers: tuple[str, ...] = ()  # none: on the user's own machine
    trust: tuple[str, ...] | None = None
    identity: str | None = None  # the file
    wire: str = "compute"
    mixed: bool = False
    quantization: str = "none"
    audit: float = 0.0
    local_blocks: int = 0

    @classmethod
    def of(cls, peers: Sequence[str] | None, client: ClientOptions) -> KeptSwarm:
        """What is to be kept of a chat's beginning."""
        options = {name: getattr(client, name) for name in _names()}
        identity = None if client.identity is None else str(client.identity.absolute())
        trust = None if client.trust is None else tuple(client.trust)
        return cls(**options | {"peers": tuple(peers or ()), "identity": identity, "trust": trust})

    @classmethod
    def read(cls, content: Mapping[str, Any], place: Path) -> KeptSwarm:
        """The inverse of `to_dict`. Raises `UsageError`."""
        import msgspec

        try:
            return msgspec.convert(content, cls)
        except msgspec.ValidationError as error:
            raise UsageError(
                f"{place} does not say where its swarm is in a form that this version reads."
            ) from error

    def to_dict(self) -> dict[str, Any]:
        """As JSON values."""
        return asdict(self)

    def going_on(
        self, peers: Sequence[str] | None, client: ClientOptions, typed: Callable[[str], bool]
    ) -> tuple[Sequence[str] | None, ClientOptions]:
        """The peers and options of a chat that goes on: as they were, but for what was `typed`."""
        kept: dict[str, Any] = {name: getattr(self, name) for name in _names() if not typed(name)}
        if "identity" in kept:
            newer = self.identity is None or typed("invite")
            kept["identity"] = client.identity if newer else Path(str(self.identity))
        return (peers if typed("peers") else self.peers or None), replace(client, **kept)


def _names() -> list[str]:
    return [field.name for field in fields(KeptSwarm) if field.name != "peers"]


def where(
    peers: Sequence[str] | None,
    client: ClientOptions,
    partner: Partner,
    saved: SavedChat | None,
    typed: Callable[[str], bool],
) -> tuple[Sequence[str] | None, ClientOptions]:
    """The swarm to talk through: the one given, else that of the chat or of the bundle. Raises `UsageError`."""
    from corolla.chat.repl import notice

    if saved is not None and saved.info.swarm:
        peers, client = KeptSwarm.read(saved.info.swarm, saved.path).going_on(peers, client, typed)
    elif not peers and partner.swarm and partner.prompts is not None:
        found = KeptSwarm.read(partner.swarm, partner.prompts)
        peers = found.peers or None
        if client.trust is None:
            client = replace(client, trust=found.trust)
        if peers:
            notice(console, f"Joining the swarm that the bundle was trained in: {peers[0]}")
            notice(console, f"(--peers {LOCAL} would run the model on this machine)")
    return peers, client


def is_local(peers: Sequence[str] | None) -> bool:
    """Whether a swarm on this machine is asked for."""
    return list(peers or ()) in ([], [LOCAL])
