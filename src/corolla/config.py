"""Settings of the processes that people start, checked when they are made.

Invariant: a config that exists is valid by itself; what depends on the machine or the model (a port in use,
blocks that the model does not have) is checked by whoever opens it.
"""

from __future__ import annotations

import math
import os
import re
import sys
from collections.abc import Collection, Iterable
from dataclasses import asdict, dataclass
from functools import lru_cache
from numbers import Integral, Real
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, Union, cast, get_args, get_origin, get_type_hints

from corolla.errors import UsageError

# How activations travel: as they are, or in fewer bytes, which is inexact.
WireFormat = Literal["compute", "float16", "int8"]
# What a client trains beside the frozen model (docs/tuning.md).
TuningMode = Literal["ptune", "deep_ptune", "prefix", "lora"]
LORA_RANK = 8  # where none is given
# How a client keeps its embedding and head: as they are, or in fewer bits.
ClientQuantization = Literal["none", "bfloat16", "int8"]


_WORDS: dict[Any, str] = {
    int: "a whole number",
    float: "a number",
    str: "a text",
    bool: "True or False",
    tuple: "a list of texts",
    type(None): "None",
}


def check_kinds(settings: Any) -> None:
    """Raises `UsageError` where a field of these settings, a dataclass, is of another kind than it is declared.

    Numbers of other libraries become Python's own, which files and messages can hold, and lists tuples.
    """
    kind: Any = type(settings)
    for name, hint in _hints(kind).items():
        value = _as_pythons(getattr(settings, name))
        kinds = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
        if not any(_is_of(value, kind) for kind in kinds):
            words = " or ".join(_WORDS.get(plain := get_origin(one) or one, plain.__name__) for one in kinds)
            raise UsageError(f"{name} is {value!r:.60}; it must be {words}.")
        object.__setattr__(settings, name, value)


@lru_cache
def _hints(settings: Any) -> dict[str, Any]:
    return get_type_hints(settings)


def _as_pythons(value: Any) -> Any:
    if isinstance(value, bool):
        return value
    if isinstance(value, Real):
        return int(value) if isinstance(value, Integral) else float(value)
    return tuple(value) if isinstance(value, list | set | frozenset) else value


def _is_of(value: object, kind: Any) -> bool:
    if kind in (int, float) and isinstance(value, int):
        return not isinstance(value, bool) and (kind is int or abs(value) <= sys.float_info.max)
    if get_origin(kind) is tuple:
        return isinstance(value, tuple) and all(_is_of(one, get_args(kind)[0]) for one in value)
    return kind is Any or isinstance(value, get_origin(kind) or kind)


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


@dataclass(frozen=True)
class SwarmConfig:
    """Where the swarm is, and how a client uses it. Raises `UsageError`.

    `from_pretrained` and the command line take these; a field with a help text is an option of commands.
    """

    peers: tuple[str, ...] = ()  # addresses to join through
    wire: Annotated[str, "How activations travel: compute (exact), float16 or int8 (for slow lines)."] = (
        "compute"
    )
    mixed: Annotated[
        bool, "--mixed", "Use servers of different dtype or quantization together; less exact."
    ] = False
    audit: Annotated[
        float,
        "Share of requests, such as 0.05, that are computed again elsewhere; who lies is not used any more.",
    ] = 0.0
    patience: Annotated[float, "Seconds to wait, without any progress, for servers that are gone."] = 600.0
    local_blocks: Annotated[int, "Run so many of the first blocks on this machine; no server sees those."] = 0
    quantization: str = "none"  # of the client's embedding and head
    identity: Path | None = None  # a file with the key that guarded servers know this client by
    trust: tuple[str, ...] | None = None  # peer ids of the only servers to be used
    blocked: tuple[str, ...] = ()  # peer ids of servers not to be used

    def __post_init__(self) -> None:
        check_kinds(self)
        _check_name("wire", self.wire, get_args(WireFormat))
        _check_name("quantization", self.quantization, get_args(ClientQuantization))
        if not 0 <= self.patience < math.inf:
            raise UsageError(f"patience is {self.patience:g}; give seconds, such as 600.")
        if not 0 <= self.audit <= 1:
            raise UsageError(
                f"The share of requests to audit is {self.audit}; give a number from 0 to 1, such as 0.05."
            )

    @classmethod
    def of(
        cls,
        peers: str | Collection[str] | None = (),
        *,
        identity: str | Path | None = None,
        trust: str | Collection[str] | None = None,
        blocked: str | Collection[str] | None = None,
        **others: Any,
    ) -> SwarmConfig:
        """From what people write; what is None is left at its default."""
        return cls(
            peers=_texts(() if peers is None else peers),
            identity=Path(identity) if isinstance(identity, str | os.PathLike) else identity,
            trust=_texts(trust),
            blocked=_texts(() if blocked is None else blocked),
            **{name: value for name, value in others.items() if value is not None},
        )

    def arguments(self) -> dict[str, Any]:
        """As `from_pretrained` takes them."""
        values = asdict(self)
        renamed = {"initial_peers": "peers", "allowed_servers": "trust", "blocked_servers": "blocked"}
        return {name: values.pop(field) for name, field in renamed.items()} | values

    @property
    def wire_format(self) -> WireFormat:
        """`wire`, which has been checked."""
        return cast(WireFormat, self.wire)

    def check_local(self, num_blocks: int) -> int:
        """`local_blocks`, of so many. Raises `UsageError` unless some are left for the swarm."""
        count = self.local_blocks
        if not 0 <= count < num_blocks:
            raise UsageError(
                f"local_blocks is {count!r}; this model has {num_blocks} blocks, of which 0 to {num_blocks - 1} "
                "may run on this machine."
            )
        return count


def _texts(given: Any) -> Any:
    """One text, or several, as a tuple; anything else as it is."""
    if isinstance(given, str):
        return (given,)
    return tuple(given) if isinstance(given, Iterable) else given


def _check_name(field: str, name: object, known: tuple[str, ...]) -> None:
    if name not in known:
        raise UsageError(f"{field} is {name!r}; it must be one of {', '.join(known)}.")


# How weights are kept: as they are, in 8-bit integers, or (with CUDA) in 4-bit normal floats.
QUANTIZATIONS = ("none", "int8", "nf4")


@dataclass(frozen=True)
class ServerConfig:
    """What `corolla serve` runs; a field with a help text is an option of it."""

    model: str
    node: NodeConfig
    blocks: tuple[int, int] | None = None  # [start, end); None for all
    device: Annotated[str, "cpu, cuda, cuda:1, …"] = "cpu"
    threads: Annotated[int | None, "CPU threads to use at most (default: all cores)."] = None
    dtype: Annotated[str, "auto, float32, bfloat16, float16 or float64."] = "auto"
    quantization: Annotated[str, "How weights are kept: none, int8, or nf4 (CUDA only)."] = "none"
    cache_tokens: Annotated[
        int | None, "Tokens of attention cache (default: what half of the free memory holds)."
    ] = None
    lease_bytes: Annotated[
        int | None,
        "Memory for graphs that training clients will come back for (default: an eighth of what is free).",
    ] = None
    peer_share: Annotated[float, "What one peer can take of streams and bytes here while there is room."] = (
        0.5
    )
    revision: str | None = None
    token: str | None = None
    cache_dir: Path | None = None
    bundles: tuple[Path, ...] = ()  # whose prompts are computed once for all clients

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
