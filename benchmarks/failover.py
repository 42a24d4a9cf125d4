"""How long a chat stands still when a server is killed or hangs and a replica is up: real processes and signals.

Invariant: every server that was started has ended when a measurement returns.
"""

from __future__ import annotations

import contextlib
import logging
import signal
import statistics
import time
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from corolla.cli.local_swarm import Child
from corolla.client.model.causal_lm import AutoDistributedModelForCausalLM
from corolla.models.checkpoints.checkpoint import open_checkpoint
from corolla.swarm.transport.runtime_dir import RuntimeDir

START_SECONDS = 180.0
SETTLING = 16  # steps before and after the fault that tell what a step takes


@contextlib.contextmanager
def replicated(model: str, replicas: int) -> Iterator[tuple[str, dict[str, Child]]]:
    """Two stages of `model` with so many servers each: a join address, and the servers by their peer ids."""
    blocks = open_checkpoint(model).num_blocks
    children: list[Child] = []
    with contextlib.closing(RuntimeDir()) as folder:
        try:
            children.append(Child(folder.path, "bootstrap", ["bootstrap"]))
            address = str(_ready(children[:1])[0]["addresses"][0])
            for index in range(2 * replicas):
                span = f"0:{blocks // 2}" if index % 2 else f"{blocks // 2}:{blocks}"
                arguments = ["serve", model, "--blocks", span, "--peers", address, "--dtype", "float32"]
                children.append(Child(folder.path, f"server-{index}", arguments))
            peers = [str(about["peer_id"]) for about in _ready(children[1:])]
            yield address, dict(zip(peers, children[1:], strict=True))
        finally:
            for child in children:
                child.process.send_signal(signal.SIGCONT)
                child.ask_to_stop()
            for child in children:
                child.wait_stopped(time.monotonic() + 15.0)


def _ready(children: Sequence[Child]) -> list[dict[str, Any]]:
    deadline = time.monotonic() + START_SECONDS
    while any(child.about() is None for child in children):
        if time.monotonic() > deadline:
            raise TimeoutError("A server was not ready in time.")
        time.sleep(0.05)
    return [about for child in children if (about := child.about()) is not None]


class _Noticed(logging.Handler):
    """When the client found out that something failed; a retry without waiting is told at level INFO."""

    def __init__(self) -> None:
        super().__init__(logging.INFO)
        self.moments: list[float] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.moments.append(time.perf_counter())

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        """Hear the client's retries while the body runs."""
        log = logging.getLogger("corolla.client.retry")
        level = log.level
        log.setLevel(logging.INFO)
        log.addHandler(self)
        try:
            yield
        finally:
            log.removeHandler(self)
            log.setLevel(level)


class _Strike:
    """A logits processor that notes every step and, after `at` of them, sends a signal to a server in use."""

    def __init__(self, session: Any, servers: dict[str, Child], at: int, number: signal.Signals) -> None:
        self._session, self._servers, self._at, self._number = session, servers, at, number
        self.moments: list[float] = []

    def __call__(self, ids: Tensor, scores: Tensor) -> Tensor:
        self.moments.append(time.perf_counter())
        if len(self.moments) == self._at:
            victim = self._session.hops[-1].peer_id
            self._servers[victim].process.send_signal(self._number)
            self.moments[-1] = time.perf_counter()
        return scores

    def report(self, noticed: Sequence[float]) -> dict[str, float]:
        """Seconds: from the signal to the failure's notice, from there to the next token, and an ordinary step."""
        fault = self.moments[self._at - 1]
        found = min(moment for moment in noticed if moment > fault)
        gaps = [b - a for a, b in zip(self.moments, self.moments[1:], strict=False)]
        around = gaps[self._at - SETTLING : self._at - 1] + gaps[self._at : self._at + SETTLING]
        return {
            "noticed": found - fault,
            "recovered": self.moments[self._at] - found,
            "stood still": self.moments[self._at] - fault,
            "step": statistics.median(around),
        }


def measure(model: str, number: signal.Signals, *, length: int) -> dict[str, float]:
    """One fault after `length` tokens of a chat, a replica being up; seconds by name.

    "replay" is what the lost server's share of these tokens takes when a session begins with them.
    """
    noticed = _Noticed()
    with replicated(model, 2) as (address, servers):
        loaded = AutoDistributedModelForCausalLM.from_pretrained(
            model, initial_peers=[address], dtype=torch.float32
        )
        loaded.generation_config.eos_token_id = None
        loaded.generation_config.pad_token_id = 0
        with contextlib.closing(loaded), noticed.listening():
            return _measure(loaded, servers, number, length, noticed)


def _measure(
    model: Any, servers: dict[str, Child], number: signal.Signals, length: int, noticed: _Noticed
) -> dict[str, float]:
    ids = torch.randint(3, 250, (1, length - SETTLING), generator=torch.Generator().manual_seed(0))
    with model.inference_session() as session:
        strike = _Strike(session, servers, SETTLING + 1, number)
        tokens = 2 * SETTLING + 4
        model.generate(
            ids, max_new_tokens=tokens, do_sample=False, session=session, logits_processor=[strike]
        )
        whole: Tensor = session.output_ids[:, :length]
    return strike.report(noticed.moments) | {"replay": _prefill_seconds(model, whole) / 2}


@torch.no_grad()
def _prefill_seconds(model: Any, ids: Tensor) -> float:
    """What the blocks of both stages take for these tokens, without the head: the shortest of three passes.

    The first may ask the server again that was lost.
    """
    hidden, times = model.get_input_embeddings()(ids), []
    for _ in range(3):
        started = time.perf_counter()
        model.blocks[0 : model.config.num_hidden_layers](hidden)
        times.append(time.perf_counter() - started)
    return min(times)
