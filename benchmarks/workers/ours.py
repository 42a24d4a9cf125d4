"""A client of the swarm: one distributed model, used as its users use it.

Invariant: what a command times goes through the model's public interface only.
"""

from __future__ import annotations

import itertools
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Any

import torch
from torch import Tensor

from benchmarks.sizes import PROMPT_TOKENS
from benchmarks.workers import loops
from benchmarks.workers.protocol import obey
from corolla.cli import measure
from corolla.cli.measure import token_ids

model: Any = None
_fresh = itertools.count(1000)  # seeds of prompts that no server has seen before


def connect(
    name: str,
    peers: list[str],
    quantization: str | None = None,
    tuning_mode: str | None = None,
    dtype: str = "auto",
) -> None:
    """Load the client's part of the model and join the swarm."""
    global model
    from corolla import AutoDistributedModelForCausalLM
    from corolla.cli.common import set_up_libraries

    set_up_libraries()
    more = {} if quantization is None else {"quantization": quantization}
    model = AutoDistributedModelForCausalLM.from_pretrained(
        name, initial_peers=peers, dtype=dtype, tuning_mode=tuning_mode, pre_seq_len=PROMPT_TOKENS, **more
    )


def touch() -> None:
    """A short call, so that what follows does not pay for what a pause of the servers has cost."""
    measure.generate(model, token_ids(1, 4), 2)


# --- one caller -------------------------------------------------------------------------------------------


def decode(rows: int, tokens: int, context: int = 16) -> float:
    return measure.decode(model, token_ids(rows, context), tokens)


def prefill(tokens: int) -> float:
    return measure.prefill(model, token_ids(1, tokens, next(_fresh)))


def turn(number: int, said: int, reply: int) -> float:
    """Seconds to the first token of a chat's turn, with all turns before it behind it."""
    with model.inference_session() as session:
        for _ in range(number - 1):
            measure.generate(model, token_ids(1, said, next(_fresh)), reply, session=session)
        return measure.first_token(model, token_ids(1, said, next(_fresh)), session=session)


def shared_beginning(shared: int, tail: int) -> list[float]:
    """Seconds to the first token of one session, and of another with the same beginning while that is open."""
    beginning = token_ids(1, shared, next(_fresh))
    sessions = [model.inference_session() for _ in range(2)]
    try:
        return [
            measure.first_token(
                model, torch.cat([beginning, token_ids(1, tail, next(_fresh))], 1), session=session
            )
            for session in sessions
        ]
    finally:
        for session in sessions:
            session.close()


# --- many sessions ----------------------------------------------------------------------------------------


def sessions(count: int, tokens: int) -> float:
    rows = torch.cat([token_ids(1, 16, index) for index in range(count)])
    return measure.sessions(model, rows, tokens)


_held: list[Any] = []


def hold(context: int = 16, count: int = 1) -> None:
    """Open sessions, see to it that each has its first token, and keep them until `drop`."""
    for _ in range(count):
        _held.append(model.inference_session())
        measure.generate(model, token_ids(1, context, next(_fresh)), 1, session=_held[-1])


def more(tokens: int) -> list[float]:
    """Decode in the newest of the held sessions; gives the times of its beginning and its end."""
    started = time.perf_counter()
    return [started, measure.generate(model, None, tokens, session=_held[-1])[-1]]


def drop() -> None:
    while _held:
        _held.pop().close()


class Crowd:
    """Sessions that decode until they are told to stop."""

    def __init__(self, count: int, most: int) -> None:
        self._over = threading.Event()
        self.stamps = [measure.Stamps(self._over.is_set) for _ in range(count)]
        self._pool = ThreadPoolExecutor(count)
        self._ends = [self._pool.submit(self._decode, index, most) for index in range(count)]

    def _decode(self, index: int, most: int) -> None:
        with model.inference_session() as session:
            ids = token_ids(1, 16, index)
            measure.generate(model, ids, most, session=session, stamps=self.stamps[index])

    def stop(self) -> list[list[float]]:
        self._over.set()
        self._pool.shutdown()
        for one in self._ends:
            one.result()
        return [stamps.times for stamps in self.stamps]


_crowds: list[Crowd] = []


def crowd_start(count: int, most: int = 4000) -> None:
    """Gives back control when each session has three tokens."""
    _crowds.append(Crowd(count, most))
    deadline = time.monotonic() + 120
    while min(len(stamps.times) for stamps in _crowds[-1].stamps) < 3 and time.monotonic() < deadline:
        time.sleep(0.01)


def crowd_stop() -> list[list[float]]:
    """The times of each session's tokens."""
    return _crowds.pop().stop()


def intrude(tokens: int) -> list[float]:
    """Send a long prompt; gives the times of its beginning and of its first token."""
    started = time.perf_counter()
    measure.first_token(model, token_ids(1, tokens, next(_fresh)))
    return [started, time.perf_counter()]


# --- training ---------------------------------------------------------------------------------------------


@cache
def training_step() -> measure.Step:
    model.train()
    return measure.Step(list(model.prompts.parameters()))


@cache
def batches(count: int) -> list[dict[str, Tensor]]:
    return loops.demo_batches(count)


def train(rows: int, length: int) -> float:
    return measure.dense(model, training_step(), token_ids(rows, length))


def chitchat(count: int) -> float:
    """Real tokens/s with the trainer's own loss, over the same batches as the baseline's."""
    return loops.over_batches(training_step(), batches(count), _loss)


def _loss(batch: dict[str, Tensor]) -> Tensor:
    from corolla.tuning.trainer import summed_loss

    inputs = {name: batch[name] for name in ("input_ids", "attention_mask", "logits_to_keep")}
    return summed_loss(model(**inputs), batch["labels"])


if __name__ == "__main__":
    commands = (connect, touch, decode, prefill, turn, shared_beginning, sessions, hold, more, drop)
    others = (crowd_start, crowd_stop, intrude, train, chitchat)
    obey({command.__name__: command for command in (*commands, *others)})
