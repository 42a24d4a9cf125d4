"""The line about a server's memory: what it grows by after its imports, beside what it may use.

Invariant: the servers have done all kinds of work, and have been asked to cache as many tokens as their
budget holds, before they are measured. The growth is that of the server's own process; its network daemon's
memory is in the details.
"""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import psutil

from benchmarks.bench import Bench, Pair, Values
from benchmarks.figures import Figure, Line
from benchmarks.processes import ROOT, Worker
from benchmarks.sizes import MODEL
from corolla.models.checkpoints.checkpoint import open_checkpoint

CACHE_TOKENS = 8192
LEASE_BYTES = 256 * 2**20
CONTEXT = 1000  # tokens of each session that fills the cache; pages may be rounded up
FLOAT32 = 4
# All that a server of this model imports, some of it late; prints its memory.
IMPORTS = """
import corolla.cli.serve, corolla.server.serve, corolla.swarm.transport.libp2p, psutil
from transformers import LlamaForCausalLM, LlamaModel
print(psutil.Process().memory_info().rss)
"""


def growth(bench: Bench) -> Pair:
    """Each run starts its own two servers, so that none begins with what another left behind."""
    details: dict[str, Any] = {"cache tokens": CACHE_TOKENS, "lease bytes": LEASE_BYTES, "servers": []}

    def run() -> tuple[Values, Values]:
        imports = int(subprocess.check_output([sys.executable, "-c", IMPORTS], cwd=ROOT))
        bench.end_swarm()
        swarm = bench.swarm("--cache-tokens", str(CACHE_TOKENS), "--lease-bytes", str(LEASE_BYTES))
        start = [_memory(server.process.pid)["rss"] for server in swarm.servers]
        _work(bench.new_client(swarm), bench.new_client(swarm, tuning_mode="ptune"), bench.size(CONTEXT, 100))
        seen = [_memory(server.process.pid) for server in swarm.servers]
        bench.end_swarm()
        details["servers"] += [{"start": rss, **server} for rss, server in zip(start, seen, strict=True)]
        details["imports"] = imports
        return (sum(server["rss"] - imports for server in seen),), (len(seen) * _budget(len(seen)),)

    pair = Pair(run, details, warm_up=False)
    bench.end_swarm()
    return pair


def _work(chatting: Worker, tuning: Worker, context: int) -> None:
    """Fill the cache, decode in a crowd, send a long prompt, train."""
    for _ in range(CACHE_TOKENS // (CONTEXT + 24)):
        chatting.ask("hold", context=context)
    chatting.ask("more", tokens=16)
    for _ in range(2):
        tuning.ask("train", rows=8, length=min(256, context))
    chatting.ask("drop")
    chatting.ask("sessions", count=8, tokens=8)
    chatting.ask("prefill", tokens=2 * context)


def _memory(pid: int) -> dict[str, int]:
    """Bytes in use by a server and by its daemon, and the most that the server ever used."""
    process = psutil.Process(pid)
    daemons = sum(child.memory_info().rss for child in process.children(recursive=True))
    peak = next(
        int(line.split()[1]) * 1024
        for line in open(f"/proc/{pid}/status")  # noqa: SIM115  # a few lines
        if line.startswith("VmHWM")
    )
    return {"rss": process.memory_info().rss, "peak": peak, "daemon": daemons}


def _budget(servers: int) -> float:
    """Bytes that one of these servers may use: its weights, its cache, its leases."""
    checkpoint = open_checkpoint(MODEL)
    config = checkpoint.config
    blocks = checkpoint.num_blocks // servers
    hidden, inner = config.hidden_size, config.intermediate_size
    head = getattr(config, "head_dim", None) or hidden // config.num_attention_heads
    keys_and_values = 2 * config.num_key_value_heads * head
    weights = 2 * hidden * hidden + keys_and_values * hidden + 3 * hidden * inner + 2 * hidden
    return float(FLOAT32 * blocks * (weights + keys_and_values * CACHE_TOKENS) + LEASE_BYTES)


LINES = [
    Line(
        (
            Figure(
                "memory",
                "growth of the servers' resident memory after their imports",
                "bytes",
                "weights + cache budget + lease budget",
                1.25,
                at_most=True,
            ),
        ),
        growth,
        quantization="memory",  # a swarm of its own
    )
]
