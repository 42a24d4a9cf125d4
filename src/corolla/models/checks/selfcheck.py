"""Proof, before a family is served, that its blocks can be split: a miniature is, and compared.

Invariant: a family that passes gave, in this process and with these libraries, the whole model's hidden
states from chained spans (on a CPU bit for bit, elsewhere within rounding), its cached steps and gradients within
rounding, and with a client's shell around the spans its logits. A naive split is *silently* wrong for several
families, so nothing is served on trust. A client proves all of its own half by itself
(`client/model/startcheck.py`), with its own libraries.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel

from corolla.errors import UnsupportedFamily
from corolla.models.cache import BlocksCall, cache_argument, take_cache
from corolla.models.checkpoints.identity import canonical_config
from corolla.models.checks.forms import (
    refuse_states_in_blocks,
    refuse_what_is_left_out,
    refusing,
    values_returned,
)
from corolla.models.checks.miniature import EDGE, close, miniature
from corolla.models.checks.padding import BEFORE, BEHIND, has_states, known_in_front, same_without
from corolla.models.checks.splitting import CPU, chain, split_miniature, watched
from corolla.models.checks.together import can_pack, can_stack
from corolla.models.families import (
    blocks_prefix,
    refuse_encoder_and_decoder,
    refuse_what_cannot_be_built,
    structure,
)
from corolla.models.shell import BaseModelHooks, BlocksLayer, replace_blocks
from corolla.models.span import Span

# A sequence that is cached ends where rotary embeddings begin to change, one that is run whole goes beyond.
ROWS, CACHED, TOKENS, PROMPT = 2, EDGE, EDGE + 3, 3
PIECES = ((0, CACHED - 3), (CACHED - 3, CACHED - 2), (CACHED - 2, CACHED))  # in which cached tokens come


# Differences that are none between the whole and its parts, but between calls of the whole.
PADDING, EQUALS = "padding", "equals"
OF_THEIR_OWN = {
    PADDING: "with this config padding changes what transformers itself computes of a row, and servers are sent none",
    EQUALS: "with this config their blocks choose among tokens with equal scores, and which ones transformers itself "
    "chooses depends on how many others are computed with them",
}


@dataclass(frozen=True)
class Together:
    """Which requests of a family may share a pass."""

    packable: bool  # all, packed
    stackable: bool  # steps of one token, stacked


_passed: dict[tuple[bytes, torch.device], Together] = {}


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
        if not same_without(whole, spans, BEHIND):  # which no token before it knows of
            return EQUALS
        front = known_in_front(whole.config)
        if front and not has_states(whole.config) and not same_without(whole, spans, BEFORE):
            return PADDING
        if not _same_cached_steps(copy.deepcopy(whole), spans, ids, left_padded):
            return "in cached steps" if front else PADDING
        for mask in (None, left_padded[:, :CACHED]):
            if not _same_at_a_client(whole, spans, ids[:, :CACHED], mask):
                return "at a client"
    same = _same_gradients(copy.deepcopy(whole), spans, ids, left_padded)
    return None if same else "in gradients"


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
    found, wanted = chain(spans, seen.entered[0], mask=mask)[real], seen.left[0][real]
    # Elsewhere than on a CPU sums may be added up in another order each time.
    return torch.equal(found, wanted) if found.device.type == "cpu" else close(found, wanted)


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
    return has_states(whole.config) and close(left[real], _own_steps(whole, spans, ids, mask)[real])


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
        return chain(spans, hidden, mask=call.mask, positions=call.positions)

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
    (gradient,) = torch.autograd.grad((chain(spans, hidden, mask=mask) * weight).sum(), [hidden])
    real = mask.bool()
    return close(gradient[real], expected[real])
