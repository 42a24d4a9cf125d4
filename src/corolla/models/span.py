"""A server's part of a model: blocks [start, end), run by the family's own code.

Invariant: spans chained end to end compute what the whole model computes between its embeddings and its
final norm, in the same arithmetic. The model that runs the blocks is the family's own class with everything
before and after the blocks replaced by nothing; blocks keep the index that they have in the whole model.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from corolla.errors import CheckpointError, UsageError
from corolla.models.checkpoint import Checkpoint
from corolla.models.compiled.compile import MOST_ROWS, compile_blocks
from corolla.models.compiled.program import Program
from corolla.models.families import (
    ADDED_POSITIONS,
    NEUTRAL_ATTRIBUTES,
    Structure,
    block_key_pattern,
    slice_config,
    structure,
)
from corolla.models.kernels.apply import weight_bytes
from corolla.models.packed_bloom import pack_bloom
from corolla.models.packing import PACKED, PackedBatch, current_batch, packed
from corolla.models.pretrained import load_parts
from corolla.models.prompts import add_deep, add_deep_packed
from corolla.models.span_cache import SpanCache

BlockHook = Callable[[nn.Module, tuple[Any, ...]], Any]


class Span:
    """Blocks [start, end) with their weights. One thread at a time may run a span and its views."""

    start: int
    end: int
    model: PreTrainedModel  # the family's own, holding these blocks only
    packable: bool  # whether `forward_packed` may be used, as `selfcheck` found for the family

    def __init__(self, model: PreTrainedModel, blocks: str, start: int, end: int) -> None:
        """`blocks` is the model's attribute that is the list of blocks; use `load_span` to make a span."""
        self.model = model
        self.start = start
        self.end = end
        self.packable = False
        self._blocks = blocks
        self.dtype: torch.dtype = model.dtype  # what it computes in
        # The whole model's config, which all blocks share and by which their attention code is chosen.
        self._block_config: Any = next(
            (one.config for one in self.blocks.modules() if hasattr(one, "config")), model.config
        )
        self._views: dict[tuple[int, int], Span] = {(start, end): self}
        self._compiled: tuple[Program | None] | None = None  # None: not yet asked for

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
    def device(self) -> torch.device:
        """Where the weights are."""
        device: torch.device = self.model.device
        return device

    def nbytes(self) -> int:
        """Memory of the span's weights in bytes."""
        return weight_bytes(self.blocks)

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
        view = Span(model, self._blocks, start, end)
        view.packable = self.packable
        return view

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

    def forward_packed(
        self,
        hidden: Tensor,
        batch: PackedBatch,
        *,
        positions: Tensor,
        deep: DeepRows | None = None,
        between: Callable[[], None] | None = None,
    ) -> Tensor:
        """Hidden states [N, H] of the batch's packed tokens before block `start` to those after `end - 1`.

        `positions` int64 [N] are position ids. `deep` are deep prompts and the tokens that they are added to.
        `between` is called before each block, in a backward pass too. For families that `selfcheck` found
        to be packable. Differentiable in `hidden` and the prompts where nothing is cached.
        """
        plain = deep is None and between is None and batch.one_each and not torch.is_grad_enabled()
        if plain and len(hidden) <= MOST_ROWS and (program := self.compile()) is not None:
            return program.run(hidden, positions, batch)
        return self.run_packed(hidden, batch, positions=positions, deep=deep, between=between)

    def compile(self) -> Program | None:
        """The blocks' passes in generation as one call, if they can be; made when it is first asked for."""
        if self._compiled is None:
            self._compiled = (compile_blocks(self),)
        return self._compiled[0]

    def run_packed(
        self,
        hidden: Tensor,
        batch: PackedBatch,
        *,
        positions: Tensor,
        deep: DeepRows | None = None,
        between: Callable[[], None] | None = None,
    ) -> Tensor:
        """What `forward_packed` gives, always by the family's own code."""
        hooks = _packed_hooks(self.blocks, batch, deep, between)
        with self._attention(PACKED), packed(batch), self._hooked(hooks):
            output: Any = self.model(
                inputs_embeds=hidden.unsqueeze(0), position_ids=positions.unsqueeze(0), use_cache=False
            )
        result: Tensor = output.last_hidden_state
        return result.squeeze(0)

    @contextmanager
    def _attention(self, name: str) -> Iterator[None]:
        """The family's code uses the attention function of that name inside."""
        configs = (self.model.config, self._block_config)
        before = [config._attn_implementation_internal for config in configs]
        for config in configs:
            config._attn_implementation_internal = name
        try:
            yield
        finally:
            for config, own in zip(configs, before, strict=True):
                config._attn_implementation_internal = own

    def _with_prompts(self, prompts: Tensor | None, past: int) -> AbstractContextManager[None]:
        if prompts is None:
            return nullcontext()
        return self._hooked([(_PromptAdder(prompt, past),) for prompt in prompts])

    @contextmanager
    def _hooked(self, hooks: Sequence[Sequence[BlockHook]]) -> Iterator[None]:
        """Each block's hooks see, and may replace, its inputs inside."""
        handles = [
            block.register_forward_pre_hook(hook)
            for block, own in zip(self.blocks, hooks, strict=bool(hooks))
            for hook in own
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


@dataclass(frozen=True)
class DeepRows:
    """Deep prompts in a packed pass: `vectors` [blocks, M, H] are added to the packed tokens int64 [M]."""

    tokens: Tensor
    vectors: Tensor

    @staticmethod
    def of(places: Sequence[tuple[int, int, int]], prompts: Sequence[Tensor]) -> DeepRows | None:
        """For stretches (first packed token, its position in its sequence, count), each with its prompts.

        `prompts` are [blocks, P, H]; a stretch takes those of positions below P. None when no token does.
        """
        tokens, vectors = [], []
        for (begin, start, count), prompt in zip(places, prompts, strict=True):
            stop = min(prompt.shape[1], start + count)
            if start < stop:
                tokens.append(torch.arange(begin, begin + stop - start, device=prompt.device))
                vectors.append(prompt[:, start:stop])
        return DeepRows(torch.cat(tokens), torch.cat(vectors, dim=1)) if tokens else None


class _PackedHook:
    """Before a block of one batch's pass: a pause, and that block's deep prompts.

    In the pause other batches may pass through the same blocks; their inputs are left alone.
    """

    def __init__(
        self,
        batch: PackedBatch,
        between: Callable[[], None] | None,
        tokens: Tensor | None,
        vectors: Tensor | None,
    ) -> None:
        self.batch = batch
        self.between = between
        self.tokens = tokens
        self.vectors = vectors

    def __call__(self, _block: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...] | None:
        if current_batch() is not self.batch:
            return None
        hidden: Tensor = arguments[0]
        if self.between is not None:
            self._pause(self.between, hidden)
        if self.tokens is None or self.vectors is None:
            return None
        return (add_deep_packed(hidden, self.vectors, self.tokens), *arguments[1:])

    def _pause(self, between: Callable[[], None], hidden: Tensor) -> None:
        between()
        if hidden.requires_grad and not hidden.is_leaf:
            hidden.register_hook(lambda _grad: between())  # type: ignore[no-untyped-call]


def _packed_hooks(
    blocks: nn.ModuleList, batch: PackedBatch, deep: DeepRows | None, between: Callable[[], None] | None
) -> list[list[BlockHook]]:
    if deep is None:
        return [] if between is None else [[_PackedHook(batch, between, None, None)] for _ in blocks]
    return [[_PackedHook(batch, between, deep.tokens, vectors)] for vectors in deep.vectors]


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
    model, info = load_parts(_span_class(found, start, end), checkpoint, state, dtype)
    if info["missing_keys"]:
        first = sorted(info["missing_keys"])[0]
        raise CheckpointError(
            f"{checkpoint.name} lacks tensors of blocks {start}:{end}, among them {first} (counted from "
            f"block {start})."
        )
    model.requires_grad_(False)
    if checkpoint.config.model_type == "bloom":
        pack_bloom(getattr(model, found.blocks))
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
