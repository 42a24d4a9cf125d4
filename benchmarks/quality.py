"""Quality: our prompts and prefixes, trained through a swarm of two processes, beside peft's, trained here.

All see the same batches in the same order and take the same steps, each mode at the rate that is its default. A
prefix and peft's CARTRIDGE start from the same conversations of the training split, `ptune` and peft's PROMPT_TUNING
(`prompt_vocab`) from the same sampled vocabulary, `lora` and peft's LORA from the same A; `prompt_random` and
`prefix_tuning` start as peft starts them.
Every run is a line of a JSON file, so that what was interrupted goes on; the table and the paired intervals are made
of the lines.

    python benchmarks/quality.py --steps 12                                 # ptune and prefix, beside peft's
    python benchmarks/quality.py --steps 60 --seeds 3 --lines quality.jsonl --runs base prefix ptune cartridge
"""

from __future__ import annotations

import argparse
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from peft import (
    CartridgeConfig,
    LoraConfig,
    PrefixTuningConfig,
    PromptTuningConfig,
    PromptTuningInit,
    TaskType,
    get_peft_model,
    set_peft_model_state_dict,
)
from peft.tuners.cartridge.utils import prompt_embeddings_from_past_key_values
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PrinterCallback, Trainer

from benchmarks.quality_lines import Lines, Outcome, loss_of, pooled
from benchmarks.residual import ResidualEmbedding
from corolla import AutoDistributedModelForCausalLM
from corolla.cli.common import set_up_libraries
from corolla.cli.local_swarm import local_swarm
from corolla.cli.tune import conversations_text
from corolla.data.render import RenderSettings
from corolla.data.sources import load_conversations
from corolla.models.checkpoints.checkpoint import open_checkpoint
from corolla.models.checkpoints.lora_files import peft_files
from corolla.models.checks.lora import check_adapter
from corolla.models.lora import initial
from corolla.models.prompts import initial_vectors
from corolla.tuning.batches import Prepared, prepare
from corolla.tuning.checkpoints import RunFolder
from corolla.tuning.evaluate import Evaluation, compare, evaluate
from corolla.tuning.settings import RATES, TuneSettings
from corolla.tuning.trainer import training_arguments

SLOW_LINE = 100e6 / 8  # bytes a second
RANK = 8  # of LoRA, with twice that as alpha
OWN_TENSORS = ("prefix", "prompts", "lora")  # what a prompt adds to the line
# Pairs of runs whose difference is told: the second minus the first.
PAIRS = (
    ("base", "ptune"),
    ("base", "prefix"),
    ("base", "lora"),
    ("base", "prompt_vocab"),
    ("base", "prompt_random"),
    ("base", "prefix_tuning"),
    ("ptune", "prefix"),
    ("cartridge", "prefix"),
    ("prompt_vocab", "ptune"),
    ("prompt_vocab", "prefix"),
    ("prompt_random", "prefix"),
    ("prompt_vocab", "residual"),
    ("prefix_tuning", "prefix"),
    ("prefix", "lora"),
    ("peft_lora", "lora"),
)


@dataclass(frozen=True)
class Task:
    """One seed's settings and data."""

    model: str
    prompt_tokens: int
    settings: TuneSettings
    prepared: Prepared

    @property
    def text(self) -> str:
        """What prefixes begin with."""
        return conversations_text(self.prepared, self.prompt_tokens, self.settings.seed)


class Kept(nn.Module):
    """A peft model behind the interface that `evaluate` uses: logits [n, V] where they are to be kept."""

    def __init__(self, model: Any, columns: int) -> None:
        """`columns` are a prompt's own positions, which come first."""
        super().__init__()
        self.model, self.columns = model, columns
        self.device = model.device

    def forward(self, *, logits_to_keep: Tensor, **inputs: Any) -> Any:
        """As the model's, but for the logits."""
        output = self.model(**inputs)
        output.logits = output.logits[:, self.columns :][logits_to_keep]
        return output


