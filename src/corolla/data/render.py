"""Conversations as tokens and labels, for training and for chatting.

Invariant: the tokens that a chat feeds, with the replies in between, are the tokens that an example of the
same turns has. Padding does not occur here, and a reply carries loss once however many windows a long
conversation is cut into; each window is rendered as a conversation of its own, as a chat does that has left
its oldest turns behind.

No end-of-text token is added: what closes a reply is what a chat stops at, and a chat always goes on after it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from corolla.config import check_kinds
from corolla.data.conversation import Conversation, Turn
from corolla.data.styles import DelimiterStyle, Rendering, Style, TemplateStyle, is_reply
from corolla.errors import BundleError, DataError, UsageError

NO_LOSS = -100
STYLES = ("auto", "delimiter", "template")
Kind = Literal["reply", "marker", "context"]


@dataclass(frozen=True)
class RenderSettings:
    """How conversations become tokens; saved with every prompt."""

    style: str = "delimiter"  # or "template", or "auto": the template where it will do
    delimiter: str = "\n-----\n"
    loss_on: str = "replies"  # or "all"
    max_length: int = 256
    # The delimiter style puts SentencePiece's space before every piece, as it did up to 0.1.
    spaced: bool = False

    def __post_init__(self) -> None:
        check_kinds(self)
        if self.style not in STYLES:
            raise UsageError(f"--style is {self.style!r}; it must be delimiter or template, or auto.")
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
        values = {"spaced": True, **values}  # those who do not name it are from before
        if set(values) != {field.name for field in dataclasses.fields(cls)}:
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


class Renderer:
    """Renders for one tokenizer and one set of settings. Raises `UsageError` where these do not go together.

    Its `settings` name the style that was chosen, never "auto"; `about_style` says in words which, and why.
    """

    def __init__(self, tokenizer: Any, settings: RenderSettings) -> None:
        self.tokenizer = tokenizer
        self.requested_style = settings.style
        self.style, self.about_style = _chosen_style(tokenizer, settings)
        # What follows a reply's text, up to the next turn; its beginning, with which the model has ended its reply.
        self.closing_ids, self.stop_ids = self.style.closing, self.style.stop
        # What ends a reply, too: a text, since a model may spell it in other tokens ("" for none), and single tokens.
        self.stop_text, self.end_ids = self.style.stop_text, self.style.ends
        by_template = isinstance(self.style, TemplateStyle)
        self.settings = dataclasses.replace(settings, style="template" if by_template else "delimiter")

    # --- training ----------------------------------------------------------------------------------------

    def refusal(self, conversation: Conversation) -> str | None:
        """Why the style cannot write a conversation down; None where it can."""
        try:
            self.style.check(conversation.turns, conversation.tools)
        except DataError as error:
            return str(error)
        return None

    def examples(self, conversation: Conversation) -> list[Example]:
        """The conversation in windows of at most `max_length` tokens, cut between turns.

        Every reply is learnt in exactly one window, which also holds what came before it: at least one turn,
        and as many as fit. A system turn stands in front of every window. Where not even a reply and the turn
        before it fit, that turn loses its beginning; a reply that is too long by itself loses its end, and a
        quarter of the window is left to what came before it. Raises `DataError` for a conversation that the
        style cannot render.
        """
        if not conversation.has_reply:
            return []
        turns = conversation.turns
        learnt = [index for index, turn in enumerate(turns) if turn.learn and is_reply(turns, index)]
        if not learnt:
            return []
        windows = _Windows(self.style, conversation, self.settings)
        return windows.examples(learnt)

    # --- chatting ----------------------------------------------------------------------------------------

    def prompt_ids(self, turns: Sequence[Turn], own: Sequence[Sequence[int]] = ()) -> list[int]:
        """All that the model reads before its reply to `turns`; `own` are the tokens of its replies so far.

        Raises `DataError` for what the style cannot render.
        """
        return self._with_own(turns, own, reply=True)

    def ids(self, turns: Sequence[Turn], own: Sequence[Sequence[int]] = ()) -> list[int]:
        """The turns' tokens, with what closes the last one; `own` are the tokens of the replies among them."""
        return self._with_own(turns, own, reply=False)

    def _with_own(self, turns: Sequence[Turn], own: Sequence[Sequence[int]], *, reply: bool) -> list[int]:
        """The model's own tokens stand for its replies, but where one is tokenized with what closes it."""
        rendering = self.style.render(turns, reply=reply, strict=False)
        ids: list[int] = []
        done = 0
        replies = [index for index in range(len(turns)) if is_reply(turns, index)]
        for index, said in zip(replies, own, strict=False):
            place = rendering.replies.get(index)
            if place is None or not place.apart:
                continue
            ids += [*rendering.ids[done : place.begin], *said]
            done = place.end
        return ids + rendering.ids[done:]


def _chosen_style(tokenizer: Any, settings: RenderSettings) -> tuple[Style, str]:
    """The style, and what it is in words; "auto" is a template that a chat could follow, else the delimiter."""
    why = ""
    if settings.style == "auto" and not tokenizer.chat_template:
        why = ": the tokenizer has no chat template"
    elif settings.style != "delimiter":
        try:
            return TemplateStyle(tokenizer), "the tokenizer's chat template"
        except UsageError as error:
            if settings.style == "template":
                raise
            why = ": " + str(error).partition("; use")[0].rstrip(".")
    return DelimiterStyle(
        tokenizer, settings.delimiter, spaced=settings.spaced
    ), f"the delimiter {settings.delimiter!r}{why}"


