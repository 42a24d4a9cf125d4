"""A reply: how it may begin, what of it may be shown as its tokens come, and where it ends.

Invariant: a reply that `generate` makes with a processor of `Beginnings` has something to read in it, and is never
the delimiter or a piece of it: until something was said, the tokens that would end it cannot be chosen. From then on,
and for tokens that can be chosen, scores are what the model gave. The pieces that a `ReplyReader` shows, joined, are
the reply's `text`, and `ids` are tokens of that text; no part of what ends a reply is ever shown, nor half of a
character.
"""

from __future__ import annotations

import string
import unicodedata
from collections.abc import Callable, Collection, Sequence
from typing import Any, Self

import torch
from torch import Tensor
from transformers import LogitsProcessor, StoppingCriteria

from corolla.data.cuts import ids_inside
from corolla.data.render import Renderer
from corolla.errors import UsageError

_PLAIN = {"skip_special_tokens": True, "clean_up_tokenization_spaces": False}
# Templates let a reply begin with marks or line breaks of its own.
SILENT_TOKENS = 8


class Beginnings:
    """What of a vocabulary can begin a reply; made once for a tokenizer and what ends a reply."""

    def __init__(
        self, tokenizer: Any, *, stop_ids: Sequence[int], end_ids: Collection[int], stop_text: str
    ) -> None:
        """A reply ends with `stop_ids`, any of `end_ids`, or `stop_text`, the delimiter ("" for none).

        Decodes the whole vocabulary: about a second for 100,000 tokens. Raises `UsageError` when nothing of
        it can begin a reply.
        """
        self._tokenizer = tokenizer
        self._stop_text = stop_text
        texts = tokenizer.batch_decode([[token] for token in range(len(tokenizer))], **_PLAIN)
        # Each token of a delimiter is a piece of it; of a template's mark in several tokens, none ends a reply.
        ending = {*end_ids, *(stop_ids if stop_text or len(stop_ids) == 1 else ())}
        self._ending = torch.tensor(
            [token in ending or _is_piece(text, stop_text) for token, text in enumerate(texts)]
        )
        self._readable = torch.tensor([_is_readable(text) for text in texts]) & ~self._ending
        # Of halves of characters, only those that follow tell whether they become white space.
        self._whole = self._readable & torch.tensor(["\ufffd" not in text for text in texts])
        if not bool(self._readable.any()):
            raise UsageError("With this delimiter no token could begin a reply; give another --delimiter.")

    @classmethod
    def of(cls, renderer: Renderer, end_ids: Collection[int]) -> Beginnings:
        """For replies as `renderer` ends them, or any of `end_ids`."""
        return cls(
            renderer.tokenizer, stop_ids=renderer.stop_ids, end_ids=end_ids, stop_text=renderer.stop_text
        )

    def ends(self, tokens: Tensor) -> Tensor:
        """Which of these tokens, int64 [...], would end a reply that they begin; bool [...]."""
        return _of_width(self._ending, int(tokens.max()) + 1).to(tokens.device)[tokens]

    def processor(self, prompt_tokens: int, max_new_tokens: int) -> LogitsProcessor:
        """For a `generate` call whose rows have `prompt_tokens` in front, padding included."""
        return _SaySomething(self, prompt_tokens, max_new_tokens)

    def blocked(self, replies: Tensor, width: int, *, more: bool) -> Tensor | None:
        """Which of `width` tokens cannot follow, bool [R, width], after `replies` [R, n]; None: all can.

        With `more`, tokens that say nothing by themselves may still come, since others will follow.
        """
        begun = torch.tensor([self._has_begun(reply) for reply in replies.tolist()])
        if bool(begun.all()):
            return None
        silent = more and replies.shape[1] < SILENT_TOKENS
        blocked = _of_width(self._ending, width) if silent else ~_of_width(self._readable, width)
        return blocked & ~begun[:, None]

    def _has_begun(self, reply: list[int]) -> bool:
        known = len(self._readable)
        if any(token < known and self._whole[token] for token in reply):
            return True
        text = self._tokenizer.decode(reply, **_PLAIN) if reply else ""
        return _is_readable(text) and not _is_piece(text, self._stop_text)


class TokensSeen(StoppingCriteria):  # type: ignore[misc]
    """Tells `take(row, token)` of new tokens as soon as they are chosen; ends once it has said of all rows: over.

    Speculation chooses several tokens at a time. Of a row that is over, `take` is told no more.
    """

    def __init__(self, take: Callable[[int, int], bool], prompt_tokens: int) -> None:
        self._take = take
        self._seen = prompt_tokens
        self._over: set[int] = set()

    def __call__(self, input_ids: Tensor, scores: Any, **_kwargs: Any) -> Tensor:
        for row, tokens in enumerate(input_ids[:, self._seen :].tolist()):
            if row not in self._over and any(self._take(row, token) for token in tokens):
                self._over.add(row)
        self._seen = input_ids.shape[1]
        rows = input_ids.shape[0]
        return torch.full((rows,), len(self._over) == rows, device=input_ids.device)


def reply_ends(model: Any, renderer: Renderer) -> frozenset[int]:
    """Single tokens that end a reply: those of the model, of the tokenizer and of its template."""
    named = model.generation_config.eos_token_id
    ids = set(named if isinstance(named, list) else [named]) | {renderer.tokenizer.eos_token_id}
    return renderer.end_ids | frozenset(ids - {None})


class _SaySomething(LogitsProcessor):  # type: ignore[misc]
    def __init__(self, beginnings: Beginnings, prompt_tokens: int, max_new_tokens: int) -> None:
        self._beginnings = beginnings
        self._prompt_tokens = prompt_tokens
        self._most = max_new_tokens

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        replies = input_ids[:, self._prompt_tokens :]
        more = replies.shape[1] + 1 < self._most
        blocked = self._beginnings.blocked(replies, scores.shape[1], more=more)
        return scores if blocked is None else scores.masked_fill(blocked.to(scores.device), -torch.inf)


def _is_readable(text: str) -> bool:
    """Whether there is something to see: not only white space and controls."""
    return any(unicodedata.category(character)[0] not in "ZC" for character in text)


def _is_piece(text: str, delimiter: str) -> bool:
    """Whether a reply that is `text` would be the delimiter, or a part of it, whatever white space is around.

    Of words in a delimiter only a beginning counts: after "man", "\\nHuman:" does not come any more.
    """
    core, own = delimiter.strip(), text.strip()
    if not own:
        return bool(text) and (text in delimiter or delimiter[:1].isspace())
    if not core:
        return False
    if own.startswith(core) or core.startswith(own):
        return True
    return own in core and not any(character.isalnum() for character in own)


def _of_width(table: Tensor, width: int) -> Tensor:
    """A table [V] for models whose head has more rows than the tokenizer has tokens, or fewer."""
    if len(table) >= width:
        return table[:width]
    return torch.cat([table, table.new_zeros(width - len(table))])


# --- reading -----------------------------------------------------------------------------------------------

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
        return str(self._tokenizer.decode(list(ids), **_PLAIN))
