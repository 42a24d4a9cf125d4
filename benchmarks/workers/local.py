"""Baselines in this process: transformers' own model, and peft's prompt tuning on it.

Invariant: a figure is measured with the attention implementation that was faster for its kind of work, on
all cores.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor

from benchmarks.sizes import DEMO, MODEL, PROMPT_TOKENS
from benchmarks.workers import loops
from benchmarks.workers.protocol import obey

ATTENTION = ("sdpa", "eager")


@cache
def plain() -> Any:
    """The local model in fp32."""
    from transformers import AutoModelForCausalLM

    from corolla.models.checkpoints.checkpoint import open_checkpoint

    folder = open_checkpoint(MODEL).tokenizer_source
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@cache
def cut_model(folder: str) -> Any:
    """A model that `cut` has written."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    model.set_attn_implementation(best_attention("decode")["attention"])
    return model


@cache
def tuned() -> Any:
    """The same model with a prompt of peft's."""
    from peft import PromptTuningConfig, get_peft_model

    return get_peft_model(
        plain(), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=PROMPT_TOKENS)
    )


@cache
def training_step() -> loops.Step:
    return loops.Step([weight for weight in tuned().parameters() if weight.requires_grad])


@cache
def batches(count: int) -> list[dict[str, Tensor]]:
    return loops.demo_batches(count)


# --- the best attention -----------------------------------------------------------------------------------


# A short piece of each kind of work, in tokens/s, that the attention is chosen by.
TRIALS: dict[str, Callable[[], float]] = {
    "decode": lambda: loops.decode(plain(), 1, 12),
    "batch": lambda: loops.decode(plain(), 8, 6),
    "prefill": lambda: loops.prefill(plain(), 512),
    "train": lambda: loops.dense(tuned(), training_step(), 4, 256),
}


@cache
def best_attention(kind: str) -> dict[str, Any]:
    """Try each implementation for a kind of work, and keep the faster one (best of 3)."""
    rates: dict[str, float] = {}
    for name in ATTENTION:
        plain().set_attn_implementation(name)
        rates[name] = max(TRIALS[kind]() for _ in range(3))
    best = max(rates, key=lambda name: rates[name])
    return {"attention": best, "tokens/s": rates[best], "tried": rates}


def use(kind: str) -> dict[str, Any]:
    """Set the attention for this kind of work (see `TRIALS`); gives what was found about it."""
    found = best_attention(kind)
    plain().set_attn_implementation(found["attention"])
    return found


def cut(blocks: int, folder: str) -> None:
    """Write the model with its first blocks only, and its tokenizer."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from corolla.models.checkpoints.checkpoint import open_checkpoint

    whole = open_checkpoint(MODEL).tokenizer_source
    model = AutoModelForCausalLM.from_pretrained(whole, num_hidden_layers=blocks, dtype=torch.float32)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(whole).save_pretrained(folder)


# --- figures ----------------------------------------------------------------------------------------------


def decode(rows: int, tokens: int, context: int = 16, folder: str | None = None) -> float:
    use("decode" if rows == 1 else "batch")
    return loops.decode(plain() if folder is None else cut_model(folder), rows, tokens, context)


def prefill(tokens: int) -> float:
    use("prefill")
    return loops.prefill(plain(), tokens)


def train(rows: int, length: int) -> float:
    use("train")
    return loops.dense(tuned(), training_step(), rows, length)


def chitchat(count: int, padding: str) -> float:
    """Real tokens/s; `padding` is "longest" (of each batch) or "max_length" (of every example)."""
    use("train")
    return loops.over_batches(
        training_step(), batches(count), lambda batch: _loss(_padded(batch, padding == "max_length"))
    )


def _loss(batch: dict[str, Tensor]) -> Tensor:
    loss: Tensor = tuned()(**batch).loss
    return loss


def _padded(batch: dict[str, Tensor], to_max: bool) -> dict[str, Tensor]:
    """For a model that keeps all logits and shifts labels by itself."""
    more = DEMO.max_length - batch["input_ids"].shape[1] if to_max else 0
    filling = {"input_ids": 0, "attention_mask": 0, "labels": -100}
    return {
        name: torch.nn.functional.pad(batch[name], (0, more), value=value) for name, value in filling.items()
    }


if __name__ == "__main__":
    torch.set_num_threads(os.cpu_count() or 1)
    commands = (use, cut, decode, prefill, train, chitchat)
    obey({command.__name__: command for command in commands})
