"""What a chat and a bundle keep of their swarm, so that nobody has to give it again.

Invariant: what is typed goes before what a chat has kept, and that before the environment and the config file; a
bundle, which may come from others, is asked last.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from corolla.config import SwarmConfig
from corolla.errors import UsageError

LOCAL = "local"  # for --peers: a swarm on this machine, whatever else is set
SAVED = [field.name for field in fields(SwarmConfig) if field.name != "patience"]


def is_local(peers: Sequence[str] | None) -> bool:
    """Whether a swarm on this machine is asked for."""
    return list(peers or ()) in ([], [LOCAL])


def to_saved(client: SwarmConfig) -> dict[str, Any]:
    """What is to be kept, as JSON values; `read_saved` reads it."""
    saved = {name: getattr(client, name) for name in SAVED}
    identity = None if client.identity is None else str(client.identity.absolute())
    return saved | {"peers": () if is_local(client.peers) else client.peers, "identity": identity}


def read_saved(content: Mapping[str, Any], place: Path) -> SwarmConfig:
    """What was kept at `place`. Raises `UsageError`."""
    import msgspec

    try:
        return msgspec.convert(content, SwarmConfig, dec_hook=lambda kind, value: kind(value))
    except msgspec.ValidationError as error:
        raise UsageError(
            f"{place} does not say where its swarm is in a form that this version reads."
        ) from error


def going_on(saved: SwarmConfig, given: SwarmConfig, typed: Callable[[str], bool]) -> SwarmConfig:
    """The options of a chat that goes on: as they were, but for what was `typed`."""
    kept = {name: getattr(saved, name) for name in SAVED if not typed(name)}
    if saved.identity is None or typed("invite"):
        kept.pop("identity", None)
    return replace(given, **kept)
