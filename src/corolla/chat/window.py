"""The part of a conversation that the model sees, as tokens.

Invariant: `ids` are what training would render for the same turns, but that a reply's text is the very tokens
that the model has said. Every exchange in it is complete, with what closes its reply.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass

from corolla.data.conversation import Turn
from corolla.data.render import Renderer


@dataclass(frozen=True)
class Exchange:
    """What was said, what was replied, and the reply's tokens without what closes it."""

    said: str
    reply: str
    reply_ids: tuple[int, ...]


class Window:
    """Some newest exchanges of a conversation, after the system's text if there is one."""

    def __init__(self, renderer: Renderer, system: str | None) -> None:
        self._renderer = renderer
        self._turns = [] if system is None else [Turn("system", system)]
        self._known = 0  # turns that are rendered in `ids`
        self._starts: list[int] = []  # tokens before each exchange
        self.ids: list[int] = []

    def __len__(self) -> int:
        """The number of exchanges."""
        return len(self._starts)

    def prompted(self, said: str) -> list[int]:
        """The whole of the tokens after which the model replies to `said`."""
        return self.ids + self._renderer.prompt_ids([*self._turns, Turn("user", said)], self._known)

    def add(self, exchange: Exchange) -> None:
        """Append an exchange."""
        ids = [*self.prompted(exchange.said), *exchange.reply_ids, *self._renderer.closing_ids]
        self._starts.append(len(self.ids))
        self._turns += [Turn("user", exchange.said), Turn("assistant", exchange.reply)]
        self._known = len(self._turns)
        self.ids = ids

    def drop_newest(self) -> None:
        """Be as before the latest `add`."""
        self.ids = self.ids[: self._starts.pop()]
        del self._turns[-2:]
        self._known = len(self._turns) if self._starts else 0


def newest_that_fit(
    renderer: Renderer, system: str | None, exchanges: Sequence[Exchange], said: str, room: int
) -> Window:
    """A window of as many of the newest exchanges as leave the prompt for `said` within `room` tokens.

    Empty when not even one does; whether `said` alone fits is for the caller to see.
    """

    def window_from(first: int) -> Window:
        window = Window(renderer, system)
        for exchange in exchanges[first:]:
            window.add(exchange)
        return window

    def fits(first: int) -> bool:
        return len(window_from(first).prompted(said)) <= room

    return window_from(bisect_left(range(len(exchanges)), True, key=fits))
