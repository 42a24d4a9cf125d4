"""Cuts what is computed alone into pieces of bounded time, between which others' steps are computed.

Operators are the pieces. While others come in between, the longest ones (products over many rows, attention of many
tokens) are cut once more, where each row of a result is of its own rows alone. Nobody pays for that who is alone.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

PIECE_SECONDS = 0.01  # what is computed alone goes on for so long before it gives way again
LEAST_SHARE = 0.5  # of what comes between, that what it interrupts is given before it is interrupted again
LATELY = 1.0  # seconds since others came in between, for which operators are cut
ROWS = 512  # that a product takes at once then
SCORES = 2**18  # that attention computes at once then, of each head
FEWEST_QUERIES = 32


def _joined(parts: list[Tensor]) -> Tensor:
    return torch.cat(parts, dim=-2)


def _joined_numbers(parts: list[Tensor]) -> Tensor:
    return torch.cat(parts, dim=-1)


def _added(parts: list[Tensor]) -> Tensor:
    return torch.stack(parts).sum(dim=0)


@dataclass(frozen=True)
class Cut:
    """How an operator is cut by the rows of its first argument here, [..., rows, width]."""

    rows: dict[str, int]  # the dimension of rows in each argument that has them
    results: tuple[Callable[[list[Tensor]], Tensor], ...] = (_joined,)


QUERIES = {"query": -2, "attn_mask": -2}
CUTS = {
    "aten.linear.default": Cut({"input": -2}),
    "aten.mm.default": Cut({"self": -2}),
    "aten.addmm.default": Cut({"mat1": -2}),
    "mkldnn._linear_pointwise.default": Cut({"X": -2}),
    "mkldnn._linear_pointwise.binary": Cut({"X": -2, "other": -2}),
    "aten.scaled_dot_product_attention.default": Cut(QUERIES),
    "aten._scaled_dot_product_flash_attention_for_cpu.default": Cut(QUERIES, (_joined, _joined_numbers)),
    "aten._scaled_dot_product_flash_attention_for_cpu_backward.default": Cut(
        {"query": -2, "grad_out": -2, "out": -2, "logsumexp": -1, "attn_mask": -2},
        (_joined, _added, _added),
    ),
}


@cache
def cut_of(operator: Any) -> tuple[Cut, tuple[str, ...]] | None:
    """How an operator of torch is cut, and its arguments' names; None where it is not."""
    cut = CUTS.get(str(operator))
    names = tuple(one.name for one in operator._schema.arguments) if cut else ()
    return (cut, names) if cut and cut.rows.keys() <= set(names) else None


class Pieces(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """The operators inside, of a forward or a backward, let others in: `between` is called from time to time before
    one of them, and tells how many seconds it gave to others.

    A piece takes `LEAST_SHARE` times as long at least, so that the computation goes on beside any number of others.
    """

    def __init__(self, between: Callable[[], float]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._between = between
        self._due = time.perf_counter() + PIECE_SECONDS
        self._came_last = float("-inf")  # when others came in between

    def __torch_dispatch__(self, func: Any, _types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if self._let_in() - self._came_last < LATELY and (found := cut_of(func)) is not None:
            cut, names = found
            given = dict(zip(names, args, strict=False)) | (kwargs or {})
            parts = list(_cut(cut, given))
            if len(parts) > 1:
                return self._in_parts(func, cut, given, parts)
        return func(*args, **(kwargs or {}))

    def _let_in(self) -> float:
        """Let others in if it is time; what the clock says after it."""
        now = time.perf_counter()
        if now < self._due:
            return now
        with torch.inference_mode(False):  # what others begin here, they may go on with elsewhere
            away = self._between()
        after = time.perf_counter()
        if away:
            self._came_last = after
        self._due = after + max(PIECE_SECONDS, LEAST_SHARE * away)
        return after

    def _in_parts(self, func: Any, cut: Cut, given: dict[str, Any], parts: list[dict[str, Tensor]]) -> Any:
        found = []
        for part in parts:
            self._let_in()
            result = func(**(given | part))
            found.append(result if isinstance(result, tuple) else (result,))
        joined = [join(list(one)) for join, one in zip(cut.results, zip(*found, strict=True), strict=True)]
        return joined[0] if len(joined) == 1 else tuple(joined)


def _cut(cut: Cut, given: dict[str, Any]) -> Iterator[dict[str, Tensor]]:
    """The arguments that have rows, some rows after the others; nothing where they are few, or not independent."""
    held = {name: dim for name, dim in cut.rows.items() if isinstance(given.get(name), Tensor)}
    first = given[next(iter(held))]
    count = first.shape[-2] if first.dim() > 1 else 1
    most = max(1, ROWS // max(1, first.shape[:-2].numel()))
    if "query" in held:
        most = max(FEWEST_QUERIES, SCORES // given["key"].shape[-2])
    if count <= most or given.get("is_causal") or any(given[n].shape[d] != count for n, d in held.items()):
        return
    for begin in range(0, count, most):
        end = min(begin + most, count)
        yield {name: given[name].narrow(dim, begin, end - begin) for name, dim in held.items()}
