"""A client's half of a split miniature, compared with the whole one: the shell around blocks that run here.

Invariant: the shell is made, entered and cached as a client's is; only what stands behind `BlocksLayer` is not a
swarm. So what goes wrong at a client, such as blocks' outputs in a form that the family's code does not
expect, goes wrong here.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from corolla.models.attention.span_cache import SpanCache, crop_cache, select_rows
from corolla.models.cache import BlocksCall, RemoteCache, cache_argument
from corolla.models.checks.layer_form import returns_tuple
from corolla.models.checks.miniature import EDGE, close
from corolla.models.families import blocks_prefix
from corolla.models.shell import BaseModelHooks, BlocksLayer, RunBlocks, replace_blocks
from corolla.models.span import Span

PADDED = 3
STEPS = ((0, EDGE - 3), (EDGE - 3, EDGE - 2), (EDGE - 2, EDGE))

# Makes of a whole model the model that a client has, whose blocks are run by what is given.
MakeShell = Callable[[PreTrainedModel, RunBlocks], PreTrainedModel]


class LocalSession:
    """What a session's servers do, on spans in this process."""

    def __init__(self, spans: Sequence[Span]) -> None:
        self.spans = spans
        self.caches = [span.new_cache() for span in spans]
        self._order: Tensor | None = None

    def reorder(self, rows: Tensor) -> None:
        """See `BlocksSession`."""
        self._order = rows if self._order is None else self._order[rows]

    def reserve(self, tokens: int) -> None:
        """See `BlocksSession`; there is room."""

    def step(self, hidden: Tensor, call: BlocksCall) -> Tensor:
        """See `BlocksSession`."""
        for cache in self.caches:
            crop_cache(cache, call.start)
            if self._order is not None and cache.get_seq_length():
                select_rows(cache, self._order)
        self._order = None
        return _run(self.spans, hidden, call, self.caches)


class LocalBlocks:
    """All blocks of a model as spans in this process; `run` is a `RunBlocks`."""

    def __init__(self, spans: Sequence[Span]) -> None:
        self._spans = spans

    def new_cache(self) -> RemoteCache:
        """An empty cache, without a prompt and without a limit."""
        return RemoteCache(LocalSession(self._spans), prompt_length=0, max_length=None)

    def run(self, hidden: Tensor, call: BlocksCall) -> Tensor:
        """Hidden states [R, T, H] behind the last block."""
        if call.cache is not None:
            return call.cache.session.step(hidden, call)
        return _run(self._spans, hidden, call, [None] * len(self._spans))


def _run(
    spans: Sequence[Span], hidden: Tensor, call: BlocksCall, caches: Sequence[SpanCache | None]
) -> Tensor:
    for span, cache in zip(spans, caches, strict=True):
        prompts = None if call.deep is None else call.deep[span.start : span.end]
        hidden = span.forward(hidden, mask=call.mask, positions=call.positions, cache=cache, prompts=prompts)
    return hidden


def make_shell(whole: PreTrainedModel, run: RunBlocks) -> PreTrainedModel:
    """The shell as `BlocksLayer`, `replace_blocks` and `BaseModelHooks` make it, without prompts."""
    shell = copy.deepcopy(whole)
    layer = BlocksLayer(run, returns_tuple=returns_tuple(whole.config))
    holder = replace_blocks(shell, blocks_prefix(whole.config), layer)
    BaseModelHooks(holder, prompts=lambda: None, caches=None)
    return shell


def client_difference(whole: PreTrainedModel, spans: Sequence[Span], make: MakeShell) -> str | None:
    """What a client's logits and gradients differ in from the whole model's, in words; None when in nothing."""
    blocks = LocalBlocks(spans)
    shell = make(whole, blocks.run)
    ids = torch.randint(3, 64, (2, EDGE))
    mask = torch.ones_like(ids)
    mask[0, :PADDED] = 0
    with torch.no_grad():
        if not _same_logits(whole, shell, ids, None):
            return "at a client, in a plain pass"
        if not _same_logits(whole, shell, ids, mask):
            return "at a client, with padding"
        if (difference := _different_steps(whole, shell, blocks, ids, mask)) is not None:
            return f"at a client, {difference}"
    return None if _same_gradients(whole, shell, ids, mask) else "at a client, in gradients"


def _same_logits(whole: PreTrainedModel, shell: PreTrainedModel, ids: Tensor, mask: Tensor | None) -> bool:
    wanted, found = (
        model(input_ids=ids, attention_mask=mask, use_cache=False).logits
        for model in (copy.deepcopy(whole), shell)
    )
    real = slice(None) if mask is None else mask.bool()
    return close(found[real], wanted[real])


def _different_steps(
    whole: PreTrainedModel, shell: PreTrainedModel, blocks: LocalBlocks, ids: Tensor, mask: Tensor
) -> str | None:
    """Cached steps as `generate` takes them, then the last again after a rollback, and with the rows exchanged."""
    whole, own, cache = copy.deepcopy(whole), DynamicCache(config=whole.config), blocks.new_cache()
    wanted = torch.empty(0)
    for start, end in STEPS:
        wanted, found = (
            _step(model, ids, mask, (start, end), one) for model, one in ((whole, own), (shell, cache))
        )
        real = mask[:, start:end].bool()
        if not close(found[real], wanted[real]):
            return "in cached steps"
    last = STEPS[-1]
    cache.crop(last[0])
    if not close(_step(shell, ids, mask, last, cache), wanted):
        return "after a rollback"
    cache.crop(last[0])
    cache.reorder_cache(torch.tensor([1, 0]))
    if not close(_step(shell, ids.flip(0), mask.flip(0), last, cache), wanted.flip(0)):
        return "with its rows exchanged"
    return None


def _step(model: PreTrainedModel, ids: Tensor, mask: Tensor, part: tuple[int, int], cache: Any) -> Tensor:
    start, end = part
    arguments: dict[str, Any] = {cache_argument(model.forward): cache, "use_cache": True}
    if "position_ids" in inspect.signature(model.forward).parameters:
        arguments["position_ids"] = (mask.cumsum(1) - 1).clamp(min=0)[:, start:end]
    logits: Tensor = model(input_ids=ids[:, start:end], attention_mask=mask[:, :end], **arguments).logits
    return logits


def _same_gradients(whole: PreTrainedModel, shell: PreTrainedModel, ids: Tensor, mask: Tensor) -> bool:
    weight = mask.unsqueeze(-1) * torch.randn(*ids.shape, whole.config.vocab_size)
    gradients: list[Tensor] = []
    for model in (copy.deepcopy(whole), shell):
        embeddings = model.get_input_embeddings()(ids).detach().requires_grad_()
        logits = model(inputs_embeds=embeddings.clone(), attention_mask=mask, use_cache=False).logits
        gradients += torch.autograd.grad((logits * weight).sum(), [embeddings])
    real = mask.bool()
    return close(gradients[1][real], gradients[0][real])
