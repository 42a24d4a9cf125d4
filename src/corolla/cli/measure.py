"""What is timed, in the same words for a distributed model and for a local one.

Invariant: nothing here knows where a model's blocks are; both sides of a ratio run the same loop.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor
from transformers import StoppingCriteria, StoppingCriteriaList

GREEDY: dict[str, Any] = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}
KNOWN = (10, 40_000)  # tokens that are drawn; fewer where a vocabulary is smaller
READY_SECONDS = 600.0


def token_ids(rows: int, length: int, seed: int = 0, *, below: int = KNOWN[1]) -> Tensor:
    """Random tokens, int64 [rows, length]; equal seeds give equal ones."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(KNOWN[0], min(below, KNOWN[1]), (rows, length), generator=generator)


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
        ids = ids.to(model.device)
        more["attention_mask"] = torch.ones_like(ids)
    model.generate(
        ids, max_new_tokens=tokens, stopping_criteria=StoppingCriteriaList([stamps]), **GREEDY, **more
    )
    return stamps.times


def decode(model: Any, ids: Tensor, tokens: int) -> float:
    """Tokens/s of one batch of rows behind `ids` [R, T], from its first new token on."""
    times = generate(model, ids, tokens + 1)
    return len(ids) * tokens / (times[-1] - times[0])


def first_token(model: Any, ids: Tensor, **more: Any) -> float:
    """Seconds from the call to the first new token after `ids` [R, T]."""
    started = time.perf_counter()
    return generate(model, ids, 1, **more)[0] - started


def prefill(model: Any, ids: Tensor) -> float:
    """Tokens/s of a prompt [1, T], up to the first new token."""
    return ids.numel() / first_token(model, ids)


def sessions(model: Any, ids: Tensor, tokens: int) -> float:
    """Tokens/s in all of a thread with a session for each row of `ids` [R, T], once all have their first token."""
    ready = threading.Barrier(len(ids) + 1, timeout=READY_SECONDS)

    def work(row: Tensor) -> float:
        try:
            with model.inference_session() as session:
                generate(model, row[None], 1, session=session)
                ready.wait()
                return generate(model, None, tokens, session=session)[-1]
        except BaseException:
            ready.abort()
            raise

    with ThreadPoolExecutor(len(ids)) as pool:
        ends = [pool.submit(work, row) for row in ids]
        try:
            ready.wait()
        except threading.BrokenBarrierError:
            raise_first(ends)
        started = time.perf_counter()
        return len(ids) * tokens / (max(one.result() for one in ends) - started)


def raise_first(ended: Sequence[Any]) -> None:
    """Raise what went wrong first on some threads, not what that made of the others' waiting."""
    errors = [error for one in ended if (error := one.exception()) is not None]
    causes = (error for error in errors if not isinstance(error, threading.BrokenBarrierError))
    if errors:
        raise next(causes, errors[0])


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
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return time.perf_counter() - started


def dense(model: Any, step: Step, ids: Tensor) -> float:
    """Tokens/s of a step on rows `ids` [R, T] without padding, a label at every token."""
    ids = ids.to(model.device)
    return ids.numel() / step.seconds(lambda: model(input_ids=ids, labels=ids).loss)
