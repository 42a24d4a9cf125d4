"""What padding does to a row in a family's own code: seen in a miniature at work, once a process.

A pass without a cache is sent no padding: its rows are computed as if each were alone. Of blocks with states
(recurrences, convolutions) transformers itself computes another thing with padding, where their projections have
biases; of these, and of attention in chunks, also where it stands between a prompt and a text.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel

from corolla.models.attention.span_cache import keeps_states
from corolla.models.cache import own_cache
from corolla.models.checkpoints.identity import canonical_config
from corolla.models.checks.forms import takes_padding_in_front
from corolla.models.checks.miniature import EDGE, TOLERANCE, close, miniature, random_model, undisturbed
from corolla.models.checks.splitting import chain, split_miniature, watched
from corolla.models.checks.together import can_pack
from corolla.models.families import structure
from corolla.models.span import Span

TOKENS, PADDED = EDGE, 3
ROWS = 64  # many: few scores of an indexer are equal
BY_CHANCE = 1  # of them: where two of a router's scores are as good as equal, rounding decides
COLUMNS = torch.arange(TOKENS)
BEFORE, BEHIND = COLUMNS >= PADDED, COLUMNS < TOKENS - PADDED
BETWEEN = (COLUMNS != 2) & (COLUMNS != 4) & (COLUMNS != 5)  # chunks of whatever length begin elsewhere

_found: dict[tuple[bytes, bool], bool] = {}
_generates: dict[bytes, bool] = {}


def has_states(config: PretrainedConfig) -> bool:
    """Whether any blocks of this config's model keep more than keys and values."""
    return keeps_states(structure(config).holder.forward, config)


def known_in_front(config: PretrainedConfig) -> bool:
    """Whether rows with padding in front are computed: where that changes nothing, or blocks can be told of it."""
    return has_states(config) or takes_padding_in_front(config)


def padding_changes_rows(config: PretrainedConfig, *, before: bool, between: bool) -> bool:
    """Whether padding before all of a row's tokens, or between them, makes transformers compute another thing of it
    than of the row alone. Raises whatever the family's code makes of its miniature.

    Windows of families that can be packed are no reason: `padded_rows.check_windows` knows of these.
    """
    # Of a family without states `selfcheck` serves none that padding in front changes.
    tried = [(BEFORE, before and has_states(config)), (BETWEEN, between)]
    return not all(_changes_nothing(config, real) for real, stands in tried if stands)


def _changes_nothing(config: PretrainedConfig, real: Tensor) -> bool:
    key = canonical_config(miniature(config).to_dict()), bool(real[0])
    if key not in _found:
        with split_miniature(config) as (whole, spans):
            _found[key] = same_without(whole, spans, real) or can_pack(spans)
    return _found[key]


def same_without(whole: PreTrainedModel, spans: list[Span], real: Tensor) -> bool:
    """Whether tokens in the columns `real` (bool [T]) come out of the spans, alone, as of the whole, among padding.

    Tokens are often the same, so that a choice among equals, which may fall otherwise, is noticed.
    """
    device = spans[0].device
    with undisturbed():
        ids = torch.randint(3, 6, (ROWS, TOKENS)).to(device)
    real = real.to(device)
    places = None if bool(real[: int(real.sum())].all()) else real.nonzero().T
    twin = copy.deepcopy(whole)  # it may remember passes
    with torch.no_grad(), watched(twin, spans[0].cuts) as seen:
        twin(input_ids=ids, attention_mask=real.long().expand(ROWS, -1), use_cache=False)
        alone = seen.entered[0][:, real]
        # As a server does: without a mask some code reads positions that leave some out as several sequences.
        every = None if places is None else alone.new_ones(alone.shape[:2], dtype=torch.bool)
        found = chain(spans, alone, mask=every, positions=places)
    wanted = seen.left[0][:, real]
    near = (found - wanted).abs().amax((1, 2)) <= TOLERANCE * (1 + wanted.abs().max())
    return int((~near).sum()) <= BY_CHANCE


def generates_with_padding(config: PretrainedConfig) -> bool:
    """Whether transformers' own `generate` goes on from its cache, with padding in front, as it computes at once.

    A family's own kind of cache may not know how many tokens it holds, which masks are made by.
    """
    if own_cache(structure(config).holder.forward) is None:
        return True
    small = miniature(config)
    key = canonical_config(small.to_dict())
    if key not in _generates:
        with undisturbed(), torch.no_grad():
            _generates[key] = _same_replies(random_model(structure(config).causal_lm, small))
    return _generates[key]


def _same_replies(whole: Any) -> bool:
    whole.generation_config.update(eos_token_id=None, pad_token_id=0)
    ids = torch.randint(3, 64, (2, TOKENS - 2))
    mask = torch.ones(2, TOKENS - 1, dtype=torch.long)
    mask[0, :PADDED] = 0
    said = whole.generate(
        ids,
        attention_mask=mask[:, :-1],
        max_new_tokens=2,
        do_sample=False,
        use_cache=True,
        return_dict_in_generate=True,
        output_logits=True,
    )
    wanted = whole(input_ids=said.sequences[:, :-1], attention_mask=mask, use_cache=False).logits[:, -1]
    return close(said.logits[-1], wanted)
