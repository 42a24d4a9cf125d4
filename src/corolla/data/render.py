"""Conversations as tokens and labels, for training and for chatting.

Invariant: the tokens that a chat feeds, turn by turn with the replies in between, are the tokens that an
example of the same turns has. Padding does not occur here, and a token carries loss at most once however
many windows a long conversation is cut into.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from corolla.data.conversation import Conversation, Turn
from corolla.data.styles import DelimiterStyle, Style, TemplateStyle
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
class _Rendered:
    """One turn of a conversation, ready to be put into windows."""

    ids: list[int]
    kinds: list[Kind]
    learn: bool  # a reply to be learnt

    def __len__(self) -> int:
        return len(self.ids)


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
        """The conversation in windows of at most `max_length` tokens; every reply is learnt in one of them.

        A window begins with what was said before its first reply. Where not even one turn and its reply fit,
        the newest of what came before is kept, and the reply whole if it fits.
        """
        turns = [self._turn(conversation.turns, index) for index in range(len(conversation.turns))]
        first = 1 if conversation.turns[0].role == "system" else 0
        system, turns = turns[:first], turns[first:]
        windows, learnt = [], 1  # the first turn answers nothing, so it is never learnt
        while (reply := _next_reply(turns, learnt)) is not None:
            begin, end = self._window(system, turns, reply)
            windows.append(self._example(system, turns[begin:end], learnt - begin, conversation.id))
            learnt = end
        return windows

    def _window(self, system: Sequence[_Rendered], turns: Sequence[_Rendered], reply: int) -> tuple[int, int]:
        """Turns [begin, end) around the next reply: one turn before it, then as much as fits."""
        room = self._room(system)
        begin, end = reply - 1, reply + 1
        used = len(turns[begin]) + len(turns[reply])
        best = end
        while end < len(turns) and used + len(turns[end]) <= room:
            used += len(turns[end])
            end += 1
            if turns[end - 1].learn:
                best = end
        used = sum(len(turn) for turn in turns[begin:best])
        while begin > 0 and used + len(turns[begin - 1]) <= room:  # older context, where there is room
            begin -= 1
            used += len(turns[begin])
        return begin, best

    def _opening(self, system: Sequence[_Rendered]) -> list[int]:
        return list(self.style.opening(system=bool(system)))

    def _room(self, system: Sequence[_Rendered]) -> int:
        return self.settings.max_length - len(self._opening(system)) - sum(len(turn) for turn in system)

    def _example(
        self, system: Sequence[_Rendered], turns: Sequence[_Rendered], fresh: int, conversation: str
    ) -> Example:
        """One window; turns before index `fresh` carry no loss, since an earlier window has learnt them."""
        ids = self._opening(system)
        kinds: list[Kind] = ["context"] * len(ids)
        wanted = [False] * len(ids)
        for turn in system:
            ids += turn.ids
            kinds += turn.kinds
            wanted += [False] * len(turn)
        everything = self.settings.loss_on == "all"
        for index, turn in enumerate(turns):
            ids += turn.ids
            kinds += turn.kinds if turn.learn and index >= fresh else ["context"] * len(turn)
            if everything:
                wanted += [index >= fresh or index == 0] * len(turn)
            else:
                wanted += [turn.learn and index >= fresh and kind != "context" for kind in turn.kinds]
        cut = self._cut(len(ids), turns)
        labels = [token if want else NO_LOSS for token, want in zip(ids, wanted, strict=True)]
        return Example(ids[cut], labels[cut], kinds[cut], conversation)

    def _cut(self, length: int, turns: Sequence[_Rendered]) -> slice:
        """Which tokens to keep of a window that is too long: the newest, and the beginning of a long reply."""
        limit = self.settings.max_length
        if length <= limit:
            return slice(None)
        reply = len(turns[-1])
        if reply >= limit:
            return slice(length - reply, length - reply + limit)
        return slice(length - limit, None)

    def _turn(self, turns: Sequence[Turn], index: int) -> _Rendered:
        pieces = self.style.pieces(turns, index)
        learn = turns[index].role == "assistant" and turns[index].learn
        kinds: list[Kind] = ["context"] * len(pieces.lead)
        kinds += ["reply" if learn else "context"] * len(pieces.text)
        kinds += ["marker" if learn else "context"] * len(pieces.closing)
        return _Rendered(pieces.ids, kinds, learn)

    # --- chatting ----------------------------------------------------------------------------------------

    def prompt_ids(self, turns: Sequence[Turn], known: int = 0) -> list[int]:
        """What to feed so that the model's next tokens are the reply to `turns`.

        The first `known` turns, with all that closes them, have been fed already.
        """
        ids = [] if known else list(self.style.opening(system=turns[0].role == "system"))
        for index in range(known, len(turns)):
            ids += self.style.pieces(turns, index).ids
        return [*ids, *self.style.reply_lead(turns)]

    @property
    def closing_ids(self) -> list[int]:
        """What follows a reply's text, up to the next turn."""
        return self.style.closing

    @property
    def stop_ids(self) -> list[int]:
        """The beginning of `closing_ids`; once the model has said it, its reply has ended."""
        return self.style.stop

    def reply_text(self, ids: Sequence[int]) -> str:
        """The text of a reply's tokens, without what closes it."""
        kept = list(ids)
        stop = self.stop_ids
        for start in range(len(kept) - len(stop) + 1):
            if kept[start : start + len(stop)] == stop:
                kept = kept[:start]
                break
        text: str = self.tokenizer.decode(kept, skip_special_tokens=True)
        return text


def _next_reply(turns: Sequence[_Rendered], start: int) -> int | None:
    return next((index for index in range(start, len(turns)) if turns[index].learn), None)
