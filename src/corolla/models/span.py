"""A server's part of a model: blocks [start, end), run by the family's own code.

Invariant: spans chained end to end compute what the whole model computes between its embeddings and its
final norm, in the same arithmetic. The model that runs the blocks is the family's own class with everything
before and after the blocks replaced by nothing; blocks keep the index that they have in the whole model.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from corolla.errors import CheckpointError, UsageError
from corolla.models.attention.latent import LatentPages, latent_blocks
from corolla.models.attention.packing import PACKED, PackedBatch, packed
from corolla.models.attention.prefixes import KeyValueForm
from corolla.models.attention.rotary import padded
from corolla.models.attention.span_cache import SpanCache, keeps_states, span_cache_class
from corolla.models.attention.stacked import StackedCaches
from corolla.models.blocks_pass import BlocksPass, WideBlocksPass, attention_named, narrow_stand_ins
from corolla.models.cache import cache_argument
from corolla.models.checkpoints.block_tensors import tensors_of_blocks
from corolla.models.checkpoints.checkpoint import Checkpoint
from corolla.models.checks.forms import cuts_of
from corolla.models.compiled.compile import MOST_ROWS, compile_blocks
from corolla.models.compiled.program import Program
from corolla.models.cut_layout import CutLayout
from corolla.models.families import largest, slice_config, structure
from corolla.models.kernels.apply import weight_bytes
from corolla.models.lora import Adapter, AdapterRows, Hook, linear_layers, of_all
from corolla.models.parts import load_blocks
from corolla.models.prompts import (
    BlockHook,
    DeepRows,
    PromptAdder,
    packed_hooks,
    prepend_mask,
)
from corolla.models.trials import (
    cached_form,
    goes_one_by_one,
    masks_new_tokens,
    measured_bytes,
    remembers,
    seen_once,
)

EMPTY: Mapping[str, Tensor | None] = {}


class Span:
    """Blocks [start, end) with their weights. One thread at a time may run a span and its views."""

    start: int
    end: int
    model: PreTrainedModel  # the family's own, holding these blocks only
    packable: bool  # whether `forward_packed` may be used, as `selfcheck` found for the family
    stackable: bool  # the same of `forward_stacked`
    steps_differ: (
        bool  # whether a token by itself is computed otherwise than among others (`checks/steps.py`)
    )
    hidden_size: int  # H, the width of the hidden states
    width: int  # W, of what enters the first block: H, and what else blocks need (`models/cut_layout.py`)
    width_behind: int  # W', of what leaves the last block
    feed_forward_size: int  # of the widest block
    heads: int  # of the block that has most

    def __init__(
        self,
        model: PreTrainedModel,
        blocks: str,
        start: int,
        end: int,
        *,
        cuts: CutLayout,
        packable: bool,
        stackable: bool = False,
        steps_differ: bool = False,
    ) -> None:
        """`blocks` is the model's attribute that is the list of blocks; use `load_span` to make a span."""
        self.model = model
        self.cuts = cuts
        self.start, self.end = start, end
        self.packable = packable
        self.stackable = stackable and cuts.plain
        self.steps_differ = steps_differ
        self._blocks = blocks
        self.hidden_size = int(model.config.hidden_size)
        self.width, self.width_behind = cuts.width(start), cuts.width(end)
        self.feed_forward_size = largest(model.config, "intermediate_size") or 4 * self.hidden_size
        self.heads = largest(model.config, "num_attention_heads") or 1
        self.head_size = largest(model.config, "head_dim") or self.hidden_size // self.heads
        self.experts = largest(model.config, "num_experts_per_tok") or 1  # that a token is sent to
        self.cache_name = cache_argument(model.forward)
        self._empty_cache = span_cache_class(model.forward)(start, end, model.whole_config)
        # The model, if not this span of it.
        self._has_states = keeps_states(model.forward, model.whole_config)
        self.dtype: torch.dtype = model.dtype  # what it computes in
        # The whole model's config, which all blocks share and by which their attention code is chosen.
        own = next((one.config for one in self.blocks.modules() if hasattr(one, "config")), model.config)
        self._configs: tuple[Any, Any] = (model.config, own)
        self.latent_blocks = latent_blocks(self.blocks)
        self._views: dict[tuple[int, int], Span] = {(start, end): self}
        self._compiled: tuple[Program | None] | None = None  # None: not yet asked for
        self._whole = self  # of which this is a view

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
        narrow_stand_ins(model, last - first)
        model.config = slice_config(self.config, first, last)
        kind = {name: getattr(self, name) for name in ("packable", "stackable", "steps_differ")}
        view = Span(model, self._blocks, start, end, cuts=self.cuts, **kind)
        view._whole = self._whole
        return view

    def by_block(self, prefix: Tensor) -> dict[int, Tensor]:
        """A prefix [blocks, P, D] of these blocks by their indices in the whole model."""
        return dict(zip(range(self.start, self.end), prefix, strict=True))

    def new_cache(self) -> SpanCache:
        """An empty cache for these blocks."""
        cache = copy.deepcopy(self._empty_cache)
        cache.steps_differ = self.steps_differ
        return cache

    @cached_property
    def _one_by_one(self) -> bool:
        return not self._empty_cache.keeps_everything and goes_one_by_one(self)

    @cached_property
    def _masks_new_tokens(self) -> bool:
        """Whether the family's code knows masks of the new tokens only."""
        return not self._empty_cache.keeps_everything and masks_new_tokens(self)

    @cached_property
    def remembers(self) -> bool:
        """Whether blocks have states, and snapshots bring them back."""
        return self._empty_cache.has_known_states and remembers(self)

    def go_back(
        self,
        cache: SpanCache,
        length: int,
        *,
        mask: Tensor | None = None,
        given: Mapping[str, Tensor | None] = EMPTY,
    ) -> None:
        """Have a cache that reaches there hold its first `length` tokens, not 0; mask, and what blocks are given, as
        for `forward`."""
        if (again := cache.go_back(length)) is not None:
            seen = None if mask is None else mask[:, :length].to(self.device)
            self.forward_again(*again, cache, mask=seen, given=given)

    def forward_again(
        self,
        hidden: Tensor,
        positions: Tensor,
        lengths: Sequence[int],
        cache: SpanCache,
        *,
        mask: Tensor | None = None,
        given: Mapping[str, Tensor | None] = EMPTY,
    ) -> None:
        """Extend the cache by what it held once, which came in passes of `lengths`: as such, if that matters."""
        parts, past = list(lengths) if self.steps_differ else [int(hidden.shape[1])], cache.tokens
        for one, ids in zip(torch.split(hidden, parts, 1), torch.split(positions, parts, 1), strict=True):
            past += int(one.shape[1])
            seen = None if mask is None else mask[:, :past]
            self.forward(one, mask=seen, positions=ids, cache=cache, **given)

    @cached_property
    def key_values(self) -> KeyValueForm | None:
        """What each block caches of a token, found out by running one; None where that is not keys and values of one
        form, so that no prefix can stand for them."""
        if self._whole is not self:
            return self._whole.key_values
        if not self.cuts.plain or not self._empty_cache.keeps_everything:
            return None
        return cached_form(self)

    @cached_property
    def linear_layers(self) -> list[dict[str, nn.Module]]:
        """Of each block those linear layers that may be given an adapter (`models/lora.py`), by name.

        In a packed pass those that see each of its tokens once, and in their order: no others, such as experts', know
        whose a token is.
        """
        layers = [linear_layers(block) for block in self.blocks]
        if not self.packable:
            return layers
        if self._whole is not self:
            begin = self.start - self._whole.start
            return self._whole.linear_layers[begin : begin + len(layers)]
        fit = seen_once(self, [one for own in layers for one in own.values()])
        return [{name: one for name, one in own.items() if one in fit} for own in layers]

    @cached_property
    def cache_bytes(self) -> tuple[int, int]:
        """Memory of a sequence in the caches of all blocks, measured: that of each token, and that of its states.

        Where blocks remember states, what has passed is part of a token.
        """
        return measured_bytes(self)

    def forward(
        self,
        hidden: Tensor,
        *,
        mask: Tensor | None = None,
        positions: Tensor | None = None,
        cache: SpanCache | None = None,
        prompts: Tensor | None = None,
        prefix: Tensor | None = None,
        lora: Tensor | None = None,
        targets: Tensor | None = None,
    ) -> Tensor:
        """What crosses the cut before block `start` to what does after block `end - 1`, [R, T, W] to [R, T, W'].

        Both are hidden states, of width H, for most families. `mask` [R, past+T], bool or integer, is 0 where a
        token is padding; left out, none is. `positions` int64 [R, T] default to past + 0, 1, …. `cache` is extended
        by the T new tokens. `prompts` [blocks, P, H] are added before each block (`add_deep`), to each stream of
        hidden states, counted from the cache's beginning. `prefix` [blocks, P, D] stands before all tokens, which know
        nothing of it: mask, positions and the cache's tokens are counted from behind it. `lora` [blocks, R, F] is an
        adapter of the layers `targets` (`models/lora.py`). Differentiable in `hidden` and in these.
        """
        if prefix is not None:
            cache = self._begun_with(prefix, int(hidden.shape[0]), cache)
            before = cache.prefix_length
            mask = None if mask is None else prepend_mask(mask, before)
            positions = None if positions is None else positions + before
        past = cache.get_seq_length() if cache is not None else 0
        if cache is not None and past and hidden.shape[1] > 1 and self._one_by_one:
            again = partial(self.forward, cache=cache, prompts=prompts, lora=lora, targets=targets)
            steps = []
            for at in range(hidden.shape[1]):
                seen = None if mask is None else mask[:, : past + at + 1]
                place = None if positions is None else positions[:, at : at + 1]
                steps.append(again(hidden[:, at : at + 1], mask=seen, positions=place))
            return torch.cat(steps, dim=1)
        if past and positions is None and (mask is None or self._has_states):
            # Not every family's code counts what is cached; some others, none with states, count the mask's ones.
            positions = torch.arange(past, past + hidden.shape[1], device=hidden.device)[None]
        arguments: dict[str, Any] = {"use_cache": cache is not None, self.cache_name: cache}
        if mask is not None:
            new = past and self._masks_new_tokens
            arguments["attention_mask"] = (mask[:, past:] if new else mask).to(torch.long)
        if positions is not None:
            # There is code that looks for each row's own.
            arguments["position_ids"] = positions.expand(len(hidden), -1)
        hooks: list[list[BlockHook]] = (
            [] if prompts is None else [[PromptAdder(one, past)] for one in prompts]
        )
        real = None if mask is None else mask.bool()[:, -hidden.shape[1] :].to(hidden.device)
        adapter = None
        if lora is not None and targets is not None:
            adapter = of_all(Adapter.of(lora, targets, self.device, self.dtype), hidden[..., 0].numel())
        with padded(real):
            output = self.run(hidden, hooks, arguments, adapter)
        if cache is not None:
            cache.record(hidden, positions)
        return output

    def _begun_with(self, prefix: Tensor, rows: int, cache: SpanCache | None) -> SpanCache:
        """The cache, or a new one, with the prefix before its first token."""
        cache = self.new_cache() if cache is None else cache
        if not cache.get_seq_length():
            assert self.key_values is not None  # `check_prefix` asked
            cache.begin_with(prefix.to(self.device, self.dtype), rows, self.key_values)
        return cache

    def forward_packed(
        self,
        hidden: Tensor,
        batch: PackedBatch,
        *,
        positions: Tensor,
        deep: DeepRows | None = None,
        adapters: AdapterRows | None = None,
    ) -> Tensor:
        """As `forward`, [N, W] to [N, W'] of the batch's packed tokens.

        `positions` int64 [N] are position ids. `deep` are deep prompts and the tokens that they are added to,
        `adapters` those of layers. For families that `selfcheck` found to be packable. Differentiable in `hidden` and
        in these where nothing is cached.
        """
        plain = deep is None and adapters is None and batch.one_each and not torch.is_grad_enabled()
        if plain and len(hidden) <= MOST_ROWS and (program := self.compile()) is not None:
            return program.run(hidden, positions, batch)
        return self.run_packed(hidden, batch, positions=positions, deep=deep, adapters=adapters)

    def compile(self) -> Program | None:
        """The blocks' passes in generation as one call, if they can be; made when it is first asked for."""
        if self._compiled is None:
            self._compiled = (compile_blocks(self) if self.cuts.plain else None,)
        return self._compiled[0]

    def run_packed(
        self,
        hidden: Tensor,
        batch: PackedBatch,
        *,
        positions: Tensor,
        deep: DeepRows | None = None,
        adapters: AdapterRows | None = None,
    ) -> Tensor:
        """What `forward_packed` gives, always by the family's own code."""
        hooks: list[list[BlockHook]] = [] if deep is None else packed_hooks(deep)
        arguments: dict[str, Any] = {"position_ids": positions.unsqueeze(0), "use_cache": False}
        if self.latent_blocks and batch.goes_on:
            arguments |= {"use_cache": True, self.cache_name: LatentPages(self.latent_blocks, batch.keep)}
        with attention_named(PACKED, self._configs), packed(batch):
            return self.run(hidden.unsqueeze(0), hooks, arguments, adapters).squeeze(0)

    def forward_stacked(
        self, hidden: Sequence[Tensor], caches: Sequence[SpanCache], positions: Sequence[Tensor]
    ) -> Sequence[Tensor]:
        """As `forward` of each cache's rows, that have one new token each and no padding: [R, 1, W] to [R, 1, W'].

        `positions` are int64 [R, 1]. For families that `selfcheck` found to be stackable, caches that hold tokens, and
        what is given no vectors. A pass that fails leaves all caches as they were.
        """
        stacked = StackedCaches(caches, self.latent_blocks)
        given, places = torch.cat(list(hidden)), torch.cat(list(positions))
        program = None if torch.is_grad_enabled() else self.compile()
        fits = program is not None and program.takes(len(given), stacked.states)
        run = program.run_stacked if program is not None and fits else self.run_stacked
        return stacked.commit(run(given, stacked, positions=places), hidden, positions)

    def run_stacked(self, hidden: Tensor, stacked: StackedCaches, *, positions: Tensor) -> Tensor:
        """[R, 1, W] to [R, 1, W'] of the stacked rows, by the family's own code."""
        arguments = {"use_cache": True, self.cache_name: stacked, "position_ids": positions}
        with attention_named(PACKED, self._configs), packed(stacked):
            return self.run(hidden, [], arguments)

    def run(
        self,
        hidden: Tensor,
        hooks: Sequence[Sequence[BlockHook]],
        arguments: dict[str, Any],
        adapters: AdapterRows | None = None,
    ) -> Tensor:
        """The family's own code over what crosses the cut, [R, T, W]."""
        behind = [] if adapters is None else list(adapters.hooks(self.linear_layers))
        if not self.cuts.plain:
            return self._run_wide(hidden, hooks, arguments, behind)
        one_pass = BlocksPass(self.blocks, hidden, hooks, behind)
        with one_pass.hooked():
            # The code may write to what it is given before the first block gets the hidden states themselves.
            self.model(inputs_embeds=torch.zeros_like(hidden), **arguments)
        if one_pass.left is None:
            raise CheckpointError(f"The code of {self.config.model_type} has not called its blocks.")
        return one_pass.left

    def _run_wide(
        self,
        entering: Tensor,
        hooks: Sequence[Sequence[BlockHook]],
        arguments: dict[str, Any],
        behind: Sequence[tuple[nn.Module, Hook]],
    ) -> Tensor:
        """The same of a family whose blocks are given more: entered with tokens, of which such things are made."""
        crossed = self.cuts.split(entering, self.start)
        cache = arguments.get(self.cache_name)
        one_pass = WideBlocksPass(self.blocks, self.cuts, crossed, hooks, cache, self.hidden_size, behind)
        tokens = torch.zeros(entering.shape[:2], dtype=torch.long, device=entering.device)
        with one_pass.hooked():
            self.model(input_ids=tokens, **arguments)
        if one_pass.left is None:
            raise CheckpointError(f"The code of {self.config.model_type} has not called its blocks.")
        return one_pass.join(self.end)


def load_span(
    checkpoint: Checkpoint,
    start: int,
    end: int,
    *,
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
    packable: bool = False,
    stackable: bool = False,
    steps_differ: bool = False,
) -> Span:
    """Read blocks [start, end) of a checkpoint, and nothing else of it.

    `packable` is what `check_family` says of the family, `stackable` what `steps_stack` does, `steps_differ` what
    `checks/steps.py` does.

    Raises `UsageError` for blocks that the model does not have, `CheckpointError` when a tensor is missing or
    has another shape than the config says.
    """
    if not 0 <= start < end <= checkpoint.num_blocks:
        raise UsageError(
            f"Blocks {start}:{end} do not exist; {checkpoint.name} has blocks 0:{checkpoint.num_blocks}."
        )
    found = structure(checkpoint.config)
    state = {
        f"{found.blocks}.{name}": one
        for name, one in tensors_of_blocks(checkpoint, start, end, dtype).items()
    }
    cuts = cuts_of(checkpoint.config)
    model = load_blocks(checkpoint, found, cuts, start, end, state, dtype)
    model = model.to(torch.device(device))
    kind = {"packable": packable, "stackable": stackable, "steps_differ": steps_differ}
    return Span(model, found.blocks, start, end, cuts=cuts, **kind)
