"""Quality: Corolla through a swarm of two processes against peft's prompt tuning on this machine.

Both start from the same vectors (drawn by peft's own SAMPLE_VOCAB), see the same batches in the same order and
take the same steps; the held-out loss of the replies should come out the same.

    python benchmarks/quality_vs_peft.py --steps 12
"""

from __future__ import annotations

import argparse
import tempfile
import time
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PromptTuningConfig, PromptTuningInit, TaskType, get_peft_model
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PrinterCallback, Trainer

from corolla import AutoDistributedModelForCausalLM
from corolla.cli.common import set_up_libraries
from corolla.cli.local_swarm import local_swarm
from corolla.data.render import RenderSettings
from corolla.data.sources import load_conversations
from corolla.models.checkpoints.checkpoint import Checkpoint, open_checkpoint
from corolla.tuning.batches import Prepared, prepare
from corolla.tuning.bundle import ModelInfo
from corolla.tuning.checkpoints import RunFolder
from corolla.tuning.evaluate import compare, evaluate
from corolla.tuning.settings import RATES, TuneSettings
from corolla.tuning.trainer import training_arguments
from corolla.tuning.tune import TuneResult, tune

PROMPT_TOKENS = 16


@dataclass(frozen=True)
class Outcome:
    """Held-out reply loss before and after, and the time that it took."""

    before: Any
    after: Any
    seconds: float


class Prompted(nn.Module):
    """A peft model behind the interface that `evaluate` uses: logits where they are to be kept."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model
        self.device = model.device

    def forward(self, *, logits_to_keep: Tensor, **inputs: Any) -> Any:
        """Logits [n, V], without the prompt's own positions."""
        output = self.model(**inputs)
        output.logits = output.logits[:, PROMPT_TOKENS:][logits_to_keep]
        return output


class PlainBatches:
    """Batches for a model that shifts labels by itself and keeps all logits."""

    def __init__(self, prepared: Prepared) -> None:
        self._make = prepared.batches

    def __call__(self, examples: Any) -> dict[str, Tensor]:
        batch = self._make(examples)
        del batch["logits_to_keep"]
        return batch


def with_peft(
    checkpoint: Checkpoint, settings: TuneSettings, prepared: Prepared, folder: Path
) -> tuple[Outcome, Tensor]:
    """Train with peft alone; gives the vectors that it started from, too."""
    torch.manual_seed(settings.seed)
    base = AutoModelForCausalLM.from_pretrained(checkpoint.tokenizer_source, dtype=torch.float32)
    config = PromptTuningConfig(
        task_type=TaskType.CAUSAL_LM,
        num_virtual_tokens=PROMPT_TOKENS,
        prompt_tuning_init=PromptTuningInit.SAMPLE_VOCAB,
    )
    model = get_peft_model(base, config)
    start = model.prompt_encoder["default"].embedding.weight.detach().clone()
    begun = time.monotonic()
    before = evaluate(Prompted(model), prepared.held_out, prepared.batches, settings.batch_size)
    arguments = training_arguments(settings, RunFolder(folder / "peft"), len(prepared.train), on_cpu=True)
    arguments.eval_strategy, arguments.save_strategy, arguments.eval_on_start = "no", "no", False
    trainer = Trainer(model, arguments, data_collator=PlainBatches(prepared), train_dataset=prepared.train)
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    after = evaluate(Prompted(model), prepared.held_out, prepared.batches, settings.batch_size)
    return Outcome(before, after, time.monotonic() - begun), start


def with_corolla(
    model_name: str, settings: TuneSettings, prepared: Prepared, folder: Path, start: Tensor
) -> Outcome:
    """Train through two server processes, from the vectors `start` [P, H]."""
    with (
        local_swarm(model_name) as swarm,
        AutoDistributedModelForCausalLM.from_pretrained(
            model_name, initial_peers=swarm.peers, tuning_mode="ptune", pre_seq_len=PROMPT_TOKENS
        ) as model,
    ):
        model.prompts.input.data.copy_(start)
        about = ModelInfo(model_name, model.blocks.connection.view.model)
        result = tune(model, settings, prepared, folder / "corolla", about)
        assert isinstance(result, TuneResult)
        return Outcome(result.before, result.after, result.seconds)


def options_of(about: str | None) -> argparse.ArgumentParser:
    """What both benchmarks beside peft are asked."""
    parser = argparse.ArgumentParser(description=about.splitlines()[0] if about else None)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--data", default="chitchat")
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--max-length", type=int, default=96)
    parser.add_argument("--held-out", type=int, default=32)
    parser.add_argument("--seed", type=int, default=0)
    return parser


def settings_of(options: argparse.Namespace, rate: float) -> TuneSettings:
    """How both sides train."""
    return TuneSettings(
        steps=options.steps,
        batch_size=options.batch_size,
        held_out=options.held_out,
        held_out_samples=options.held_out,
        seed=options.seed,
        learning_rate=rate,
        warmup=0,  # transformers' own begins with a step of rate 0
        keep="last",
        rendering=RenderSettings(max_length=options.max_length),
    )


def main() -> None:
    """Run both and print both."""
    options = options_of(__doc__).parse_args()
    set_up_libraries()
    warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)  # peft asks for it
    settings = settings_of(options, RATES["ptune"])
    checkpoint = open_checkpoint(options.model)
    tokenizer = AutoTokenizer.from_pretrained(checkpoint.tokenizer_source)
    prepared = prepare(tokenizer, settings, load_conversations(options.data)[0])
    with tempfile.TemporaryDirectory() as temporary:
        peft, start = with_peft(checkpoint, settings, prepared, Path(temporary))
        ours = with_corolla(options.model, settings, prepared, Path(temporary), start)
    for name, outcome in (("peft, local", peft), ("corolla, two servers", ours)):
        print(
            f"{name:22} held-out loss of replies {outcome.before.reply_loss:.4f} -> "
            f"{outcome.after.reply_loss:.4f}   {outcome.seconds:.0f} s"
        )
    change = compare(peft.after, ours.after, seed=options.seed)
    print(
        f"corolla minus peft     {change.mean:+.5f} (95 % interval {change.low:+.5f} to {change.high:+.5f})"
    )


if __name__ == "__main__":
    main()
