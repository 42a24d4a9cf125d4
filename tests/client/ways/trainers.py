"""Trainers of transformers and TRL: losses of a few steps, which need gradients and not only logits to be right."""

from __future__ import annotations

import tempfile
from typing import Any

import pytest
import torch
import transformers
from packaging.version import Version
from tests.client.ways.libraries import tokenizer
from tests.client.ways.table import Case, Outcome, way
from tests.client.ways.twin import twins
from tests.reference import random_ids

TRAINERS = "Trainers"
STEPS = 3
COMMON: dict[str, Any] = {
    "per_device_train_batch_size": 4,
    "per_device_eval_batch_size": 4,
    "max_steps": STEPS,
    "logging_steps": 1,
    "learning_rate": 0.02,
    "report_to": "none",
    "use_cpu": True,
    "bf16": False,
    "save_strategy": "no",
    "disable_tqdm": True,
    "gradient_checkpointing": False,
}


def sequences() -> list[list[int]]:
    """Sixteen of unequal lengths."""
    return [random_ids(1, 5 + index % 4, seed=index)[0].tolist() for index in range(16)]


def said_by(trainer: Any) -> torch.Tensor:
    """The losses that the trainer prints."""
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(set(losses)) == STEPS, f"nothing is trained: {losses}"
    return torch.tensor(losses)


# --- transformers ----------------------------------------------------------------------------------------------


def _trainer(model: Any, folder: str, side: str = "right", **options: Any) -> Any:
    from transformers import DataCollatorForLanguageModeling, Trainer, TrainingArguments

    compute = options.pop("compute_metrics", None)
    settings = TrainingArguments(output_dir=folder, **{**COMMON, **options})
    rows = [{"input_ids": ids, "attention_mask": [1] * len(ids)} for ids in sequences()]
    collator = DataCollatorForLanguageModeling(tokenizer(side), mlm=False)
    data = {"train_dataset": rows, "eval_dataset": rows[:6]}
    return Trainer(model, settings, data_collator=collator, compute_metrics=compute, **data)


OPTIONS: dict[str, dict[str, Any]] = {
    "`transformers.Trainer`": {},
    "`Trainer` with gradient accumulation": {"gradient_accumulation_steps": 2},
    "`Trainer` with gradient checkpointing": {"gradient_checkpointing": True},
    "`Trainer` with `train_sampling_strategy='group_by_length'`": {
        "train_sampling_strategy": "group_by_length"
    },
    "`Trainer` with `label_smoothing_factor`": {"label_smoothing_factor": 0.1},
}
for _name, _options in OPTIONS.items():

    @way(
        TRAINERS,
        _name,
        refused={"peft prompt": ""} if "smoothing" in _name else None,
        note="peft's logits have the prompt's positions too" if "smoothing" in _name else "",
    )
    def _trained(case: Case, options: dict[str, Any] = _options) -> Outcome:
        old = Version(transformers.__version__) < Version("5.23")
        if old and case.column == "deep_ptune" and "gradient_checkpointing" in options:
            pytest.skip("this release computes the local blocks again without the reference's hooks")
        model, local = twins(case)
        # A local model that checkpoints loses its cache, and with it the prefix; what it does is the same without.
        plainly = {} if case.column == "prefix" and "gradient_checkpointing" in options else options
        with tempfile.TemporaryDirectory() as folder:
            found = said_by(_trainer(model, folder, **options))
            return found, said_by(_trainer(local, folder, **plainly))


@way(TRAINERS, "`Trainer` with padding on the left", refused="With padding in front")
def _trained_left(case: Case) -> Outcome:
    with tempfile.TemporaryDirectory() as folder:
        return said_by(_trainer(twins(case)[0], folder, side="left")), None


@way(TRAINERS, "`Trainer.evaluate` with `compute_metrics`, and `predict`", refused={"peft prompt": ""})
def _evaluated(case: Case) -> Outcome:
    def share(answer: Any) -> dict[str, float]:
        best = answer.predictions[:, :-1].argmax(-1)
        return {"right": float(((best == answer.label_ids[:, 1:]) & (answer.label_ids[:, 1:] >= 0)).mean())}

    found = []
    with tempfile.TemporaryDirectory() as folder:
        for model in twins(case):
            trainer = _trainer(model, folder, compute_metrics=share)
            figures = trainer.evaluate()
            said = trainer.predict(trainer.eval_dataset)
            real = torch.tensor(said.label_ids) >= 0
            found.append(
                (
                    torch.tensor([figures["eval_loss"], figures["eval_right"]]),
                    torch.tensor(said.predictions)[real],
                )
            )
    return found[0], found[1]


