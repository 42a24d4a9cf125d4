"""Proof, before a family is served, that its blocks can be split: a miniature is, and compared.

Invariant: a family that passes gave, in this process and with these libraries, the whole model's hidden
states bit for bit from chained spans, and its cached steps and gradients within rounding. A naive split is
*silently* wrong for several families, so nothing is served on trust.
"""

from __future__ import annotations

import copy
import logging
import math
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from corolla.errors import CorollaError, UnsupportedFamily
from corolla.models.checkpoint import Checkpoint
from corolla.models.families import blocks_prefix, slice_config, structure
from corolla.models.identity import canonical_config
from corolla.models.packing import PackedBatch, segments_of
from corolla.models.pages import CachedRow, PagePool
from corolla.models.source import LocalFolder
from corolla.models.span import Span, load_span

log = logging.getLogger(__name__)

LAYERS = 6
ROWS, TOKENS, PROMPT = 2, 9, 3
TOLERANCE = 1e-4  # of the largest value, where a row is computed in another arrangement (cached steps)

# The miniature's sizes, for those of these attributes that a config has.
SMALL: dict[str, int] = {
    "hidden_size": 64,
    "num_attention_heads": 4,
    "head_dim": 16,
    "intermediate_size": 96,
    "ffn_dim": 96,
    "ffn_hidden_size": 96,
    "n_inner": 96,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32,
    "word_embed_proj_dim": 64,
    "vocab_size": 64,
    "num_local_experts": 4,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "sliding_window": 4,
}

_passed: dict[bytes, bool] = {}


def check_family(config: PretrainedConfig) -> bool:
    """Split a miniature of this config and compare it with the whole miniature; once a process and config.

    Returns whether packed passes (`Span.forward_packed`) give the same too; where they do not, requests are
    computed one by one. Takes about a second and leaves the random number generators alone. Raises
    `UnsupportedFamily` when the family cannot be split, or when the split model computes something else.
    """
    found = structure(config)  # raises for what is not a causal model of one list of blocks
    try:
        small = miniature(config)
        key = canonical_config(small.to_dict())
        if key in _passed:
            return _passed[key]
        with torch.random.fork_rng(devices=[]), tempfile.TemporaryDirectory(prefix="corolla-") as folder:
            whole = random_model(found.causal_lm, small)
            whole.save_pretrained(folder)
            spans = _spans(Path(folder), small.num_hidden_layers)
            difference = _first_difference(whole, spans)
            packable = difference is None and can_pack(spans)
    except UnsupportedFamily:
        raise
    except (CorollaError, ValueError, TypeError, AttributeError, RuntimeError, KeyError, IndexError) as error:
        raise UnsupportedFamily(
            f"Models of type {config.model_type} cannot be served: a miniature of this one could not be split "
            f"({type(error).__name__}: {str(error).partition(chr(10))[0]:.120})."
        ) from error
    if difference is not None:
        raise UnsupportedFamily(
            f"Models of type {config.model_type} cannot be served: split, a miniature of this one computes "
            f"something else than whole ({difference})."
        )
    _passed[key] = packable
    return packable


