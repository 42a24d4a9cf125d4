"""Quality: trained prefixes through a swarm of two processes, against peft's CARTRIDGE here and against our prompts.

All start from the training split (a prefix from the caches of rendered conversations, a prompt from sampled
vocabulary), see the same batches in the same order and take the same steps. Printed are held-out losses of replies,
the time, what travelled in a step, and how far the prefixes are apart.

    python benchmarks/prefix_vs_peft.py --steps 12 --runs corolla,peft,ptune
    python benchmarks/prefix_vs_peft.py --runs first   # a chat's first token behind a prefix of 512 tokens
"""

from __future__ import annotations

import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

import torch
from peft import CartridgeConfig, TaskType, get_peft_model
from peft.tuners.cartridge.utils import prompt_embeddings_from_past_key_values
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PrinterCallback, Trainer

from benchmarks.quality_vs_peft import PlainBatches, Prompted, options_of, settings_of
from corolla import AutoDistributedModelForCausalLM
from corolla.cli.common import set_up_libraries
from corolla.cli.local_swarm import local_swarm
from corolla.cli.tune import conversations_text
from corolla.data.sources import load_conversations
from corolla.models.checkpoints.checkpoint import open_checkpoint
from corolla.tuning.batches import Prepared, prepare
from corolla.tuning.checkpoints import RunFolder
from corolla.tuning.evaluate import Evaluation, compare, evaluate
from corolla.tuning.settings import TuneSettings
from corolla.tuning.trainer import training_arguments

SLOW_LINE = 100e6 / 8  # bytes a second
LONG, TURN, REPEATS = 512, 32, 7  # tokens of a prefix and of a chat's first turn


@dataclass(frozen=True)
class Outcome:
    """Held-out losses of replies before and after, seconds a step, and what was trained."""

    before: Evaluation
    after: Evaluation
    step_seconds: float
    numbers: int
    values: Tensor | None = None  # of a prefix, [blocks, P, D]
    traffic: Counter[str] | None = None  # bytes a step, by the tensors' names


class Prefixed(Prompted):
    """As `Prompted`, without positions to take away."""

    def forward(self, *, logits_to_keep: Tensor, **inputs: Any) -> Any:
        """Logits [n, V]."""
        output = self.model(**inputs)
        output.logits = output.logits[logits_to_keep]
        return output


def trained(
    model: Any, seen: Any, settings: TuneSettings, prepared: Prepared, folder: Path
) -> tuple[Evaluation, Evaluation, float]:
    """Evaluations of `seen` before and after `model` was trained, and seconds a step."""
    before = evaluate(seen, prepared.held_out, prepared.batches, settings.batch_size)
    arguments = training_arguments(settings, RunFolder(folder), len(prepared.train), on_cpu=True)
    arguments.eval_strategy, arguments.save_strategy, arguments.eval_on_start = "no", "no", False
    trainer = Trainer(model, arguments, data_collator=PlainBatches(prepared), train_dataset=prepared.train)
    trainer.remove_callback(PrinterCallback)
    begun = time.monotonic()
    trainer.train()
    seconds = (time.monotonic() - begun) / trainer.state.global_step
    return before, evaluate(seen, prepared.held_out, prepared.batches, settings.batch_size), seconds


def with_peft(options: Any, settings: TuneSettings, prepared: Prepared, folder: Path, text: str) -> Outcome:
    """A CARTRIDGE, from what the whole model's own caches hold of the text."""
    checkpoint = open_checkpoint(options.model)
    base = AutoModelForCausalLM.from_pretrained(checkpoint.tokenizer_source, dtype=torch.float32)
    ids = prepared.renderer.tokenizer(text, return_tensors="pt").input_ids[:, : options.prompt_tokens]
    with torch.no_grad():
        cache = base(ids, use_cache=True).past_key_values
    config = CartridgeConfig(task_type=TaskType.CAUSAL_LM, num_virtual_tokens=options.prompt_tokens)
    model = get_peft_model(base, config)
    layers = [(layer.keys, layer.values) for layer in cache.layers]
    encoder = model.prompt_encoder["default"]
    encoder.load_prompt_embeddings(
        prompt_embeddings_from_past_key_values(layers, num_virtual_tokens=options.prompt_tokens)
    )
    outcome = Outcome(
        *trained(model, Prefixed(model), settings, prepared, folder),
        sum(one.numel() for one in model.parameters() if one.requires_grad),
    )
    vectors = encoder.weight.detach()
    values = vectors.view(len(vectors), base.config.num_hidden_layers, -1).transpose(0, 1)
    return replace(outcome, values=values)


@contextmanager
def counted(view: Any) -> Any:
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