class WithoutKeep:
    """Batches for a model that shifts labels by itself and keeps all logits."""

    def __init__(self, prepared: Prepared) -> None:
        self._make = prepared.batches

    def __call__(self, examples: Any) -> dict[str, Tensor]:
        batch = self._make(examples)
        del batch["logits_to_keep"]
        return batch


def trained(model: Any, task: Task) -> float:
    """Train what of `model` can be trained; gives seconds a step."""
    with tempfile.TemporaryDirectory() as folder:
        arguments = training_arguments(
            task.settings, RunFolder(Path(folder, "run")), len(task.prepared.train), on_cpu=True
        )
        arguments.eval_strategy, arguments.save_strategy, arguments.eval_on_start = "no", "no", False
        trainer = Trainer(
            model, arguments, data_collator=WithoutKeep(task.prepared), train_dataset=task.prepared.train
        )
        trainer.remove_callback(PrinterCallback)
        begun = time.monotonic()
        trainer.train()
        return (time.monotonic() - begun) / int(trainer.state.global_step)


def evaluated(seen: Any, task: Task) -> Evaluation:
    """Held-out losses of a model that keeps logits."""
    return evaluate(seen, task.prepared.held_out, task.prepared.batches, task.settings.batch_size)


def numbers_of(model: Any) -> int:
    """How many are trained."""
    return sum(one.numel() for one in model.parameters() if one.requires_grad)


# --- peft, on this machine ------------------------------------------------------------------------------------------


def whole_model(task: Task) -> Any:
    """The base model, all of it here."""
    source = open_checkpoint(task.model).source.location
    return AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)


def with_peft(task: Task, config: Any, start: Callable[[Any, Any, Task], None] | None) -> Outcome:
    """Train a prompt; `start` gives it its first values, of the base model and the task."""
    torch.manual_seed(task.settings.seed)
    base = whole_model(task)
    model = get_peft_model(base, config)
    if start is not None:
        start(model.prompt_encoder["default"], base, task)
    seconds = trained(model, task)
    columns = task.prompt_tokens if isinstance(config, PromptTuningConfig) else 0
    return Outcome(evaluated(Kept(model, columns), task), seconds, numbers_of(model), {})


def from_vocabulary(encoder: Any, base: Any, task: Task) -> None:
    """The vectors that a distributed model's prompt of this seed begins with."""
    vectors = initial_vectors(
        base.get_input_embeddings(),
        task.prompt_tokens,
        vocab_size=base.config.vocab_size,
        seed=task.settings.seed,
    )
    encoder.embedding.weight.data.copy_(vectors)


def from_vocabulary_reparametrized(encoder: Any, base: Any, task: Task) -> None:
    """The same, trained together with a small network that they go through."""
    from_vocabulary(encoder, base, task)
    encoder.embedding = ResidualEmbedding(encoder.embedding.weight.data)


def from_text(encoder: Any, base: Any, task: Task) -> None:
    """What the whole model's own caches hold of the text."""
    ids = task.prepared.renderer.tokenizer(task.text, return_tensors="pt").input_ids
    with torch.no_grad():
        cache = base(ids[:, : task.prompt_tokens], use_cache=True).past_key_values
    layers = [(layer.keys, layer.values) for layer in cache.layers]
    encoder.load_prompt_embeddings(
        prompt_embeddings_from_past_key_values(layers, num_virtual_tokens=task.prompt_tokens)
    )


def with_peft_lora(task: Task, _swarms: Swarms) -> Outcome:
    """Train a LoRA adapter of all linear layers, from what a distributed model's adapter of this seed begins with."""
    base = whole_model(task)
    names = check_adapter(base.config, None)
    tensors, about = peft_files(initial(base.config, names, RANK, 2.0, task.settings.seed), base.config)
    config = LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=about["target_modules"])
    model = get_peft_model(base, config)
    set_peft_model_state_dict(model, tensors)
    seconds = trained(model, task)
    return Outcome(evaluated(Kept(model, 0), task), seconds, numbers_of(model), {})


