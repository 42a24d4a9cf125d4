"""Baselines in this process: transformers' own model, and peft's prompt tuning on it.

Invariant: a figure is measured with the attention implementation that was faster for its kind of work, on
all cores.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from functools import cache, lru_cache, partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.sizes import DEMO, MODEL, PROMPT_TOKENS, SHAPES
from benchmarks.workers import loops
from benchmarks.workers.protocol import obey
from corolla.cli import measure
from corolla.cli.measure import token_ids

ATTENTION = ("sdpa", "eager")
STREAM, STREAM_ROUNDS = 2**26, 8  # float32 that are read to see how fast memory is


@cache
def plain() -> Any:
    """The local model in fp32."""
    from transformers import AutoModelForCausalLM

    from corolla.models.checkpoints.checkpoint import open_checkpoint

    folder = open_checkpoint(MODEL).source.location
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@lru_cache(maxsize=1)
def model_in(folder: str) -> Any:
    """A model that `cut` or `write` has written, in fp32."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@cache
def tuned() -> Any:
    """The same model with a prompt of peft's."""
    from peft import PromptTuningConfig, get_peft_model

    return get_peft_model(
        plain(), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=PROMPT_TOKENS)
    )


@cache
def training_step() -> measure.Step:
    return measure.Step([weight for weight in tuned().parameters() if weight.requires_grad])


@cache
def batches(count: int) -> list[dict[str, Tensor]]:
    return loops.demo_batches(count)


# --- the best attention -----------------------------------------------------------------------------------


# A short piece of each kind of work, in tokens/s, that the attention is chosen by.
TRIALS: dict[str, Callable[[Any], float]] = {
    "decode": lambda model: measure.decode(model, token_ids(1, 16), 12),
    "batch": lambda model: measure.decode(model, token_ids(8, 16), 6),
    "prefill": lambda model: measure.prefill(model, token_ids(1, 512)),
    "train": lambda _model: measure.dense(tuned(), training_step(), token_ids(4, 256)),
}


def named(folder: str | None) -> Any:
    """The model in that folder; the usual one for None."""
    return plain() if folder is None else model_in(folder)


_found: dict[tuple[str, str | None], dict[str, Any]] = {}  # the best attention, by work and model


def best_attention(kind: str, folder: str | None, tries: int) -> dict[str, Any]:
    """Try each implementation for a kind of work, and keep the faster one."""
    model = named(folder)
    rates: dict[str, float] = {}
    for name in ATTENTION:
        model.set_attn_implementation(name)
        rates[name] = max(TRIALS[kind](model) for _ in range(tries))
    best = max(rates, key=lambda name: rates[name])
    return {"attention": best, "tokens/s": rates[best], "tried": rates}


def use(kind: str, folder: str | None = None, tries: int = 3) -> dict[str, Any]:
    """Set the attention for this kind of work (see `TRIALS`); gives what was found about it the first time."""
    if (kind, folder) not in _found:
        _found[kind, folder] = best_attention(kind, folder, tries)
    found = _found[kind, folder]
    named(folder).set_attn_implementation(found["attention"])
    return found


def write(shape: str, dtype: str, folder: str) -> None:
    """Write a model of that shape (`sizes.SHAPES`), its weights random numbers in `dtype`."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(SHAPES[shape].kind, **SHAPES[shape].config)
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype)).save_pretrained(folder)


def token_bytes(folder: str) -> int:
    """Bytes of weights that one token needs, as the checkpoint has them: of a mixture, those of its own experts."""
    from transformers import AutoConfig

    config, model = AutoConfig.from_pretrained(folder), model_in(folder)
    numbers = sum(one.numel() for one in model.parameters())  # a table that is tied counts once
    table, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    numbers -= 0 if table is head else table.numel()
    count = getattr(config, "num_local_experts", 0)
    experts = sum(one.numel() for name, one in model.named_parameters() if ".experts." in name)
    if count:
        numbers -= experts * (count - config.num_experts_per_tok) // count
    return int(numbers * torch.empty(0, dtype=config.dtype).itemsize)


def stream() -> float:
    """Bytes that torch reads from memory in a second, in the way in which it does so fastest."""
    numbers = torch.ones(STREAM)
    rows = numbers.view(-1, 1024)
    best = float("inf")
    for work in (numbers.sum, numbers.amax, partial(rows.mv, rows[0])):
        for _ in range(STREAM_ROUNDS):
            started = time.perf_counter()
            work()
            best = min(best, time.perf_counter() - started)
    return numbers.nbytes / best


def cut(blocks: int, folder: str) -> None:
    """Write the model with its first blocks only, and its tokenizer."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from corolla.models.checkpoints.checkpoint import open_checkpoint

    whole = open_checkpoint(MODEL).source.location
    model = AutoModelForCausalLM.from_pretrained(whole, num_hidden_layers=blocks, dtype=torch.float32)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(whole).save_pretrained(folder)


# --- figures ----------------------------------------------------------------------------------------------


def decode(rows: int, tokens: int, context: int = 16, folder: str | None = None) -> float:
    use("decode" if rows == 1 else "batch", folder)
    return measure.decode(named(folder), token_ids(rows, context), tokens)


def prefill(tokens: int, folder: str | None = None) -> float:
    use("prefill", folder)
    return measure.prefill(named(folder), token_ids(1, tokens))


def train(rows: int, length: int) -> float:
    use("train")
    return measure.dense(tuned(), training_step(), token_ids(rows, length))


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
    commands = (use, cut, write, token_bytes, stream, decode, prefill, train, chitchat)
    obey({command.__name__: command for command in commands})
