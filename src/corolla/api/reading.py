"""A reply's text as its tokens come.

Invariant: the pieces, joined, are what the tokenizer decodes from all tokens up to what ended the reply; nothing of a
stop text is ever given out, nor half of a character.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

NOT_YET = "\ufffd"  # what some bytes of a character decode to
MOST_TOKENS = 4  # of a character, a byte each: what is no text after more of them will never be any
MOST_MISSING = 3  # bytes of a character whose last one has not come, each as NOT_YET at most


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
        self._given = 0  # characters of tokens behind those, where what they are will never be text
        self._waiting = ""  # text that may be the beginning of a stop text
        self.ended = False
        self.position = 0  # characters that all tokens so far have come to: where the next one's begin
        self.shown = 0  # of them, those that were given out

    def push(self, token: int) -> str:
        """Take the next token; gives the text that is certain now."""
        if token in self._ends:
            return self._out(self._last(self._rest()))
        self._ids.append(token)
        new = self._new()
        if not new.endswith(NOT_YET):
            self._from, self._read, self._given = self._read, len(self._ids), 0
            return self._out(self._show(new))
        if len(self._ids) - self._read <= MOST_TOKENS:
            return ""
        missing = min(len(new) - len(new.rstrip(NOT_YET)), MOST_MISSING)
        new = new[: len(new) - missing]
        self._given += len(new)
        return self._out(self._show(new))

    def finish(self) -> str:
        """No token will come any more: gives what was held back."""
        if self.ended:
            return ""
        piece = self._show(self._rest())
        rest, self._waiting = self._waiting, ""
        return self._out(piece if self.ended else piece + rest)

    def _out(self, piece: str) -> str:
        self.shown += len(piece)
        return piece

    def _new(self) -> str:
        """The text of tokens that were not read, but for what was given out of it; whole characters or not."""
        before, now = self._decode(self._ids[self._from : self._read]), self._decode(self._ids[self._from :])
        return now[len(before) + self._given :]

    def _rest(self) -> str:
        """The same, and they are read now."""
        new = self._new()
        self._from, self._read, self._given = len(self._ids), len(self._ids), 0
        return new

    def _last(self, text: str) -> str:
        """An end token has come: all that was held back, but for a stop text and the tail."""
        piece = self._show(text)
        if self.ended:  # a stop text was in it
            return piece
        self.ended = True
        rest, self._waiting = self._waiting, ""
        return piece + (rest.removesuffix(self._tail) if self._tail else rest)

    def _show(self, text: str) -> str:
        self.position += len(text)
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
