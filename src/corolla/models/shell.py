"""A client's part of a model: everything but the blocks, which one pseudo-layer stands for.

Invariant: the family's own forward runs unchanged around the pseudo-layer. What the blocks need besides
hidden states (mask, position ids, prompts, cache) is taken where the base model is entered, once, by
`BaseModelHooks`; so it does not matter what a family hands to its layers, nor who calls the base model
(generation, a trainer, peft, TRL).
"""

from __future__ import annotations

import copy
import inspect
import weakref
from collections.abc import Callable
from contextvars import ContextVar, Token
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from corolla.errors import UsageError
from corolla.models import guard, padded_rows
from corolla.models.attention.padding_free import FlatRows
from corolla.models.attention.rotary import LengthThreshold, length_threshold
from corolla.models.cache import (
    BlocksCall,
    Caches,
    PromptedView,
    RemoteCache,
    cache_argument,
    own_cache,
    take_cache,
)
from corolla.models.cut_layout import CutLayout
from corolla.models.families import TIES, keep_ties
from corolla.models.prompts import (
    Prompt,
    SoftPrompt,
    nothing_in_front,
    place_prompt,
    place_prompt_by_ids,
    prefix_length,
    sent_length,
    stands_in_front,
)

ATTENTION_NAME = "corolla_remote"
KEPT = "logits_to_keep"  # how many last positions a family's model may give, if it is told


def _no_attention_here(*_args: Any, **_kwargs: Any) -> Any:
    raise RuntimeError("attention was called at the client, which has no blocks")


def _no_mask(*_args: Any, **_kwargs: Any) -> Tensor:
    """In the place of a [T, T] mask that nobody would read; some families' code does something with it."""
    return torch.ones(1, 1, 1, 1, dtype=torch.bool)


ALL_ATTENTION_FUNCTIONS.register(ATTENTION_NAME, _no_attention_here)
ALL_MASK_ATTENTION_FUNCTIONS.register(ATTENTION_NAME, _no_mask)


RunBlocks = Callable[[Tensor, BlocksCall], Tensor]
_call: ContextVar[BlocksCall | None] = ContextVar("corolla_blocks_call", default=None)
_given: ContextVar[tuple[dict[str, Tensor], ...]] = ContextVar("corolla_given", default=())
_seen: ContextVar[list[Tensor] | None] = ContextVar("corolla_seen", default=None)


