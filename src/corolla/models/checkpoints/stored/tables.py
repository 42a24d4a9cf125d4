"""Weights as bitsandbytes stores them: places in a table of 16 numbers (nf4, fp4), or 8-bit integers by rows.

Published definition: QLoRA (Dettmers et al. 2023), section 3: blocks of consecutive numbers share their largest
absolute value; with double quantization these are themselves 8-bit places in a table of 256, in blocks of their own,
less a mean. LLM.int8() (Dettmers et al. 2022): rows share their largest absolute value, which is 127.

Invariant: as in `scaled.py`; the arithmetic is float32, rounded once.
"""

from __future__ import annotations

from math import prod
from typing import Any

import torch
from torch import Tensor

from corolla.json_files import JsonError, parse_object
from corolla.models.checkpoints.stored.recipe import Entries, Layout, Parts, Unfit
from corolla.models.checkpoints.stored.scaled import PIECE, ROWS, Shape, scaled

LARGEST = 127.0


def four_bits(kind: str) -> Layout:
    """`weight` uint8 [n / 2, 1], two places a byte, the high half first; `kind` is nf4 or fp4."""

    def shape(entries: Entries) -> Shape:
        if entries["map"].shape != (16,):
            raise Unfit(f"has a table of {list(entries['map'].shape)} numbers, which is not {kind}")
        return (entries["weight"].size * 2,)  # how long its rows are stands in its state

    def widen(parts: Parts, dtype: torch.dtype) -> Tensor:
        state = _state(parts["state"])
        size, block = prod(state["shape"]), state["blocksize"]
        stored = parts["weight"].contiguous().view(torch.uint8).flatten()
        largest = _largest(parts, state)
        if len(stored) * 2 - size not in (0, 1) or len(largest) != -(-size // block):
            raise Unfit(
                f"has {len(stored)} bytes and {len(largest)} scales for shape {state['shape']} in blocks of {block}"
            )
        table = parts["map"].float()
        pairs = torch.stack([table.repeat_interleave(16), table.repeat(16)], dim=-1)
        result = torch.empty(size, dtype=dtype)
        step = PIECE // block * block
        for first in range(0, size, step):
            last = min(first + step, size)
            numbers = pairs[stored[first // 2 : -(-last // 2)].int()].flatten()[: last - first]
            own = largest[first // block : -(-last // block)].repeat_interleave(block)[: last - first]
            result[first:last] = numbers * own
        return result.view(state["shape"])

    names = {
        "state": f".weight.quant_state.bitsandbytes__{kind}",
        "weight": ".weight",
        "absmax": ".weight.absmax",
        "map": ".weight.quant_map",
        "outer": ".weight.nested_absmax",
        "outer_map": ".weight.nested_quant_map",
    }
    return Layout(names, "state", ".weight", shape, widen, optional=frozenset({"outer", "outer_map"}))


def _state(stored: Tensor) -> dict[str, Any]:
    """What bitsandbytes notes of a weight as JSON. Raises `Unfit`."""
    try:
        state = parse_object(bytes(stored.contiguous().view(torch.uint8).tolist()))
        shape = [int(one) for one in state["shape"]]
        block, outer = int(state["blocksize"]), int(state.get("nested_blocksize", 0))
        offset = float(state.get("nested_offset", 0.0))
    except (JsonError, KeyError, TypeError, ValueError) as error:
        raise Unfit("has a quant_state that cannot be read") from error
    if not (2 <= block <= PIECE and block % 2 == 0 and all(one > 0 for one in shape) and outer >= 0):
        raise Unfit(f"has a quant_state of shape {shape} in blocks of {block}")
    return {"shape": shape, "blocksize": block, "outer": outer, "offset": offset}


def _largest(parts: Parts, state: dict[str, Any]) -> Tensor:
    """Each block's largest absolute value, float32. Raises `Unfit`."""
    stored = parts["absmax"].flatten()
    if stored.is_floating_point():
        return stored.float()
    if "outer" not in parts or "outer_map" not in parts or state["outer"] < 1:
        raise Unfit("has scales of 8 bits without what they are places in")
    outer, table = parts["outer"].flatten().float(), parts["outer_map"].flatten().float()
    if len(table) != 256 or len(outer) != -(-len(stored) // state["outer"]):
        raise Unfit(f"has {len(stored)} scales of 8 bits in {len(outer)} blocks of {state['outer']}")
    own = outer.repeat_interleave(state["outer"])[: len(stored)]
    return table[stored.int()] * own + float(state["offset"])


def eight_bits() -> Layout:
    """`weight` int8 [out, in] with `SCB` [out], each row's largest absolute value."""

    def shape(entries: Entries) -> Shape:
        own, largest = entries["weight"], entries["largest"]
        if own.dtype != "I8" or len(own.shape) != 2 or largest.shape != own.shape[:1]:
            raise Unfit(
                f"is stored as {own.dtype} {list(own.shape)} with scales {list(largest.shape)}, which do not fit"
            )
        return own.shape

    def widen(parts: Parts, dtype: torch.dtype) -> Tensor:
        form = parts.get("form")
        if form is not None and int(form.flatten()[0]) != 0:
            raise Unfit("is stored in a form of some graphics cards, not by rows")
        return scaled(parts["weight"], parts["largest"].float() / LARGEST, dtype, [ROWS])

    names = {"largest": ".SCB", "weight": ".weight", "form": ".weight_format"}
    return Layout(names, "largest", ".weight", shape, widen, optional=frozenset({"form"}))