class _Windows:
    """Parts of one conversation that fit; turns are counted without a system turn in front."""

    def __init__(self, style: Style, conversation: Conversation, settings: RenderSettings) -> None:
        self._style = style
        self._conversation = conversation
        self._settings = settings
        turns = list(conversation.turns)
        self._system = turns[:1] if turns[0].role == "system" else []
        self._spoken = turns[len(self._system) :]

    def examples(self, learnt: Sequence[int]) -> list[Example]:
        """`learnt` are the indexes of the replies to learn, among all turns."""
        replies = [index - len(self._system) for index in learnt]
        whole = self._rendered(0, replies[-1] + 1)
        if len(whole.ids) <= self._settings.max_length:
            return [self._example(whole, 0, replies[-1] + 1, 0)]
        lengths = self._style.lengths(self._conversation.turns)
        room = self._settings.max_length - whole.opening - sum(lengths[: len(self._system)])
        lengths = lengths[len(self._system) :]
        examples = []
        fresh = 0  # turns from here on have not been in a window of their own
        while replies:
            begin, end = self._window(lengths, replies, room)
            begin, end, rendering = self._that_fits(begin, end, replies)
            examples.append(self._example(rendering, begin, end, fresh))
            fresh = end
            replies = [reply for reply in replies if reply >= fresh]
        return examples

    def _window(self, lengths: Sequence[int], replies: Sequence[int], room: int) -> tuple[int, int]:
        """Turns [begin, end): the next reply and the turn before it, then later replies, then older turns."""
        first = self._style.first_of_window(self._spoken, replies[0])
        begin, end = first, replies[0] + 1
        used = best = sum(lengths[begin:end])
        for index in range(end, len(lengths)):
            used += lengths[index]
            if used > room:
                break
            if index in replies:
                end, best = index + 1, used
        while begin > 0 and best + lengths[begin - 1] <= room:
            begin -= 1
            best += lengths[begin]
        return self._allowed(begin, first), end

    def _allowed(self, begin: int, first: int) -> int:
        """`begin`, or the next turn after it with which a window may begin; `first` is one."""
        for index in range(begin, first):
            if index == 0 or self._style.first_of_window(self._spoken, index + 1) == index:
                return index
        return first

    def _that_fits(self, begin: int, end: int, replies: Sequence[int]) -> tuple[int, int, Rendering]:
        """The window made smaller until it fits, since lengths of single turns do not say it exactly."""
        first = self._style.first_of_window(self._spoken, replies[0])
        while True:
            rendering = self._rendered(begin, end)
            if len(rendering.ids) <= self._settings.max_length:
                return begin, end, rendering
            shorter = [reply + 1 for reply in replies if reply + 1 < end]
            if begin < first:
                begin = self._allowed(begin + 1, first)
            elif shorter:
                end = shorter[-1]
            else:
                return begin, end, rendering

    def _rendered(self, begin: int, end: int) -> Rendering:
        return self._style.render([*self._system, *self._spoken[begin:end]], self._conversation.tools)

    def _example(self, rendering: Rendering, begin: int, end: int, fresh: int) -> Example:
        """The window as an example of at most `max_length` tokens; what came before `fresh` is context."""
        turns = [*self._system, *self._spoken[begin:end]]
        first_new = len(self._system) + max(0, fresh - begin)
        silent = rendering.opening
        kinds: list[Kind] = ["context"] * len(rendering.ids)
        for index, reply in rendering.replies.items():
            if index < first_new:
                silent = reply.closed
            elif turns[index].learn and is_reply(turns, index):
                kinds[reply.begin : reply.end] = ["reply"] * (reply.end - reply.begin)
                kinds[reply.end : reply.closed] = ["marker"] * (reply.closed - reply.end)
        if fresh and self._settings.loss_on == "all":
            silent = max(silent, self._style.heading(turns, self._conversation.tools))
        everything = self._settings.loss_on == "all"
        labels = [
            token if kind != "context" or (everything and place >= silent) else NO_LOSS
            for place, (token, kind) in enumerate(zip(rendering.ids, kinds, strict=True))
        ]
        kept = self._kept(rendering, turns)
        return Example(
            [rendering.ids[place] for place in kept],
            [labels[place] for place in kept],
            [kinds[place] for place in kept],
            self._conversation.id,
        )

    def _kept(self, rendering: Rendering, turns: Sequence[Turn]) -> Sequence[int]:
        """The places of the tokens that fit, where not even a reply and what it answers do."""
        longest = self._settings.max_length
        if len(rendering.ids) <= longest:
            return range(len(rendering.ids))
        reply = rendering.replies[max(rendering.replies)]
        head = min(self._style.heading(turns, self._conversation.tools), reply.begin)
        opening = min(rendering.opening, head)
        room = longest - opening
        said = reply.closed - reply.begin
        if said > room:
            least = max(room // 4, len(self._style.reply_lead))
            said = max(1, room - min(reply.begin - head, least))
        room -= said
        system = head - opening if head - opening <= room else 0
        room -= system
        context = min(reply.begin - head, room)
        return [
            *range(opening + system),
            *range(reply.begin - context, reply.begin + said),
        ]
