"""How turns become tokens: by a delimiter, or by the tokenizer's chat template.

Invariant: what a chat feeds, with the replies in between, are the tokens that training has seen for the same
turns. With a template these are the template's own, those of `apply_chat_template(…, tokenize=True)`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from corolla.data.conversation import Conversation, Turn
from corolla.data.cuts import all_ids, ids_inside, ids_of
from corolla.errors import DataError, UsageError

SIGNS = "-=#~*+_"  # for delimiters like the default


@dataclass(frozen=True)
class Reply:
    """Where a reply stands among tokens: its text [begin, end), and what closes it, up to `closed`.

    Where `apart` is False, the last token of its text holds some of what closes it, too.
    """

    begin: int
    end: int
    closed: int
    apart: bool = True


@dataclass(frozen=True)
class Rendering:
    """Turns as tokens. `replies` are the assistant's turns, by the turn's index."""

    ids: list[int]
    opening: int  # tokens before the first turn
    replies: dict[int, Reply] = field(default_factory=dict)


class Style(ABC):
    """Turns to tokens."""

    closing: list[int]  # after a reply, up to the next turn
    stop: list[int]  # the beginning of `closing` whose generation ends a reply
    stop_text: str  # text that ends a reply whatever tokens it comes in; "" when only `stop` does
    ends: frozenset[int] = frozenset()  # single tokens that end a reply, too
    reply_lead: list[int]  # between a turn and the reply to it

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer

    @abstractmethod
    def check(self, turns: Sequence[Turn], tools: Sequence[Any] = ()) -> None:
        """Raises `DataError` for turns that this style cannot write down; far cheaper than `render`."""

    @abstractmethod
    def render(
        self, turns: Sequence[Turn], tools: Sequence[Any] = (), *, reply: bool = False, strict: bool = True
    ) -> Rendering:
        """The turns as tokens; with `reply`, up to where a reply to them begins.

        Raises `DataError` for what this style cannot render, or not so that a chat could go on from there. Not
        `strict`, replies whose place cannot be told are left out of `replies`.
        """

    @abstractmethod
    def heading(self, turns: Sequence[Turn], tools: Sequence[Any] = ()) -> int:
        """How many of the turns' tokens come before what the first one says who is not the system."""

    @abstractmethod
    def lengths(self, turns: Sequence[Turn]) -> list[int]:
        """About how many tokens each turn has; exactly, where turns are tokenized one by one."""

    def first_of_window(self, turns: Sequence[Turn], reply: int) -> int:
        """The latest turn with which a part of the conversation may begin that has this reply."""
        return reply - 1


class DelimiterStyle(Style):
    """Turns joined by a delimiter: `text delimiter text delimiter …`. A reply ends with the delimiter.

    Each piece is tokenized by itself, so that no token spans two turns.
    """

    def __init__(self, tokenizer: Any, delimiter: str, *, spaced: bool = False) -> None:
        """`spaced`: each piece with the space that SentencePiece puts in front of a whole text."""
        super().__init__(tokenizer)
        # Only where it makes a difference: what is plain text to the tokenizer is one inside of another, too.
        self._inside = not spaced and ids_inside(tokenizer, "a") != ids_of(tokenizer, "a")
        self._bos = [tokenizer.bos_token_id] if _adds_bos(tokenizer) else []
        self.closing = ids_inside(tokenizer, delimiter) if self._inside else ids_of(tokenizer, delimiter)
        self.stop = self.closing
        self.stop_text = delimiter
        self.reply_lead = []
        if not self.closing:
            raise UsageError("The delimiter is empty for this tokenizer; give another one.")

    def check(self, turns: Sequence[Turn], tools: Sequence[Any] = ()) -> None:
        if any(turn.about_tools for turn in turns):
            raise DataError("Turns about tools need a chat template, which the delimiter style is not.")

    def render(
        self, turns: Sequence[Turn], tools: Sequence[Any] = (), *, reply: bool = False, strict: bool = True
    ) -> Rendering:
        self.check(turns, tools)
        ids = list(self._bos)
        replies: dict[int, Reply] = {}
        for index, piece in enumerate(self._pieces(turns)):
            begin = len(ids)
            ids += piece
            end = len(ids)
            ids += self.closing
            if turns[index].role == "assistant":
                replies[index] = Reply(begin, end, len(ids))
        return Rendering(ids, len(self._bos), replies)

    def heading(self, turns: Sequence[Turn], tools: Sequence[Any] = ()) -> int:
        system = turns[:1] if turns[0].role == "system" else ()
        return len(self._bos) + sum(self.lengths(system))

    def lengths(self, turns: Sequence[Turn]) -> list[int]:
        return [len(piece) + len(self.closing) for piece in self._pieces(turns)]

    def _pieces(self, turns: Sequence[Turn]) -> list[list[int]]:
        """The texts' tokens; one call of the tokenizer for all."""
        ids = all_ids(self._tokenizer, [turn.text for turn in turns])
        if not self._inside:
            return ids
        return ids[:1] + [ids_inside(self._tokenizer, turn.text) for turn in turns[1:]]


def is_reply(turns: Sequence[Turn], index: int) -> bool:
    """Whether a turn is the assistant's and answers something: what opens a conversation does not."""
    opener = int(turns[0].role == "system")
    return turns[index].role == "assistant" and index > opener


def _adds_bos(tokenizer: Any) -> bool:
    """Whether the tokenizer begins a text with its BOS token by itself."""
    ids = tokenizer("a").input_ids
    return tokenizer.bos_token_id is not None and bool(ids) and ids[0] == tokenizer.bos_token_id


def delimiter_note(conversations: Sequence[Conversation], delimiter: str) -> str | None:
    """A sentence on the texts that contain `delimiter`, with one that none contains; None where none does.

    A reply ends where the delimiter begins: a model that learns to say it inside of one is cut off there.
    """
    texts = [turn.text for conversation in conversations for turn in conversation.turns]
    found = sum(delimiter in text for text in texts)
    if not found:
        return None
    replies = sum(
        turn.role == "assistant" and delimiter in turn.text
        for conversation in conversations
        for turn in conversation.turns
    )
    other = next(one for one in _others() if not any(one in text for text in texts))
    return (
        f"{found:,} of {len(texts):,} texts contain the delimiter, {replies:,} of them replies, which a chat would "
        f"end there: give one that none contains, such as --delimiter '{_typed(other)}'."
    )


def _others() -> Iterator[str]:
    """Delimiters like the default, longer and longer."""
    count = 5
    while True:
        yield from (f"\n{sign * count}\n" for sign in SIGNS)
        count += 1


def _typed(delimiter: str) -> str:
    """As it is typed on a command line."""
    return delimiter.replace("\n", "\\n").replace("\t", "\\t")
