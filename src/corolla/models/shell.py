"""A client's part of a model: everything but the blocks, which one pseudo-layer stands for.

Invariant: the family's own forward runs unchanged around the pseudo-layer. What the blocks need besides
hidden states (mask, position ids, prompts, cache) is taken where the base model is entered, once, by
`BaseModelHooks`; so it does not matter what a family hands to its layers, nor who calls the base model
(generation, a trainer, peft, TRL).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from contextvars import ContextVar, Token
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from corolla.errors import UsageError
from corolla.models import prompts as prompt_math
from corolla.models.cache import PromptedView, RemoteCache
from corolla.models.private_config import with_attention
from corolla.models.prompts import SoftPrompt

# No mask function belongs to this name, so the base model builds no [T, T] masks that nobody would read.
ATTENTION_NAME = "corolla_remote"


def _no_attention_here(*_args: Any, **_kwargs: Any) -> Any:
    raise RuntimeError("attention was called at the client, which has no blocks")


ALL_ATTENTION_FUNCTIONS.register(ATTENTION_NAME, _no_attention_here)


@dataclass(frozen=True)
class BlocksCall:
    """What one pass through the blocks needs besides hidden states [R, T, H]."""

    mask: Tensor | None  # bool [R, S], S tokens so far; None when all are real
    positions: Tensor | None  # int64 [R, T]; None when they are start, start+1, …
    deep: Tensor | None  # fp32 [blocks, P, H]
    cache: RemoteCache | None
    start: int  # position of the first of the T tokens, prompt included
    prompt: Tensor | None = None  # fp32 [P, H], what the first of the T tokens are, where they are a prompt


RunBlocks = Callable[[Tensor, BlocksCall], Tensor]
_call: ContextVar[BlocksCall | None] = ContextVar("corolla_blocks_call", default=None)


class BlocksLayer(nn.Module):
    """The one pseudo-layer; hands hidden states to `run` and gives the result in the family's form."""

    def __init__(self, run: RunBlocks, *, returns_tuple: bool) -> None:
        super().__init__()
        self._run = run
        self._returns_tuple = returns_tuple

    def forward(self, hidden_states: Tensor, *_args: Any, **_kwargs: Any) -> Tensor | tuple[Tensor]:
        call = _call.get()
        if call is None:
            raise UsageError(
                "The blocks were called outside of their model's forward; use model.blocks[i:j](hidden)."
            )
        output = self._run(hidden_states, call)
        return (output,) if self._returns_tuple else output


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


