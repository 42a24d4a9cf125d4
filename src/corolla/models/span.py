"""A server's part of a model: blocks [start, end), run by the family's own code.

Invariant: spans chained end to end compute what the whole model computes between its embeddings and its
final norm, in the same arithmetic. The model that runs the blocks is the family's own class with everything
before and after the blocks replaced by nothing; blocks keep the index that they have in the whole model.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from corolla.errors import CheckpointError, UsageError
from corolla.models.checkpoint import Checkpoint
from corolla.models.families import (
    ADDED_POSITIONS,
    NEUTRAL_ATTRIBUTES,
    Structure,
    block_key_pattern,
    slice_config,
    structure,
)
from corolla.models.prompts import add_deep
from corolla.models.span_cache import SpanCache


class Span:
    """Blocks [start, end) with their weights. One thread at a time may run a span and its views."""

    start: int
    end: int
    model: PreTrainedModel  # the family's own, holding these blocks only

    def __init__(self, model: PreTrainedModel, blocks: str, start: int, end: int) -> None:
        """`blocks` is the model's attribute that is the list of blocks; use `load_span` to make a span."""
        self.model = model
        self.start = start
        self.end = end
        self._blocks = blocks
        self._views: dict[tuple[int, int], Span] = {(start, end): self}

    @property
    def config(self) -> PretrainedConfig:
        """The model's config cut down to these blocks."""
        return self.model.config

    @property
    def blocks(self) -> nn.ModuleList:
        """The blocks themselves, in order."""
        found: nn.ModuleList = getattr(self.model, self._blocks)
        return found

    @property
    def hidden_size(self) -> int:
        """H, the width of the hidden states."""
        return int(self.config.hidden_size)

    @property
    def dtype(self) -> torch.dtype:
        """What the span computes in."""
        dtype: torch.dtype = self.model.dtype
        return dtype

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        device: torch.device = self.model.device
        return device

    def nbytes(self) -> int:
        """Memory of the span's weights in bytes."""
        return sum(one.nbytes for one in self.blocks.parameters()) + sum(
            one.nbytes for one in self.blocks.buffers()
        )

    def view(self, start: int, end: int) -> Span:
        """The sub-span [start, end), in indices of the whole model, on the same weights.

        Raises `UsageError` when the span does not hold all of these blocks.
        """
        if not self.start <= start < end <= self.end:
            raise UsageError(
                f"Blocks {start}:{end} are not all here; this span holds {self.start}:{self.end}."
            )
        if (start, end) not in self._views:
            self._views[start, end] = self._make_view(start, end)
        return self._views[start, end]

    def _make_view(self, start: int, end: int) -> Span:
        first, last = start - self.start, end - self.start
        model = copy.copy(self.model)
        # A shallow copy shares the dictionary of modules; replacing the list of blocks must not reach back.
        model._modules = dict(self.model._modules)
        setattr(model, self._blocks, nn.ModuleList(self.blocks[first:last]))
        model.config = slice_config(self.config, first, last)
        return Span(model, self._blocks, start, end)

    def new_cache(self) -> SpanCache:
        """An empty attention cache for these blocks."""
        return SpanCache(self.start)

    def forward(
        self,
        hidden: Tensor,
        *,
        mask: Tensor | None = None,
        positions: Tensor | None = None,
        cache: SpanCache | None = None,
        prompts: Tensor | None = None,
    ) -> Tensor:
        """Hidden states before block `start` to those after block `end - 1`, [R, T, H] both.

        `mask` [R, past+T], bool or integer, is 0 where a token is padding; left out, none is. `positions`
        int64 [R, T] default to past + 0, 1, …. `cache` is extended by the T new tokens. `prompts`
        [blocks, P, H] are added before each block (`add_deep`), counted from the cache's beginning.
        Differentiable in `hidden` and `prompts`.
        """
        past = cache.get_seq_length() if cache is not None else 0
        arguments: dict[str, Any] = {"use_cache": cache is not None, "past_key_values": cache}
        if mask is not None:
            arguments["attention_mask"] = mask.to(torch.long)
        if positions is not None:
            arguments["position_ids"] = positions
        with self._with_prompts(prompts, past):
            output: Any = self.model(inputs_embeds=hidden, **arguments)
        result: Tensor = output.last_hidden_state
        return result

    @contextmanager
    def _with_prompts(self, prompts: Tensor | None, past: int) -> Iterator[None]:
        if prompts is None:
            yield
            return
        handles = [
            block.register_forward_pre_hook(_PromptAdder(prompt, past))
            for block, prompt in zip(self.blocks, prompts, strict=True)
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


class _PromptAdder:
    """Adds one block's deep prompt to the hidden states that enter it."""

    def __init__(self, prompt: Tensor, past: int) -> None:
        self.prompt = prompt
        self.past = past

    def __call__(self, _block: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
        return (add_deep(arguments[0], self.prompt, self.past), *arguments[1:])


class _NoPositions(nn.Module):
    """Stands in for a position embedding whose output is added to the hidden states: adds nothing."""

    def forward(self, ids: Tensor, *_args: Any, **_kwargs: Any) -> Tensor:
        return torch.zeros((), dtype=torch.long, device=ids.device)


def load_span(
    checkpoint: Checkpoint, start: int, end: int, *, dtype: torch.dtype, device: torch.device | str = "cpu"
) -> Span:
    """Read blocks [start, end) of a checkpoint, and nothing else of it.

    Raises `UsageError` for blocks that the model does not have, `CheckpointError` when a tensor is missing or
    has another shape than the config says.
    """
    if not 0 <= start < end <= checkpoint.num_blocks:
        raise UsageError(
            f"Blocks {start}:{end} do not exist; {checkpoint.name} has blocks 0:{checkpoint.num_blocks}."
        )
    found = structure(checkpoint.config)
    pattern = block_key_pattern(checkpoint.config)

    def wanted(key: str) -> bool:
        match = pattern.match(key)
        return match is not None and start <= int(match["index"]) < end

    state: dict[str, Tensor] = {}
    for key, tensor in checkpoint.tensors(wanted, widen_to=dtype).items():
        match = pattern.match(key)
        if match is not None:
            state[f"{found.blocks}.{int(match['index']) - start}.{match['rest']}"] = tensor
    model = _load_blocks(checkpoint, found, start, end, state, dtype)
    return Span(model.to(torch.device(device)), found.blocks, start, end)


def _load_blocks(
    checkpoint: Checkpoint,
    found: Structure,
    start: int,
    end: int,
    state: dict[str, Tensor],
    dtype: torch.dtype,
) -> PreTrainedModel:
    """The family's own loader, on the span's class; it also converts layouts (mixtures of experts)."""
    try:
        model, info = _span_class(found, start, end).from_pretrained(
            None,
            config=copy.deepcopy(checkpoint.config),
            state_dict=state,
            dtype=dtype,
            output_loading_info=True,
        )
    except (RuntimeError, ValueError) as error:
        raise CheckpointError(
            f"The tensors of blocks {start}:{end} in {checkpoint.name} do not fit its config."
        ) from error
    if info["missing_keys"]:
        first = sorted(info["missing_keys"])[0]
        raise CheckpointError(
            f"{checkpoint.name} lacks tensors of blocks {start}:{end}, among them {first} (counted from "
            f"block {start})."
        )
    model.requires_grad_(False)
    return model.eval()


def _span_class(found: Structure, start: int, end: int) -> type[PreTrainedModel]:
    """The family's model class, built whole (on the meta device, by the loader) and then cut."""
    holder = found.holder

    def build(self: PreTrainedModel, config: PretrainedConfig) -> None:
        holder.__init__(self, config)
        cut_to_blocks(self, found.blocks, start, end)

    # The loader looks conversions of weights up by the class's name and refuses them to classes that are not
    # transformers' own; so the class carries the family's name and module.
    return type(holder.__name__, (holder,), {"__init__": build, "__module__": holder.__module__})


def cut_to_blocks(model: PreTrainedModel, blocks: str, start: int, end: int) -> None:
    """Keep blocks [start, end) of a family's model, and nothing of what comes before and after them."""
    kind = model.config.model_type
    kept = getattr(model, blocks)[start:end]
    for name, child in list(model.named_children()):
        if name == ADDED_POSITIONS.get(kind):
            setattr(model, name, _NoPositions())
        elif isinstance(child, nn.Embedding):
            setattr(model, name, None)
        elif name != blocks and "rotary" not in name:
            setattr(model, name, nn.Identity())
    setattr(model, blocks, nn.ModuleList(kept))
    for name, value in NEUTRAL_ATTRIBUTES.get(kind, {}).items():
        setattr(model, name, value)
    # Blocks keep the whole model's config, by which they know their own place; the model that runs them
    # counts its blocks from 0.
    model.config = slice_config(model.config, start, end)
