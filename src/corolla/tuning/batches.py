"""From conversations to the batches that training and evaluation run on.

Invariant: held-out conversations are never trained on, and the same settings give the same examples in the
same order. Logits are computed only where there is a label: `logits_to_keep` marks these positions, and the
first token of a row, which nothing predicts, never carries one.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from corolla.data.collate import Collator
from corolla.data.conversation import Conversation
from corolla.data.render import Example, Renderer
from corolla.data.split import split_conversations, subsample
from corolla.errors import DataError
from corolla.tuning.settings import TuneSettings

MOST_HELD_OUT = 32  # conversations, unless the user says otherwise


class BatchMaker:
    """A data collator: examples to `input_ids`, `attention_mask`, `labels` and `logits_to_keep`, each [R, T]."""

    def __init__(self, collator: Collator) -> None:
        self._collator = collator

    def __call__(self, examples: Sequence[Example]) -> dict[str, Tensor]:
        batch = self._collator(examples)
        labels = batch["labels"].clone()
        labels[:, 0] = -100
        # Position t predicts token t+1; a bool mask, so that rows may keep different numbers of positions.
        keep = torch.zeros_like(labels, dtype=torch.bool)
        keep[:, :-1] = labels[:, 1:] != -100
        return {
            "input_ids": batch["input_ids"],
            "attention_mask": batch["attention_mask"],
            "labels": labels,
            "logits_to_keep": keep,
        }


@dataclass(frozen=True)
class Prepared:
    """Examples for training and for evaluation, and what makes batches of them."""

    train: list[Example]
    held_out: list[Example]
    batches: BatchMaker
    renderer: Renderer

    def fingerprint(self) -> str:
        """Equal for equal examples in equal order."""
        digest = hashlib.sha256()
        for example in [*self.train, *self.held_out]:
            digest.update(repr((example.input_ids, example.labels)).encode())
        return digest.hexdigest()[:16]


def prepare(tokenizer: Any, settings: TuneSettings, conversations: Sequence[Conversation]) -> Prepared:
    """Split, render and subsample. Raises `DataError` when nothing is left to train or evaluate on."""
    wanted = settings.held_out
    if wanted is None:
        wanted = min(MOST_HELD_OUT, max(1, len(conversations) // 10))
    train, held_out = split_conversations(conversations, held_out=wanted, seed=settings.seed)
    renderer = Renderer(tokenizer, settings.rendering)
    train_examples = _render(renderer, train, "training")
    held_out_examples = _render(renderer, held_out, "evaluation")
    if settings.samples is not None:
        train_examples = subsample(train_examples, settings.samples, settings.seed)
    padding = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    return Prepared(
        train=train_examples,
        held_out=subsample(held_out_examples, settings.held_out_samples, settings.seed),
        batches=BatchMaker(Collator(padding or 0)),
        renderer=renderer,
    )


def _render(renderer: Renderer, conversations: Sequence[Conversation], purpose: str) -> list[Example]:
    examples = [example for conversation in conversations for example in renderer.examples(conversation)]
    examples = [example for example in examples if any(label != -100 for label in example.labels[1:])]
    if not examples:
        raise DataError(
            f"Of {len(conversations)} conversations none gives an example for {purpose}: use more data or a "
            "larger --max-length."
        )
    return examples
