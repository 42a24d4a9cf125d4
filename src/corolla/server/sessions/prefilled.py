"""Prompts whose columns a server has computed by itself, for whoever chats with them.

Invariant: what stands here comes from the checkpoint and the bundles' own files, in the arithmetic in which the
prompt would have been computed had a client sent it; nothing that a client sends reaches it. Its pages are
never written again and never evicted; sessions hold them copy-on-write (`models/attention/pages.py`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor
from transformers import PretrainedConfig

from corolla.errors import BundleError, RequestRefused
from corolla.models.attention.packing import PackedBatch, Segment
from corolla.models.attention.pages import CachedSequence, PagePool
from corolla.models.checkpoints.checkpoint import Checkpoint
from corolla.models.checkpoints.prompt_files import load_prompt
from corolla.models.families import depth_of
from corolla.models.front import entering
from corolla.models.kernels.apply import use_kernels
from corolla.models.prompts import BlockVectors, DeepRows, Prompt, SoftPrompt, digest
from corolla.models.span import Span, load_span
from corolla.wire.messages import Prefilled


@dataclass(frozen=True)
class EnteringPrompt:
    """A prompt on its way to the server's first block, for clients that compute in `dtype`."""

    name: str  # `models.prompts.digest`
    hidden: Tensor  # [P, H]
    deep: Tensor | None  # fp32 [blocks of the model, P, H]
    dtype: torch.dtype

    def through(self, span: Span, batch: PackedBatch) -> EnteringPrompt:
        """The same behind the span's blocks; `batch` is of one segment, which all blocks may share."""
        count = int(self.hidden.shape[0])
        deep = None
        if self.deep is not None:
            own = self.deep[span.start : span.end].to(span.device)
            deep = DeepRows.of([(0, 0, count)], [own])
        with torch.inference_mode():
            output = span.forward_packed(
                self.hidden.to(span.device, span.dtype),
                batch,
                positions=torch.arange(count, device=span.device),
                deep=deep,
            )
        return replace(self, hidden=output)


@dataclass(frozen=True)
class PrefilledPrompt:
    """What a server holds of a prompt: its columns' pages, and their outputs for clients."""

    start: int  # the server's first block
    row: CachedSequence
    outputs: list[Tensor]  # [1, P, H] behind each of the server's blocks
    deep: Tensor | None  # fp32 [blocks of the server, P, H]

    def outputs_of(self, span: Span) -> Tensor:
        """The prompt's columns behind a part of the server's blocks, [1, P, H]."""
        return self.outputs[span.end - 1 - self.start]

    def deep_of(self, span: Span) -> Tensor | None:
        """The deep prompts of a part of the server's blocks."""
        return None if self.deep is None else self.deep[span.start - self.start : span.end - self.start]


def read_bundles(folders: Sequence[Path], checkpoint: Checkpoint) -> list[Prompt]:
    """The prompts of these bundles. Raises `BundleError` for one that is not for this model."""
    prompts: list[Prompt] = []
    for folder in folders:
        prompt = load_prompt(
            folder, model_name=checkpoint.name, identity=checkpoint.identity, config=checkpoint.config
        )
        if not _fits(prompt, checkpoint.config):
            raise BundleError(
                f"The prompt in {folder} has not the shape that {checkpoint.name} needs; copy the bundle again."
            )
        prompts.append(prompt)
    return prompts


def _fits(prompt: Prompt, config: PretrainedConfig) -> bool:
    if not isinstance(prompt, SoftPrompt):
        # Its width is looked at with the blocks.
        return prompt.blocks.values.shape[0] == depth_of(config)
    size, width = config.hidden_size, getattr(config, "word_embed_proj_dim", config.hidden_size)
    longest = getattr(config, "max_position_embeddings", None) or prompt.length
    deep = None if prompt.deep is None else prompt.deep.shape
    return (
        0 < prompt.length <= longest
        and prompt.input.shape[1] == width
        and deep in (None, (depth_of(config), prompt.length, size))
    )


def before_span(
    checkpoint: Checkpoint,
    prompts: Sequence[Prompt],
    start: int,
    *,
    dtype: torch.dtype,
    device: torch.device,
    quantization: str,
) -> list[EnteringPrompt | BlockVectors]:
    """The prompts as they enter block `start`, once for each dtype that clients may compute in; prefixes and
    adapters as they are.

    One block at a time is read and run, in the server's own arithmetic. Raises `CheckpointError`.
    """
    given = [prompt.blocks.kept() for prompt in prompts if not isinstance(prompt, SoftPrompt)]
    soft = [prompt for prompt in prompts if isinstance(prompt, SoftPrompt)]
    found: dict[str, EnteringPrompt] = {}
    for kind in _client_dtypes(dtype) if soft else ():
        for prompt, hidden in zip(soft, entering(checkpoint, soft, kind), strict=True):
            deep = None if prompt.deep is None else prompt.deep.detach()
            name = digest(prompt.input, deep, kind)
            found[name] = EnteringPrompt(name, hidden, deep, kind)
    if not found:
        return [*given]
    for index in range(start):
        block = load_span(checkpoint, index, index + 1, dtype=dtype, device=device)
        use_kernels(block.model, quantization, device)
        for name, one in found.items():
            found[name] = one.through(block, PackedBatch([Segment(0, len(one.hidden))]))
    return [*found.values(), *given]


def _client_dtypes(dtype: torch.dtype) -> list[torch.dtype]:
    """What clients may compute in so that nothing is rounded on the way from one server of `dtype` to the next."""
    wide = torch.promote_types(dtype, torch.float32)
    return list(dict.fromkeys([dtype, wide]))


def prefill(span: Span, pool: PagePool, prompt: EnteringPrompt) -> PrefilledPrompt:
    """Run a prompt through the span's blocks, into pages of its own. On the compute thread."""
    row = CachedSequence(pool)
    batch = PackedBatch([Segment(0, len(prompt.hidden), row)], pool)
    outputs = []
    for index in range(span.start, span.end):
        prompt = prompt.through(span.view(index, index + 1), batch)
        outputs.append(prompt.hidden.unsqueeze(0).to("cpu", prompt.dtype))
    deep = None if prompt.deep is None else prompt.deep[span.start : span.end].to(span.device, copy=True)
    return PrefilledPrompt(span.start, row, outputs, deep)


def find(bundles: dict[str, PrefilledPrompt], named: Prefilled | None) -> PrefilledPrompt | None:
    """The bundle that a client names. Raises `RequestRefused` (no_bundle) where it cannot do without."""
    found = None if named is None else bundles.get(named.digest)
    if found is None and named is not None and named.deep:
        raise RequestRefused(
            "This server has not computed that prompt by itself; send it.", code="no_bundle", field="bundle"
        )
    return found
