"""`python -m benchmarks.session_bytes`: memory of a session here, and of the same tokens in transformers' own cache.

Shapes of `sizes.SHAPES`, with random weights in float32. Both are measured: what a server accounts for a session of so
many tokens, and what the family's own cache holds after them. For latents, also what the heads' keys and values would
take. Printed, not kept.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from benchmarks.workers.local import write
from corolla.models.cache import take_cache
from corolla.models.checkpoints.checkpoint import open_checkpoint
from corolla.models.span import load_span

NAMES = ("mla", "hybrid", "moe")
TOKENS = 512


def tensors(value: Any) -> Iterator[Tensor]:
    """All that a cache holds."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, list | tuple | dict):
        for one in value.values() if isinstance(value, dict) else value:
            yield from tensors(one)


def own_bytes(folder: str) -> int:
    """Of transformers' cache."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    cache = take_cache(dict(model(torch.randint(10, 1000, (1, TOKENS)), use_cache=True)))
    return sum(one.nbytes for layer in cache.layers for one in tensors(vars(layer)))


def report(name: str, folder: str) -> None:
    """Measure and print."""
    checkpoint = open_checkpoint(folder)
    span = load_span(checkpoint, 0, checkpoint.num_blocks, dtype=torch.float32)
    token, states = span.cache_bytes
    ours, own = token * TOKENS + states, own_bytes(folder)
    line = f"{name:8} {ours / 2**20:7.2f} MiB here, {own / 2**20:7.2f} in transformers: {ours / own:.2f}x"
    form = span.key_values
    latent: Any = next((one for one in span.blocks.modules() if hasattr(one, "expand_kv")), None)
    if form is not None and latent is not None:
        made = latent.expand_kv(torch.zeros(1, 1, 1, form.key_dim), torch.zeros(1, 1, 1, form.value_dim))
        numbers = sum(one.numel() for one in made)
        line += f"; {numbers} numbers a token and block as keys and values of the heads, {form.width} kept: "
        line += f"1/{numbers / form.width:.1f}"
    print(line, flush=True)


def main() -> None:
    """Each shape in turn."""
    print(f"a session of {TOKENS} tokens, float32, what is kept to go back included")
    with torch.inference_mode():
        for name in NAMES:
            with tempfile.TemporaryDirectory() as folder:
                write(name, "float32", folder)
                report(name, folder)


if __name__ == "__main__":
    main()
