"""A reply's text as its tokens come.

Invariant: the pieces, joined, are what the tokenizer decodes from all tokens up to what ended the reply; nothing of a
stop text is ever given out, nor half of a character.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

NOT_YET = "\ufffd"  # what some bytes of a character decode to


class TextReader:
    """Reads one reply; `ended` once it has come to an end token or a stop text."""

    def __init__(
        self,
        tokenizer: Any,
        *,
        ends: Collection[int] = (),
        stops: Sequence[str] = (),
        tail: str = "",
        special: bool = False,
        before: Sequence[int] = (),
    ) -> None:
        """A reply ends with any of the tokens `ends` or the texts `stops`; `tail` belongs to what ends it.

        `special`: whether special tokens are part of the text. `before` are the last tokens that it goes on after.
        """
        self._tokenizer = tokenizer
        self._ends = frozenset(ends)
        self._stops = tuple(stop for stop in stops if stop)
        self._held = (*self._stops, tail) if tail else self._stops
        self._tail = tail
        self._special = special
        self._ids = list(before)
        self._from = 0  # tokens before it are not looked at any more
        self._read = len(self._ids)  # those before it have been read
        self._waiting = ""  # text that may be the beginning of a stop text
        self.ended = False

    def is_end(self, token: int) -> bool:
        """Whether the token ends a reply, and so is none of it."""
        return token in self._ends

    def push(self, token: int) -> str:
        """Take the next token; gives the text that is certain now."""
        if self.is_end(token):
            self.ended = True
            return self._last(self._rest())
        self._ids.append(token)
        before, now = self._decode(self._ids[self._from : self._read]), self._decode(self._ids[self._from :])
        if now.endswith(NOT_YET):
            return ""
        self._from, self._read = self._read, len(self._ids)
        return self._show(now[len(before) :])

    def finish(self) -> str:
        """No token will come any more: gives what was held back."""
        if self.ended:
            return ""
        piece = self._show(self._rest())
        rest, self._waiting = self._waiting, ""
        return piece if self.ended else piece + rest

    def _rest(self) -> str:
        """The text of tokens that were not read, whole characters or not."""
        before, now = self._decode(self._ids[self._from : self._read]), self._decode(self._ids[self._from :])
        self._from = self._read = len(self._ids)
        return now[len(before) :]

    def _last(self, text: str) -> str:
        """An end token has come: all that was held back, but for a stop text and the tail."""
        self.ended = False
        piece = self._show(text)
        if self.ended:  # a stop text was in it
            return piece
        self.ended = True
        rest, self._waiting = self._waiting, ""
        return piece + (rest.removesuffix(self._tail) if self._tail else rest)

    def _show(self, text: str) -> str:
        text = self._waiting + text
        places = [(text.find(stop), stop) for stop in self._stops if stop in text]
        if places:
            self.ended, self._waiting = True, ""
            return text[: min(places)[0]]
        held = max((_begun(text, stop) for stop in self._held), default=0)
        self._waiting = text[len(text) - held :]
        return text[: len(text) - held]

    def _decode(self, ids: Sequence[int]) -> str:
        return str(
            self._tokenizer.decode(
                list(ids), skip_special_tokens=not self._special, clean_up_tokenization_spaces=False
            )
        )


def _begun(text: str, stop: str) -> int:
    """How many characters at the end of `text` are a beginning of `stop`."""
    return next((size for size in range(min(len(stop), len(text)), 0, -1) if text.endswith(stop[:size])), 0)
