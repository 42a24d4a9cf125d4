"""Conversations as tokens and labels, for training and for chatting.

Invariant: the tokens that a chat feeds, turn by turn with the replies in between, are the tokens that an
example of the same turns has. Padding does not occur here, and a token carries loss at most once however
many windows a long conversation is cut into.

No end-of-text token is added: what closes a reply is what a chat stops at, and a chat always goes on after it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from corolla.data.conversation import Conversation, Turn
from corolla.data.styles import DelimiterStyle, Style, TemplateStyle, TurnPieces
from corolla.errors import BundleError, UsageError

NO_LOSS = -100
Kind = Literal["reply", "marker", "context"]


@dataclass(frozen=True)
class RenderSettings:
    """How conversations become tokens; saved with every prompt."""

    style: str = "delimiter"  # or "template"
    delimiter: str = "\n-----\n"
    loss_on: str = "replies"  # or "all"
    max_length: int = 256

    def __post_init__(self) -> None:
        if self.style not in ("delimiter", "template"):
            raise UsageError(f"--style is {self.style!r}; it must be delimiter or template.")
        if self.loss_on not in ("replies", "all"):
            raise UsageError(f"--loss-on is {self.loss_on!r}; it must be replies or all.")
        if self.max_length < 8:
            raise UsageError(f"--max-length is {self.max_length}; examples need at least 8 tokens.")

    def to_dict(self) -> dict[str, Any]:
        """As JSON values."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> RenderSettings:
        """Read `to_dict`'s result back. Raises `BundleError`."""
        kinds = {"style": str, "delimiter": str, "loss_on": str, "max_length": int}
        if set(values) != set(kinds) or any(not isinstance(values[key], kind) for key, kind in kinds.items()):
            raise BundleError("The saved rendering settings are not of a form that this version reads.")
        try:
            return cls(**values)
        except UsageError as error:
            raise BundleError(f"The saved rendering settings are not valid: {error}") from error


@dataclass(frozen=True)
class Example:
    """One sequence to train on. `labels` are `input_ids` where there is loss and -100 elsewhere."""

    input_ids: list[int]
    labels: list[int]
    kinds: list[Kind]
    conversation: str  # id


@dataclass(frozen=True)
class _Part:
    """Some tokens of one turn (or of several), and which of them are labels."""

    ids: list[int] = field(default_factory=list)
    kinds: list[Kind] = field(default_factory=list)
    labels: list[int] = field(default_factory=list)
    reply: bool = False  # one to be learnt

    def __len__(self) -> int:
        return len(self.ids)

    def __add__(self, other: _Part) -> _Part:
        return _Part(self.ids + other.ids, self.kinds + other.kinds, self.labels + other.labels)

    def __getitem__(self, cut: slice) -> _Part:
        return _Part(self.ids[cut], self.kinds[cut], self.labels[cut])

    def silent(self) -> _Part:
        """The same tokens as context, without loss."""
        return _context(self.ids)


