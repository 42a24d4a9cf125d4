"""`python -m benchmarks.going_back`: a session of a hybrid family takes back its last turn, and the last ten tokens.

Beside it, in the same run, what that takes without snapshots: all that came before is computed anew. Random weights of
Qwen3-Next's shape in small; the time of the span's own passes, without any network.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable

import torch
from transformers import Qwen3NextConfig

from corolla.models.attention.span_cache import SpanCache
from corolla.models.checkpoints.checkpoint import open_checkpoint
from corolla.models.checks.miniature import random_model
from corolla.models.families import structure
from corolla.models.span import Span, load_span

BEFORE, REPLY, PASS = 2000, 100, 512
CONFIG = Qwen3NextConfig(
    vocab_size=1024,
    hidden_size=512,
    num_hidden_layers=4,
    num_attention_heads=8,
    num_key_value_heads=2,
    head_dim=64,
    linear_num_key_heads=4,
    linear_num_value_heads=8,
    linear_key_head_dim=64,
    linear_value_head_dim=64,
    num_experts=8,
    num_experts_per_tok=2,
    moe_intermediate_size=512,
    shared_expert_intermediate_size=512,
)


def filled(span: Span, hidden: torch.Tensor, cache: SpanCache) -> None:
    """The beginning in passes, as a server computes a prompt."""
    for start in range(0, BEFORE, PASS):
        cache.remember(turn=False)
        span.forward(hidden[:, start : min(start + PASS, BEFORE)], cache=cache)


def seconds(work: Callable[[], object]) -> float:
    begin = time.perf_counter()
    work()
    return time.perf_counter() - begin


def main() -> None:
    with tempfile.TemporaryDirectory() as folder, torch.inference_mode():
        torch.manual_seed(0)
        random_model(structure(CONFIG).causal_lm, CONFIG).save_pretrained(folder)
        span = load_span(open_checkpoint(folder), 0, 4, dtype=torch.float32)
        hidden = torch.randn(1, BEFORE + REPLY, span.width)
        anew = seconds(lambda: filled(span, hidden, span.new_cache()))
        print(f"{BEFORE} tokens computed anew: {1000 * anew:.0f} ms")
        for name, length in (("a turn", BEFORE), ("the last ten tokens", BEFORE + REPLY - 10)):
            cache = span.new_cache()
            filled(span, hidden, cache)
            for at in range(BEFORE, BEFORE + REPLY):
                cache.remember(turn=at == BEFORE)
                span.forward(hidden[:, at : at + 1], cache=cache)
            back = seconds(lambda at=length, kept=cache: span.go_back(kept, at))
            print(f"{name} of {REPLY} taken back: {1000 * back:.1f} ms, {anew / back:.0f}x less")
        token, states = span.cache_bytes
        print(f"bytes of a token {token}, of its states {states}, which is {states / token:.0f} tokens")


if __name__ == "__main__":
    main()
