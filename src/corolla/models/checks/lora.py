"""Proof, before an adapter is made or loaded for a model, that its family's layers can be changed beside weights.

Invariant: a family that passes gave, in this process and with these libraries, the same from spans with an adapter as
the whole model with the products added to its weights, gradients included; beside strangers, too, where it is packed.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.func import functional_call
from transformers import PretrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from corolla.errors import UnsupportedFamily
from corolla.models.attention.packing import PackedBatch, segments_of
from corolla.models.checkpoints.identity import canonical_config
from corolla.models.checks.forms import refusing
from corolla.models.checks.miniature import close, miniature
from corolla.models.checks.selfcheck import check_family
from corolla.models.checks.splitting import split_miniature, watched
from corolla.models.families import blocks_prefix
from corolla.models.lora import Adapter, AdapterRows, pieces, places, width
from corolla.models.prompts import as_tensor
from corolla.models.span import Span

ROWS, TOKENS, RANK = 2, 6, 3

_passed: dict[tuple[bytes, tuple[str, ...] | None], tuple[str, ...]] = {}


def check_adapter(config: PretrainedConfig, targets: tuple[str, ...] | None) -> tuple[str, ...]:
    """Compare a miniature of this config with its spans, adapters of these layers in both; once a process.

    Names without the modules around them stand for all that end so, as in peft; None for all layers that can have an
    adapter. Returns the layers' whole names. Raises `UnsupportedFamily` for layers that are not given each token once,
    or where the two differ.
    """
    key = canonical_config(miniature(config).to_dict()), targets
    if key in _passed:
        return _passed[key]
    packable = check_family(config)
    with (
        refusing(config, "given an adapter: a miniature of this one could not be"),
        split_miniature(config) as (whole, spans),
    ):
        for span in spans:
            span.packable = packable
        here = {name for span in spans for layers in span.linear_layers for name in layers}
        wanted = sorted(here) if targets is None else targets
        named = {one: [name for name in here if f".{name}".endswith(f".{one}")] for one in wanted}
        lacking = next((one for one, found in named.items() if not found), None)
        if lacking is not None or not named:
            what = (
                f"{lacking or 'Nothing'} is none of the linear layers"
                if here
                else "There are no linear layers, outside of lists,"
            )
            raise UnsupportedFamily(
                f"{what} in blocks of {config.model_type} models that see each token once, and only those can have an "
                f"adapter: {', '.join(sorted(here)) or 'use ptune'}."
            )
        names = tuple(sorted({name for found in named.values() for name in found}))
        _check_same(config, whole, spans, names)
    _passed[key] = names
    return names


def _check_same(
    config: PretrainedConfig, whole: PreTrainedModel, spans: list[Span], names: tuple[str, ...]
) -> None:
    values = torch.randn(spans[-1].end, RANK, max(width(one.linear_layers, names) for one in spans)) / 5
    if not _same(whole, spans, values.requires_grad_(), names) or (
        spans[0].packable and not all(_same_beside_strangers(one, values.detach(), names) for one in spans)
    ):
        raise UnsupportedFamily(
            f"An adapter in blocks of {config.model_type} models gives something else than it gives in a local model: "
            "use tuning_mode='ptune'."
        )


def _same(whole: PreTrainedModel, spans: list[Span], values: Tensor, targets: tuple[str, ...]) -> bool:
    ids = torch.randint(3, 64, (ROWS, TOKENS))
    mask = torch.ones(ROWS, TOKENS, dtype=torch.long)
    mask[0, :2] = 0
    with watched(whole, spans[0].cuts) as seen:
        changed = _changed_weights(whole, spans, values, targets)
        functional_call(whole, changed, (), {"input_ids": ids, "attention_mask": mask, "use_cache": False})
    hidden, names = seen.entered[0].detach(), as_tensor(targets)
    for span in spans:
        hidden = span.forward(hidden, mask=mask, lora=values[span.start : span.end], targets=names)
    real = mask.bool()
    weight = torch.randn(hidden[real].shape)
    found, wanted = (
        torch.autograd.grad((one[real] * weight).sum(), [values])[0] for one in (hidden, seen.left[0])
    )
    return close(hidden[real], seen.left[0][real]) and close(found, wanted)


def _changed_weights(
    whole: PreTrainedModel, spans: list[Span], values: Tensor, targets: tuple[str, ...]
) -> dict[str, Tensor]:
    found = {}
    blocks = [(span.start + at, own) for span in spans for at, own in enumerate(span.linear_layers)]
    for index, layers in blocks:
        for name, down, up in pieces(values[index], places(layers, targets)):
            path = f"{blocks_prefix(whole.config)}.{index}.{name}"
            layer = whole.get_submodule(path)
            product = down.t() @ up  # [in, out]
            weight = layer.weight
            assert isinstance(weight, Tensor)
            found[f"{path}.weight"] = weight + (product if isinstance(layer, Conv1D) else product.t())
    return found


def _same_beside_strangers(span: Span, values: Tensor, targets: tuple[str, ...]) -> bool:
    """Sequences with an adapter, without one and with another, in one pass, as each of them alone."""
    own = values[span.start : span.end]
    adapters = [Adapter(own, targets), None, Adapter(own.flip(1) * 2, targets), Adapter(own, targets)]
    hidden = [torch.randn(length, span.width) for length in (3, 2, 4, 1)]
    segments = segments_of([len(one) for one in hidden])
    with torch.inference_mode():
        alone = [_alone(span, one, adapter) for one, adapter in zip(hidden, adapters, strict=True)]
        parts = [
            (adapter, [range(one.begin, one.end)])
            for adapter, one in zip(adapters, segments, strict=True)
            if adapter is not None
        ]
        total = sum(len(one) for one in hidden)
        together = span.forward_packed(
            torch.cat(hidden),
            PackedBatch(segments),
            positions=torch.cat([torch.arange(len(one)) for one in hidden]),
            adapters=AdapterRows(parts, total),
        )
    return close(together, torch.cat(alone))


def _alone(span: Span, hidden: Tensor, adapter: Adapter | None) -> Tensor:
    if adapter is None:
        return span.forward(hidden[None])[0]
    return span.forward(hidden[None], lora=adapter.values, targets=as_tensor(adapter.targets))[0]
