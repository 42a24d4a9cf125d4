"""A conversation, whatever it was read from.

Invariant: turns are in order of time; `id` is the same for all pieces of one conversation, so that a split by
id never puts half of a conversation into training and half into the held-out part.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Role = Literal["system", "user", "assistant"]


@dataclass(frozen=True)
class Turn:
    """What one side said at once. `learn` False keeps a reply as context, without loss."""

    role: Role
    text: str
    learn: bool = True


@dataclass(frozen=True)
class Conversation:
    """Turns in order; the model learns to say the assistant's."""

    turns: tuple[Turn, ...]
    id: str

    @property
    def has_reply(self) -> bool:
        """Whether there is an assistant's turn to learn, with something before it."""
        spoken = [turn for turn in self.turns if turn.role != "system"]
        return any(turn.role == "assistant" and turn.learn for turn in spoken[1:])
