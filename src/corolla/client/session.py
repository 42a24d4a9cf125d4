"""An inference session as its user sees it: tokens so far, a position, a limit.

Invariant: `tokens` is the whole conversation, what the servers' caches hold is a beginning of it, and a
`generate` call runs just the rest. `max_length` counts the user's tokens; prompts come on top.
"""

from __future__ import annotations

import weakref
from contextvars import ContextVar, Token
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from corolla.client.chain import SessionChain
from corolla.client.connection import SwarmConnection
from corolla.client.prefixes import LEAST_TOKENS, Beginning
from corolla.client.remote_blocks import RemoteBlocks
from corolla.errors import UsageError
from corolla.models.cache import RemoteCache
from corolla.models.prompts import SoftPrompt

ActiveSession = ContextVar["InferenceSession | None"]


class InferenceSession:
    """Attention caches on the servers for one conversation (or a batch of them).

    Use as a context manager; inside the `with`, calls of the model that name no session use this one.
    """

    def __init__(
        self,
        blocks: RemoteBlocks,
        prompt: SoftPrompt | None,
        active: ActiveSession,
        *,
        max_length: int | None,
    ) -> None:
        """`max_length` None means: as far as each call says that it needs."""
        if max_length is not None and max_length < 1:
            raise UsageError("A session needs a max_length of at least 1.")
        self.max_length = max_length
        self._blocks = blocks
        self._prompt = prompt
        self._prompt_input = None if prompt is None else prompt.input.detach().clone()
        self._chain = blocks.open_chain(None if prompt is None else prompt.deep)
        self.cache = RemoteCache(
            self._chain, prompt_length=0 if prompt is None else prompt.length, max_length=max_length
        )
        self._active = active
        self._tokens: list[Token[InferenceSession | None]] = []
        self._output_ids: Tensor | None = None
        # A session that is dropped without `close()` must not hold the servers' memory. The finalizer hangs
        # on the cache, since that is what a caller of `model(..., use_cache=True)` keeps.
        self._connection = blocks.connection
        self._finalizer = weakref.finalize(self.cache, _close_soon, self._connection, self._chain)
        self._connection.prefixes.opened(self)

    # --- tokens so far -----------------------------------------------------------------------------------

    @property
    def output_ids(self) -> Tensor | None:
        """All tokens of the conversation so far, int64 [R, n], including the newest that no server has seen."""
        known = 0 if self._output_ids is None else int(self._output_ids.shape[1])
        return self.cache.ids if self.cache.length > known else self._output_ids

    @property
    def position(self) -> int:
        """How many tokens a row the conversation has; set it back to forget what came later."""
        tokens = self.output_ids
        return self.cache.length if tokens is None else max(self.cache.length, int(tokens.shape[1]))

    @position.setter
    def position(self, position: int) -> None:
        if not 0 <= position <= self.position:
            raise UsageError(f"A session of {self.position} tokens cannot be set to position {position}.")
        tokens = self.output_ids
        self.cache.truncate(min(position, self.cache.length))
        self._output_ids = None if tokens is None or position == 0 else tokens[:, :position]

    # --- used by generate --------------------------------------------------------------------------------

    def begin(self, inputs: Tensor | None, mask: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        """The whole conversation with `inputs` [R, T] behind it, and the padding mask that belongs to it.

        `mask` may cover the new tokens or the whole. Afterwards the caches hold a true beginning of it.
        """
        past = self.output_ids
        ids = _appended(past, inputs)
        if past is None and ids is not None and (mask is None or bool(mask.all())):
            self._begin_with_known(ids)
        if past is None or ids is None:
            return ids, mask
        self.cache.align(ids)
        return ids, self._whole_mask(mask, int(past.shape[1]), ids)

    def _begin_with_known(self, ids: Tensor) -> None:
        """Where another session of this client has begun with the same tokens, take them over from it."""
        if ids.shape[0] != 1:
            return
        found = self._connection.prefixes.find(ids[0].detach().cpu(), self._prompt_input)
        if found is not None:
            beginning, tokens = found
            columns = self.cache.prompt_length + tokens
            begin = self._chain.begin_as(beginning.chain, columns, beginning.version)
            if self._connection.run(begin):
                self.cache.record(ids[:, :tokens], 1, tokens, None)

    def beginning(self) -> Beginning | None:
        """What others may begin with: the tokens of a single row without padding that the servers have seen."""
        version, ids = self._chain.version, self.cache.ids
        if ids is None or ids.shape[0] != 1 or self.cache.mask is not None or bool((ids < 0).any()):
            return None
        return Beginning(ids[0], self._chain, self._prompt_input, version)

    def fork(self) -> InferenceSession:
        """Another session that goes on from here by itself; what is cached so far is shared, not copied."""
        twin = InferenceSession(self._blocks, self._prompt, self._active, max_length=self.max_length)
        columns = self.cache.prompt_length + self.cache.length
        if self.cache.length:
            begin = twin._chain.begin_as(self._chain, columns, self._chain.version)
            if self._connection.run(begin):
                twin.cache.take_over(self.cache)
        twin._output_ids = self._output_ids
        return twin

    def _whole_mask(self, mask: Tensor | None, before: int, ids: Tensor) -> Tensor:
        """The mask for `ids` [R, n]: as it was for what the servers have seen, and given or real behind that.

        It is never left to be guessed from padding tokens, since a model may have said one.
        """
        total = int(ids.shape[1])
        if mask is not None and mask.shape[1] == total:
            return mask
        if mask is not None and mask.shape[1] != total - before:
            raise UsageError(
                f"The attention mask covers {mask.shape[1]} tokens; give one for the {total - before} new "
                f"tokens or for all {total}."
            )
        whole = torch.ones_like(ids)
        if self.cache.mask is not None:
            whole[:, : self.cache.length] = self.cache.mask.to(whole.device)
        if mask is not None:
            whole[:, before:] = mask.to(whole.device)
        return whole

    def keep(self, sequences: Tensor, before: int) -> Tensor:
        """Note what a call has returned, [R, n]; gives back what came after the first `before` tokens."""
        self._output_ids = sequences
        return sequences[:, before:]

    # --- life --------------------------------------------------------------------------------------------

    def __enter__(self) -> InferenceSession:
        self._tokens.append(self._active.set(self))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._active.reset(self._tokens.pop())
        self.close()

    def close(self) -> None:
        """Free the servers' caches; safe to call twice."""
        if self._finalizer.detach() is None or not self._connection.is_open:
            return
        beginning = self.beginning()
        keep = beginning is not None and len(beginning.ids) >= LEAST_TOKENS
        self._connection.run(self._chain.close(keep=keep))
        if keep and beginning is not None:
            self._connection.prefixes.keep(beginning)


def _close_soon(connection: SwarmConnection, chain: SessionChain) -> None:
    if connection.is_open:
        connection.run_soon(chain.close())


def _appended(past: Tensor | None, inputs: Tensor | None) -> Tensor | None:
    if past is None or inputs is None:
        return past if inputs is None else inputs
    if past.shape[0] != inputs.shape[0]:
        raise UsageError(
            f"This session holds {past.shape[0]} sequences; inputs of {inputs.shape[0]} cannot continue it."
        )
    return torch.cat([past.to(inputs.device), inputs], dim=1)


def sequences_of(result: Any) -> Tensor:
    """The token ids of a `generate` result, which is a tensor or a `ModelOutput`."""
    sequences: Tensor = result if isinstance(result, Tensor) else result.sequences
    return sequences
