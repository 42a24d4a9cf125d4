"""An inference session as its user sees it: tokens so far, a position, a limit.

Invariant: `tokens` is the whole conversation, what the servers' caches hold is a prefix of it, and a
`generate` call runs just the rest. `max_length` counts the user's tokens; prompts come on top.
"""

from __future__ import annotations

import operator
import weakref
from collections.abc import Callable
from contextvars import ContextVar, Token
from dataclasses import dataclass
from functools import partial
from types import TracebackType
from typing import Any, cast

import torch
from torch import Tensor

from corolla.client.remote_blocks import RemoteBlocks, close_soon
from corolla.client.sessions.chain import SessionChain
from corolla.client.sessions.prefix_cache import LEAST_TOKENS, CachedPrefix
from corolla.errors import UsageError
from corolla.models import guard
from corolla.models.cache import RemoteCache
from corolla.models.prompts import Prompt, SoftPrompt, prefix_length, sent_length
from corolla.swarm.directory.routing import Hop

ActiveSession = ContextVar["InferenceSession | None"]
SAME = 1e-5  # of the largest value: what may differ where the same tokens enter the blocks in another batch


@dataclass(frozen=True)
class GenerateInputs:
    """What a `generate` call is given so that it goes on with a session's conversation."""

    ids: Tensor | None  # int64 [R, n], all tokens that are known as ids
    embeddings: Tensor | None  # [R, N, H], where some of the conversation is known as embeddings only
    mask: Tensor | None  # [R, N]; None to leave it to `generate`
    returned: int  # how many of `ids` earlier calls have returned
    columns: Tensor | None  # int64 [R, N], the whole conversation, -1 for what is known as an embedding only