# --- TRL -------------------------------------------------------------------------------------------------------


def _sft(model: Any, folder: str, rows: list[dict[str, Any]], **options: Any) -> Any:
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    settings = SFTConfig(output_dir=folder, **{**COMMON, **options})
    return SFTTrainer(
        model, args=settings, train_dataset=Dataset.from_list(rows), processing_class=tokenizer()
    )


def _tuned(case: Case, rows: list[dict[str, Any]], **options: Any) -> Outcome:
    with tempfile.TemporaryDirectory() as folder:
        found, expected = (said_by(_sft(model, folder, rows, **options)) for model in twins(case))
    return found, expected


def _plain_rows() -> list[dict[str, Any]]:
    return [{"input_ids": ids} for ids in sequences()]


@way(TRAINERS, "TRL `SFTTrainer`")
def _sft_plain(case: Case) -> Outcome:
    return _tuned(case, _plain_rows())


@way(TRAINERS, "TRL `SFTTrainer` with `padding_free=True`", note="as sequences by themselves")
def _sft_padding_free(case: Case) -> Outcome:
    return _tuned(case, _plain_rows(), padding_free=True, max_length=None)


@way(TRAINERS, "TRL `SFTTrainer` with `packing=True`", note="as sequences by themselves")
def _sft_packed(case: Case) -> Outcome:
    return _tuned(case, _plain_rows(), packing=True, max_length=16, per_device_train_batch_size=1)


@way(TRAINERS, "TRL `SFTTrainer` with `packing_strategy='wrapped'`", note="borders are not seen, as locally")
def _sft_wrapped(case: Case) -> Outcome:
    return _tuned(
        case,
        _plain_rows(),
        packing=True,
        packing_strategy="wrapped",
        max_length=8,
        per_device_train_batch_size=2,
    )


@way(TRAINERS, "TRL `SFTTrainer` on prompts and completions (`completion_only_loss`)")
def _sft_completions(case: Case) -> Outcome:
    words = tokenizer()
    rows = [
        {"prompt": words.decode(ids[:3]), "completion": " " + words.decode(ids[3:])} for ids in sequences()
    ]
    return _tuned(case, rows, completion_only_loss=True)


@way(TRAINERS, "TRL `SFTTrainer` with masks of what the assistant said")
def _sft_assistant(case: Case) -> Outcome:
    rows = [{"input_ids": ids, "assistant_masks": [0, 0] + [1] * (len(ids) - 2)} for ids in sequences()]
    return _tuned(case, rows, assistant_only_loss=False)


def _dpo(case: Case, **options: Any) -> Outcome:
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    words = tokenizer()
    rows = [
        {
            "prompt": words.decode(ids[:3]),
            "chosen": " " + words.decode(ids[3:]),
            "rejected": " " + words.decode(ids[::-1][:3]),
        }
        for ids in sequences()
    ]

    def losses(model: Any, folder: str) -> torch.Tensor:
        settings = DPOConfig(output_dir=folder, **{**COMMON, **options})
        data = Dataset.from_list(rows)
        return said_by(DPOTrainer(model, args=settings, train_dataset=data, processing_class=words))

    with tempfile.TemporaryDirectory() as folder:
        found, expected = (losses(model, folder) for model in twins(case))
    return found, expected


@way(TRAINERS, "TRL `DPOTrainer`, the reference computed before (`precompute_ref_log_probs`)")
def _dpo_before(case: Case) -> Outcome:
    return _dpo(case, precompute_ref_log_probs=True)


@way(
    TRAINERS,
    "TRL `DPOTrainer`, the reference without the prompt",
    refused=dict.fromkeys(("none", "ptune", "deep_ptune", "prefix"), ""),
)
def _dpo_adapter(case: Case) -> Outcome:
    return _dpo(case)