def base_alone(task: Task) -> Outcome:
    """No prompt at all."""
    return Outcome(evaluated(Kept(whole_model(task), 0), task), 0.0, 0, {})


# --- Corolla, through two server processes ---------------------------------------------------------------------------


class Swarms:
    """A swarm of two processes for whoever asks first, until the end."""

    def __init__(self, model: str, stack: ExitStack) -> None:
        self._model, self._stack = model, stack

    @cached_property
    def peers(self) -> Sequence[str]:
        """Where to join."""
        return self._stack.enter_context(local_swarm(self._model)).peers


def with_corolla(task: Task, mode: str, swarms: Swarms) -> Outcome:
    """Train through the swarm."""
    starts: dict[str, dict[str, Any]] = {
        "prefix": {"prompt_init": "text", "prompt_text": task.text},
        "lora": {"lora_rank": RANK},
    }
    with AutoDistributedModelForCausalLM.from_pretrained(
        task.model,
        initial_peers=swarms.peers,
        tuning_mode=mode,
        pre_seq_len=task.prompt_tokens,
        seed=task.settings.seed,
        **starts.get(mode, {"prompt_init": "vocab"}),
    ) as model:
        with counted(model.blocks.connection.view) as traffic:
            seconds = trained(model, task)
        each = {name: sent // (task.settings.steps or 1) for name, sent in traffic.items()}
        return Outcome(evaluated(model, task), seconds, numbers_of(model), each)


@contextmanager
def counted(view: Any) -> Iterator[Counter[str]]:
    """Bytes of the tensors that travel inside, by name, both ways."""
    found: Counter[str] = Counter()
    ask = view.channels.ask

    async def counting(peer: str, packet: Any) -> Any:
        reply = await ask(peer, packet)
        for one in (packet, reply):
            found.update({name: tensor.nbytes for name, tensor in one.tensors.items()})
        return reply

    view.channels.ask = counting
    try:
        yield found
    finally:
        view.channels.ask = ask


# --- all of them ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Run:
    """What stands in the table, the rate of which of our modes it takes, and how it is done."""

    name: str
    mode: str
    do: Callable[[Task, Swarms], Outcome]


def _peft(config: Callable[..., Any], start: Any = None, **options: Any) -> Callable[[Task, Swarms], Outcome]:
    def run(task: Task, _swarms: Swarms) -> Outcome:
        made = config(task_type=TaskType.CAUSAL_LM, num_virtual_tokens=task.prompt_tokens, **options)
        return with_peft(task, made, start)

    return run


RUNS = {
    "base": Run("base model", "ptune", lambda task, _: base_alone(task)),
    "prefix": Run("prefix, two servers", "prefix", lambda task, swarms: with_corolla(task, "prefix", swarms)),
    "ptune": Run("ptune, two servers", "ptune", lambda task, swarms: with_corolla(task, "ptune", swarms)),
    "deep_ptune": Run(
        "deep_ptune, two servers", "deep_ptune", lambda task, swarms: with_corolla(task, "deep_ptune", swarms)
    ),
    "cartridge": Run("peft CARTRIDGE, text", "prefix", _peft(CartridgeConfig, from_text)),
    "prompt_vocab": Run(
        "peft PROMPT_TUNING, vocabulary",
        "ptune",
        _peft(PromptTuningConfig, from_vocabulary, prompt_tuning_init=PromptTuningInit.SAMPLE_VOCAB),
    ),
    "residual": Run(
        "the same, residual network",
        "ptune",
        _peft(
            PromptTuningConfig,
            from_vocabulary_reparametrized,
            prompt_tuning_init=PromptTuningInit.SAMPLE_VOCAB,
        ),
    ),
    "prompt_random": Run("peft PROMPT_TUNING, defaults", "ptune", _peft(PromptTuningConfig)),
    "prefix_tuning": Run("peft PREFIX_TUNING", "prefix", _peft(PrefixTuningConfig)),
    "lora": Run("lora, two servers", "lora", lambda task, swarms: with_corolla(task, "lora", swarms)),
    "peft_lora": Run("peft LORA, same start", "lora", with_peft_lora),
}


def table(lines: Lines) -> Iterator[str]:
    """A line for each run, then one for each pair."""
    for name, run in RUNS.items():
        found = lines.all(name)
        if not found:
            continue
        entry = next(iter(found.values()))
        seeds = " ".join(f"{loss_of(one):.4f}" for _, one in sorted(found.items()))
        line = f"{run.name:31} {pooled(list(found.values())).reply_loss:.4f}   seeds {seeds}"
        if entry["numbers"]:
            line += f"   {entry['numbers']:,} numbers   {entry['step_seconds']:.2f} s a step"
        if entry["traffic"]:
            whole = sum(entry["traffic"].values())
            own = sum(sent for tensor, sent in entry["traffic"].items() if tensor in OWN_TENSORS)
            line += (
                f"   {whole / 2**20:.1f} MiB a step, {own / 2**20:.1f} of them prompts: {own / SLOW_LINE:.2f} s at "
                "100 Mbit/s"
            )
        yield line
    for first, second in PAIRS:
        one, other = lines.all(first), lines.all(second)
        seeds_of_both = sorted(one.keys() & other.keys())
        if not seeds_of_both:
            continue
        pair = [pooled([runs[seed] for seed in seeds_of_both]) for runs in (one, other)]
        change = compare(*pair)
        each = " ".join(f"{loss_of(other[seed]) - loss_of(one[seed]):+.4f}" for seed in seeds_of_both)
        yield (
            f"{second} minus {first}: {change.mean:+.5f} (95 % interval {change.low:+.5f} to {change.high:+.5f}; "
            f"seeds {each})"
        )


def task_of(options: argparse.Namespace, run: Run, seed: int, tokenizer: Any, conversations: Any) -> Task:
    """One run's settings and data."""
    settings = TuneSettings(
        steps=options.steps,
        batch_size=options.batch_size,
        held_out=options.held_out,
        held_out_samples=options.held_out,
        seed=seed,
        learning_rate=RATES[run.mode] if options.lr is None else options.lr,
        warmup=0,  # transformers' own begins with a step of rate 0
        rendering=RenderSettings(max_length=options.max_length),
    )
    return Task(options.model, options.prompt_tokens, settings, prepare(tokenizer, settings, conversations))


def main() -> None:
    """Do the runs that are not in the file yet, seed by seed, then print what all say."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--data", default="chitchat")
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--max-length", type=int, default=96)
    parser.add_argument("--held-out", type=int, default=32)
    parser.add_argument("--prompt-tokens", type=int, default=16)
    parser.add_argument("--lr", type=float, help="for all runs (default: what suits each mode)")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--lines", type=Path, help="the file that runs are appended to (default: none kept)")
    parser.add_argument(
        "--runs", nargs="*", choices=RUNS, default=["base", "prefix", "ptune", "cartridge", "prompt_vocab"]
    )
    options = parser.parse_args()
    set_up_libraries()
    warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)  # peft asks for it
    tokenizer = AutoTokenizer.from_pretrained(open_checkpoint(options.model).source.location)
    conversations = load_conversations(options.data)[0]
    with ExitStack() as stack:
        path = options.lines or Path(stack.enter_context(tempfile.TemporaryDirectory()), "lines.jsonl")
        shared = {key: value for key, value in vars(options).items() if key not in ("seeds", "lines", "runs")}
        lines, swarms = Lines(path, shared), Swarms(options.model, stack)
        for seed in range(options.seeds):
            for name in options.runs:
                if (name, seed) not in lines:
                    task = task_of(options, RUNS[name], seed, tokenizer, conversations)
                    outcome = RUNS[name].do(task, swarms)
                    lines.add(name, seed, outcome)
                    print(f"{name} seed {seed}: {outcome.after.reply_loss:.4f}", flush=True)
        for line in table(lines):
            print(line)


if __name__ == "__main__":
    main()