class InferenceSession:
    """Attention caches on the servers for one conversation (or a batch of them).

    Use as a context manager; inside the `with`, calls of the model that name no session use this one.
    """

    def __init__(
        self,
        blocks: RemoteBlocks,
        prompt: Prompt | None,
        active: ActiveSession,
        *,
        max_length: int | None,
        embed: Callable[[Tensor], Tensor],
        entering: Callable[[Tensor], Tensor],
    ) -> None:
        """`max_length` None means: as far as each call says that it needs.

        `embed` gives the embeddings [R, T, E] of token ids [R, T], `entering` what they are when they enter the
        first block, the prompt in front.
        """
        if max_length is not None:
            max_length = _whole("A session's max_length", max_length)
            if max_length < 1:
                raise UsageError("A session needs a max_length of at least 1.")
        self.max_length = max_length
        self._new = partial(
            InferenceSession, blocks, prompt, active, max_length=max_length, embed=embed, entering=entering
        )
        self._embed, self._entering = embed, entering
        given = None if prompt is None else prompt.snapshot()
        self._prompt_key: Tensor | str | None = None
        if isinstance(prompt, SoftPrompt):
            self._prompt_key = prompt.input.detach().clone()
        elif given is not None:
            self._prompt_key = given.digest
        self._chain = chain = blocks.open_chain(given)
        self.cache = RemoteCache(
            lambda _cache: chain,
            prompt_length=sent_length(prompt),
            prefix_length=prefix_length(prompt),
            max_length=max_length,
            owner=blocks,
            fork=partial(forked, self._new),
        )
        self._active = active
        self._tokens: list[Token[InferenceSession | None]] = []
        self._output_ids: Tensor | None = None
        # 0 for padding in `_output_ids`; None while all tokens are real.
        self._output_mask: Tensor | None = None
        # A session that is dropped without `close()` must not hold the servers' memory. The finalizer hangs
        # on the cache, since that is what a caller of `generate` is given.
        self._connection = blocks.connection
        self._finalizer = weakref.finalize(self.cache, close_soon, self._connection, self._chain)
        self._connection.prefix_cache.opened(self)

    # --- tokens so far -----------------------------------------------------------------------------------

    @property
    def output_ids(self) -> Tensor | None:
        """All tokens of the conversation so far, int64 [R, n], including the newest that no server has seen.

        -1 stands for what is known as an embedding only.
        """
        known = 0 if self._output_ids is None else int(self._output_ids.shape[1])
        return self.cache.ids if self.cache.length > known else self._output_ids

    @property
    def position(self) -> int:
        """How many tokens a row the conversation has; set it back to forget what came later."""
        tokens = self.output_ids
        return self.cache.length if tokens is None else max(self.cache.length, int(tokens.shape[1]))

    @position.setter
    def position(self, position: int) -> None:
        position = _whole("A session's position", position)
        if not 0 <= position <= self.position:
            raise UsageError(f"A session of {self.position} tokens cannot be set to position {position}.")
        tokens, mask = self.output_ids, self._mask()
        self.cache.truncate(min(position, self.cache.length))
        self._output_ids = None if tokens is None or position == 0 else tokens[:, :position]
        self._output_mask = None if mask is None or position == 0 else mask[:, :position]

    @property
    def chain(self) -> SessionChain:
        """What the servers hold of the session."""
        return self._chain

    @property
    def hops(self) -> list[Hop]:
        """The servers that hold the session's caches, in the order of their blocks."""
        return self._chain.hops

    def _mask(self) -> Tensor | None:
        """The padding mask of `output_ids`; None while all tokens are real."""
        return self.cache.mask if self.output_ids is self.cache.ids else self._output_mask

    # --- used by generate --------------------------------------------------------------------------------

    def begin(
        self,
        inputs: Tensor | None,
        mask: Tensor | None,
        embeddings: Tensor | None = None,
        *,
        share: bool = True,
    ) -> GenerateInputs:
        """The whole conversation with `inputs` [R, T], or `embeddings` [R, T, H], behind it.

        `mask` may cover the new tokens or the whole; `share` allows to begin with what another session of this
        client holds. Afterwards the caches hold a true prefix of it. Raises
        `UsageError` for what cannot be told to continue it.
        """
        guard.check_cache(self.cache, self.cache.owner)
        self._chain.stopped = False
        if self.cache.foreign:
            raise UsageError(
                "Another library has put a prompt in front of this session's tokens (peft does), so it cannot tell "
                "what comes next: load the prompt with from_pretrained(…, prompts=FOLDER) to go on in sessions, or "
                "generate without a session."
            )
        past = self.output_ids
        if past is None and embeddings is not None:
            columns = torch.full(embeddings.shape[:2], -1)
            return GenerateInputs(inputs, embeddings, mask, 0, columns)
        new = inputs if embeddings is None else torch.full(embeddings.shape[:2], -1)
        ids = _appended(past, new)
        if share and past is None and ids is not None and (mask is None or bool(mask.all())):
            self._share_known_prefix(ids)
        if past is None or ids is None:
            return GenerateInputs(ids, None, mask, 0, ids)
        self.cache.align(ids)
        mask = self._whole_mask(mask, int(past.shape[1]), ids)
        if bool((ids < 0).any()):
            return self._as_embeddings(ids, embeddings, mask, past)
        return GenerateInputs(ids, None, mask, int(past.shape[1]), ids)

    def _as_embeddings(
        self, columns: Tensor, embeddings: Tensor | None, mask: Tensor, past: Tensor
    ) -> GenerateInputs:
        """`generate` takes such a conversation as embeddings; of what is cached nobody looks at them."""
        cached, total = self.cache.length, int(columns.shape[1])
        new = 0 if embeddings is None else int(embeddings.shape[1])
        between = columns[:, cached : total - new]
        if bool((between < 0).any()):
            raise UsageError(
                "This session's embeddings are no longer in its caches, so it cannot go on from there: open another "
                "session and give all of them again."
            )
        tail = self._embed(between)
        parts = [tail] if embeddings is None else [tail, embeddings.to(tail)]
        cached_part = tail.new_zeros(tail.shape[0], cached, tail.shape[2])
        is_token = (columns >= 0).all(0)
        ids = columns[:, is_token] if bool(is_token.any()) else None
        returned = int((past >= 0).all(0).sum())
        return GenerateInputs(ids, torch.cat([cached_part, *parts], 1), mask, returned, columns)

    def _share_known_prefix(self, ids: Tensor) -> None:
        """Where another session of this client has begun with the same tokens, take them over from it."""
        if ids.shape[0] != 1:
            return
        found = self._connection.prefix_cache.find(ids[0].detach().cpu(), self._prompt_key)
        if found is None:
            return
        prefix, tokens = found
        columns = self.cache.prompt_length + tokens
        # The same tokens are not the same prefix where the embeddings have been changed since.
        before = prefix.chain.entered(columns)
        if before is None or not _same(before, self._entering(ids[:, :tokens])):
            return
        begin = self._chain.fork_from(prefix.chain, columns, prefix.version)
        if self._connection.run(self._chain.unless_stopped(begin)):
            self.cache.record(ids[:, :tokens], 1, tokens, None)

    def prefix(self) -> CachedPrefix | None:
        """What others may begin with: the tokens of a single row without padding that the servers have seen, and
        computed as if all at once."""
        version, ids = self._chain.version, self.cache.ids
        if ids is None or ids.shape[0] != 1 or self.cache.mask is not None or bool((ids < 0).any()):
            return None
        begun = max(0, self._chain.at_once - self.cache.prompt_length)
        return CachedPrefix(ids[0][:begun], self._chain, self._prompt_key, version)

    def fork(self) -> InferenceSession:
        """Another session that goes on from here by itself; what is cached so far is shared, not copied."""
        guard.check_cache(self.cache, self.cache.owner)
        twin = _go_on_from(self.cache, self._new)
        twin._output_ids, twin._output_mask = self._output_ids, self._output_mask
        return twin

    def _whole_mask(self, mask: Tensor | None, before: int, ids: Tensor) -> Tensor:
        """The mask for `ids` [R, n]: as it was for earlier tokens, and given or real behind that.

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
        known = self._mask()
        if known is not None:
            whole[:, : known.shape[1]] = known.to(whole.device)
        if mask is not None:
            whole[:, before:] = mask.to(whole.device)
        return whole

    def keep(
        self, sequences: Tensor, inputs: GenerateInputs, mask_of: Callable[[Tensor, int, int], Tensor | None]
    ) -> Tensor:
        """Note what a call has returned, [R, n]; gives back what came after the tokens of earlier calls.

        `mask_of` is `generating.RowEnds.mask_of`.
        """
        given = 0 if inputs.ids is None else int(inputs.ids.shape[1])
        said = sequences[:, given:]
        columns = inputs.columns if inputs.columns is not None else sequences[:, :0]
        rows = sequences.shape[0] // max(1, columns.shape[0])
        columns = columns.to(sequences.device).repeat_interleave(rows, dim=0)
        self._output_ids = torch.cat([columns, said], 1) if given != columns.shape[1] else sequences
        self._output_mask = mask_of(sequences, given, int(columns.shape[1]))
        self.cache.align(self._output_ids)  # beams that were given up may be longer than what was returned
        return sequences[:, inputs.returned :]

    def break_off(self, inputs: GenerateInputs) -> None:
        """A call has ended in between. Tokens that were said stay; beams and samples are forgotten with their call."""
        if inputs.columns is None or self.cache.rows in (0, inputs.columns.shape[0]):
            return
        known = 0 if self._output_ids is None else int(self._output_ids.shape[1])
        self.cache.align(inputs.columns)
        self.cache.truncate(min(known, self.cache.length))

    # --- life --------------------------------------------------------------------------------------------

    def __enter__(self) -> InferenceSession:
        self._tokens.append(self._active.set(self))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._active.reset(self._tokens.pop())
        self.close()

    def stop(self) -> None:
        """From any thread: end the `generate` call that goes on in this session, whatever its servers do.

        Its thread gets a `concurrent.futures.CancelledError`; the session goes on with the next call.
        """
        self._chain.stopped = True
        self._connection.run_soon(self._chain.stop())

    def close(self, *, seconds: float | None = None) -> None:
        """Free the servers' caches; safe to call twice. Waits so long at most until they have said so."""
        self.cache.closed = True
        if self._finalizer.detach() is None or not self._connection.is_open:
            return
        prefix = self.prefix()
        keep = prefix is not None and len(prefix.ids) >= LEAST_TOKENS
        self._connection.run(self._chain.close(keep=keep, seconds=seconds))
        if keep and prefix is not None:
            self._connection.prefix_cache.keep(prefix)


def _go_on_from(cache: RemoteCache, new: Callable[[], InferenceSession]) -> InferenceSession:
    """A new session that holds what a cache does, whose own may not have been opened yet."""
    twin = new()
    if cache.deferred is not None:
        twin.cache.take_over(cache)
    elif cache.length:
        chain = cast(SessionChain, cache.session)
        begin = twin._chain.fork_from(chain, cache.prompt_length + cache.length, chain.version)
        if twin._connection.run(begin):
            twin.cache.take_over(cache)
    return twin


def forked(new: Callable[[], InferenceSession], cache: RemoteCache) -> RemoteCache:
    """The cache of a `new` session that goes on from another's."""
    return _go_on_from(cache, new).cache


def _whole(what: str, value: Any) -> int:
    """As an int, whatever kind of whole number it is. Raises `UsageError`."""
    try:
        return operator.index(value)
    except TypeError:
        raise UsageError(f"{what} is a whole number of tokens, not {value!r:.60}.") from None


def _same(before: Tensor, now: Tensor) -> bool:
    now = now.detach().cpu()
    return before.shape == now.shape and bool((before - now).abs().max() <= SAME * before.abs().max())


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
