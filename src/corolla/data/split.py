"""Which conversations are held out, and which examples are drawn.

Invariant: no id is on both sides; who is held out depends on the seed and the ids only, not on their order.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Sequence
from typing import TypeVar

from corolla.data.conversation import Conversation
from corolla.errors import DataError

T = TypeVar("T")


def split_conversations(
    conversations: Sequence[Conversation], *, held_out: float | int, seed: int
) -> tuple[list[Conversation], list[Conversation]]:
    """Training and held-out conversations; `held_out` below 1 is a share, else a number of conversations.

    Raises `DataError` when nothing would be left to train on.
    """
    ids = sorted({conversation.id for conversation in conversations}, key=lambda name: _rank(name, seed))
    count = max(1, round(held_out * len(ids)) if held_out < 1 else int(held_out))
    if count >= len(ids):
        raise DataError(
            f"There are {len(ids)} conversations, too few to hold {count} out and train on the rest: "
            "give more data or a smaller --held-out."
        )
    kept_out = set(ids[:count])
    train = [conversation for conversation in conversations if conversation.id not in kept_out]
    return train, [conversation for conversation in conversations if conversation.id in kept_out]


def subsample(items: Sequence[T], count: int, seed: int) -> list[T]:
    """`count` items (or all there are) drawn without replacement, in random order."""
    chosen = list(items)
    random.Random(seed).shuffle(chosen)
    return chosen[:count]


def _rank(name: str, seed: int) -> bytes:
    return hashlib.sha256(f"{seed}:{name}".encode()).digest()
