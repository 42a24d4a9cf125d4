"""A crowd on real processes: chats and tuning at once, while servers are killed and started again.

Two stages with a replica each. The victim is always the busier server of its stage, so that every kill hits
somebody; it comes back at once, as another peer.
"""

from __future__ import annotations

import itertools
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import psutil
from tests.e2e.processes import Process, Processes, environment

STAGES = ("0:2", "2:4")
SAMPLE_SECONDS = 1.0
WARM_UP_SECONDS = 20.0  # of a process's life, in which libraries still fill caches of their own


@dataclass
class Seen:
    """What one run has shown."""

    seconds: float
    kills: int = 0
    tokens: list[int] = field(default_factory=list)  # of each chat
    steps: dict[str, int] = field(default_factory=dict)  # of each tuning mode
    ties: int = 0
    longest_wait: float = 0.0  # seconds for a whole reply
    errors: list[str] = field(default_factory=list)
    slopes: dict[str, float] = field(default_factory=dict)  # MB a minute, of each process that lived long

    @property
    def slowest_share(self) -> float:
        """What the slowest chat got, as a fraction of the median."""
        return min(self.tokens) / statistics.median(self.tokens)

    def as_dict(self) -> dict[str, Any]:
        """Plain values, and the same in words."""
        plain = {name: value for name, value in asdict(self).items() if name not in ("tokens", "errors")}
        totals = {"chats": len(self.tokens), "tokens": sum(self.tokens), "slowest": self.slowest_share}
        return {**plain, **totals, "words": self.report()}

    def report(self) -> str:
        """The figures, for whoever reads the test's output."""
        slopes = ", ".join(f"{name} {slope:+.2f}" for name, slope in sorted(self.slopes.items()))
        return (
            f"{len(self.tokens)} chats said {sum(self.tokens)} tokens in {self.seconds:.0f} s beside "
            f"{self.steps} training steps; {self.kills} servers killed, {len(self.errors)} errors; slowest chat "
            f"{self.slowest_share:.2f} of the median; longest reply {self.longest_wait:.1f} s; {self.ties} ties; "
            f"memory, MB a minute: {slopes or 'nobody lived long enough'}"
        )


class Memory:
    """Resident memory of processes over time."""

    def __init__(self) -> None:
        self._samples: dict[str, list[tuple[float, float]]] = {}
        self._born: dict[str, float] = {}

    def sample(self, name: str, pid: int) -> None:
        try:
            megabytes = psutil.Process(pid).memory_info().rss / 1e6
        except psutil.Error:
            return
        now = time.monotonic()
        if now - self._born.setdefault(name, now) > WARM_UP_SECONDS:
            self._samples.setdefault(name, []).append((now / 60, megabytes))

    def slopes(self, least_seconds: float) -> dict[str, float]:
        """MB a minute of all that were watched for so long."""
        return {
            name: statistics.linear_regression(*zip(*samples, strict=True)).slope
            for name, samples in self._samples.items()
            if 60 * (samples[-1][0] - samples[0][0]) >= least_seconds
        }


class Crowd:
    """The swarm and its clients."""

    def __init__(self, started: Processes, model: Path, *, cache_tokens: int) -> None:
        self._started = started
        self._model = model
        self._numbers = itertools.count()
        self._bootstrap = started.start("bootstrap", "bootstrap").wait_ready()
        self._options = ("--peers", self._bootstrap.address, "--cache-tokens", str(cache_tokens))
        self._stages = [[self._serve(stage) for _ in range(2)] for stage in STAGES]
        for server in itertools.chain(*self._stages):
            server.wait_ready()

    def _serve(self, stage: str) -> Process:
        name = f"server-{next(self._numbers)}"
        return self._started.start(name, "serve", str(self._model), "--blocks", stage, *self._options)

    def run(
        self, *, seconds: float, clients: Sequence[Sequence[str]], kill_every: float, slope_seconds: float
    ) -> Seen:
        """`clients` are the last arguments of each client process (see `load_client`)."""
        command = [sys.executable, "-m", "tests.e2e.load_client", str(self._model), self._bootstrap.address]
        pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        running = [
            subprocess.Popen([*command, str(seconds), *more], env=environment(), **pipes) for more in clients
        ]
        try:
            for client in running:
                assert json.loads(client.stdout.readline())["ready"]
            for client in running:
                print("go", file=client.stdin, flush=True)
            seen, memory = Seen(seconds), Memory()
            self._disturb(running, seen, memory, time.monotonic() + seconds, kill_every)
            for client in running:
                _add(seen, json.loads(client.stdout.readline()))
                assert client.wait(60) == 0
            for server in itertools.chain(*self._stages):
                server.wait_ready()  # whoever was started again has come back
            seen.slopes = memory.slopes(slope_seconds)
            return seen
        finally:
            for client in running:
                client.kill()
                client.communicate()

    def _disturb(
        self, clients: list[Any], seen: Seen, memory: Memory, until: float, kill_every: float
    ) -> None:
        """Kill a server now and then, and watch everybody's memory."""
        next_kill = time.monotonic() + kill_every
        while time.monotonic() < until:
            for number, client in enumerate(clients):
                memory.sample(f"client {number}", client.pid)
            for server in itertools.chain(*self._stages):
                memory.sample(server.ready_path.stem, server.popen.pid)
            stage = self._stages[seen.kills % len(STAGES)]
            if time.monotonic() >= next_kill and all(server.ready_path.exists() for server in stage):
                self._kill_busier(seen.kills % len(STAGES))
                seen.kills += 1
                next_kill += kill_every
            time.sleep(SAMPLE_SECONDS)

    def _kill_busier(self, stage: int) -> None:
        servers = self._stages[stage]
        before = [_cpu_seconds(server) for server in servers]
        time.sleep(SAMPLE_SECONDS)
        worked = [_cpu_seconds(server) - seconds for server, seconds in zip(servers, before, strict=True)]
        victim = servers[worked.index(max(worked))]
        victim.popen.kill()
        victim.popen.wait()
        servers[servers.index(victim)] = self._serve(STAGES[stage])


def _cpu_seconds(server: Process) -> float:
    return sum(psutil.Process(server.popen.pid).cpu_times()[:2])


def _add(seen: Seen, client: dict[str, Any]) -> None:
    seen.tokens += client["tokens"].values()
    seen.steps |= client["steps"]
    seen.ties += client["ties"]
    seen.longest_wait = max(seen.longest_wait, client["longest_wait"])
    seen.errors += client["errors"]