class BlocksLayer(guard.NoHooks):
    """The one pseudo-layer; hands hidden states to `run` and gives the result in the family's form."""

    def __init__(self, run: RunBlocks, *, returns: int, cuts: CutLayout) -> None:
        """`returns` and `cuts` are what `models/checks/forms.py` says of the family."""
        super().__init__()
        self._run = run
        self._returns = returns
        self.cuts = cuts
        self._holder: weakref.ref[nn.Module] | None = None
        self._threshold: tuple[LengthThreshold | None] | None = None  # None: not yet looked for

    def stand_in(self, holder: nn.Module) -> None:
        """`holder` is the model whose blocks this layer stands for; it has its weights when it is first run."""
        self._holder = weakref.ref(holder)
        holder.register_forward_pre_hook(lambda _holder, _args: self._look())

    @property
    def threshold(self) -> LengthThreshold | None:
        """Where the family's rotary embeddings begin to depend on the length of a sequence."""
        self._look()
        return None if self._threshold is None else self._threshold[0]

    def _look(self) -> None:
        """Once, before the rotary embeddings have seen a sequence: they remember the longest."""
        holder = None if self._holder is None else self._holder()
        if self._threshold is None and holder is not None:
            self._threshold = (length_threshold(holder),)

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor | tuple[Tensor | None, ...]:
        plain = self.cuts.plain
        entering = hidden_states if plain else self._collected(hidden_states, args, kwargs)
        output = self._outputs(entering)
        return self.in_form(output if plain else self.cuts.hidden.shaped(output))

    def in_form(self, hidden: Tensor) -> Tensor | tuple[Tensor | None, ...]:
        """Hidden states as the family's blocks return them."""
        return (hidden, *[None] * (self._returns - 1)) if self._returns else hidden

    def given(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Tensor]:
        """What a block is given besides hidden states, of the arguments behind them."""
        return {
            side.name: args[side.place - 1] if side.place <= len(args) else kwargs[side.name]
            for side in self.cuts.sides
        }

    def _collected(self, hidden: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        """What enters the blocks, [R, T, W]: the family's loop has come to the last of them."""
        given = [*_given.get(), self.given(args, kwargs)]
        _given.set(())
        return self.cuts.collect(hidden, given)

    def _outputs(self, entering: Tensor) -> Tensor:
        """Of all blocks, for what enters them [R, T, W]."""
        call = _call.get()
        if call is None:
            raise UsageError(
                "The blocks were called outside of their model's forward; use model.blocks[i:j](hidden)."
            )
        if self.threshold is not None:
            self._check_length(self.threshold, entering, call)
        seen = _seen.get()
        if seen is None:
            return self._run(entering, call)
        seen.append(entering)
        return entering[..., : self.cuts.hidden.width]

    def _check_length(self, threshold: LengthThreshold, hidden: Tensor, call: BlocksCall) -> None:
        rows, count = int(hidden.shape[0]), int(hidden.shape[1])
        positions = call.positions
        if positions is None:
            positions = torch.arange(call.start, call.start + count, device=hidden.device)
        positions = positions.expand(rows, -1) + call.prefix_length
        real = None if call.mask is None else call.mask[:, -count:].to(positions.device)
        threshold.check(positions, real, cached=call.cache is not None)


class _EarlierBlock(guard.NoHooks):
    """Stands for a block before the last, where blocks are given more than hidden states: notes what it is given."""

    def __init__(self, layer: BlocksLayer, *, first: bool) -> None:
        super().__init__()
        self._layer = (layer,)  # which is a module in its own place
        self._first = first

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor | tuple[Tensor | None, ...]:
        (layer,) = self._layer
        before = () if self._first else _given.get()
        _given.set((*before, layer.given(args, kwargs)))
        return layer.in_form(hidden_states)


def check_cached_length(model: nn.Module, tokens: int) -> None:
    """Raises `SessionLimit` where a session of so many tokens a row, prompts included, would not be exact."""
    for layer in model.modules():
        if isinstance(layer, BlocksLayer) and layer.threshold is not None:
            layer.threshold.check_cached(tokens)


@torch.no_grad()
def what_enters(base: nn.Module, ids: Tensor) -> Tensor:
    """What token ids [R, T] are when they enter the first block, the prompt in front: [R, P+T, W]; no block is run."""
    seen: list[Tensor] = []
    token = _seen.set(seen)
    try:
        base(input_ids=ids, use_cache=False)
    finally:
        _seen.reset(token)
    return seen[0]


@dataclass(frozen=True)
class _Entered:
    """State between entering and leaving the base model."""

    token: Token[BlocksCall | None]
    cache: RemoteCache | None
    ids: Tensor | None
    mask: Tensor | None  # the user's, [R, S]
    rows: int
    new_tokens: int  # the user's
    prompt_tokens: int  # that were prepended in this call
    flat: FlatRows | None  # where the user's rows hold several sequences each


class BaseModelHooks:
    """Stands around the forward that runs the blocks: puts prompts in front, takes their outputs away again."""

    def __init__(
        self,
        base: PreTrainedModel,
        *,
        prompts: Callable[[], Prompt | None],
        caches: Caches | None,
        reads_flat_rows: Callable[[], bool] = lambda: False,
        takes_padding_in_front: Callable[[], bool] = lambda: True,
        needs_ids: bool = False,
    ) -> None:
        """Without `caches` no call has one; the rest says what `models/checks/forms.py` finds."""
        self._needs_ids = needs_ids
        if needs_ids:
            stands_in_front(base.get_input_embeddings())
        self._prompts = prompts
        self._reads_flat_rows = reads_flat_rows
        self._takes_padding_in_front = takes_padding_in_front
        self._caches = caches
        self._names = [name for name in inspect.signature(base.forward).parameters if name != "self"]
        self._cache_name, self._own_cache = cache_argument(base.forward), own_cache(base.forward)
        self._entered: ContextVar[tuple[_Entered, ...]] = ContextVar("corolla_entered", default=())
        base.register_forward_pre_hook(self._enter, with_kwargs=True)
        base.register_forward_hook(self._leave, always_call=True)

    def _enter(
        self, base: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        named = dict(zip(self._names, args, strict=False)) | kwargs
        guard.check_outputs(named)
        cache = self._pick_cache(base, named)
        rows, new_tokens = guard.shape(named, may_be_empty=self._caches is None)
        guard.check_continues(cache, rows, new_tokens, named)
        if named.get("position_ids") is not None:
            named["position_ids"] = guard.known_positions(named["position_ids"], named.get("attention_mask"))
        if KEPT in self._names:  # the head takes what it needs of all outputs
            named.pop(KEPT, None)
        flat = self._flat_rows(named, rows, cache)
        if flat is not None:
            flat.split_call(named)
        padded_rows.check_front(named.get("attention_mask"), self._takes_padding_in_front)
        prompt = self._prompts()
        self._check_tokens(base, named, cache, prompt)
        ids, users_mask = named.get("input_ids"), named.get("attention_mask")
        first = cache is None or cache.length == 0
        prepended = sent_length(prompt) if first else 0
        if isinstance(prompt, SoftPrompt) and first and self._needs_ids:
            place_prompt_by_ids(named, prompt, getattr(base.config, "pad_token_id", None) or 0)
        elif prompt is not None:
            place_prompt(base, named, prompt, in_front=first)
        # `generate` has looked ahead, but does not know of prompts that peft puts in front.
        if cache is None or not (cache.in_session or (cache.whole and prompt is not None)):
            padded_rows.check_windows(named.get("attention_mask"), base.config)
        before = 0 if prompt is None else prefix_length(prompt)
        view = PromptedView(None, before) if before else None
        if cache is not None:
            view = cache.with_prompt(self._own_cache)
        named[self._cache_name] = view
        named["use_cache"] = view is not None
        mask, positions = named.get("attention_mask"), named.get("position_ids")
        call = BlocksCall(
            mask=guard.real_mask(None if mask is None else mask[:, before:], positions),
            positions=None if positions is None else positions - before,
            vectors=None if prompt is None else prompt.blocks,
            cache=cache,
            start=0 if view is None else view.past - before,
            prompt=prompt.input if prompt is not None and first else None,
        )
        call = _without_plain_positions(call)
        entered = _Entered(_call.set(call), cache, ids, users_mask, rows, new_tokens, prepended, flat)
        self._entered.set((*self._entered.get(), entered))
        return (), named

    def _pick_cache(self, base: Any, named: dict[str, Any]) -> RemoteCache | None:
        """The cache that the call names, that of the active session, or a new one where a local model makes one."""
        given = take_cache(named)
        if given is not None:
            guard.check_cache(given, None if self._caches is None else self._caches.owner)
            cache: RemoteCache = given
            return cache
        if self._caches is None:
            return None
        wanted = named.get("use_cache")
        if wanted is False:
            return None
        active = self._caches.active()
        if active is not None:
            guard.check_cache(active, self._caches.owner)
            return active
        if wanted or getattr(base.config, "use_cache", False):
            return self._caches.fresh(lazy=wanted is None)
        return None

    def _flat_rows(self, named: dict[str, Any], rows: int, cache: RemoteCache | None) -> FlatRows | None:
        """Where rows hold several sequences each, if the family's own code would tell them apart."""
        positions = named.get("position_ids")
        if positions is None or named.get("attention_mask") is not None or not guard.starts_anew(positions):
            return None
        if cache is not None:
            raise UsageError(
                "Position ids start anew inside a row, as in batches without padding, but a cache holds one "
                "sequence a row: pass use_cache=False."
            )
        return FlatRows.of(positions, rows) if self._reads_flat_rows() else None

    def _check_tokens(
        self, base: Any, named: dict[str, Any], cache: RemoteCache | None, prompt: Prompt | None
    ) -> None:
        """Everything that the new tokens may be too many for, and ids that the model does not know."""
        embedding = guard.embedding_of(base)
        ids, new_tokens = named.get("input_ids"), guard.shape(named, may_be_empty=True)[1]
        if ids is not None:
            named["input_ids"] = guard.known_ids(ids, named.get("attention_mask"), embedding)
        elif named.get("inputs_embeds") is not None:
            guard.check_embeddings(named["inputs_embeds"], embedding)
        length = 0 if prompt is None else prompt.length
        if cache is not None:
            if cache.length and cache.prompt_length + cache.prefix_length != length:
                raise UsageError(
                    "The model's prompt is not the one that this session began with; open another session."
                )
            cache.check_room(new_tokens)
        limit, positions = guard.position_limit(base, embedding, base.config), named.get("position_ids")
        if positions is None:
            past = 0 if cache is None else cache.length
            guard.check_reach(length + past + new_tokens, limit)
        else:
            guard.check_places(positions, length, limit)

    def _leave(self, _base: nn.Module, _args: tuple[Any, ...], output: Any) -> Any:
        if self._needs_ids:
            nothing_in_front()
        if not self._entered.get():
            return output
        *outer, entered = self._entered.get()
        self._entered.set(tuple(outer))
        _call.reset(entered.token)
        if output is None:  # the forward raised; `always_call` brings us here to tidy up
            return output
        if entered.cache is not None:
            entered.cache.record(entered.ids, entered.rows, entered.new_tokens, entered.mask)
        return _users_view(output, entered)


def _without_plain_positions(call: BlocksCall) -> BlocksCall:
    """Drop position ids (and then an all-ones mask) that say no more than the default."""
    if call.positions is None or not guard.counts_from(call.positions, call.start):
        return call
    mask = None if call.mask is not None and bool(call.mask.all()) else call.mask
    return replace(call, mask=mask, positions=None)


def _users_view(output: Any, entered: _Entered) -> Any:
    """The base model's output without the prompt's positions, and with the cache that the user knows."""
    if isinstance(output, tuple):
        return tuple(_trim(item, entered) for item in output)
    for key in list(output.keys()):
        output[key] = _trim(output[key], entered)
    return output


def _trim(item: Any, entered: _Entered) -> Any:
    if isinstance(item, PromptedView):  # of a call without a cache, behind a prefix, nothing is to be had
        return entered.cache
    if isinstance(item, Tensor) and item.ndim == 3:
        item = item[:, entered.prompt_tokens :] if entered.prompt_tokens else item
        return item if entered.flat is None else entered.flat.join(item)
    if isinstance(item, tuple):
        return tuple(_trim(part, entered) for part in item)
    return item


def replace_blocks(model: PreTrainedModel, prefix: str, layer: BlocksLayer) -> PreTrainedModel:
    """Put the pseudo-layer where the family keeps its list of blocks (`prefix`, such as `model.layers`).

    Returns the model whose forward runs them.
    """
    path, _, name = prefix.rpartition(".")
    holder: Any = model.get_submodule(path)
    before = 0 if layer.cuts.plain else layer.cuts.depth - 1
    earlier = [_EarlierBlock(layer, first=not index) for index in range(before)]
    stand_ins = nn.ModuleList([*earlier, layer])
    for block, stand_in in zip(getattr(holder, name), stand_ins, strict=False):
        _look_alike(block, stand_in)
    setattr(holder, name, stand_ins)
    if TIES in vars(holder):
        keep_ties(holder, {})
        all_tied: Any = model.all_tied_weights_keys
        for one in [one for one in all_tied if one.startswith(f"{prefix}.")]:
            del all_tied[one]
    layer.stand_in(holder)
    # Some families initialise their blocks with the model that runs them; others, what no checkpoint has of it.
    holder._is_hf_initialized = not holder._non_persistent_buffers_set
    holder.config = with_attention(holder.config, ATTENTION_NAME)
    return holder


def _look_alike(block: nn.Module, stand_in: nn.Module) -> None:
    """Have what a family's loop may ask its blocks (their kind, their index)."""
    for name, value in vars(block).items():
        if isinstance(value, str | int) and not name.startswith("_") and not hasattr(stand_in, name):
            setattr(stand_in, name, value)


def with_attention(config: PretrainedConfig, name: str) -> PretrainedConfig:
    """`config` as a module sees it whose attention is the one registered as `name`; the rest is `config`'s own.

    Whichever of the two is changed, both are; whoever copies or saves it gets `config`, so the name never leaves
    the module.
    """
    family: Any = type(config)
    kind: Any = _private_class(family, name)
    made = kind.__new__(kind)
    object.__setattr__(made, "__dict__", config.__dict__)
    object.__setattr__(made, "_public", config)
    private: PretrainedConfig = made
    return private


@lru_cache
def _private_class(family: Any, name: str) -> Any:
    def deepcopy(self: Any, memo: dict[int, Any]) -> PretrainedConfig:
        found: PretrainedConfig = copy.deepcopy(self._public, memo)
        return found

    def reduce(self: Any, _protocol: Any) -> Any:
        return copy.copy, (self._public,)

    def set_public(self: Any, value: Any) -> None:
        self._public._attn_implementation = value

    members = {
        "__slots__": ("_public",),
        "__module__": family.__module__,
        "__deepcopy__": deepcopy,
        "__reduce_ex__": reduce,
        "_attn_implementation": property(lambda _self: name, set_public),
    }
    return type(family.__name__, (family,), members)