class Renderer:
    """Renders for one tokenizer and one set of settings. Raises `UsageError` where these do not go together."""

    def __init__(self, tokenizer: Any, settings: RenderSettings) -> None:
        self.tokenizer = tokenizer
        self.settings = settings
        self.style: Style
        if settings.style == "template":
            self.style = TemplateStyle(tokenizer)
        else:
            self.style = DelimiterStyle(tokenizer, settings.delimiter)

    # --- training ----------------------------------------------------------------------------------------

    def examples(self, conversation: Conversation) -> list[Example]:
        """The conversation in windows of at most `max_length` tokens, cut between turns.

        Every reply is learnt in exactly one window, which also holds what came before it: at least one turn,
        and as many as fit. A system turn stands in front of every window. Where not even a reply and the turn
        before it fit, that turn loses its beginning; a reply that is too long by itself loses its end, and a
        quarter of the window is left to what came before it.
        """
        if not conversation.has_reply:
            return []
        self.style.check(conversation.turns)
        begins_with_system = conversation.turns[0].role == "system"
        opener = int(begins_with_system)  # answers nothing, so it is not a reply whoever says it
        turns = [
            self._part(turn, pieces, answers=index > opener)
            for index, (turn, pieces) in enumerate(
                zip(conversation.turns, self.style.pieces(conversation.turns), strict=True)
            )
        ]
        opening = _context(self.style.opening(system=begins_with_system))
        system = turns.pop(0) if begins_with_system else _Part()
        windows: list[Example] = []
        fresh = 0  # turns from here on have not been in a window of their own
        while (reply := _next_reply(turns, fresh)) is not None:
            begin, end = self._window(turns, reply, self.settings.max_length - len(opening) - len(system))
            window = [
                turn if index >= fresh else turn.silent()
                for index, turn in enumerate(turns[begin:end], start=begin)
            ]
            whole = self._fitted(opening, system.silent() if fresh else system, window)
            windows.append(Example(whole.ids, whole.labels, whole.kinds, conversation.id))
            fresh = end
        return windows

    def _window(self, turns: Sequence[_Part], reply: int, room: int) -> tuple[int, int]:
        """Turns [begin, end): the next reply and the turn before it, then later replies, then older turns."""
        begin, end = reply - 1, reply + 1
        used = best = len(turns[begin]) + len(turns[reply])
        for index in range(end, len(turns)):
            used += len(turns[index])
            if used > room:
                break
            if turns[index].reply:
                end, best = index + 1, used
        while begin > 0 and best + len(turns[begin - 1]) <= room:
            begin -= 1
            best += len(turns[begin])
        return begin, end

    def _fitted(self, opening: _Part, system: _Part, window: Sequence[_Part]) -> _Part:
        """The window as one part of at most `max_length` tokens; it ends with a reply."""
        context, reply = sum(window[:-1], _Part()), window[-1]
        room = self.settings.max_length - len(opening)
        if len(reply) > room:
            reply = reply[: room - min(len(context), room // 4)]
        room -= len(reply)
        if len(system) > room:
            system = _Part()
        room -= len(system)
        return opening + system + context[max(0, len(context) - room) :] + reply

    def _part(self, turn: Turn, pieces: TurnPieces, *, answers: bool) -> _Part:
        ids = pieces.ids
        reply = turn.role == "assistant" and turn.learn and answers
        kinds: list[Kind] = ["context"] * len(ids)
        if reply:
            kinds = ["context"] * len(pieces.lead)
            kinds += ["reply"] * len(pieces.text)
            kinds += ["marker"] * len(pieces.closing)
        everything = self.settings.loss_on == "all"
        labels = [
            token if everything or kind != "context" else NO_LOSS
            for token, kind in zip(ids, kinds, strict=True)
        ]
        return _Part(ids, kinds, labels, reply)

    # --- chatting ----------------------------------------------------------------------------------------

    def prompt_ids(self, turns: Sequence[Turn], known: int = 0) -> list[int]:
        """What to feed so that the model's next tokens are the reply to `turns`.

        The first `known` turns, with all that closes them, have been fed already.
        """
        ids = [] if known else list(self.style.opening(system=turns[0].role == "system"))
        for pieces in self.style.pieces(turns[known:]):
            ids += pieces.ids
        return [*ids, *self.style.reply_lead]

    @property
    def closing_ids(self) -> list[int]:
        """What follows a reply's text, up to the next turn."""
        return self.style.closing

    @property
    def stop_ids(self) -> list[int]:
        """The beginning of `closing_ids`; once the model has said it, its reply has ended."""
        return self.style.stop

    @property
    def stop_text(self) -> str:
        """Text that ends a reply too, since a model may spell the delimiter in other tokens; "" for none."""
        return self.style.stop_text

    def reply_text(self, ids: Sequence[int]) -> str:
        """The text of a reply's tokens, up to what closes it."""
        kept = list(ids)
        stop = self.stop_ids
        for start in range(len(kept) - len(stop) + 1):
            if kept[start : start + len(stop)] == stop:
                kept = kept[:start]
                break
        text: str = self.tokenizer.decode(kept, skip_special_tokens=True)
        return text.partition(self.stop_text)[0] if self.stop_text else text


def _context(ids: list[int]) -> _Part:
    return _Part(list(ids), ["context"] * len(ids), [NO_LOSS] * len(ids))


def _next_reply(turns: Sequence[_Part], start: int) -> int | None:
    return next((index for index in range(start, len(turns)) if turns[index].reply), None)
