"""llama-cpp-python on the same GGUF file, in an interpreter of its own.

Invariant: imports nothing but Python's own library and llama_cpp.
"""

from __future__ import annotations

import random
import time
from functools import cache
from typing import Any

import llama_cpp

from benchmarks.workers.protocol import obey


@cache
def loaded(path: str, threads: int) -> Any:
    return llama_cpp.Llama(
        path, n_ctx=1024, n_threads=threads, n_threads_batch=threads, verbose=False, logits_all=False
    )


def use(path: str, threads: int) -> dict[str, Any]:
    """Its version, which instructions it was built for, and how fast it is (best of 3)."""
    return {
        "llama-cpp-python": llama_cpp.__version__,
        "llama.cpp": llama_cpp.llama_print_system_info().decode().strip(),
        "tokens/s": max(decode(path, threads, 16) for _ in range(3)),
    }


def decode(path: str, threads: int, tokens: int, context: int = 16) -> float:
    """Tokens/s of greedy decoding from the first new token on."""
    model = loaded(path, threads)
    model.reset()
    ids = random.Random(0).choices(range(10, 40_000), k=context)
    times = []
    for _ in model.generate(ids, temp=0.0, top_k=1, reset=True):
        times.append(time.perf_counter())
        if len(times) > tokens:
            break
    return tokens / (times[-1] - times[0])


if __name__ == "__main__":
    obey({"use": use, "decode": decode})
