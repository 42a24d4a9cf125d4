"""How one turn becomes tokens: by a delimiter, or by the tokenizer's chat template.

Invariant: a conversation's tokens are the concatenation of its turns' pieces, each tokenized by itself. So
what a chat feeds turn by turn is exactly what training has seen, and no token ever spans two turns.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from corolla.data.conversation import Turn
from corolla.errors import UsageError


@dataclass(frozen=True)
class TurnPieces:
    """A turn's token ids: what comes before its text, the text, and what closes it."""

    lead: list[int]
    text: list[int]
    closing: list[int]

    @property
    def ids(self) -> list[int]:
        """All of them in order."""
        return [*self.lead, *self.text, *self.closing]


class Style(ABC):
    """Turns to tokens. `turns[:index]` came before; only the turn at `index` is rendered."""

    closing: list[int]  # after a reply, up to the next turn
    stop: list[int]  # the beginning of `closing` whose generation ends a reply

    @abstractmethod
    def opening(self, *, system: bool) -> list[int]:
        """What stands before the first turn; `system` says whether that is a system turn."""

    @abstractmethod
    def pieces(self, turns: Sequence[Turn], index: int) -> TurnPieces:
        """The turn at `index`."""

    @abstractmethod
    def reply_lead(self, turns: Sequence[Turn]) -> list[int]:
        """What makes the model reply after all of `turns`."""


class DelimiterStyle(Style):
    """Turns joined by a delimiter: `text delimiter text delimiter …`. A reply ends with the delimiter."""

    def __init__(self, tokenizer: Any, delimiter: str) -> None:
        self._tokenizer = tokenizer
        self._bos = [tokenizer.bos_token_id] if _adds_bos(tokenizer) else []
        self.closing = self._ids(delimiter)
        self.stop = self.closing
        if not self.closing:
            raise UsageError("The delimiter is empty for this tokenizer; give another one.")

    def opening(self, *, system: bool) -> list[int]:
        return self._bos

    def pieces(self, turns: Sequence[Turn], index: int) -> TurnPieces:
        return TurnPieces([], self._ids(turns[index].text), self.closing)

    def reply_lead(self, turns: Sequence[Turn]) -> list[int]:
        return []

    def _ids(self, text: str) -> list[int]:
        ids: list[int] = self._tokenizer(text, add_special_tokens=False).input_ids
        return ids


class TemplateStyle(Style):
    """The tokenizer's own chat template, cut at the turns' boundaries."""

    def __init__(self, tokenizer: Any) -> None:
        if not tokenizer.chat_template:
            raise UsageError("This tokenizer has no chat template; use the delimiter style.")
        self._tokenizer = tokenizer
        probe = [Turn("user", "a"), Turn("assistant", "b"), Turn("user", "a")]
        # What the template puts before a first turn that is not the system's, such as a system turn of its own.
        self._preamble = ""
        first = self._rendered(probe[:1])
        later = self._rest(self._rendered(probe), self._rendered(probe[:2]))
        if first.endswith(later):
            self._preamble = first.removesuffix(later)
        self.closing = self.pieces(probe, 1).closing
        self.stop = self.closing[:1]
        if not self.closing:
            raise UsageError(
                "This tokenizer's chat template does not mark a reply's end; use the delimiter style."
            )

    def opening(self, *, system: bool) -> list[int]:
        return [] if system else self._ids(self._preamble)

    def pieces(self, turns: Sequence[Turn], index: int) -> TurnPieces:
        before = self._rendered(turns[:index])
        if index == 0 and turns[0].role != "system":
            before = self._preamble
        lead = ""
        if turns[index].role == "assistant":
            prompted = self._rendered(turns[:index], reply=True)
            lead = self._rest(prompted, before)
            before = prompted
        own = self._rest(self._rendered(turns[: index + 1]), before)
        head, found, tail = own.partition(turns[index].text)
        if not found:
            raise self._unstable()
        return TurnPieces(self._ids(lead + head), self._ids(found), self._ids(tail))

    def reply_lead(self, turns: Sequence[Turn]) -> list[int]:
        return self._ids(self._rest(self._rendered(turns, reply=True), self._rendered(turns)))

    def _rendered(self, turns: Sequence[Turn], *, reply: bool = False) -> str:
        if not turns:
            return ""
        messages = [{"role": turn.role, "content": turn.text} for turn in turns]
        try:
            text: str = self._tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=reply
            )
        except Exception as error:  # templates raise what their authors wrote
            raise UsageError(
                f"This tokenizer's chat template refuses the conversation ({error}); use the delimiter style."
            ) from error
        return text

    def _rest(self, whole: str, beginning: str) -> str:
        if not whole.startswith(beginning):
            raise self._unstable()
        return whole[len(beginning) :]

    def _unstable(self) -> UsageError:
        return UsageError(
            "This tokenizer's chat template rewrites earlier turns when later ones come, so a chat could not go "
            "on where training left off; use the delimiter style."
        )

    def _ids(self, text: str) -> list[int]:
        ids: list[int] = self._tokenizer(text, add_special_tokens=False).input_ids
        return ids


def _adds_bos(tokenizer: Any) -> bool:
    """Whether the tokenizer begins a text with its BOS token by itself."""
    ids = tokenizer("a").input_ids
    return tokenizer.bos_token_id is not None and bool(ids) and ids[0] == tokenizer.bos_token_id
