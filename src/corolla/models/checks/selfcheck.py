"""Proof, before a family is served, that its blocks can be split: a miniature is, and compared.

Invariant: a family that passes gave, in this process and with these libraries, the whole model's hidden
states from chained spans (on a CPU bit for bit, elsewhere within rounding), its cached steps and gradients within
rounding, and with a client's shell around the spans its logits. A naive split is *silently* wrong for several
families, so nothing is served on trust. A client proves all of its own half by itself
(`client/model/startcheck.py`), with its own libraries.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from corolla.errors import UnsupportedFamily
from corolla.files import scratch_folder
from corolla.models.attention.packing import PackedBatch, segments_of
from corolla.models.attention.pages import CachedSequence, PagePool
from corolla.models.blocks_pass import first_of
from corolla.models.cache import BlocksCall, cache_argument, take_cache
from corolla.models.checkpoints.checkpoint import Checkpoint
from corolla.models.checkpoints.identity import canonical_config
from corolla.models.checkpoints.source import LocalFolder
from corolla.models.checks.forms import (
    refuse_states_in_blocks,
    refuse_what_is_left_out,
    refusing,
    takes_padding_in_front,
    values_returned,
)
from corolla.models.checks.miniature import EDGE, close, miniature, random_model, undisturbed
from corolla.models.checks.tracing import argument_names, replaced
from corolla.models.cut_layout import CutLayout
from corolla.models.families import (
    blocks_prefix,
    refuse_encoder_and_decoder,
    refuse_what_cannot_be_built,
    structure,
)
from corolla.models.shell import BaseModelHooks, BlocksLayer, replace_blocks
from corolla.models.span import Span, load_span
from corolla.text import get_logger

log = get_logger(__name__)

# A sequence that is cached ends where rotary embeddings begin to change, one that is run whole goes beyond.
ROWS, CACHED, TOKENS, PROMPT = 2, EDGE, EDGE + 3, 3
STEPS = 5  # of one token
PIECES = ((0, CACHED - 3), (CACHED - 3, CACHED - 2), (CACHED - 2, CACHED))  # in which cached tokens come


# Differences that are none between the whole and its parts, but between calls of the whole.
PADDING, EQUALS = "padding", "equals"
OF_THEIR_OWN = {
    PADDING: "with this config padding changes what transformers itself computes of a row, and servers are sent none",
    EQUALS: "with this config their blocks choose among equal scores (of tokens that are repeated), and what they "
    "choose depends on the padding in transformers itself",
}


@dataclass(frozen=True)
class Together:
    """Which requests of a family may share a pass."""

    packable: bool  # all, packed
    stackable: bool  # steps of one token, stacked


_passed: dict[tuple[bytes, torch.device], Together] = {}
CPU = torch.device("cpu")


def check_family(config: PretrainedConfig, device: torch.device = CPU) -> bool:
    """Split a miniature of this config and compare it with the whole miniature; once a process, config and device.

    Returns whether packed passes (`Span.forward_packed`) give the same too; where they do not, requests are
    computed one by one. Takes about a second and leaves the random number generators alone. Raises
    `UnsupportedFamily` when the family cannot be split, or when the split model computes something else.
    """
    return _checked(config, device).packable


def steps_stack(config: PretrainedConfig, device: torch.device = CPU) -> bool:
    """Whether steps of one token (`Span.forward_stacked`) give the same together, of a family that cannot be packed;
    found out with, and raises as, `check_family`."""
    return _checked(config, device).stackable


def _checked(config: PretrainedConfig, device: torch.device) -> Together:
    structure(config)  # raises for what is not a causal model of one list of blocks
    with refusing(config, "served: a miniature of this one could not be split", _refuse_what_is_left_out):
        key = canonical_config(miniature(config).to_dict()), device
        if key not in _passed:
            with split_miniature(config, device) as (whole, spans):
                _compare(config, _first_difference(whole, spans))
                packable = can_pack(spans)
                _passed[key] = Together(packable, not packable and can_stack(spans))
        return _passed[key]


@contextmanager
def split_miniature(
    config: PretrainedConfig, device: torch.device = CPU
) -> Iterator[tuple[PreTrainedModel, list[Span]]]:
    """A random miniature of this config, always the same, and the spans of which it consists."""
    small = miniature(config)
    with undisturbed(), scratch_folder() as folder:
        whole = random_model(structure(config).causal_lm, small)
        whole.save_pretrained(folder)
        moved: Any = whole
        yield moved.to(device), _spans(folder, small.num_hidden_layers, device)


def _compare(config: PretrainedConfig, difference: str | None) -> None:
    if difference is not None:
        _refuse_what_is_left_out(config)
        reason = f"split, a miniature of this one computes something else than whole ({difference})"
        raise UnsupportedFamily(
            f"Models of type {config.model_type} cannot be served: {OF_THEIR_OWN.get(difference, reason)}."
        )


def _refuse_what_is_left_out(config: PretrainedConfig) -> None:
    """The reason of most failures, where there is such a thing."""
    refuse_encoder_and_decoder(config)
    refuse_what_is_left_out(config)
    refuse_states_in_blocks(config)
    refuse_what_cannot_be_built(config)


def _spans(folder: Path, depth: int, device: torch.device) -> list[Span]:
    checkpoint = Checkpoint("miniature", None, LocalFolder(folder))
    cuts = sorted({0, 1, (depth + 2) // 2, depth})
    return [
        load_span(checkpoint, start, end, dtype=torch.float32, device=device) for start, end in pairwise(cuts)
    ]


@dataclass
class Seen:
    """What entered the first block and left the last, flat, one of each a call."""

    entered: list[Tensor] = field(default_factory=list)
    left: list[Tensor] = field(default_factory=list)
    given: list[dict[str, Tensor]] = field(default_factory=list)  # to each block of the latest call


@contextmanager
def watched(whole: PreTrainedModel, cuts: CutLayout, *, grad: bool = False) -> Iterator[Seen]:
    """With `grad`, what is given to the blocks from outside comes from nowhere and needs gradients."""
    blocks: Any = whole.get_submodule(blocks_prefix(whole.config))
    hidden = argument_names(blocks[0])[0]
    from_outside = [(hidden, 0), *((side.name, side.place) for side in cuts.sides)]
    shared = {side.name for side in cuts.sides if not side.each}
    seen = Seen()

    def entering(
        _block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        if len(seen.given) == len(blocks):
            seen.given.clear()
        given: dict[str, Tensor] = {}
        for name, place in from_outside if not seen.given else from_outside[1:]:
            value = args[place] if place < len(args) else kwargs[name]
            if grad and value.is_floating_point():
                again = name in shared and seen.given
                value = seen.given[0][name] if again else value.detach().requires_grad_()
                args, kwargs = replaced(args, kwargs, name, place, value)
            given[name] = value
        seen.given.append(given)
        if len(seen.given) == len(blocks):
            seen.entered.append(cuts.collect(seen.given[0][hidden], seen.given))
        return args, kwargs

    def leaving(_block: nn.Module, _arguments: tuple[Any, ...], output: Any) -> None:
        seen.left.append(cuts.hidden.flat(first_of(output)))

    handles = [one.register_forward_pre_hook(entering, with_kwargs=True) for one in blocks]
    handles.append(blocks[-1].register_forward_hook(leaving))
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def _first_difference(whole: PreTrainedModel, spans: list[Span]) -> str | None:
    """What differs, in words; None when nothing does. The whole is new each time: it may remember passes."""
    ids = torch.randint(3, 64, (ROWS, TOKENS)).to(spans[0].device)
    left_padded = torch.ones_like(ids)
    left_padded[0, :PROMPT] = 0
    with torch.no_grad():
        if not _same_whole_pass(copy.deepcopy(whole), spans, ids, None):
            return "in a plain pass"
        if not _same_whole_pass(copy.deepcopy(whole), spans, ids, left_padded):
            return "with padding"
        if not _same_whole_pass(copy.deepcopy(whole), _cut_again(spans), ids, None):
            return "cut elsewhere"
        if not _same_whole_pass(copy.deepcopy(whole), spans, ids[:, :CACHED], None):
            return "after a longer request"
        front = takes_padding_in_front(whole.config)
        if not _same_without_padding(copy.deepcopy(whole), spans, ids % 3 + 3, front=front):
            distinct = (torch.randperm(ids.numel()) + 3).reshape(ids.shape).to(ids.device)
            same = _same_without_padding(copy.deepcopy(whole), spans, distinct, front=front)
            return EQUALS if same else PADDING
        if not _same_cached_steps(copy.deepcopy(whole), spans, ids, left_padded):
            return "in cached steps" if front else PADDING
        for mask in (None, left_padded[:, :CACHED]):
            if not _same_at_a_client(whole, spans, ids[:, :CACHED], mask):
                return "at a client"
    same = _same_gradients(copy.deepcopy(whole), spans, ids, left_padded)
    return None if same else "in gradients"


def _chain(spans: list[Span], hidden: Tensor, **arguments: Any) -> Tensor:
    for span in spans:
        hidden = span.forward(hidden, **arguments)
    return hidden


def _cut_again(spans: list[Span]) -> list[Span]:
    """The same blocks, some spans' in two parts."""
    parts = []
    for span in spans:
        end = span.start + len(span.blocks)
        cuts = sorted({span.start, (span.start + end) // 2, end})
        parts += [span.view(start, end) for start, end in pairwise(cuts)]
    return parts


def _same_whole_pass(whole: PreTrainedModel, spans: list[Span], ids: Tensor, mask: Tensor | None) -> bool:
    with watched(whole, spans[0].cuts) as seen:
        whole(input_ids=ids, attention_mask=mask, use_cache=False)
    real = slice(None) if mask is None else mask.bool()
    found, wanted = _chain(spans, seen.entered[0], mask=mask)[real], seen.left[0][real]
    # Elsewhere than on a CPU sums may be added up in another order each time.
    return torch.equal(found, wanted) if found.device.type == "cpu" else close(found, wanted)


def _same_without_padding(whole: PreTrainedModel, spans: list[Span], ids: Tensor, *, front: bool) -> bool:
    """Rows are sent without their padding, here one on the right, and one on the left, in `front`, but where that
    changes what transformers itself computes, so that clients refuse it; on one side of the edge.

    Where tokens are often the same, a choice among equals, which may fall otherwise, is noticed.
    """
    ids = ids[:, :CACHED]
    mask = torch.ones_like(ids)
    mask[0, : PROMPT * front] = mask[1, -PROMPT:] = 0
    with watched(whole, spans[0].cuts) as seen:
        whole(input_ids=ids, attention_mask=mask, use_cache=False)
    for row, real in enumerate(mask.bool()):
        alone = seen.entered[0][row, real][None]
        positions = None if bool(real[0]) else real.nonzero().T
        if not close(_chain(spans, alone, positions=positions)[0], seen.left[0][row, real]):
            return False
    return True


def _same_cached_steps(whole: PreTrainedModel, spans: list[Span], ids: Tensor, mask: Tensor) -> bool:
    """With what the whole gives in one pass: not every family's own code goes on from a cache by several tokens.

    There are families whose own code gives something else token by token than at once; then, with what it gives so.
    """
    ids, mask = ids[:, :CACHED], mask[:, :CACHED]
    with watched(whole, spans[0].cuts) as seen:
        whole(input_ids=ids, attention_mask=mask, use_cache=False)
    caches, found = [span.new_cache() for span in spans], []
    for start, end in PIECES:
        hidden = seen.entered[0][:, start:end]
        for span, cache in zip(spans, caches, strict=True):
            hidden = span.forward(hidden, mask=mask[:, :end], cache=cache)
        found.append(hidden)
    left, real = torch.cat(found, 1), mask.bool()
    if close(left[real], seen.left[0][real]):
        return True
    return not spans[0].new_cache().keeps_everything and close(
        left[real], _own_steps(whole, spans, ids, mask)[real]
    )


def _own_steps(whole: PreTrainedModel, spans: list[Span], ids: Tensor, mask: Tensor) -> Tensor:
    """What leaves the last block of the whole with a cache of its own, in the same pieces."""
    cache: Any = None
    with watched(whole, spans[0].cuts) as seen:
        for start, end in PIECES:
            arguments: dict[str, Any] = {cache_argument(whole.forward): cache, "use_cache": True}
            cache = take_cache(
                dict(whole(input_ids=ids[:, start:end], attention_mask=mask[:, :end], **arguments))
            )
    return torch.cat(seen.left, 1)


def _same_at_a_client(whole: PreTrainedModel, spans: list[Span], ids: Tensor, mask: Tensor | None) -> bool:
    """The logits of a client's shell around the spans."""

    def run(hidden: Tensor, call: BlocksCall) -> Tensor:
        return _chain(spans, hidden, mask=call.mask, positions=call.positions)

    shell = copy.deepcopy(whole)
    layer = BlocksLayer(run, returns=values_returned(whole.config), cuts=spans[0].cuts)
    holder = replace_blocks(shell, blocks_prefix(whole.config), layer)
    BaseModelHooks(holder, prompts=lambda: None, caches=None)
    wanted, found = (
        model(input_ids=ids, attention_mask=mask, use_cache=False).logits
        for model in (copy.deepcopy(whole), shell)
    )
    real = slice(None) if mask is None else mask.bool()
    return close(found[real], wanted[real])


def _same_gradients(whole: PreTrainedModel, spans: list[Span], ids: Tensor, mask: Tensor) -> bool:
    cuts = spans[0].cuts
    with watched(whole, cuts, grad=True) as seen:
        whole(input_ids=ids, attention_mask=mask, use_cache=False)
    weight = mask.unsqueeze(-1) * torch.randn(seen.left[0].shape).to(mask.device)
    distinct = {id(one): one for given in seen.given for one in given.values() if one.is_floating_point()}
    grads = torch.autograd.grad((seen.left[0] * weight).sum(), list(distinct.values()))
    of = dict(zip(distinct, grads, strict=True))
    given = [
        {name: of[id(one)] if id(one) in of else torch.zeros_like(one) for name, one in each.items()}
        for each in seen.given
    ]
    expected = cuts.collect(next(iter(given[0].values())), given)
    hidden = seen.entered[0].detach().requires_grad_()
    (gradient,) = torch.autograd.grad((_chain(spans, hidden, mask=mask) * weight).sum(), [hidden])
    real = mask.bool()
    return close(gradient[real], expected[real])


# --- packed passes ----------------------------------------------------------------------------------------


def can_pack(spans: list[Span]) -> bool:
    """Whether packed passes of a miniature's spans equal passes of each sequence by itself, of unlike lengths.

    With a cache and without one, gradients too; sequences that are run whole lie on both sides of the length at
    which rotary embeddings change, if they do.
    """
    width, device = spans[0].width, spans[0].device
    cached = [torch.randn(length, width).to(device) for length in (EDGE, EDGE - 4)]
    across = [torch.randn(length, width).to(device) for length in (EDGE + 3, EDGE - 4, EDGE + 1)]
    try:
        return _same_packed_steps(spans, cached) and _same_packed_gradients(spans, across)
    except Exception as error:  # whatever the family's own attention code makes of missing masks and caches
        log.info("Packed passes are not for this family: %s", error)
        return False


def can_stack(spans: list[Span]) -> bool:
    """Whether steps of one token of several requests, as a batch, equal steps of each by itself.

    Their sequences are of unlike lengths, one request is of two rows, and the company changes.
    """
    width, device = spans[0].width, spans[0].device
    sizes = ((1, EDGE), (2, EDGE - 3), (1, EDGE - 1))
    hidden = [torch.randn(rows, length, width).to(device) for rows, length in sizes]
    try:
        with torch.inference_mode():
            return spans[0].cuts.plain and _same_stacked_steps(spans, hidden)
    except Exception as error:  # whatever the family's own code makes of others' caches
        log.info("Stacked steps are not for this family: %s", error)
        return False


def _same_stacked_steps(spans: list[Span], hidden: list[Tensor]) -> bool:
    wanted = [_steps(spans, [one], ([0],) * STEPS)[0] for one in hidden]
    found = _steps(spans, hidden, ([0, 1, 2], [2, 0], [1], [0, 1, 2], [2, 1, 0], [0, 1], [2]))
    return all(close(one, other) for one, other in zip(found, wanted, strict=True))


def _steps(spans: list[Span], hidden: list[Tensor], companies: Sequence[list[int]]) -> list[Tensor]:
    """What the last `STEPS` tokens of sequences give, with what is before them cached; who steps together when."""
    caches = [[span.new_cache() for span in spans] for _ in hidden]
    outputs: list[list[Tensor]] = [[] for _ in hidden]
    for sequence, kept in zip(hidden, caches, strict=True):
        value = sequence[:, :-STEPS]
        for span, cache in zip(spans, kept, strict=True):
            value = span.forward(value, cache=cache)
    for company in companies:
        at = [caches[one][0].tokens for one in company]
        both = list(zip((hidden[one] for one in company), at, strict=True))
        values: Sequence[Tensor] = [one[:, place : place + 1] for one, place in both]
        places = [torch.full((len(one), 1), place, device=one.device) for one, place in both]
        for index, span in enumerate(spans):
            own = [caches[one][index] for one in company]
            if len(company) > 1:
                values = span.forward_stacked(values, own, places)
            else:
                values = [span.forward(values[0], cache=own[0])]
        for row, value in zip(company, values, strict=True):
            outputs[row].append(value)
    return [torch.cat(one, 1) for one in outputs]


def _alone(spans: list[Span], hidden: Tensor) -> Tensor:
    """One sequence [T, H], by itself."""
    output = hidden[None]
    for span in spans:
        output = span.forward(output)
    return output[0]


def _same_packed_steps(spans: list[Span], hidden: list[Tensor]) -> bool:
    """All but the last four tokens of each at once, then two together, then one, then the other."""
    pools = [PagePool(8, dtype=torch.float32, device=span.device) for span in spans]
    rows = [[CachedSequence(pool) for _ in hidden] for pool in pools]
    outputs: list[list[Tensor]] = [[] for _ in hidden]
    with torch.inference_mode():
        expected = [_alone(spans, one) for one in hidden]
        for cut in (slice(None, -4), slice(-4, -2), slice(-2, -1), slice(-1, None)):
            parts = [one[cut] for one in hidden]
            starts = [row.length for row in rows[0]]
            value = torch.cat(parts)
            for span, pool, own in zip(spans, pools, rows, strict=True):
                batch = PackedBatch(segments_of([len(part) for part in parts], own), pool)
                value = span.forward_packed(value, batch, positions=_places(starts, parts))
            for kept, output in zip(outputs, torch.split(value, [len(part) for part in parts]), strict=True):
                kept.append(output)
    return all(close(torch.cat(kept), one) for kept, one in zip(outputs, expected, strict=True))


def _same_packed_gradients(spans: list[Span], hidden: list[Tensor]) -> bool:
    lengths = [len(one) for one in hidden]
    weight = torch.randn(sum(lengths), spans[-1].width_behind).to(spans[-1].device)
    alone = [one.detach().requires_grad_() for one in hidden]
    value = torch.cat([_alone(spans, one) for one in alone])
    expected = torch.autograd.grad((value * weight).sum(), alone)
    inputs = torch.cat(hidden).requires_grad_()
    output = inputs
    for span in spans:
        batch = PackedBatch(segments_of(lengths))
        output = span.forward_packed(output, batch, positions=_places([0] * len(hidden), hidden))
    (gradient,) = torch.autograd.grad((output * weight).sum(), [inputs])
    return close(output, value) and close(gradient, torch.cat(expected))


def _places(starts: list[int], parts: list[Tensor]) -> Tensor:
    ranges = [torch.arange(start, start + len(part)) for start, part in zip(starts, parts, strict=True)]
    return torch.cat(ranges).to(parts[0].device)
