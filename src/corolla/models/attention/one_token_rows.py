"""Attention by a kernel, in one call: of sequences that have been given one token each, or of one with several.

Invariant: what the kernels compute is what `one_sequence.attend_one` does, for the same rules.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from corolla.models.attention.pages import PAGE, BlockTable, pages_for
from corolla.models.kernels.native import kernels, library, pointer

LANES = 16  # heads are a multiple of this wide where a kernel reads them
THREADED = 2**13  # weights (tokens times heads) from which threads are worth their waking


@dataclass(frozen=True)
class Rules:
    """How one block's scores become weights, beyond the plain softmax(scale · q·k)."""

    scale: float | None = None
    window: int | None = None  # a token sees this many newest ones, itself included
    softcap: float | None = None
    sinks: Tensor | None = None  # [heads], a score of each head that takes weight and gives nothing
    slopes: Tensor | None = None  # [heads], alibi


class OneTokenRows:
    """Rows that have been given one token each, as the kernel reads them; prepared once for all blocks of a pass."""

    def __init__(self, rows: Sequence[BlockTable]) -> None:
        """`rows` already count their new token."""
        used = [pages_for(row.length) for row in rows]
        self._most = max(used)
        table = [
            row.pages[:count] + [0] * (self._most - count) for row, count in zip(rows, used, strict=True)
        ]
        self._pages = torch.tensor(table, dtype=torch.int32)
        self._lengths = torch.tensor([row.length for row in rows])
        self._count = len(rows)
        self._total = sum(row.length for row in rows)
        # Scores of one head, with space behind the longest row's.
        self.room = -(-max(row.length for row in rows) // LANES) * LANES

    def described(self) -> tuple[int | None, ...]:
        """Pages and lengths, pages of a row in the table, a head's room and the sum: see `run_program`."""
        return (self._pages.data_ptr(), self._lengths.data_ptr(), self._most, self.room, self._total)

    def attend(
        self,
        query: Tensor,
        cache: tuple[Tensor, Tensor],
        rules: Rules,
        new: tuple[Tensor, Tensor] | None,
        beside: Tensor | None = None,
    ) -> Tensor:
        """[1, R, heads, V] for `query` [1, heads, R, D] over a block's `cache`, [slots, kv_heads, D] and [.., .., V].

        `new` are the tokens' keys and values [1, kv_heads, R, D or V] if they have yet to be put into the cache. Of
        keys, the last numbers may lie `beside` the others, [slots, kv_heads, E], where D counts both.
        """
        heads, kv_heads, width = query.shape[1], cache[0].shape[1], cache[1].shape[-1]
        dim, extra = cache[0].shape[-1], 0 if beside is None else beside.shape[-1]
        threads = torch.get_num_threads() if self._total * heads >= THREADED else 1
        scores = torch.empty(threads, heads // kv_heads, self.room, dtype=torch.float32)
        result = torch.empty(1, self._count, heads, width, dtype=torch.float32)
        tokens = [_strided(one) for one in (query, *(new or ()))]
        numbers, sinks, slopes = kernel_rules(rules, dim + extra)
        kernels().attend_rows(
            *(argument for one in tokens for argument in (pointer(one), one.stride(1), one.stride(2))),
            *(None, 0, 0) * (4 - len(tokens)),
            *(pointer(one) for one in (*cache, beside, self._pages, self._lengths)),
            *(self._count, heads, kv_heads, dim, width, extra, PAGE, self._most),
            *(*numbers, pointer(sinks), pointer(slopes)),
            *(pointer(scores), self.room, pointer(result), threads),
        )
        return result


def attend_stretch(
    query: Tensor, cache: tuple[Tensor, Tensor], pages: Tensor, past: int, rules: Rules
) -> Tensor:
    """[1, T, heads, V] for `query` [1, heads, T, D], the last tokens of a sequence on `pages`, int32, behind `past`
    others, all in a block's `cache` [slots, kv_heads, D] and [.., .., V]."""
    heads, count, dim, width = query.shape[1], query.shape[2], query.shape[3], cache[1].shape[-1]
    result = torch.empty(1, count, heads, width, dtype=torch.float32)
    query = _strided(query)
    numbers, sinks, slopes = kernel_rules(rules, dim)
    kernels().attend_stretch(
        *(pointer(query), query.stride(1), query.stride(2)),
        *(pointer(one) for one in (*cache, pages)),
        *(past, count, heads, cache[0].shape[1], dim, width, PAGE),
        *(*numbers, pointer(sinks), pointer(slopes), pointer(result), torch.get_num_threads()),
    )
    return result


def kernel_rules(rules: Rules, dim: int) -> tuple[tuple[float, float, int], Tensor | None, Tensor | None]:
    """Rules for heads `dim` wide as the kernels take them: scale, softcap and window, 0 for none; sinks and slopes."""
    scale = dim**-0.5 if rules.scale is None else rules.scale
    return (scale, rules.softcap or 0.0, rules.window or 0), _plain(rules.sinks), _plain(rules.slopes)


def can_attend(query: Tensor, cache: tuple[Tensor, Tensor]) -> bool:
    """Whether the kernel computes attention of this kind here."""
    same = query.dtype == cache[0].dtype
    return same and kernel_attends(query.dtype, query.device, *(one.shape[-1] for one in cache))


def kernel_attends(dtype: torch.dtype, device: torch.device, *widths: int) -> bool:
    """The same of heads whose keys and values are `widths` wide."""
    plain = dtype == torch.float32 and device.type == "cpu"
    return plain and not any(width % LANES for width in widths) and library() is not None


def _strided(tokens: Tensor) -> Tensor:
    return tokens if tokens.stride(3) == 1 else tokens.contiguous()


def _plain(values: Tensor | None) -> Tensor | None:
    return None if values is None else values.detach().float().contiguous()
