"""The cache that `transformers` sees at the client: lengths and rows here, keys and values on the servers.

Invariant: `length` counts the user's tokens that the servers have seen and that have not been taken back;
prompts come on top and are shown only to the base model itself (`with_prompt`). Cropping and reordering
cost nothing: they are carried out by the servers together with the next step.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor
from transformers import Cache

from corolla.errors import SessionLimit, UsageError


class BlocksSession(Protocol):
    """What the cache needs of the session behind it (`client/chain.py`)."""

    def reorder(self, rows: Tensor) -> None:
        """The next step continues with these rows of the cached ones, int64 [R]."""

    def reserve(self, tokens: int) -> None:
        """The coming steps may reach this many tokens a row, prompts included."""


class RemoteCache(Cache):  # type: ignore[misc]
    """Stands in for `DynamicCache`; made by `InferenceSession`, not by users."""

    def __init__(self, session: BlocksSession, *, prompt_length: int, max_length: int | None) -> None:
        super().__init__(layers=[])
        self.session = session
        self.prompt_length = prompt_length
        self.max_length = max_length
        self.length = 0
        # Both [R, length], of what the servers have seen: token ids (-1 where only embeddings are known) and
        # the padding mask, None while all tokens are real.
        self.ids: Tensor | None = None
        self.mask: Tensor | None = None

    # --- what generation and the models ask for ---------------------------------------------------------

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.length

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        return self.length + query_length, 0

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the newest tokens; a negative number counts them, a positive one is the length to keep."""
        self.truncate(self.length + tokens_to_remove if tokens_to_remove <= 0 else tokens_to_remove)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.select_rows(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        if self.ids is not None:
            self.select_rows(torch.arange(self.ids.shape[0]).repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        self.select_rows(indices)

    # --- what Corolla asks for --------------------------------------------------------------------------

    @property
    def rows(self) -> int:
        """Sequences in the cache; 0 before the first step."""
        return 0 if self.ids is None else int(self.ids.shape[0])

    def truncate(self, length: int) -> None:
        """Keep the first `length` of the user's tokens."""
        if not 0 <= length <= self.length:
            raise UsageError(f"A session of {self.length} tokens cannot be set to position {length}.")
        self.length = length
        if self.ids is not None:
            self.ids = self.ids[:, :length]
        if self.mask is not None:
            self.mask = self.mask[:, :length]
        if length == 0:
            self.ids = None
            self.mask = None

    def select_rows(self, rows: Tensor) -> None:
        """Continue with the rows that the int64 tensor `rows` [R] names."""
        if self.ids is None:
            return
        rows = rows.detach().to("cpu", torch.int64)
        self.ids = self.ids[rows]
        self.mask = None if self.mask is None else self.mask[rows]
        self.session.reorder(rows)

    def check_room(self, new_tokens: int) -> None:
        """Raises `SessionLimit` when so many more tokens do not fit; nothing has been computed then."""
        if self.max_length is not None and self.length + new_tokens > self.max_length:
            raise SessionLimit(
                f"This call needs {self.length + new_tokens} tokens, but its session was opened with "
                f"max_length={self.max_length}: open one with a larger max_length, or ask for fewer tokens."
            )

    def reserve(self, tokens: int) -> None:
        """Let the servers set aside room for `tokens` of the user's tokens a row, before anything is computed."""
        self.check_room(tokens - self.length)
        self.session.reserve(self.prompt_length + tokens)

    def record(self, ids: Tensor | None, rows: int, count: int, mask: Tensor | None) -> None:
        """Note what a step has added: token ids [R, T], or None where embeddings were given.

        `mask` [R, length + T] covers all tokens, those of the step included.
        """
        self.mask = None if mask is None else mask.detach().to("cpu", torch.int64)
        new = torch.full((rows, count), -1) if ids is None else ids.detach().to("cpu", torch.int64)
        past = self.ids
        if past is not None and past.shape[0] < rows:  # one sequence has become several beams or samples
            past = past.repeat_interleave(rows // past.shape[0], dim=0)
        self.ids = new if past is None else torch.cat([past, new], dim=1)
        self.length += count

    def take_over(self, other: RemoteCache) -> None:
        """Hold what `other` does; its session has become a copy of the other's."""
        self.length, self.ids, self.mask = other.length, other.ids, other.mask

    def align(self, ids: Tensor) -> None:
        """Make the cache a true beginning of `ids` [R, n], short of at least one token.

        Beam search leaves other rows behind than the ones it returned, prompt lookup may leave too many
        tokens: each row continues from the cached row that agrees with it longest.
        """
        if self.ids is None or not self.length:
            return
        ids = ids.detach().to("cpu", torch.int64)
        width = min(self.length, ids.shape[1] - 1)
        agree = self._agreement(ids[:, :width])  # [R, cached rows]
        best = agree.argmax(dim=1)
        if self.rows == ids.shape[0]:
            own = torch.arange(self.rows)
            best = torch.where(agree[own, own] == agree.max(dim=1).values, own, best)
        keep = int(agree.gather(1, best[:, None]).min())
        if not torch.equal(best, torch.arange(self.rows)):
            self.select_rows(best)
        self.truncate(keep)

    def _agreement(self, ids: Tensor) -> Tensor:
        """How many leading tokens each row of `ids` shares with each cached row, int64 [R, cached rows]."""
        assert self.ids is not None
        cached = self.ids[None, :, : ids.shape[1]]
        same = (cached == ids[:, None]) | (cached == -1)
        return same.long().cumprod(dim=2).sum(dim=2)

    def with_prompt(self) -> PromptedView:
        """The same cache as the base model must see it: with the prompt's positions counted."""
        return PromptedView(self)


class PromptedView(Cache):  # type: ignore[misc]
    """A `RemoteCache` whose lengths include the prompt once it has been run."""

    def __init__(self, cache: RemoteCache) -> None:
        super().__init__(layers=[])
        self.cache = cache
        self.past = cache.length + cache.prompt_length if cache.length else 0

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.past

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        return self.past + query_length, 0
