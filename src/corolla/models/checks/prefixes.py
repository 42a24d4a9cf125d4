"""Proof, before a prefix is made or loaded for a model, that keys and values can stand for tokens in its family.

Invariant: a family that passes gave, in this process and with these libraries, the same from spans behind a prefix as
the whole model from a cache that holds it, gradients included.
"""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import DynamicCache, PretrainedConfig, PreTrainedModel

from corolla.errors import UnsupportedFamily
from corolla.models.attention.prefixes import KeyValueForm
from corolla.models.cache import cache_argument
from corolla.models.checkpoints.identity import canonical_config
from corolla.models.checks.forms import refusing
from corolla.models.checks.miniature import close, miniature
from corolla.models.checks.splitting import split_miniature, watched
from corolla.models.span import Span

ROWS, TOKENS, PREFIX = 2, 5, 4

_passed: set[bytes] = set()


def check_prefix(config: PretrainedConfig) -> None:
    """Compare a miniature of this config with its spans, a prefix before both; once a process and config.

    Raises `UnsupportedFamily` where blocks keep something else than keys and values of one form, or where the two
    differ.
    """
    key = canonical_config(miniature(config).to_dict())
    if key in _passed:
        return
    with (
        refusing(config, "given a prefix: a miniature of this one could not be"),
        split_miniature(config) as (whole, spans),
    ):
        forms = {span.key_values for span in spans}
        form = forms.pop()
        if forms or form is None:
            raise UnsupportedFamily(
                f"Blocks of {config.model_type} models keep other things than keys and values of one form, so no "
                "prefix can stand for them: use tuning_mode='ptune'."
            )
        if not _same(whole, spans, form):
            raise UnsupportedFamily(
                f"A prefix before the blocks of {config.model_type} models gives something else than it gives a local "
                "model: use tuning_mode='ptune'."
            )
    _passed.add(key)


def _same(whole: PreTrainedModel, spans: list[Span], form: KeyValueForm) -> bool:
    prefix = torch.randn(len(spans[-1].blocks) + spans[-1].start, PREFIX, form.width).requires_grad_()
    ids = torch.randint(3, 64, (ROWS, TOKENS))
    mask = torch.ones(ROWS, TOKENS, dtype=torch.long)
    mask[0, :2] = 0
    cache = DynamicCache(config=whole.config)
    for index, own in enumerate(prefix):
        keys, values = form.split(own)
        cache.update(keys.expand(ROWS, -1, -1, -1), values.expand(ROWS, -1, -1, -1), index)
    with watched(whole, spans[0].cuts) as seen:
        arguments = {cache_argument(whole.forward): cache, "use_cache": True}
        whole(
            input_ids=ids, attention_mask=torch.cat([torch.ones(ROWS, PREFIX).long(), mask], 1), **arguments
        )
    hidden = seen.entered[0].detach()
    for span in spans:
        hidden = span.forward(hidden, mask=mask, prefix=prefix[span.start : span.end])
    real = mask.bool()
    if not close(hidden[real], seen.left[0][real]):
        return False
    weight = torch.randn(hidden[real].shape)
    found, wanted = (_gradient(one[real], weight, prefix) for one in (hidden, seen.left[0]))
    return close(found, wanted)


def _gradient(output: Tensor, weight: Tensor, prefix: Tensor) -> Tensor:
    return torch.autograd.grad((output * weight).sum(), [prefix], retain_graph=True)[0]
