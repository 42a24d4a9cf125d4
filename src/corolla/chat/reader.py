"""From a reply's tokens, as they come, to the text that may be shown, and to where the reply ends.

Invariant: the shown pieces joined are the reply's text; no part of what ends a reply is ever shown, nor half
of a character. `ids` are the reply's own tokens: decoded they give the shown text.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

_UNFINISHED = "\ufffd"  # how tokenizers decode the first bytes of a character


class TextDecoder:
    """Tokens to text, one at a time, holding back characters that are not complete yet."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._ids: list[int] = []
        self._window = 0  # a token's spaces depend on the one before it: decoding begins there
        self._read = 0  # what lies before is text that was given out

    def push(self, token: int) -> str:
        """The text that has become certain with this token; may be empty."""
        self._ids.append(token)
        text = self._new_text()
        if not text or text.endswith(_UNFINISHED):
            return ""
        self._window, self._read = self._read, len(self._ids)
        return text

    def finish(self) -> str:
        """What was held back: bytes that will not become a character any more."""
        text = self._new_text()
        self._read = len(self._ids)
        return text

    def _new_text(self) -> str:
        known = self._decode(self._ids[self._window : self._read])
        return self._decode(self._ids[self._window :])[len(known) :]

    def _decode(self, ids: Sequence[int]) -> str:
        text: str = self._tokenizer.decode(
            list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        return text


class ReplyReader:
    """Reads one reply; `ended` once the model has said what ends a reply."""

    def __init__(
        self, tokenizer: Any, *, stop_ids: Sequence[int], end_ids: Collection[int], stop_text: str | None
    ) -> None:
        """A reply ends with the sequence `stop_ids`, with any single one of `end_ids`, or with `stop_text`.

        `stop_text` is a delimiter, which a model may also say in other tokens than training's.
        """
        self._tokenizer = tokenizer
        self._stop_ids = list(stop_ids)
        self._end_ids = frozenset(end_ids)
        self._stop_text = stop_text
        self._decoder = TextDecoder(tokenizer)
        self._held = ""
        self.ids: list[int] = []
        self.text = ""
        self.ended = False

    def push(self, token: int) -> str:
        """Take the next token; gives the text to show. Not to be called once the reply has `ended`."""
        self.ids.append(token)
        if self.ids[-len(self._stop_ids) :] == self._stop_ids:
            self.ids = self.ids[: -len(self._stop_ids)]
            return self._end()
        if token in self._end_ids:
            self.ids.pop()
            return self._end()
        self._held += self._decoder.push(token)
        if self._stop_text is not None and self._stop_text in self._held:
            self._held = self._held[: self._held.index(self._stop_text)]
            shown = self._show(len(self._held))
            self.ids = self._ids_of(self.text)
            self.ended = True
            return shown
        return self._show(len(self._held) - self._unsure())

    def finish(self) -> str:
        """No token will come any more; gives what was held back, as it did not end the reply."""
        if self.ended:
            return ""
        self._held += self._decoder.finish()
        return self._show(len(self._held))

    def _end(self) -> str:
        """The stop was said in its own tokens: whatever of its text is held back is not shown."""
        self.ended = True
        own = TextDecoder(self._tokenizer)
        whole = "".join(own.push(token) for token in self.ids) + own.finish()
        self._held = whole[len(self.text) :]
        return self._show(len(self._held))

    def _unsure(self) -> int:
        """How many of the held characters may be the beginning of the stop text."""
        stop = self._stop_text or ""
        return next(
            (
                size
                for size in range(min(len(stop), len(self._held)), 0, -1)
                if self._held.endswith(stop[:size])
            ),
            0,
        )

    def _show(self, count: int) -> str:
        shown, self._held = self._held[:count], self._held[count:]
        self.text += shown
        return shown

    def _ids_of(self, text: str) -> list[int]:
        """The reply's tokens up to where the stop text begins; the token that straddles is tokenized anew."""
        for count in range(len(self.ids) - 1, 0, -1):
            beginning: str = self._tokenizer.decode(
                self.ids[:count], skip_special_tokens=True, clean_up_tokenization_spaces=False
            )
            if text.startswith(beginning):
                rest: list[int] = self._tokenizer(text[len(beginning) :], add_special_tokens=False).input_ids
                return [*self.ids[:count], *rest]
        rest = self._tokenizer(text, add_special_tokens=False).input_ids
        return rest
