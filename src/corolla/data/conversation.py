"""A conversation, whatever it was read from.

Invariant: turns are in order of time; `id` is the same for all pieces of one conversation, so that a split by
id never puts half of a conversation into training and half into the held-out part.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

Role = Literal["system", "user", "assistant", "tool"]


@dataclass(frozen=True)
class Turn:
    """What one side said at once. `learn` False keeps a reply as context, without loss."""

    role: Role
    text: str
    learn: bool = True
    # What only a chat template can render, by its name in a message: tool_calls, tool_call_id, name.
    more: Mapping[str, Any] = field(default_factory=dict, hash=False)

    @property
    def about_tools(self) -> bool:
        """Whether it calls tools, or is what one said."""
        return self.role == "tool" or bool(self.more)


@dataclass(frozen=True)
class Conversation:
    """Turns in order; the model learns to say the assistant's. `tools` are those that a template lists."""

    turns: tuple[Turn, ...]
    id: str
    tools: Sequence[Any] = field(default=(), hash=False)

    @property
    def has_reply(self) -> bool:
        """Whether there is an assistant's turn to learn, with something before it."""
        spoken = [turn for turn in self.turns if turn.role != "system"]
        return any(turn.role == "assistant" and turn.learn for turn in spoken[1:])
