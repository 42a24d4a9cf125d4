"""The cache that `transformers` sees at the client: lengths and rows here, keys and values on the servers.

Invariant: `length` counts the user's tokens that the servers have seen and that have not been taken back;
prompts come on top and are shown only to the base model itself (`with_prompt`). Cropping and reordering
cost nothing: they are carried out by the servers together with the next step.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence, Sized
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from typing import Any, Protocol, TypeVar, cast, get_args

import torch
from torch import Tensor
from transformers import Cache, DynamicCache
from transformers.cache_utils import DynamicIndexedLayer

from corolla.errors import SessionLimit, UsageError
from corolla.models.prompts import BlockVectors

OptionalTensor = TypeVar("OptionalTensor", Tensor, Tensor | None)


@dataclass(frozen=True)
class BlocksCall:
    """What one pass through the blocks needs besides hidden states [R, T, H]."""

    mask: Tensor | None  # bool [R, S], S tokens so far; None when all are real
    positions: Tensor | None  # int64 [R, T]; None when they are start, start+1, …
    vectors: BlockVectors | None  # a prefix is before all tokens, and counted in nothing here
    cache: RemoteCache | None
    start: int  # position of the first of the T tokens, soft prompt included
    prompt: Tensor | None = None  # fp32 [P, H], what the first of the T tokens are, where they are a prompt

    @property
    def prefix_length(self) -> int:
        """How many positions of a prefix come before all tokens."""
        return 0 if self.vectors is None else self.vectors.prefix_length

    def select_rows(self, rows: Tensor) -> BlocksCall:
        """The same for the rows that int64 [R'] names, wherever it says something of rows."""
        mask = None if self.mask is None else self.mask[rows.to(self.mask.device)]
        positions = self.positions
        if positions is not None and positions.shape[0] > 1:
            positions = positions[rows.to(positions.device)]
        return replace(self, mask=mask, positions=positions)


@dataclass(frozen=True)
class DeferredPass:
    """A session's first pass, computed without its caches: what entered the blocks, and with what.

    The session is given it when it is continued.
    """

    hidden: Tensor
    call: BlocksCall

    def select_rows(self, rows: Tensor) -> DeferredPass:
        """The same pass for the rows that int64 [R'] names."""
        return DeferredPass(self.hidden[rows.to(self.hidden.device)], self.call.select_rows(rows))


class BlocksSession(Protocol):
    """What stands behind a cache (`client/sessions/chain.py`): the keys and values, wherever they are."""

    def step(self, hidden: Tensor, call: BlocksCall) -> Tensor:
        """The blocks' outputs for `hidden` [R, T, H] from position `call.start` on, forgetting what stood there."""

    def reorder(self, rows: Tensor) -> None:
        """The next step continues with these rows of the cached ones, int64 [R]."""

    def reserve(self, tokens: int) -> None:
        """The coming steps may reach this many tokens a row, prompts included."""


def on_cpu(tensor: OptionalTensor) -> OptionalTensor:
    """Detached, and where sessions take it: None stays None."""
    return None if tensor is None else tensor.detach().cpu().contiguous()


# What transformers calls the argument that is a cache; before 5.24 the former, since then the latter.
CACHE_ARGUMENTS = ("past_key_values", "cache")


def cache_argument(forward: Callable[..., Any]) -> str:
    """The name of the argument with which a model's or base model's forward takes its cache."""
    names = inspect.signature(forward).parameters
    return next((name for name in reversed(CACHE_ARGUMENTS) if name in names), CACHE_ARGUMENTS[0])


def take_cache(arguments: dict[str, Any]) -> Any:
    """Take the cache out of a call's arguments, whatever it is called there; None when there is none."""
    found = [arguments.pop(name, None) for name in CACHE_ARGUMENTS]
    return next((cache for cache in found if cache is not None), None)


def own_cache(forward: Callable[..., Any]) -> type[DynamicCache] | None:
    """The family's own class of caches, where a model's forward takes no other."""
    names = inspect.signature(forward).parameters
    named = names[cache_argument(forward)].annotation if cache_argument(forward) in names else None
    for kind in get_args(named) or (named,):
        if isinstance(kind, type) and issubclass(kind, DynamicCache) and kind is not DynamicCache:
            return kind
    return None


class _NoLayers(list[Any]):
    """None is here: a family's code that asks for one of them finds an empty one, of the kind that has most."""

    def __getitem__(self, _index: Any) -> Any:
        return DynamicIndexedLayer()


class _OneGrowingLayer(Cache):  # type: ignore[misc]
    """A cache without layers of its own, which says of itself what a `DynamicCache` of full attention says."""

    is_compileable = False
    is_initialized = True
    is_croppable = True
    is_sliding = (False,)
    is_linear = (False,)
    max_cache_len = -1  # no end

    def __init__(self) -> None:
        Cache.__init__(self, layers=_NoLayers())

    def __bool__(self) -> bool:
        return True  # as a local cache, which `cache or …` goes on with, though no layer of it is here

    def has_previous_state(self, layer_idx: int | None = None, state_idx: int | None = None) -> bool:
        return bool(self.get_seq_length())

    def activate_past_recording(self) -> None:
        """Whatever was seen can be taken back, always."""


class RemoteCache(_OneGrowingLayer):
    """Stands in for `DynamicCache`; made by `InferenceSession`, not by users."""

    def __init__(
        self,
        open_session: Callable[[RemoteCache], BlocksSession],
        *,
        prompt_length: int,
        prefix_length: int = 0,
        max_length: int | None,
        owner: object = None,
        fork: Callable[[RemoteCache], RemoteCache] | None = None,
        lazy: bool = False,
    ) -> None:
        """`open_session` gives what stands behind the cache, once it is needed: most caches are never continued.

        `prompt_length` tokens of a prompt are run before the user's; `prefix_length` positions come before those.

        `owner` is what all caches of a model have in common; `fork` makes another one that goes on from it.

        A `lazy` cache is of a call that may never be continued: servers are given it when it is.
        """
        super().__init__()
        self._open_session = open_session
        self.prompt_length = prompt_length
        self.prefix_length = prefix_length
        self.max_length = max_length
        self.owner = owner
        self.lazy = lazy
        self.closed = False
        self.deferred: DeferredPass | None = None
        # Of the `generate` call that goes on with this cache: how many tokens it was given in all, 0 without one; how
        # many of them it was given both as ids and as embeddings.
        self.whole = self.counted_twice = 0
        self._by_ids = self.in_session = False
        self.announced: int | None = None  # tokens that its next forward should bring
        # Something else than the user's tokens was put in front of them (peft's prompts).
        self.foreign = False
        self._fork = fork
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
        self.truncate(
            self.length + tokens_to_remove if tokens_to_remove <= 0 else min(tokens_to_remove, self.length)
        )

    def reset(self) -> None:
        self.truncate(0)

    def __len__(self) -> int:
        return len(self.owner) if isinstance(self.owner, Sized) else 0

    def __deepcopy__(self, _memo: Any) -> RemoteCache:
        """Another session that goes on from here, as a copy of a local cache would."""
        if self._fork is None or self.closed:
            raise UsageError("This session is closed; open another one with model.inference_session().")
        return self._fork(self)

    def __reduce_ex__(self, _protocol: Any) -> Any:
        raise UsageError(
            "A session's cache lies on the servers and cannot be saved; keep the tokens (session.output_ids)."
        )

    def batch_repeat_interleave(self, repeats: int) -> None:
        self.select_rows(torch.arange(self.rows).repeat_interleave(repeats))

    # --- what Corolla asks for --------------------------------------------------------------------------

    @cached_property
    def session(self) -> BlocksSession:
        """The keys and values, wherever they are."""
        return self._open_session(self)

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

    def select_rows(self, named: Tensor | Sequence[int]) -> None:
        """Continue with the rows that `named` names as a tensor's index does: by numbers, or by true and false."""
        if self.ids is None:
            return
        rows = torch.arange(self.rows)[torch.as_tensor(named).cpu()]
        self.ids = self.ids[rows]
        self.mask = None if self.mask is None else self.mask[rows]
        if self.deferred is not None:
            self.deferred = self.deferred.select_rows(rows)
        else:
            self.session.reorder(rows)

    reorder_cache = batch_select_indices = select_rows

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
        self.foreign |= self._by_ids and ids is None
        self.mask = None if mask is None else mask.detach().to("cpu", torch.int64)
        new = torch.full((rows, count), -1) if ids is None else ids.detach().to("cpu", torch.int64)
        past = self.ids
        if past is not None and past.shape[0] < rows:  # one sequence has become several beams or samples
            past = past.repeat_interleave(rows // past.shape[0], dim=0)
        self.ids = new if past is None else torch.cat([past, new], dim=1)
        self.length += count

    def begin_call(self, ids: Tensor | None, embeddings: Tensor | None, *, in_session: bool = False) -> None:
        """A `generate` call begins that is given the whole conversation, as `ids` [R, n] or `embeddings` [R, N, H].

        In a session of the caller's rows are as if alone, whatever padding has come between their tokens.
        """
        self.in_session = in_session
        given, known = (0 if part is None else int(part.shape[1]) for part in (embeddings, ids))
        self.whole = given or known
        self.counted_twice = known if given and known != given else 0
        self._by_ids = embeddings is None

    def end_call(self) -> None:
        """That call is over."""
        self.whole = self.counted_twice = 0
        self._by_ids = self.in_session = False
        self.announced = None

    def new_of(self, ids: Tensor, embeddings: Tensor | None) -> int | None:
        """How many of `ids` [R, n] are new where they are the whole conversation; None where that is not known.

        Or of `embeddings` [R, N, H], where the cache holds not even all of those.
        """
        if embeddings is not None and self.length < embeddings.shape[1]:
            ids = embeddings
        if not self.whole or not self.length or ids.shape[1] < self.whole:
            return None
        return int(ids.shape[1]) - self.length

    def announce(self, prepared: dict[str, Any], mask: Tensor | None) -> None:
        """The next forward should bring what `generate` has prepared for it; `mask` is of all tokens, if there is one.

        Families of recurrences alone leave it out of later steps, but servers tell rows apart by it.
        """
        if prepared.get("attention_mask") is None and mask is not None:
            prepared["attention_mask"] = mask
        given = prepared.get("inputs_embeds")
        given = prepared.get("input_ids") if given is None else given
        self.announced = None if given is None or not self.whole else int(given.shape[1])
        prepared["past_key_values"] = self  # peft, which stands in between, knows it by this name only

    def take_over(self, other: RemoteCache) -> None:
        """Hold what `other` does; its session has become a copy of the other's."""
        self.length, self.ids, self.mask = other.length, other.ids, other.mask
        self.deferred, self.foreign = other.deferred, other.foreign

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

    def align_mask(self, mask: Tensor | None) -> None:
        """Keep what was computed under this padding mask [R, n] (None: no padding); what follows is computed anew."""
        if self.ids is None or (mask is None and self.mask is None):
            return
        width = self.length if mask is None else min(self.length, int(mask.shape[1]))
        before = torch.ones(self.rows, width) if self.mask is None else self.mask[:, :width]
        now = torch.ones_like(before) if mask is None else mask[:, :width].to(before)
        if now.shape[0] % self.rows == 0:
            before = before.repeat_interleave(now.shape[0] // self.rows, dim=0)
            differs = (now.bool() != before.bool()).any(0).nonzero()
            if len(differs):
                self.truncate(int(differs[0]))

    def _agreement(self, ids: Tensor) -> Tensor:
        """How many leading tokens each row of `ids` shares with each cached row, int64 [R, cached rows]."""
        assert self.ids is not None
        cached = self.ids[None, :, : ids.shape[1]]
        same = (cached == ids[:, None]) | (cached == -1)
        return same.long().cumprod(dim=2).sum(dim=2)

    def with_prompt(self, own: type[DynamicCache] | None = None) -> PromptedView:
        """The same cache as the base model must see it: with the prompt counted, and of its `own` class."""
        return PromptedView(self) if own is None else _view_of_its_own(cast(Any, own))(self)


class PromptedView(_OneGrowingLayer):
    """A `RemoteCache` whose lengths include the prompt once it has been run, and a prefix always.

    Without a cache it is that of a call which nobody continues, behind a prefix.
    """

    def __init__(self, cache: RemoteCache | None, prefix_length: int = 0) -> None:
        super().__init__()
        self.past = prefix_length
        if cache is not None:
            self.past = cache.prefix_length + (cache.length + cache.prompt_length if cache.length else 0)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.past

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        return self.past + query_length, 0


class Caches(Protocol):
    """Where calls that name no cache find one (`client/model/distributed.py`)."""

    owner: object  # what the caches of this model have in common

    def active(self) -> RemoteCache | None:
        """That of the session whose `with` block we are in."""

    def fresh(self, *, lazy: bool) -> RemoteCache:
        """An empty one for a call that may be continued."""


@lru_cache
def _view_of_its_own(own: Any) -> type[PromptedView]:
    def begin(self: Any, cache: RemoteCache) -> None:
        own.__init__(self)
        PromptedView.__init__(self, cache)

    return type("PromptedView", (PromptedView, own), {"__init__": begin})
