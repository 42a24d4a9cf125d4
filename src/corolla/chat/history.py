"""What was said, and which tokens the model is to see of it.

Invariant: `ids` are the tokens that training has for the same turns: what the renderer opens a conversation
with, then for every exchange in the context the user's turn, the reply as the model said it, and what closes
a reply. They change only at their end, but for the moment when old exchanges are forgotten.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from corolla.data.conversation import Turn
from corolla.data.render import Renderer
from corolla.errors import UsageError


@dataclass(frozen=True)
class Exchange:
    """A message and its reply; `reply_ids` are the reply's own tokens, without what closes it."""

    user: str
    reply: str
    reply_ids: tuple[int, ...]


class ChatHistory:
    """All exchanges, of which the newest from `first` on are the model's context."""

    def __init__(self, renderer: Renderer, *, system: str | None = None) -> None:
        self._renderer = renderer
        self._system = [] if system is None else [Turn("system", system)]
        self.exchanges: list[Exchange] = []
        self.first = 0
        self.ids: list[int] = []
        self._starts: list[int] = []  # where in `ids` each exchange of the context begins

    def prompt_ids(self, user: str) -> list[int]:
        """What to feed after `ids`, so that the model's next tokens are the reply to `user`."""
        return self._fed(self.exchanges[self.first :], user)

    def add(self, exchange: Exchange) -> None:
        """Note an exchange that has taken place."""
        self._starts.append(len(self.ids))
        self.ids = [*self.ids, *self._exchange_ids(self.exchanges[self.first :], exchange)]
        self.exchanges.append(exchange)

    def undo(self, *, room: int) -> bool:
        """Forget the newest exchange; False when there is none.

        When the context ends with it, older exchanges that had been forgotten come back, up to `room` tokens.
        """
        if not self.exchanges:
            return False
        self.exchanges.pop()
        self.ids = self.ids[: self._starts.pop()]
        if not self._starts and self.exchanges:
            self._begin_at(self._first_that_fits("", room))
        return True

    def clear(self) -> None:
        """Forget everything but the system's turn."""
        self.exchanges = []
        self._begin_at(0)

    def make_room(self, user: str, *, limit: int, room: int) -> int:
        """Make `ids` and the prompt for `user` fit `limit` tokens; gives how many exchanges were forgotten.

        Where they do not fit, the newest exchanges that fit `room` tokens are kept: `room` is less than
        `limit`, so that not every coming turn has to forget, and to run the rest of the context anew.
        Raises `UsageError`, and changes nothing, when the message does not fit even alone.
        """
        if len(self.ids) + len(self.prompt_ids(user)) <= limit:
            return 0
        alone = len(self._fed([], user))
        if alone > limit:
            raise UsageError(
                f"This message is {alone} tokens long, and {limit} is the most that fits the model: shorten it."
            )
        before = self.first
        self._begin_at(self._first_that_fits(user, room))
        return self.first - before

    def _first_that_fits(self, user: str, room: int) -> int:
        count = len(self.exchanges)
        for first in range(self.first + 1 if user else 0, count):
            kept = self.exchanges[first:]
            ids, _ = self._rendered(kept)
            if len(ids) + (len(self._fed(kept, user)) if user else 0) <= room:
                return first
        return count

    def _begin_at(self, first: int) -> None:
        self.first = first
        self.ids, self._starts = self._rendered(self.exchanges[first:])

    def _rendered(self, exchanges: Sequence[Exchange]) -> tuple[list[int], list[int]]:
        ids: list[int] = []
        starts = []
        for index, exchange in enumerate(exchanges):
            starts.append(len(ids))
            ids += self._exchange_ids(exchanges[:index], exchange)
        return ids, starts

    def _exchange_ids(self, before: Sequence[Exchange], exchange: Exchange) -> list[int]:
        return [*self._fed(before, exchange.user), *exchange.reply_ids, *self._renderer.closing_ids]

    def _fed(self, before: Sequence[Exchange], user: str) -> list[int]:
        turns = list(self._system)
        for exchange in before:
            turns += [Turn("user", exchange.user), Turn("assistant", exchange.reply)]
        known = len(turns) if before else 0
        return self._renderer.prompt_ids([*turns, Turn("user", user)], known=known)

    def messages(self) -> list[dict[str, str]]:
        """The whole conversation, forgotten parts too, as `role` and `content`."""
        lines = [{"role": turn.role, "content": turn.text} for turn in self._system]
        for exchange in self.exchanges:
            lines.append({"role": "user", "content": exchange.user})
            lines.append({"role": "assistant", "content": exchange.reply})
        return lines
