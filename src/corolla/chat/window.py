"""The part of a conversation that the model sees, as tokens.

Invariant: `ids` are what training would render for the same turns, but that a reply's text is the very tokens
that the model has said. Every exchange in it is complete, with what closes its reply.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

from msgspec import Meta

from corolla.data.conversation import Turn
from corolla.data.render import Renderer


@dataclass(frozen=True)
class Exchange:
    """What was said, what was replied, and the reply's tokens without what closes it."""

    said: str
    reply: str
    reply_ids: tuple[Annotated[int, Meta(ge=0)], ...]


class Window:
    """Some newest exchanges of a conversation, after the system's text if there is one."""

    def __init__(self, renderer: Renderer, system: str | None, exchanges: Sequence[Exchange] = ()) -> None:
        self._renderer = renderer
        self._system = [] if system is None else [Turn("system", system)]
        self._exchanges = list(exchanges)
        self._ids: list[int] | None = None

    def __len__(self) -> int:
        """The number of exchanges."""
        return len(self._exchanges)

    @property
    def ids(self) -> list[int]:
        """The exchanges' tokens, with what closes the last reply."""
        if self._ids is None:
            self._ids = self._renderer.ids(self._turns(), self._own()) if self._exchanges else []
        return self._ids

    def prompted(self, said: str) -> list[int]:
        """The whole of the tokens after which the model replies to `said`. Raises `DataError`."""
        return self._renderer.prompt_ids([*self._turns(), Turn("user", said)], self._own())

    def add(self, exchange: Exchange) -> None:
        """Append an exchange."""
        self._exchanges.append(exchange)
        self._ids = None

    def drop_newest(self) -> None:
        """Be as before the latest `add`."""
        self._exchanges.pop()
        self._ids = None

    def _turns(self) -> list[Turn]:
        said = [
            turn
            for exchange in self._exchanges
            for turn in (Turn("user", exchange.said), Turn("assistant", exchange.reply))
        ]
        return [*self._system, *said]

    def _own(self) -> list[tuple[int, ...]]:
        return [exchange.reply_ids for exchange in self._exchanges]


def newest_that_fit(
    renderer: Renderer, system: str | None, exchanges: Sequence[Exchange], said: str, room: int
) -> Window:
    """A window of as many of the newest exchanges as leave the prompt for `said` within `room` tokens.

    Empty when not even one does; whether `said` alone fits is for the caller to see.
    """

    def window_from(first: int) -> Window:
        return Window(renderer, system, exchanges[first:])

    def fits(first: int) -> bool:
        return len(window_from(first).prompted(said)) <= room

    return window_from(bisect_left(range(len(exchanges)), True, key=fits))
