"""How a reply may begin, so that none is empty.

Invariant: with this processor, a reply that `generate` makes has something to read in it, and is never the
delimiter or a piece of it: until something was said, the tokens that would end it cannot be chosen. From then
on, and for tokens that can be chosen, scores are what the model gave.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessor

from corolla.data.render import Renderer
from corolla.errors import UsageError

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


def reply_ends(model: Any, renderer: Renderer) -> frozenset[int]:
    """Single tokens that end a reply: those of the model, of the tokenizer and of its template."""
    named = model.generation_config.eos_token_id
    ids = set(named if isinstance(named, list) else [named]) | {renderer.tokenizer.eos_token_id}
    return renderer.end_ids | frozenset(ids - {None})


_PLAIN = {"skip_special_tokens": True, "clean_up_tokenization_spaces": False}


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