def miniature(config: PretrainedConfig) -> PretrainedConfig:
    """The same family with few and narrow layers that keep the original's kinds of layers and ratios."""
    first = _most_varied_stretch(config, min(LAYERS, config.num_hidden_layers))
    small = slice_config(config, first, first + min(LAYERS, config.num_hidden_layers))
    ratio = _heads_per_key(config)
    for name, size in SMALL.items():
        value = getattr(config, name, None)
        computed = isinstance(getattr(type(config), name, None), property)
        if isinstance(value, int) and not computed:
            setattr(small, name, size)
    if getattr(config, "word_embed_proj_dim", config.hidden_size) != config.hidden_size:
        small.word_embed_proj_dim = SMALL["word_embed_proj_dim"] // 2
    for name in ("num_key_value_heads", "num_kv_heads"):
        if getattr(config, name, None) is not None:
            setattr(small, name, max(1, small.num_attention_heads // ratio))
    small.pad_token_id, small.bos_token_id, small.eos_token_id = 0, 1, 2
    small.rope_parameters = _shorter_factors(getattr(config, "rope_parameters", None))
    small.dtype = torch.float32
    return small


def _heads_per_key(config: PretrainedConfig) -> int:
    keys = (
        getattr(config, "num_key_value_heads", None)
        or getattr(config, "num_kv_heads", None)
        or config.num_attention_heads
    )
    return max(1, int(config.num_attention_heads // keys))


def _most_varied_stretch(config: PretrainedConfig, length: int) -> int:
    """Where `length` layers start that change their kind most often, by `layer_types` if there are any."""
    kinds = getattr(config, "layer_types", None)
    if not kinds:
        return 0

    def changes(start: int) -> int:
        return sum(kinds[at] != kinds[at + 1] for at in range(start, start + length - 1))

    return max(range(len(kinds) - length + 1), key=changes)


def _shorter_factors(rope: Any) -> Any:
    """Per-frequency factors of long-context rotary embeddings, cut to the miniature's frequencies."""
    if not isinstance(rope, dict):
        return rope
    keep = int(SMALL["head_dim"] * (rope.get("partial_rotary_factor") or 1.0)) // 2
    return {
        name: value[:keep] if name.endswith("_factor") and isinstance(value, list) else copy.deepcopy(value)
        for name, value in rope.items()
    }


def random_model(causal_lm: type[PreTrainedModel], config: PretrainedConfig) -> PreTrainedModel:
    """A model of this config with every parameter drawn anew."""
    torch.manual_seed(0)
    model = causal_lm(config)
    with torch.no_grad():
        for parameter in model.parameters():
            scale = 1.0 / math.sqrt(parameter.shape[-1]) if parameter.ndim > 1 else 0.1
            parameter.add_(torch.randn(parameter.shape) * scale)
    return model.eval().requires_grad_(False)


def _spans(folder: Path, depth: int) -> list[Span]:
    checkpoint = Checkpoint("miniature", None, LocalFolder(folder))
    cuts = sorted({0, 1, (depth + 2) // 2, depth})
    return [load_span(checkpoint, start, end, dtype=torch.float32) for start, end in pairwise(cuts)]


@dataclass
class _Seen:
    """Hidden states that entered the first block and left the last, one of each a call."""

    entered: list[Tensor] = field(default_factory=list)
    left: list[Tensor] = field(default_factory=list)


@contextmanager
def _watched(whole: PreTrainedModel, alter: Callable[[Tensor], Tensor]) -> Iterator[_Seen]:
    """`alter` may replace what enters the first block."""
    blocks = whole.get_submodule(blocks_prefix(whole.config))
    seen = _Seen()

    def entering(_block: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
        seen.entered.append(alter(arguments[0]))
        return (seen.entered[-1], *arguments[1:])

    def leaving(_block: nn.Module, _arguments: tuple[Any, ...], output: Any) -> None:
        seen.left.append(output[0] if isinstance(output, tuple) else output)

    handles = [
        blocks[0].register_forward_pre_hook(entering),
        blocks[-1].register_forward_hook(leaving),
    ]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def _first_difference(whole: PreTrainedModel, spans: list[Span]) -> str | None:
    """What differs, in words; None when nothing does."""
    ids = torch.randint(3, 64, (ROWS, TOKENS))
    left_padded = torch.ones(ROWS, TOKENS, dtype=torch.long)
    left_padded[0, :PROMPT] = 0
    with torch.no_grad():
        if not _same_whole_pass(whole, spans, ids, None):
            return "in a plain pass"
        if not _same_whole_pass(whole, spans, ids, left_padded):
            return "with padding"
        if not _same_cached_steps(whole, spans, ids, left_padded):
            return "in cached steps"
    return None if _same_gradients(whole, spans, ids, left_padded) else "in gradients"


def _chain(spans: list[Span], hidden: Tensor, **arguments: Any) -> Tensor:
    for span in spans:
        hidden = span.forward(hidden, **arguments)
    return hidden


def _same_whole_pass(whole: PreTrainedModel, spans: list[Span], ids: Tensor, mask: Tensor | None) -> bool:
    with _watched(whole, lambda hidden: hidden) as seen:
        whole(input_ids=ids, attention_mask=mask, use_cache=False)
    real = slice(None) if mask is None else mask.bool()
    return torch.equal(_chain(spans, seen.entered[0], mask=mask)[real], seen.left[0][real])


def _same_cached_steps(whole: PreTrainedModel, spans: list[Span], ids: Tensor, mask: Tensor) -> bool:
    caches = [span.new_cache() for span in spans]
    own = None
    with _watched(whole, lambda hidden: hidden) as seen:
        for start, end in ((0, TOKENS - 3), (TOKENS - 3, TOKENS - 2), (TOKENS - 2, TOKENS)):
            answer = whole(
                input_ids=ids[:, start:end],
                attention_mask=mask[:, :end],
                past_key_values=own,
                use_cache=True,
            )
            own = answer.past_key_values
            hidden = seen.entered[-1]
            for span, cache in zip(spans, caches, strict=True):
                hidden = span.forward(hidden, mask=mask[:, :end], cache=cache)
            real = mask[:, start:end].bool()
            if not _close(hidden[real], seen.left[-1][real]):
                return False
    return True


def _same_gradients(whole: PreTrainedModel, spans: list[Span], ids: Tensor, mask: Tensor) -> bool:
    weight = mask.unsqueeze(-1) * torch.randn(ROWS, TOKENS, whole.config.hidden_size)
    with _watched(whole, lambda hidden: hidden.detach().requires_grad_()) as seen:
        whole(input_ids=ids, attention_mask=mask, use_cache=False)
    (expected,) = torch.autograd.grad((seen.left[0] * weight).sum(), seen.entered)
    hidden = seen.entered[0].detach().requires_grad_()
    (gradient,) = torch.autograd.grad((_chain(spans, hidden, mask=mask) * weight).sum(), [hidden])
    real = mask.bool()
    return _close(gradient[real], expected[real])


def can_pack(spans: list[Span]) -> bool:
    """Whether packed passes of a miniature's spans equal passes of each sequence by itself."""
    lengths = (TOKENS, TOKENS - 4)
    hidden = [torch.randn(length, spans[0].hidden_size) for length in lengths]
    try:
        return _same_packed_steps(spans, hidden) and _same_packed_gradients(spans, hidden)
    except Exception as error:  # whatever the family's own attention code makes of missing masks and caches
        log.info("Packed passes are not for this family: %s", error)
        return False


def _same_packed_steps(spans: list[Span], hidden: list[Tensor]) -> bool:
    """All but the last four tokens of each at once, then two together, then one, then the other."""
    pools = [PagePool(8, dtype=torch.float32, device=torch.device("cpu")) for _ in spans]
    rows = [[CachedRow(pool) for _ in hidden] for pool in pools]
    outputs: list[list[Tensor]] = [[] for _ in hidden]
    with torch.inference_mode():
        expected = [_chain(spans, one[None])[0] for one in hidden]
        for cut in (slice(None, -4), slice(-4, -2), slice(-2, -1), slice(-1, None)):
            parts = [one[cut] for one in hidden]
            starts = [row.length for row in rows[0]]
            value = torch.cat(parts)
            for span, pool, own in zip(spans, pools, rows, strict=True):
                batch = PackedBatch(segments_of([len(part) for part in parts], own), pool)
                value = span.forward_packed(value, batch, positions=_places(starts, parts))
            for kept, output in zip(outputs, torch.split(value, [len(part) for part in parts]), strict=True):
                kept.append(output)
    return all(_close(torch.cat(kept), one) for kept, one in zip(outputs, expected, strict=True))


def _same_packed_gradients(spans: list[Span], hidden: list[Tensor]) -> bool:
    lengths = [len(one) for one in hidden]
    weight = torch.randn(sum(lengths), spans[0].hidden_size)
    alone = [one.detach().requires_grad_() for one in hidden]
    value = torch.cat([_chain(spans, one[None])[0] for one in alone])
    expected = torch.autograd.grad((value * weight).sum(), alone)
    inputs = torch.cat(hidden).requires_grad_()
    output = inputs
    for span in spans:
        batch = PackedBatch(segments_of(lengths))
        output = span.forward_packed(output, batch, positions=_places([0] * len(hidden), hidden))
    (gradient,) = torch.autograd.grad((output * weight).sum(), [inputs])
    return _close(output, value) and _close(gradient, torch.cat(expected))


def _places(starts: list[int], parts: list[Tensor]) -> Tensor:
    return torch.cat(
        [torch.arange(start, start + len(part)) for start, part in zip(starts, parts, strict=True)]
    )


def _close(one: Tensor, other: Tensor) -> bool:
    return bool((one - other).abs().max() <= TOLERANCE * (1 + other.abs().max()))
