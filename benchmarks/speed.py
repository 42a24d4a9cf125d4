"""Speed through a local swarm of two servers beside the local model, SmolLM2-135M in fp32.

Both are measured in turn in the same run, on all cores that there are; the ratio is of medians. The servers
stay up but idle while the local model runs.

    python benchmarks/speed.py [--repeats 3] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import PromptTuningConfig, get_peft_model
from transformers import AutoModelForCausalLM

from corolla import AutoDistributedModelForCausalLM
from corolla.cli.common import quiet_libraries
from corolla.cli.local_swarm import local_swarm
from corolla.models.checkpoint import open_checkpoint

MODEL = "smollm2"
NEW_TOKENS = 32
PROMPT_TOKENS = 16


def token_ids(rows: int, length: int) -> torch.Tensor:
    return torch.randint(10, 40_000, (rows, length), generator=torch.Generator().manual_seed(0))


def decode(model: Any, rows: int) -> float:
    """Tokens/s of greedy decoding after a short prompt."""
    ids = token_ids(rows, 16)
    settings = {"do_sample": False, "eos_token_id": None, "attention_mask": torch.ones_like(ids)}
    model.generate(ids, max_new_tokens=2, **settings)
    started = time.perf_counter()
    model.generate(ids, max_new_tokens=NEW_TOKENS, **settings)
    return rows * NEW_TOKENS / (time.perf_counter() - started)


def prefill(model: Any) -> float:
    """Tokens/s of one prompt of 512 tokens."""
    ids = token_ids(1, 512)
    started = time.perf_counter()
    model.generate(ids, max_new_tokens=1, do_sample=False, attention_mask=torch.ones_like(ids))
    return 512 / (time.perf_counter() - started)


def train(model: Any) -> float:
    """Tokens/s of a prompt-tuning step, forward and backward, on 8 × 256 dense tokens."""
    ids = token_ids(8, 256)
    started = time.perf_counter()
    model(input_ids=ids, labels=ids).loss.backward()
    return ids.numel() / (time.perf_counter() - started)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    quiet_libraries()
    torch.set_num_threads(os.cpu_count() or 1)
    folder = open_checkpoint(MODEL).tokenizer_source
    local = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tuned = get_peft_model(
        AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32),
        PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=PROMPT_TOKENS),
    )
    print(
        f"torch {torch.__version__}, transformers {transformers.__version__}, {os.cpu_count()} cores, ",
        end="",
    )
    print(f"{platform.machine()}; median of {options.repeats}")
    print(f"{'figure':34} {'swarm':>9} {'local':>9} {'ratio':>7}")
    with local_swarm(MODEL) as swarm:
        remote = AutoDistributedModelForCausalLM.from_pretrained(MODEL, initial_peers=swarm.peers)
        prompted = AutoDistributedModelForCausalLM.from_pretrained(
            MODEL, initial_peers=swarm.peers, tuning_mode="ptune", pre_seq_len=PROMPT_TOKENS
        )
        figures: list[tuple[str, Callable[[], float], Callable[[], float]]] = [
            ("decode, 1 session, tokens/s", lambda: decode(remote, 1), lambda: decode(local, 1)),
            ("decode, batch of 8, tokens/s", lambda: decode(remote, 8), lambda: decode(local, 8)),
            ("prefill of 512, tokens/s", lambda: prefill(remote), lambda: prefill(local)),
            ("ptune step 8 x 256, tokens/s", lambda: train(prompted), lambda: train(tuned)),
        ]
        for name, ours, theirs in figures:
            pairs = [(ours(), theirs()) for _ in range(options.repeats)]
            found, baseline = (statistics.median(column) for column in zip(*pairs, strict=True))
            print(f"{name:34} {found:9.1f} {baseline:9.1f} {found / baseline:6.2f}x", flush=True)
            if options.json:
                line = {"figure": name, "swarm": found, "local": baseline, "runs": pairs}
                with options.json.open("a") as file:
                    file.write(json.dumps(line) + "\n")
        remote.close()
        prompted.close()


if __name__ == "__main__":
    main()
