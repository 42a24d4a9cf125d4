"""Weights stored as whole numbers of a few bits, packed into 32-bit words: GPTQ, AWQ, compressed-tensors.

Published definitions: the formats of AutoGPTQ and AutoAWQ, and compressed-tensors' `pack-quantized`. All are
(number - zero) · scale with a zero and a scale for each group of inputs; they differ in what is packed along which
side, in the order within a word, and in how zeros are noted.

Invariant: as in `scaled.py`; the arithmetic is float32, rounded once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from corolla.models.checkpoints.stored.recipe import Entries, Layout, Parts, Unfit
from corolla.models.checkpoints.stored.scaled import MICROSCALED, PIECE, Blocks, Shape, block_of

WORD = 32
GPTQ_BITS = (2, 3, 4, 8)
AWQ_BITS = 4
AWQ_ORDER = (0, 4, 1, 5, 2, 6, 3, 7)  # where in a word output 0, 1, … of eight stand


def unpacked(words: Tensor, bits: int, count: int) -> Tensor:
    """The `count` numbers that words int32 [..., W] hold one after the other from the lowest bit on, int32.

    A number may go on in the next word.
    """
    mask = (1 << bits) - 1
    if WORD % bits == 0:
        shifts = torch.arange(0, WORD, bits, dtype=torch.int32)
        return ((words.unsqueeze(-1) >> shifts) & mask).flatten(-2)[..., :count]
    begins = torch.arange(count) * bits
    word, at = begins // WORD, begins % WORD
    wide = words.long() & 0xFFFFFFFF
    following = wide[..., (word + 1).clamp(max=words.shape[-1] - 1)] << (WORD - at)
    return (((wide[..., word] >> at) | following) & mask).int()


def _is_words(entries: Entries, *roles: str) -> bool:
    return all(entries[role].dtype == "I32" and len(entries[role].shape) == 2 for role in roles)


def _groups_of(inputs: int, groups: int, size: int) -> Tensor:
    """The group of each input, int64 [inputs]. Raises `Unfit`."""
    if groups == 1:
        return torch.zeros(inputs, dtype=torch.int64)
    if size <= 0 or -(-inputs // size) != groups:
        if groups == 0 or inputs % groups:
            raise Unfit(f"has {inputs} inputs, which {groups} groups do not share evenly")
        size = inputs // groups
    return torch.arange(inputs) // size


# --- GPTQ -----------------------------------------------------------------------------------------------


def gptq(bits: int, group_size: int, *, zeros_less_one: bool) -> Layout:
    """qweight [in · bits / 32, out], qzeros [groups, out · bits / 32], scales [groups, out], g_idx [in].

    `bits` are those of most layers; some may have others. `zeros_less_one`: zeros are stored less one, as the first
    version of the format has it.
    """

    def sizes(words: Shape, zeros: Shape, scales: Shape, places: Shape | None) -> tuple[int, int, int]:
        """Bits, inputs and outputs."""
        outputs = words[1]
        for one in (bits, *GPTQ_BITS):
            inputs = words[0] * WORD // one if places is None else places[0]
            fits = -(-inputs * one // WORD) == words[0] and -(-outputs * one // WORD) == zeros[1]
            if fits and scales == (zeros[0], outputs):
                return one, inputs, outputs
        groups = "" if places is None else f" and groups (g_idx) for {list(places)} inputs"
        raise Unfit(
            f"has words {list(words)}, zeros {list(zeros)}, scales {list(scales)}{groups}, which do not fit together"
        )

    def shape(entries: Entries) -> Shape:
        if not _is_words(entries, "words", "zeros"):
            raise Unfit("is not stored in 32-bit words, as GPTQ has it")
        shapes = {role: entry.shape for role, entry in entries.items()}
        _, inputs, outputs = sizes(shapes["words"], shapes["zeros"], shapes["scales"], shapes.get("places"))
        return outputs, inputs

    def widen(parts: Parts, dtype: torch.dtype) -> Tensor:
        words, scales = parts["words"], parts["scales"].float()
        shapes = {role: tuple(part.shape) for role, part in parts.items()}
        own, inputs, outputs = sizes(shapes["words"], shapes["zeros"], shapes["scales"], shapes.get("places"))
        groups = _named_groups(parts.get("places"), inputs, len(scales), group_size)
        zeros = unpacked(parts["zeros"], own, outputs)
        if zeros_less_one:
            zeros = (zeros + 1) & ((1 << own) - 1)
        result = torch.empty(outputs, inputs, dtype=dtype)
        step = max(1, PIECE // inputs)
        for first in range(0, outputs, step):
            piece = slice(first, first + step)
            numbers = unpacked(words[:, piece].t().contiguous(), own, inputs)
            shifted = numbers - zeros[:, piece].t()[:, groups]
            result[piece] = shifted * scales[:, piece].t()[:, groups]
        return result

    names = {"words": ".qweight", "zeros": ".qzeros", "scales": ".scales", "places": ".g_idx"}
    return Layout(names, "words", ".weight", shape, widen, optional=frozenset({"places"}))


def _named_groups(places: Tensor | None, inputs: int, groups: int, size: int) -> Tensor:
    if places is None:
        return _groups_of(inputs, groups, size)
    named = places.long()
    if len(named) and not 0 <= int(named.min()) <= int(named.max()) < groups:
        raise Unfit(f"names group {int(named.max())} in g_idx, and there are {groups}")
    return named


# --- AWQ ------------------------------------------------------------------------------------------------


def awq(group_size: int) -> Layout:
    """qweight [in, out / 8], qzeros [groups, out / 8], scales [groups, out], in the order of AutoAWQ's GEMM."""

    def check(words: Shape, zeros: Shape, scales: Shape) -> None:
        if zeros[1] != words[1] or scales != (zeros[0], words[1] * WORD // AWQ_BITS):
            raise Unfit(
                f"has words {list(words)}, zeros {list(zeros)} and scales {list(scales)}, which do not fit together"
            )

    def shape(entries: Entries) -> Shape:
        if not _is_words(entries, "words", "zeros"):
            raise Unfit("is not stored in 32-bit words, as AWQ has it")
        words, zeros, scales = (entries[role].shape for role in ("words", "zeros", "scales"))
        check(words, zeros, scales)
        return scales[1], words[0]

    def widen(parts: Parts, dtype: torch.dtype) -> Tensor:
        words, scales = parts["words"], parts["scales"].float()
        check(tuple(words.shape), tuple(parts["zeros"].shape), tuple(scales.shape))
        inputs, outputs = len(words), scales.shape[1]
        groups = _groups_of(inputs, len(scales), group_size)
        zeros = _in_order(unpacked(parts["zeros"], AWQ_BITS, outputs))
        result = torch.empty(outputs, inputs, dtype=dtype)
        step = max(1, PIECE // outputs)
        for first in range(0, inputs, step):
            numbers = _in_order(unpacked(words[first : first + step], AWQ_BITS, outputs))
            own = groups[first : first + step]
            result[:, first : first + step] = ((numbers - zeros[own]) * scales[own]).t()
        return result

    return Layout(
        {"words": ".qweight", "zeros": ".qzeros", "scales": ".scales"}, "words", ".weight", shape, widen
    )


def _in_order(numbers: Tensor) -> Tensor:
    return numbers.reshape(len(numbers), -1, len(AWQ_ORDER))[..., list(AWQ_ORDER)].flatten(-2)


# --- compressed-tensors ---------------------------------------------------------------------------------


def packed(bits: Sequence[int], blocks: Blocks, fp4: Callable[[Parts, torch.dtype], Tensor]) -> Layout:
    """weight_packed int32 [out, words], weight_scale [out, groups], zeros packed along the outputs.

    Numbers are stored with 2^(bits-1) added. `bits` are those that the config names; bytes in the words' place are
    pairs of 4-bit floats, which `fp4` widens.
    """

    def width(words: int, inputs: int | None) -> tuple[int, bool, int]:
        """Bits, whether numbers go on in the next word, and the inputs."""
        for one in bits:
            known = words * WORD // one if inputs is None else inputs
            if -(-known * one // WORD) == words:
                return one, True, known
            if -(-known // (WORD // one)) == words:
                return one, False, known
        raise Unfit(f"has {words} words for {inputs} inputs, which do not fit {_listed(bits)} bits")

    def shape(entries: Entries) -> Shape:
        own = entries["words"]
        if len(own.shape) != 2 or own.dtype not in ("I32", "U8"):
            raise Unfit(f"is packed as {own.dtype} {list(own.shape)}, which Corolla does not know")
        if own.dtype == "U8":
            wide = (own.shape[0], own.shape[1] * 2)
            if entries["scale"].dtype not in ("U8", "F8_E8M0"):
                raise Unfit("holds 4-bit floats without their weight_global_scale")
            block_of(wide, entries["scale"].shape, [MICROSCALED])
            return wide
        return own.shape[0], width(own.shape[1], None)[2]

    def widen(parts: Parts, dtype: torch.dtype) -> Tensor:
        words, scales = parts["words"], parts["scale"].float()
        if words.dtype == torch.uint8:
            return fp4(parts, dtype)
        noted = parts["shape"].tolist() if "shape" in parts else []
        outputs = len(words)
        if noted and noted[0] != outputs:
            raise Unfit(f"has {outputs} rows of words, and its weight_shape says {noted[0]}")
        one, dense, inputs = width(words.shape[1], int(noted[1]) if len(noted) == 2 else None)
        high, wide = block_of((outputs, inputs), tuple(scales.shape), blocks)
        columns = torch.arange(inputs) // wide
        if "places" in parts:
            columns = _named_groups(parts["places"], inputs, scales.shape[-1], wide)
        scales = scales.reshape(-1, -(-inputs // wide))
        zeros = _zeros(parts.get("zeros"), one, dense, tuple(scales.shape))
        result = torch.empty(outputs, inputs, dtype=dtype)
        step = max(1, PIECE // inputs)
        for first in range(0, outputs, step):
            numbers = _plain(words[first : first + step], one, dense, inputs) - (1 << one - 1)
            rows = torch.arange(first, first + len(numbers)) // high
            if zeros is not None:
                numbers = numbers - zeros[rows][:, columns]
            result[first : first + step] = numbers * scales[rows][:, columns]
        return result

    names = {
        "words": ".weight_packed",
        "scale": ".weight_scale",
        "shape": ".weight_shape",
        "zeros": ".weight_zero_point",
        "places": ".weight_g_idx",
    }
    return Layout(names, "words", ".weight", shape, widen, optional=frozenset({"shape", "zeros", "places"}))


def _plain(words: Tensor, bits: int, dense: bool, count: int) -> Tensor:
    if dense:
        return unpacked(words, bits, count)
    shifts = torch.arange(0, WORD // bits * bits, bits, dtype=torch.int32)
    return ((words.unsqueeze(-1) >> shifts) & ((1 << bits) - 1)).flatten(-2)[..., :count]


def _zeros(stored: Tensor | None, bits: int, dense: bool, scales: Shape) -> Tensor | None:
    """Zeros [rows of scales, groups], which are packed along the rows, or as they are."""
    if stored is None:
        return None
    if stored.dtype != torch.int32 or tuple(stored.shape) == scales:
        if stored.numel() != scales[0] * scales[1]:
            raise Unfit(f"has zeros of shape {list(stored.shape)} and scales of shape {list(scales)}")
        return stored.int().reshape(scales)
    if stored.ndim != 2 or stored.shape[1] != scales[1] or stored.shape[0] * WORD < scales[0] * bits:
        raise Unfit(f"has packed zeros of shape {list(stored.shape)} and scales of shape {list(scales)}")
    return _plain(stored.t().contiguous(), bits, dense, scales[0]).t() - (1 << bits - 1)


def _listed(numbers: Sequence[int]) -> str:
    return " or ".join(str(one) for one in numbers)
