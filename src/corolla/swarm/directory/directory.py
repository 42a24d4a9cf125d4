"""Who serves which blocks, as far as this peer has heard.

Invariant: a record that comes out of a directory is well-formed and not expired, and its texts are of a closed set
or clean; whether its claims are true is found out by using the server.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Annotated, Literal

import msgspec

from corolla.text import one_line
from corolla.wire.messages import BlockIndex, Count

MAX_NAME = 256  # characters of a model's name

Word = Annotated[str, msgspec.Meta(min_length=1, max_length=128, pattern=r"^[!-~]+\Z")]


class ServerRecord(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What a server announces of itself. Blocks are [start, end)."""

    peer_id: Word
    model: Word  # identity of the checkpoint, not its name: models/checkpoints/checkpoint.py
    model_name: Annotated[str, msgspec.Meta(max_length=MAX_NAME)]  # for people; proves nothing
    num_blocks: BlockIndex  # of the whole model
    start: BlockIndex
    end: BlockIndex
    dtype: Annotated[str, msgspec.Meta(pattern=r"^(float16|bfloat16|float32|float64)\Z")]
    quantization: Annotated[str, msgspec.Meta(pattern=r"^(none|int8|nf4)\Z")] = "none"
    throughput: Annotated[float, msgspec.Meta(ge=0, le=1e9)] = 0.0  # tokens/s through its span, measured
    free_cache_tokens: Count = 0
    version: Annotated[str, msgspec.Meta(max_length=64, pattern=r"^[0-9A-Za-z.+!-]*\Z")] = ""
    state: Literal["serving", "draining"] = "serving"

    @property
    def numerics(self) -> str:
        """In what arithmetic it computes: servers of one kind give the same up to rounding."""
        return self.dtype if self.quantization == "none" else f"{self.dtype}+{self.quantization}"

    @property
    def is_sound(self) -> bool:
        """What the types cannot say: its blocks are a part of the model, and its name steers no terminal."""
        blocks = self.start < self.end <= self.num_blocks
        return blocks and self.model_name == one_line(self.model_name, characters=MAX_NAME)


class Directory(ABC):
    """Publishes and finds `ServerRecord`s."""

    cut_short = (
        False  # whether the last reading missed some records that there are: a name missing proves nothing
    )

    @abstractmethod
    async def announce(self, record: ServerRecord, ttl: float) -> None:
        """Publish, valid for `ttl` seconds; replaces the peer's earlier record for this model."""

    @abstractmethod
    async def withdraw(self, record: ServerRecord) -> None:
        """Take the peer's record back at once (as far as the directory reaches)."""

    @abstractmethod
    async def servers(self, model: str) -> list[ServerRecord]:
        """All valid records for a model identity, fresh from the directory.

        Raises `SwarmUnavailable` when nobody who keeps it answers.
        """

    @abstractmethod
    async def all_servers(self) -> list[ServerRecord]:
        """All valid records of all models: the swarm's map. Raises as `servers`."""

    @abstractmethod
    async def close(self) -> None:
        """Stop taking part in the directory; safe to call twice. Records stay until they expire."""
