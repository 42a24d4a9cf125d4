"""What is timed, in the same words for the distributed model and for the local one.

Invariant: a loop here knows nothing of where the model's blocks are; both sides of a ratio run the same one.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import StoppingCriteria, StoppingCriteriaList

from benchmarks.sizes import DEMO

GREEDY: dict[str, Any] = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}


def token_ids(rows: int, length: int, seed: int = 0) -> Tensor:
    """Random tokens, int64 [rows, length]; equal seeds give equal ones."""
    return torch.randint(10, 40_000, (rows, length), generator=torch.Generator().manual_seed(seed))


class Stamps(StoppingCriteria):  # type: ignore[misc]
    """Notes when each token came (seconds of `time.perf_counter`); `until` may end the reply."""

    def __init__(self, until: Callable[[], bool] = lambda: False) -> None:
        self.times: list[float] = []
        self._until = until

    def __call__(self, input_ids: Tensor, scores: Any, **_kwargs: Any) -> Tensor:
        self.times.append(time.perf_counter())
        return torch.full((input_ids.shape[0],), self._until(), device=input_ids.device)


def generate(model: Any, ids: Tensor | None, tokens: int, **more: Any) -> list[float]:
    """Greedy decoding of `tokens` after `ids` [R, T]; gives the time of each token."""
    stamps = more.pop("stamps", None) or Stamps()
    if ids is not None:
        more["attention_mask"] = torch.ones_like(ids)
    model.generate(
        ids, max_new_tokens=tokens, stopping_criteria=StoppingCriteriaList([stamps]), **GREEDY, **more
    )
    return stamps.times


def decode(model: Any, rows: int, tokens: int, context: int = 16) -> float:
    """Tokens/s of one batch of `rows` from its first new token on, behind `context` tokens a row."""
    times = generate(model, token_ids(rows, context), tokens + 1)
    return rows * tokens / (times[-1] - times[0])


def first_token(model: Any, ids: Tensor, **more: Any) -> float:
    """Seconds from the call to the first new token after `ids` [R, T]."""
    started = time.perf_counter()
    return generate(model, ids, 1, **more)[0] - started


def prefill(model: Any, tokens: int, seed: int = 0) -> float:
    """Tokens/s of a prompt of that many tokens, up to the first new one."""
    return tokens / first_token(model, token_ids(1, tokens, seed))


# --- training -------------------------------------------------------------------------------------------


class Step:
    """A training step of a prompt: zero the gradients, loss, backward, AdamW."""

    def __init__(self, parameters: Sequence[Tensor]) -> None:
        self._optimizer = torch.optim.AdamW(parameters, lr=1e-3)

    def seconds(self, loss: Callable[[], Tensor]) -> float:
        """How long one step takes."""
        started = time.perf_counter()
        self._optimizer.zero_grad()
        torch.autograd.backward(loss())
        self._optimizer.step()
        return time.perf_counter() - started


def dense(model: Any, step: Step, rows: int, length: int) -> float:
    """Tokens/s of a step on rows without padding, a label at every token."""
    ids = token_ids(rows, length)
    return rows * length / step.seconds(lambda: model(input_ids=ids, labels=ids).loss)


def demo_batches(count: int) -> list[dict[str, Tensor]]:
    """The first batches of a shuffled epoch of what `corolla demo` trains on, from the real collator."""
    from transformers import AutoTokenizer

    from corolla.data.render import RenderSettings
    from corolla.data.sources import load_conversations
    from corolla.models.checkpoints.checkpoint import open_checkpoint
    from corolla.tuning.batches import prepare
    from corolla.tuning.settings import TuneSettings

    settings = TuneSettings(
        steps=DEMO.steps,
        batch_size=DEMO.batch,
        held_out=DEMO.held_out,
        held_out_samples=DEMO.held_out,
        rendering=RenderSettings(max_length=DEMO.max_length),
    )
    tokenizer = AutoTokenizer.from_pretrained(open_checkpoint("smollm2").tokenizer_source)
    prepared = prepare(tokenizer, settings, load_conversations("chitchat")[0])
    order = random.Random(0).sample(prepared.train, len(prepared.train))
    return [prepared.batches(order[i * DEMO.batch : (i + 1) * DEMO.batch]) for i in range(count)]


def over_batches(
    step: Step, batches: Sequence[dict[str, Tensor]], loss: Callable[[dict[str, Tensor]], Tensor]
) -> float:
    """Real tokens/s over the batches: padding does not count, the time that it takes does."""
    seconds = 0.0
    for batch in batches:
        seconds += step.seconds(partial(loss, batch))
    return float(sum(int(batch["attention_mask"].sum()) for batch in batches) / seconds)