class BaseModelHooks:
    """Stands around the forward that runs the blocks: puts prompts in front, takes their outputs away again."""

    def __init__(
        self,
        base: PreTrainedModel,
        *,
        prompts: Callable[[], SoftPrompt | None],
        default_cache: Callable[[bool], RemoteCache | None],
    ) -> None:
        """`default_cache(use_cache)` gives the cache for a call that names none, or None for no cache."""
        self._prompts = prompts
        self._default_cache = default_cache
        self._names = [name for name in inspect.signature(base.forward).parameters if name != "self"]
        self._entered: ContextVar[tuple[_Entered, ...]] = ContextVar("corolla_entered", default=())
        base.register_forward_pre_hook(self._enter, with_kwargs=True)
        base.register_forward_hook(self._leave, always_call=True)

    def _enter(
        self, base: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        named = dict(zip(self._names, args, strict=False)) | kwargs
        ids, embeddings = named.get("input_ids"), named.get("inputs_embeds")
        shaped = ids if ids is not None else embeddings
        if shaped is None:
            raise UsageError("Give the model input_ids or inputs_embeds.")
        rows, new_tokens = int(shaped.shape[0]), int(shaped.shape[1])
        cache = self._pick_cache(named)
        if cache is not None:
            cache.check_room(new_tokens)
        mask = named.get("attention_mask")
        prompt = self._prompts()
        first = cache is None or cache.length == 0
        prepended = prompt.length if prompt is not None and first else 0
        if prompt is not None:
            _place_prompt(base, named, prompt, prepend=first)
        view = None if cache is None else cache.with_prompt()
        named["past_key_values"] = view
        named["use_cache"] = view is not None
        call = BlocksCall(
            mask=_real_mask(named.get("attention_mask"), named.get("position_ids")),
            positions=named.get("position_ids"),
            deep=None if prompt is None else prompt.deep,
            cache=cache,
            start=0 if view is None else view.past,
            prompt=prompt.input if prompt is not None and first else None,
        )
        call = _without_plain_positions(call, new_tokens + prepended)
        entered = _Entered(_call.set(call), cache, ids, mask, rows, new_tokens, prepended)
        self._entered.set((*self._entered.get(), entered))
        return (), named

    def _pick_cache(self, named: dict[str, Any]) -> RemoteCache | None:
        given = named.get("past_key_values")
        if isinstance(given, RemoteCache):
            return given
        if given is not None and given.get_seq_length() > 0:
            raise UsageError(
                "A distributed model keeps its attention cache in a session: pass session=, not a filled cache."
            )
        return self._default_cache(named.get("use_cache") is True)

    def _leave(self, _base: nn.Module, _args: tuple[Any, ...], output: Any) -> Any:
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


def _place_prompt(base: nn.Module, named: dict[str, Any], prompt: SoftPrompt, *, prepend: bool) -> None:
    """Rewrite the base model's arguments for a prompt that comes before the user's first token."""
    mask, positions = named.get("attention_mask"), named.get("position_ids")
    if mask is not None:
        named["attention_mask"] = prompt_math.prepend_mask(mask, prompt.length)
    if not prepend:
        if positions is not None:
            named["position_ids"] = positions + prompt.length
        return
    embeddings = named.get("inputs_embeds")
    if embeddings is None:
        embeddings = base.get_input_embeddings()(named["input_ids"])  # type: ignore[operator]
    named["inputs_embeds"] = prompt_math.prepend(embeddings, prompt.input)
    named["input_ids"] = None
    if positions is not None:
        rows = positions.expand(embeddings.shape[0], -1)
        named["position_ids"] = prompt_math.prepend_positions(rows, prompt.length)


def _real_mask(mask: Tensor | None, positions: Tensor | None) -> Tensor | None:
    """The padding mask as bool, or None when no token is padding.

    With explicit positions an all-ones mask stays: without one, some families would read position ids that
    start anew as packed sequences.
    """
    if mask is None:
        return None
    if mask.ndim != 2:
        raise UsageError("A distributed model takes a 2-D attention mask (1 for tokens, 0 for padding).")
    mask = mask.bool()
    return None if bool(mask.all()) and positions is None else mask


def _without_plain_positions(call: BlocksCall, count: int) -> BlocksCall:
    """Drop position ids (and then an all-ones mask) that say no more than the default."""
    if call.positions is None:
        return call
    plain = torch.arange(call.start, call.start + count, device=call.positions.device)
    if not bool((call.positions == plain).all()):
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
    if isinstance(item, PromptedView):
        return entered.cache
    if isinstance(item, Tensor) and item.ndim == 3 and entered.prompt_tokens:
        return item[:, entered.prompt_tokens :]
    if isinstance(item, tuple):
        return tuple(_trim(part, entered) for part in item)
    return item


def replace_blocks(model: PreTrainedModel, prefix: str, layer: BlocksLayer) -> PreTrainedModel:
    """Put the pseudo-layer where the family keeps its list of blocks (`prefix`, such as `model.layers`).

    Returns the model whose forward runs them.
    """
    path, _, name = prefix.rpartition(".")
    holder: Any = model.get_submodule(path)
    setattr(holder, name, nn.ModuleList([layer]))
    holder.config = with_attention(holder.config, ATTENTION_NAME)
    return holder