def with_corolla(
    options: Any, settings: TuneSettings, prepared: Prepared, folder: Path, text: str, mode: str
) -> Outcome:
    """Through two server processes."""
    start: dict[str, Any] = {"prompt_init": "text", "prompt_text": text} if mode == "prefix" else {}
    with (
        local_swarm(options.model) as swarm,
        AutoDistributedModelForCausalLM.from_pretrained(
            options.model,
            initial_peers=swarm.peers,
            tuning_mode=mode,
            pre_seq_len=options.prompt_tokens,
            seed=settings.seed,
            **start,
        ) as model,
    ):
        with counted(model.blocks.connection.view) as traffic:
            found = trained(model, model, settings, prepared, folder)
        evaluated = 2 * len(prepared.held_out) / (settings.batch_size * (settings.steps or 1))
        each = Counter(
            {name: int(sent / (1 + evaluated) / (settings.steps or 1)) for name, sent in traffic.items()}
        )
        values = model.prompts.values.detach() if mode == "prefix" else None
        numbers = sum(one.numel() for one in model.parameters() if one.requires_grad)
        return Outcome(*found, numbers, values, each)


def first_tokens(options: Any) -> str:
    """How long a chat's first token takes behind a prefix that the servers know, beside one without."""
    with (
        local_swarm(options.model) as swarm,
        AutoDistributedModelForCausalLM.from_pretrained(
            options.model, initial_peers=swarm.peers, tuning_mode="prefix", pre_seq_len=LONG
        ) as model,
    ):
        prompts, ids = model.prompts, torch.randint(100, 10_000, (1, TURN))
        seconds: dict[bool, list[float]] = {False: [], True: []}
        for turn in range(2 * (1 + REPEATS)):
            prefixed = bool(turn % 2)
            model.prompts = prompts if prefixed else None
            begun = time.monotonic()
            with model.inference_session() as session:
                model.generate(ids, max_new_tokens=1, do_sample=False, session=session)
                if turn > 1:  # the first ones bring the prefix to the servers, and wake them
                    seconds[prefixed].append(time.monotonic() - begun)
            ids = torch.randint(100, 10_000, (1, TURN))
    without, behind = (median(seconds[prefixed]) for prefixed in (False, True))
    return (
        f"first token of a chat of {TURN} tokens: {1e3 * behind:.0f} ms behind a prefix of {LONG}, "
        f"{1e3 * without:.0f} ms without: {behind / without:.2f} times"
    )


def told(name: str, outcome: Outcome) -> str:
    """One line of the table."""
    line = (
        f"{name:26} {outcome.numbers:9,} numbers   replies {outcome.before.reply_loss:.4f} -> "
        f"{outcome.after.reply_loss:.4f}   {outcome.step_seconds:5.2f} s a step"
    )
    if outcome.traffic is not None:
        own = sum(sent for sent_name, sent in outcome.traffic.items() if sent_name in ("prefix", "prompts"))
        whole = sum(outcome.traffic.values())
        line += (
            f"   about {whole / 2**20:.1f} MiB a step, {own / 2**20:.1f} of them prefixes: "
            f"{own / SLOW_LINE:.2f} s at 100 Mbit/s"
        )
    return line


def main() -> None:
    """Run what was asked for, and compare."""
    parser = options_of(__doc__)
    parser.add_argument("--runs", default="corolla,peft,ptune")
    parser.add_argument("--prompt-tokens", type=int, default=16)
    parser.add_argument("--lr", type=float, default=3e-2, help="of prefixes; prompts have 1e-2")
    options = parser.parse_args()
    set_up_libraries()
    if options.runs == "first":
        print(first_tokens(options))
        return
    warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)  # peft asks for it
    settings = settings_of(options, options.lr)
    tokenizer = AutoTokenizer.from_pretrained(open_checkpoint(options.model).tokenizer_source)
    prepared = prepare(tokenizer, settings, load_conversations(options.data)[0])
    text = conversations_text(prepared, options.prompt_tokens, options.seed)
    prompts = replace(settings, learning_rate=1e-2)
    runs: dict[str, Callable[[Path], Outcome]] = {
        "corolla": lambda folder: with_corolla(options, settings, prepared, folder, text, "prefix"),
        "peft": lambda folder: with_peft(options, settings, prepared, folder, text),
        "ptune": lambda folder: with_corolla(options, prompts, prepared, folder, text, "ptune"),
    }
    names = {"corolla": "prefix, two servers", "peft": "peft CARTRIDGE, local", "ptune": "ptune, two servers"}
    found: dict[str, Outcome] = {}
    with tempfile.TemporaryDirectory() as temporary:
        for name in options.runs.split(","):
            found[name] = runs[name](Path(temporary) / name)
            print(told(names[name], found[name]), flush=True)
    for other in ("peft", "ptune"):
        if "corolla" in found and other in found:
            change = compare(found[other].after, found["corolla"].after, seed=options.seed)
            print(
                f"prefix minus {names[other]:24} {change.mean:+.5f} (95 % interval {change.low:+.5f} to "
                f"{change.high:+.5f})"
            )
    if {"corolla", "peft"} <= found.keys():
        ours, theirs = found["corolla"].values, found["peft"].values
        assert ours is not None
        assert theirs is not None
        print(
            f"the trained prefixes differ by {float((ours - theirs).norm() / theirs.norm()):.1e} of their size"
        )


if __name__ == "__main__":
    main()
