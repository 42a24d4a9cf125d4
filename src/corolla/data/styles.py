"""How turns become tokens: by a delimiter, or by the tokenizer's chat template.

Invariant: what a chat feeds, with the replies in between, are the tokens that training has seen for the same
turns. With a template these are the template's own, those of `apply_chat_template(…, tokenize=True)` of the whole text
at once; what it writes before a reply is a beginning of what it writes with it, as text and as tokens.
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from corolla.data.conversation import Conversation, Turn
from corolla.data.cuts import all_ids, cut, ids_inside, ids_of
from corolla.errors import DataError, UsageError

SIGNS = "-=#~*+_"  # for delimiters like the default
QUESTION, ANSWER = Turn("user", "corolla-asks"), Turn("assistant", "petal-answers")
PLAIN_ANSWER = Turn("assistant", "The one.")  # a space and its first word are one token to most tokenizers
NOT_STABLE = (
    "This tokenizer's chat template renders a turn differently when others come after it, so a chat could not go "
    "on where training left off; use the delimiter style."
)
NOT_APART = (
    "This tokenizer makes one token of the end of its chat template's prompt and the beginning of a reply, which a "
    "chat could not feed as training saw it; use the delimiter style."
)
NO_TOOLS = "This tokenizer's chat template does not render turns about tools."
Span = tuple[int, int, int]  # characters: a reply's beginning and end, and where what closes it ends


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


class TemplateStyle(Style):
    """By the tokenizer's chat template. Texts lose the white space around them, as most templates have it."""

    def __init__(self, tokenizer: Any) -> None:
        """Raises `UsageError` for a template that a chat could not follow, tried with a short conversation."""
        super().__init__(tokenizer)
        if not tokenizer.chat_template:
            raise UsageError("This tokenizer has no chat template; use the delimiter style.")
        try:
            self._learn()
            self.render([QUESTION, ANSWER, QUESTION, PLAIN_ANSWER])
        except DataError as error:
            raise UsageError(str(error)) from error

    def _learn(self) -> None:
        """What the template writes around texts."""
        first = self._rendered([QUESTION])
        prompted = self._rendered([QUESTION], reply=True)
        answered = self._rendered([QUESTION, ANSWER])
        later = _rest(self._rendered([QUESTION, ANSWER, QUESTION]), answered)
        # Before a first turn that is not the system's, a template may put a system turn of its own.
        self._preamble = first.removesuffix(later) if first.endswith(later) else ""
        lead = _rest(prompted, first)
        # What comes between prompt and reply, often a space, is the model's to say.
        self._before_reply, self._closing = _around(ANSWER.text, _rest(answered, prompted))
        self.reply_lead = ids_inside(self._tokenizer, lead)
        self.closing = ids_inside(self._tokenizer, self._closing)
        if not self.closing:
            raise DataError(
                "This tokenizer's chat template does not mark a reply's end; use the delimiter style."
            )
        self._overhead = {
            "user": len(ids_of(self._tokenizer, later)) - len(ids_of(self._tokenizer, QUESTION.text)),
            "assistant": len(self.reply_lead) + len(self.closing),
        }
        marks = [token in self._tokenizer.added_tokens_decoder for token in self.closing]
        if any(marks):
            self.stop, self.stop_text = self.closing[: marks.index(True) + 1], ""
            self.ends = frozenset(self.stop[-1:])
        else:  # plain text, which may come in other tokens, and whose first token may be said for its own sake
            self.stop_text = self._closing.rstrip() or self._closing
            self.stop = ids_inside(self._tokenizer, self.stop_text)

    def check(self, turns: Sequence[Turn], tools: Sequence[Any] = ()) -> None:
        _check_tools(self._rendered(turns, tools), turns)

    def render(
        self, turns: Sequence[Turn], tools: Sequence[Any] = (), *, reply: bool = False, strict: bool = True
    ) -> Rendering:
        whole = self._rendered(turns, tools, reply=reply)
        spans: dict[int, Span] = {}
        for index in range(len(turns)):
            if not is_reply(turns, index):
                continue
            try:
                spans[index] = self._span(whole, turns, tools, index)
            except DataError:
                if strict:
                    raise
        if strict:
            _check_tools(whole, turns)
        opening = len(self._preamble) if turns[0].role != "system" and whole.startswith(self._preamble) else 0
        ids, cuts = cut(
            self._tokenizer, whole, [opening, *(place for span in spans.values() for place in span)]
        )
        replies = {}
        for number, index in enumerate(spans):
            begin, end, closed = cuts[1 + 3 * number : 4 + 3 * number]
            if begin.clean:
                # A token of a reply and of what closes it is the reply's; one of that and of what follows is not.
                last = end.index if end.clean else end.index + 1
                replies[index] = Reply(begin.index, last, max(last, closed.index), apart=end.clean)
            elif strict:
                raise DataError(NOT_APART)
        return Rendering(ids, cuts[0].index, replies)

    def _span(self, whole: str, turns: Sequence[Turn], tools: Sequence[Any], index: int) -> Span:
        """Where a reply stands in the text. Raises `DataError` where it does not stand as it was said."""
        begin = len(_beginning(self._rendered(turns[:index], tools, reply=True), whole))
        if turns[index].more:
            after = _beginning(self._rendered(turns[: index + 1], tools), whole)
            end = len(after.removesuffix(self._closing))
            if not all(name in whole[begin:end] for name in _called(turns[index])):
                raise DataError(NO_TOOLS)
            return begin, end, len(after)
        said = self._before_reply + turns[index].text.strip()
        if not whole.startswith(said + self._closing, begin):
            raise DataError(NOT_STABLE)
        end = begin + len(said)
        return begin, end, end + len(self._closing)

    def heading(self, turns: Sequence[Turn], tools: Sequence[Any] = ()) -> int:
        system = [turn for turn in turns[:1] if turn.role == "system"]
        head, _, _ = self._rendered([*system, QUESTION], tools).partition(QUESTION.text)
        whole = self._rendered(turns, tools)
        if not whole.startswith(head):
            return 0
        return cut(self._tokenizer, whole, [len(head)])[1][0].index

    def lengths(self, turns: Sequence[Turn]) -> list[int]:
        texts = [
            turn.text + (json.dumps(dict(turn.more), default=str) if turn.more else "") for turn in turns
        ]
        return [
            len(own) + self._overhead.get(turn.role, self._overhead["user"])
            for own, turn in zip(all_ids(self._tokenizer, texts), turns, strict=True)
        ]

    def first_of_window(self, turns: Sequence[Turn], reply: int) -> int:
        """A user's turn: many templates want one in front."""
        users = [index for index in range(reply) if turns[index].role == "user"]
        return users[-1] if users else 0

    def _rendered(self, turns: Sequence[Turn], tools: Sequence[Any] = (), *, reply: bool = False) -> str:
        messages = [{"role": turn.role, "content": turn.text.strip(), **turn.more} for turn in turns]
        try:
            text: str = self._tokenizer.apply_chat_template(
                messages, tools=list(tools) or None, tokenize=False, add_generation_prompt=reply
            )
        except Exception as error:  # templates raise what their authors wrote
            raise DataError(
                f"This tokenizer's chat template refuses the conversation ({str(error)[:200]}); use the delimiter "
                "style."
            ) from error
        return text


def _check_tools(whole: str, turns: Sequence[Turn]) -> None:
    """Raises `DataError` where the template leaves out what was called or what a tool said."""
    for turn in turns:
        if not all(name in whole for name in _called(turn)):
            raise DataError(NO_TOOLS)
        text = turn.text.strip()
        # Some templates write it as JSON.
        spelt = (text, json.dumps(text)[1:-1], json.dumps(text, ensure_ascii=False)[1:-1])
        if turn.role == "tool" and not any(said in whole for said in spelt):
            raise DataError(NO_TOOLS)


def _called(turn: Turn) -> list[str]:
    """The names of the functions that a turn calls."""
    calls = turn.more.get("tool_calls") or ()
    return [str((call.get("function") or call).get("name", "")) for call in calls]


def _beginning(beginning: str, whole: str) -> str:
    if not whole.startswith(beginning):
        raise DataError(NOT_STABLE)
    return beginning


def _rest(whole: str, beginning: str) -> str:
    return whole[len(_beginning(beginning, whole)) :]


def _around(text: str, whole: str) -> tuple[str, str]:
    before, found, after = whole.partition(text)
    if not found:
        raise DataError(NOT_STABLE)
    return before, after


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
