"""How well a model predicts held-out replies, and whether training changed that.

Invariant: losses are kept apart by kind of token (what a person said; the marks around it) and by
conversation, so that learning the delimiter does not pass for learning to talk, and two evaluations of the
same examples can be compared pair by pair.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec
import torch
from torch import Tensor

from corolla.client.model.heads import lazy_logits
from corolla.client.model.losses import token_losses
from corolla.data.collate import Collator
from corolla.data.render import NO_LOSS, Example

RESAMPLES = 4000
KINDS = ("reply", "marker")


@dataclass(frozen=True)
class Evaluation:
    """Summed negative log-likelihoods in nats and token counts, by kind and conversation.

    `sums["reply"]["17"] == (12.5, 6)`: the replies of conversation 17 hold 6 tokens and 12.5 nats.
    """

    sums: dict[str, dict[str, tuple[float, int]]]

    @property
    def reply_loss(self) -> float:
        """Mean loss a reply token, in nats."""
        return self._mean("reply")

    @property
    def marker_loss(self) -> float:
        """Mean loss a delimiter or end token, in nats; NaN when there is none."""
        return self._mean("marker")

    @property
    def perplexity(self) -> float:
        """exp of the reply loss."""
        return math.exp(min(self.reply_loss, 700.0))

    @property
    def conversations(self) -> int:
        """How many conversations were evaluated."""
        return len(self.sums["reply"])

    def metrics(self) -> dict[str, float]:
        """The figures as `transformers` names them; a loss that no token has, or that is no number, is left out."""
        figures = {
            "eval_loss": self.reply_loss,
            "eval_perplexity": self.perplexity,
            "eval_marker_loss": self.marker_loss,
        }
        return {name: value for name, value in figures.items() if math.isfinite(value)}

    @staticmethod
    def from_dict(sums: Mapping[str, Any]) -> Evaluation:
        """From `sums` as JSON has them. Raises `msgspec.ValidationError`."""
        return Evaluation(msgspec.convert(sums, dict[str, dict[str, tuple[float, int]]]))

    def _mean(self, kind: str) -> float:
        count = sum(pair[1] for pair in self.sums[kind].values())
        return sum(pair[0] for pair in self.sums[kind].values()) / count if count else math.nan


@dataclass(frozen=True)
class Difference:
    """After minus before, in nats a reply token, with its paired 95 % interval (None for one conversation)."""

    mean: float
    low: float | None
    high: float | None


def evaluate(model: Any, examples: Sequence[Example], batches: Collator, batch_size: int) -> Evaluation:
    """Losses of `model` on `examples`, which are batched by length; the model's mode is left as it was."""
    collected: dict[str, dict[str, list[float]]] = {kind: {} for kind in KINDS}
    was_training = model.training
    model.eval()
    try:
        ordered = sorted(examples, key=lambda example: len(example.input_ids))
        for first in range(0, len(ordered), batch_size):
            batch = ordered[first : first + batch_size]
            losses = _token_losses(model, batches(batch))
            _collect(collected, batch, losses)
    finally:
        model.train(was_training)
    return Evaluation(
        {
            kind: {name: (math.fsum(each), len(each)) for name, each in sorted(by_name.items())}
            for kind, by_name in collected.items()
        }
    )


@torch.no_grad()
def _token_losses(model: Any, batch: dict[str, Tensor]) -> Tensor:
    """The loss of every token that carries one, row after row, at least float32 [n]."""
    batch = {name: tensor.to(model.device) for name, tensor in batch.items()}
    labels = batch.pop("labels")
    with lazy_logits():
        logits = model(**batch, use_cache=False).logits
    return token_losses(logits, flat_targets(labels)).cpu()


def flat_targets(labels: Tensor) -> Tensor:
    """The tokens to predict, in the order of the logits that `logits_to_keep` leaves; int64 [n]."""
    shifted = labels[:, 1:]
    return shifted[shifted != NO_LOSS]


def _collect(collected: dict[str, dict[str, list[float]]], batch: Sequence[Example], losses: Tensor) -> None:
    values = iter(losses.tolist())
    for example in batch:
        for by_name in collected.values():
            by_name.setdefault(example.conversation, [])
        for kind, label in zip(example.kinds[1:], example.labels[1:], strict=True):
            loss = None if label == NO_LOSS else next(values)
            if loss is not None and kind in collected:
                collected[kind][example.conversation].append(loss)


def compare(before: Evaluation, after: Evaluation, *, seed: int = 0) -> Difference:
    """The change of the reply loss, with a bootstrap interval over conversations.

    Conversations, not tokens, are drawn: the tokens of one conversation are not independent.
    """
    names = sorted(before.sums["reply"])
    pairs = [(before.sums["reply"][name], after.sums["reply"][name]) for name in names]
    change = torch.tensor([new[0] - old[0] for old, new in pairs], dtype=torch.float64)
    count = torch.tensor([old[1] for old, _ in pairs], dtype=torch.float64)
    mean = float(change.sum() / count.sum())
    if len(names) < 2:
        return Difference(mean, None, None)
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(len(names), (RESAMPLES, len(names)), generator=generator)
    resampled = change[drawn].sum(dim=1) / count[drawn].sum(dim=1).clamp(min=1.0)
    low, high = torch.quantile(resampled, torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return Difference(mean, low, high)
