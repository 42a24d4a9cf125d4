"""Finished runs of `benchmarks.quality`, kept so that what was interrupted goes on, and what several say together."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from corolla.tuning.evaluate import Evaluation


@dataclass(frozen=True)
class Outcome:
    """Held-out losses after training, seconds a step, numbers trained, bytes a step by the tensors' names."""

    after: Evaluation
    step_seconds: float
    numbers: int
    traffic: dict[str, int]


class Lines:
    """Finished runs, each a line of a JSON file; runs of other settings in it are passed over."""

    def __init__(self, path: Path, shared: dict[str, Any]) -> None:
        """`shared` is what all runs of a table have in common."""
        self._path, self._shared = path, shared
        self._found: dict[tuple[str, int], dict[str, Any]] = {}
        for line in path.read_text().splitlines() if path.exists() else ():
            entry = json.loads(line)
            if entry["shared"] == shared:
                self._found[entry["run"], entry["seed"]] = entry

    def __contains__(self, run: tuple[str, int]) -> bool:
        return run in self._found

    def add(self, name: str, seed: int, outcome: Outcome) -> None:
        """One more run, in the file at once."""
        entry = {
            "run": name,
            "seed": seed,
            "shared": self._shared,
            "sums": outcome.after.sums,
            "step_seconds": outcome.step_seconds,
            "numbers": outcome.numbers,
            "traffic": outcome.traffic,
        }
        self._found[name, seed] = entry
        with self._path.open("a") as file:
            file.write(json.dumps(entry) + "\n")

    def all(self, name: str) -> dict[int, dict[str, Any]]:
        """A run's lines by seed."""
        return {seed: entry for (run, seed), entry in self._found.items() if run == name}


def loss_of(entry: dict[str, Any]) -> float:
    """Held-out loss of a run's replies, nats a token."""
    return Evaluation.from_dict(entry["sums"]).reply_loss


def pooled(entries: Sequence[dict[str, Any]]) -> Evaluation:
    """All seeds' losses as one evaluation: a conversation that several seeds held out stays one."""
    sums: dict[str, dict[str, tuple[float, int]]] = {}
    for entry in entries:
        for kind, by_name in Evaluation.from_dict(entry["sums"]).sums.items():
            into = sums.setdefault(kind, {})
            for name, (nats, tokens) in by_name.items():
                earlier = into.get(name, (0.0, 0))
                into[name] = (earlier[0] + nats, earlier[1] + tokens)
    return Evaluation(sums)
