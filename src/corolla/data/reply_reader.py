"""From a reply's tokens, as they come, to the text that may be shown, and to where the reply ends.

Invariant: the shown pieces joined are the reply's `text`, and `ids` are tokens of that text; no part of what
ends a reply is ever shown, nor half of a character.
"""

from __future__ import annotations

import string
from collections.abc import Collection, Sequence
from typing import Any, Self

from corolla.data.cuts import ids_inside
from corolla.data.render import Renderer

# A token may be some bytes of a character only, which tokenizers decode as U+FFFD. And whitespace waits for
# what follows it: before a delimiter, some tokenizers put a space that is not the reply's.
_NOT_YET = "\ufffd" + string.whitespace


class ReplyReader:
    """Reads one reply; `ended` once the model has said what ends a reply."""

    def __init__(
        self, tokenizer: Any, *, stop_ids: Sequence[int], end_ids: Collection[int], stop_text: str
    ) -> None:
        """A reply ends with the sequence `stop_ids`, with any single one of `end_ids`, or with `stop_text`.

        `stop_text` is the delimiter, which a model may also say in other tokens than training's; "" for none.
        """
        self._tokenizer = tokenizer
        self._stop_ids = list(stop_ids)
        self._end_ids = frozenset(end_ids)
        self._stop_text = stop_text
        self.ids: list[int] = []
        self.text = ""
        self.ended = False

    @classmethod
    def of(cls, renderer: Renderer, end_ids: Collection[int]) -> Self:
        """For a reply as `renderer` ends it, or any of `end_ids`."""
        return cls(
            renderer.tokenizer, stop_ids=renderer.stop_ids, end_ids=end_ids, stop_text=renderer.stop_text
        )

    def push(self, token: int) -> str:
        """Take the next token; gives the text to show. Not to be called once the reply has `ended`."""
        self.ids.append(token)
        if self.ids[-len(self._stop_ids) :] == self._stop_ids:
            self.ids = self.ids[: -len(self._stop_ids)]
            self.ended = True
            return self._show(self._decode(self.ids))
        if token in self._end_ids:
            self.ids.pop()
            self.ended = True
            return self.finish()
        # All of the reply is decoded again: far less work than a token costs, and right for every tokenizer.
        text = self._decode(self.ids)
        if self._stop_text and self._stop_text in text:
            self.ended = True
            return self._end_at(text[: text.index(self._stop_text)])
        return self._show(self._without_beginning(text).rstrip(_NOT_YET))

    def finish(self) -> str:
        """No token will come any more: gives what was held back, but for a delimiter that has begun."""
        for size in range(len(self._stop_ids) - 1, 0, -1):
            if self.ids[-size:] == self._stop_ids[:size]:
                self.ids = self.ids[:-size]
                break
        text = self._decode(self.ids)
        own = self._without_beginning(text)
        return self._show(text) if own == text else self._end_at(own)

    def _without_beginning(self, text: str) -> str:
        """`text` without a last part that may be the beginning of the stop text."""
        for size in range(min(len(self._stop_text), len(text)), 0, -1):
            if text.endswith(self._stop_text[:size]):
                return text[:-size]
        return text

    def _end_at(self, text: str) -> str:
        """The reply is `text`, a beginning of what its tokens say; a token that straddles is tokenized anew."""
        count = len(self.ids)
        while not text.startswith(self._decode(self.ids[:count])):
            count -= 1
        rest = text[len(self._decode(self.ids[:count])) :]
        self.ids = self.ids[:count]
        if rest:
            self.ids += ids_inside(self._tokenizer, rest)
        return self._show(text)

    def _show(self, text: str) -> str:
        """The part of `text` that is new."""
        piece = text[len(self.text) :]
        self.text += piece
        return piece

    def _decode(self, ids: Sequence[int]) -> str:
        text: str = self._tokenizer.decode(
            list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        return text
