"""How turns become tokens: by a delimiter, or by the tokenizer's chat template.

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
    """Turns to tokens. What a turn becomes depends on the turn alone, and on whether it is the first."""

    closing: list[int]  # after a reply, up to the next turn
    stop: list[int]  # the beginning of `closing` whose generation ends a reply
    stop_text: str  # text that ends a reply whatever tokens it comes in; "" when only `stop` does
    reply_lead: list[int]  # between a turn and the reply to it

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer

    @abstractmethod
    def opening(self, *, system: bool) -> list[int]:
        """What stands before the first turn; `system` says whether that is a system turn."""

    @abstractmethod
    def check(self, turns: Sequence[Turn]) -> None:
        """Raises `UsageError` when the turns' pieces are not what the tokenizer makes of the conversation."""

    @abstractmethod
    def _texts(self, turn: Turn) -> tuple[str, str, str]:
        """Lead, text and closing of a turn."""

    def pieces(self, turns: Sequence[Turn]) -> list[TurnPieces]:
        """Every turn's pieces; one call of the tokenizer for all."""
        if not turns:
            return []
        texts = [text for turn in turns for text in self._texts(turn)]
        ids: list[list[int]] = self._tokenizer(texts, add_special_tokens=False).input_ids
        return [TurnPieces(*ids[first : first + 3]) for first in range(0, len(ids), 3)]

    def _ids(self, text: str) -> list[int]:
        ids: list[int] = self._tokenizer(text, add_special_tokens=False).input_ids
        return ids


class DelimiterStyle(Style):
    """Turns joined by a delimiter: `text delimiter text delimiter …`. A reply ends with the delimiter."""

    def __init__(self, tokenizer: Any, delimiter: str) -> None:
        super().__init__(tokenizer)
        self._delimiter = delimiter
        self._bos = [tokenizer.bos_token_id] if _adds_bos(tokenizer) else []
        self.closing = self._ids(delimiter)
        self.stop = self.closing
        self.stop_text = delimiter
        self.reply_lead = []
        if not self.closing:
            raise UsageError("The delimiter is empty for this tokenizer; give another one.")

    def opening(self, *, system: bool) -> list[int]:
        return self._bos

    def check(self, turns: Sequence[Turn]) -> None:
        """Nothing can be wrong."""

    def _texts(self, turn: Turn) -> tuple[str, str, str]:
        return "", turn.text, self._delimiter


class TemplateStyle(Style):
    """The tokenizer's own chat template, taken apart by rendering a short conversation with it.

    Texts lose the white space around them, as most templates have it.
    """

    def __init__(self, tokenizer: Any) -> None:
        super().__init__(tokenizer)
        if not tokenizer.chat_template:
            raise UsageError("This tokenizer has no chat template; use the delimiter style.")
        question, answer = Turn("user", "corolla-asks"), Turn("assistant", "petal-answers")
        first = self._rendered([question])
        prompted = self._rendered([question], reply=True)
        answered = self._rendered([question, answer])
        later = _rest(self._rendered([question, answer, question]), answered)
        self._user = _around(question.text, later)
        # Before a first turn that is not the system's, a template may put a system turn of its own.
        if not first.endswith(later):
            raise _unstable()
        self._preamble = first.removesuffix(later)
        self._lead = _rest(prompted, first)
        # What comes between prompt and reply, often a space, is the model's to say.
        self._before_reply, self._closing = _around(answer.text, _rest(answered, prompted))
        self.closing = self._ids(self._closing)
        self.stop = self.closing[:1]
        self.stop_text = ""
        self.reply_lead = self._ids(self._lead)
        if not self.closing:
            raise UsageError(
                "This tokenizer's chat template does not mark a reply's end; use the delimiter style."
            )

    def opening(self, *, system: bool) -> list[int]:
        return [] if system else self._ids(self._preamble)

    def check(self, turns: Sequence[Turn]) -> None:
        parts = ["".join(self._texts(turn)) for turn in turns]
        if turns[0].role != "system":
            parts.insert(0, self._preamble)
        if "".join(parts) != self._rendered(turns):
            raise _unstable()

    def _texts(self, turn: Turn) -> tuple[str, str, str]:
        text = turn.text.strip()
        if turn.role == "assistant":
            return self._lead, self._before_reply + text, self._closing
        if turn.role == "system":
            return self._system(turn), "", ""
        return text.join(self._user), "", ""

    def _system(self, turn: Turn) -> str:
        """A system turn, found in front of a user's, since some templates refuse it alone."""
        question = Turn("user", "corolla-asks")
        whole, known = self._rendered([turn, question]), question.text.join(self._user)
        if not whole.endswith(known):
            raise _unstable()
        return whole.removesuffix(known)

    def _rendered(self, turns: Sequence[Turn], *, reply: bool = False) -> str:
        messages = [{"role": turn.role, "content": turn.text.strip()} for turn in turns]
        try:
            text: str = self._tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=reply
            )
        except Exception as error:  # templates raise what their authors wrote
            raise UsageError(
                f"This tokenizer's chat template refuses the conversation ({error}); use the delimiter style."
            ) from error
        return text


def _rest(whole: str, beginning: str) -> str:
    if not whole.startswith(beginning):
        raise _unstable()
    return whole[len(beginning) :]


def _around(text: str, whole: str) -> tuple[str, str]:
    before, found, after = whole.partition(text)
    if not found:
        raise _unstable()
    return before, after


def _unstable() -> UsageError:
    return UsageError(
        "This tokenizer's chat template renders a turn differently when others come after it, so a chat could "
        "not go on where training left off; use the delimiter style."
    )


def _adds_bos(tokenizer: Any) -> bool:
    """Whether the tokenizer begins a text with its BOS token by itself."""
    ids = tokenizer("a").input_ids
    return tokenizer.bos_token_id is not None and bool(ids) and ids[0] == tokenizer.bos_token_id
