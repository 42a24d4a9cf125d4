"""Settings of the processes that people start, checked when they are made.

Invariant: a config that exists is valid by itself; what depends on the machine or the model (a port in use,
blocks that the model does not have) is checked by whoever opens it.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from corolla.errors import UsageError


@dataclass(frozen=True)
class GuardConfig:
    """Whom a guarded peer lets in: who is on a list, and who has a certificate."""

    allow: Path | None = None  # a file of peer ids
    issuers: tuple[str, ...] = ()  # besides the peer itself: peers whose certificates count


@dataclass(frozen=True)
class NodeConfig:
    """How a process takes part in the network."""

    initial_peers: tuple[str, ...] = ()
    listen: tuple[str, ...] = ()
    announce: tuple[str, ...] = ()
    identity: Path | None = None
    ready_file: Path | None = None
    guard: GuardConfig | None = None  # None: everybody may come in

    def __post_init__(self) -> None:
        if (
            self.guard is not None
            and not self.guard.allow
            and not self.guard.issuers
            and self.identity is None
        ):
            raise UsageError(
                "--guarded lets those in whom this peer has invited, and needs --identity FILE for that; or give "
                "--allow peers.txt or --trust-issuer PEER_ID."
            )


# How weights are kept: as they are, in 8-bit integers, or (with CUDA) in 4-bit normal floats.
QUANTIZATIONS = ("none", "int8", "nf4")


@dataclass(frozen=True)
class ServerConfig:
    """What `corolla serve` runs."""

    model: str
    node: NodeConfig
    blocks: tuple[int, int] | None = None  # [start, end); None for all
    device: str = "cpu"
    threads: int | None = None  # None for a fair share of the cores
    dtype: str = "auto"
    quantization: str = "none"  # a name in QUANTIZATIONS
    revision: str | None = None
    token: str | None = None
    cache_dir: Path | None = None
    cache_tokens: int | None = None  # None for what half of the free memory holds
    lease_bytes: int | None = None  # of graphs kept for training; None for an eighth of the free memory
    bundles: tuple[Path, ...] = ()  # whose prompts are computed once for all clients
    peer_share: float = 0.5  # of everything that a server has, what one peer can take for certain

    def __post_init__(self) -> None:
        if self.quantization not in QUANTIZATIONS:
            raise UsageError(
                f"--quantization is {self.quantization!r}; it must be one of {', '.join(QUANTIZATIONS)}."
            )
        if self.threads is not None and self.threads < 1:
            raise UsageError(f"--threads is {self.threads}; a server needs at least one.")
        if self.cache_tokens is not None and self.cache_tokens < 1:
            raise UsageError(f"--cache-tokens is {self.cache_tokens}; a server needs at least one.")
        if not 0.0 < self.peer_share <= 1.0:
            raise UsageError(f"--peer-share is {self.peer_share:g}; give a share above 0 and at most 1.")
        if self.lease_bytes is not None and self.lease_bytes < 0:
            raise UsageError(f"--lease-bytes is {self.lease_bytes}; give 0 to keep no graphs.")


def parse_blocks(text: str) -> tuple[int, int]:
    """`0:15` to (0, 15). Raises `UsageError`."""
    match = re.fullmatch(r"(\d+):(\d+)", text.strip())
    if match is None or int(match[1]) >= int(match[2]):
        raise UsageError(
            f"--blocks is {text!r}; give the first block and the one after the last, such as 0:15."
        )
    return int(match[1]), int(match[2])
