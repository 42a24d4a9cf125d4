"""Attention of one sequence, forward and backward, as the blocks' own code calls torch's, and as `attend_one` does.

    python -m benchmarks.attention [--threads N] [--heads 9 3 64]

With and without a window, in turns; medians of processor time. Printed, not kept.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from corolla.models.attention.one_sequence import TableSegment, attend_one
from corolla.models.attention.one_token_rows import Rules

ROUNDS = 7
TOKENS = (128, 256, 512, 1024, 2048)
WINDOWS = (None, 128, 512)


def by_torch(query: Tensor, keys: Tensor, values: Tensor, window: int | None) -> Tensor:
    """In one call, with a mask where there is a window."""
    if window is None:
        return scaled_dot_product_attention(query, keys, values, is_causal=True, enable_gqa=True)
    count = query.shape[2]
    mask = torch.ones(count, count, dtype=torch.bool).tril_().triu_(1 - window)
    return scaled_dot_product_attention(query, keys, values, attn_mask=mask, enable_gqa=True)


def ours(query: Tensor, keys: Tensor, values: Tensor, window: int | None) -> Tensor:
    """As servers compute it."""
    return attend_one(query, keys, values, TableSegment(0, query.shape[2]), Rules(window=window))


def seconds(attend: Callable[..., Tensor], sides: tuple[Tensor, ...], back: bool) -> float:
    """Processor time of one call, with the gradients of its arguments if they are wanted."""
    began = time.process_time()
    found = attend(*sides)
    if back:
        torch.autograd.grad(found, sides, torch.ones_like(found))
    return time.process_time() - began


def compare(count: int, window: int | None, heads: tuple[int, int, int], back: bool) -> str:
    """One line."""
    sides = tuple(
        torch.randn(1, count, number, heads[2]).transpose(1, 2).requires_grad_(back)
        for number in (heads[0], heads[1], heads[1])
    )
    ways = {"torch": partial(by_torch, window=window), "ours": partial(ours, window=window)}
    times: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(ROUNDS + 1):
        for name, way in ways.items():
            times[name].append(seconds(way, sides, back))
    plain, own = (1000 * statistics.median(found[1:]) for found in times.values())
    what = "and back" if back else "forward "
    return f"{count:5} tokens, window {window or '-':>4}, {what}: {plain:8.2f} -> {own:7.2f} ms, {plain / own:.2f}x"


def main() -> None:
    """Print all of them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument(
        "--heads", type=int, nargs=3, default=(9, 3, 64), help="of queries, of keys, numbers in each"
    )
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    for count in TOKENS:
        for window in WINDOWS:
            if window is None or window < count:
                for back in (False, True):
                    print(compare(count, window, tuple(options.heads), back), flush=True)


if __name__ == "__main__":
    main()
