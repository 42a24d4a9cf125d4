"""Activations and gradients in fewer bytes, for slow lines.

Invariant: what is compressed is a pure function of the values, so a replay gives a server the very same
tensors as the first time. A compressed tensor travels under its own name, with its scales beside it; a
server answers in the form in which it was asked.

Blockwise 8-bit integers as in Dettmers et al. 2022 (arXiv:2110.02861), with a linear code.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn.functional import pad

from corolla.config import WireFormat
from corolla.errors import ProtocolError

COMPRESSED = ("hidden", "grad")  # names of the tensors that are worth it
INT8_BLOCK = 64  # values that share a scale


def scales_of(name: str) -> str:
    """The name of the tensor that holds the scales of `name`."""
    return f"{name}_scales"


def compress(tensors: Mapping[str, Tensor], form: WireFormat) -> dict[str, Tensor]:
    """The same tensors with `COMPRESSED` ones [R, T, H] in `form`, and their scales float32 [R, T, B] beside them."""
    sent = dict(tensors)
    if form == "compute":
        return sent
    for name in COMPRESSED:
        if name in sent:
            sent[name], sent[scales_of(name)] = _squeezed(sent[name], form)
    return sent


def expand(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], WireFormat]:
    """The tensors as they were before, float32 where they were compressed; and the form that they came in.

    Raises `ProtocolError` for scales that do not fit their tensor.
    """
    found = dict(tensors)
    form: WireFormat = "compute"
    for name in COMPRESSED:
        scales = found.pop(scales_of(name), None)
        if scales is None:
            if name in found and found[name].dtype == torch.int8:
                raise ProtocolError(f"The tensor {name!r} is int8 and has no scales.", field=name)
            continue
        form = "int8" if found[name].dtype == torch.int8 else "float16"
        found[name] = _restored(name, found[name], scales)
    return found, form


def _squeezed(values: Tensor, form: WireFormat) -> tuple[Tensor, Tensor]:
    size = int(values.shape[-1])
    block = size if form == "float16" else INT8_BLOCK
    blocks = _in_blocks(values.float(), -(-size // block))
    # Infinite values stay infinite, and NaN stays NaN, through the scale.
    scales = blocks.abs().amax(-1)
    unit = blocks / scales.clamp(min=torch.finfo(torch.float32).tiny).unsqueeze(-1)
    if form == "float16":
        return unit.half().flatten(-2)[..., :size].contiguous(), scales
    levels = (unit * 127).round().nan_to_num(0.0).clamp(-127, 127)
    return levels.to(torch.int8).flatten(-2)[..., :size].contiguous(), scales


def _restored(name: str, values: Tensor, scales: Tensor) -> Tensor:
    size, count = int(values.shape[-1]), int(scales.shape[-1])
    if count not in (1, -(-size // INT8_BLOCK)) or values.dtype not in (torch.int8, torch.float16):
        raise ProtocolError(f"{count} scales a token do not fit {name!r}.", field=scales_of(name))
    unit = _in_blocks(values.float(), count)
    if values.dtype == torch.int8:
        unit.div_(127)
    # In place: the values are large, and a peer chose how large.
    return unit.mul_(scales.unsqueeze(-1)).flatten(-2)[..., :size].contiguous()


def _in_blocks(values: Tensor, count: int) -> Tensor:
    """[R, T, H] as [R, T, count, ceil(H / count)] (blocks of 64 for int8), filled up with zeros."""
    size = int(values.shape[-1])
    block = size if count == 1 else INT8_BLOCK
    return pad(values, (0, count * block - size)).reshape(*values.shape[:-1], count, block)
