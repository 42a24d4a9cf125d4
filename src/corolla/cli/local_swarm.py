"""A swarm on this machine for the duration of one command: a bootstrap peer and some server processes.

Invariant: the processes end with the block, and also when this process is killed: each of them watches a
pipe that only we hold open.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from corolla.cli.saved_swarm import is_local
from corolla.cli.terminal import console
from corolla.errors import SwarmUnavailable, UsageError
from corolla.json_files import load_object
from corolla.models.checkpoints.checkpoint import open_checkpoint
from corolla.swarm.transport.runtime_dir import RuntimeDir

START_SECONDS = 300.0  # a first start may have to convert or download the model
STOP_SECONDS = 15.0


@dataclass(frozen=True)
class LocalSwarm:
    """What the block is given."""

    peers: tuple[str, ...]  # join addresses
    servers: tuple[Child, ...]


class Child:
    """One process of the swarm."""

    def __init__(self, folder: Path, name: str, arguments: Sequence[str]) -> None:
        self.name = name
        self._ready = folder / f"{name}.json"
        self._log = folder / f"{name}.log"
        command = [sys.executable, "-m", "corolla", *arguments]
        with self._log.open("wb") as log:
            self.process = subprocess.Popen(
                [*command, "--ready-file", str(self._ready), "--die-with-parent"],
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=_without_defaults(),
                start_new_session=True,  # Ctrl-C is for us; we end the servers in order
            )

    def about(self) -> dict[str, Any] | None:
        """The content of the ready file, or None as long as the process is not ready.

        Raises `UsageError` or `SwarmUnavailable` with the process's own last words when it has ended.
        """
        if self._ready.exists():
            return load_object(self._ready)
        if self.process.poll() is None:
            return None
        words = self._log.read_text(errors="replace").strip().splitlines()
        last = words[-1].removeprefix("error: ") if words else f"exit code {self.process.returncode}"
        if self.process.returncode == UsageError.exit_code:
            raise UsageError(last)
        raise SwarmUnavailable(f"The local {self.name} did not start: {last}")

    def ask_to_stop(self) -> None:
        """Let the process finish what it does; closing its pipe is what the parent's end would do."""
        with contextlib.suppress(OSError):
            if self.process.stdin is not None:
                self.process.stdin.close()

    def wait_stopped(self, deadline: float) -> None:
        """Wait for the process's end, and force it after the deadline."""
        try:
            self.process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


def _without_defaults() -> dict[str, str]:
    """The environment without what says where another swarm is: this one is for us alone."""
    ours = {name: value for name, value in os.environ.items() if name != "COROLLA_PEERS"}
    return ours | {"COROLLA_CONFIG": os.devnull}


@contextlib.contextmanager
def local_swarm(
    model: str,
    *,
    servers: int = 2,
    dtype: str = "auto",
    options: Sequence[str] = (),
    cache_dir: Path | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> Iterator[LocalSwarm]:
    """Serve all of a model's blocks from `servers` processes on this machine, each with its share of cores.

    `options` are passed to `corolla serve`; `say` gets a line for each process that has become ready. Raises
    `UsageError` or `SwarmUnavailable` when one of them does not.
    """
    if cache_dir is not None:
        options = [*options, "--cache-dir", str(cache_dir)]
    blocks = open_checkpoint(
        model, cache_dir=cache_dir
    ).num_blocks  # a wrong name is found out before anything is started
    servers = min(servers, blocks)
    children: list[Child] = []
    # A folder that a later start removes, should we be killed.
    with contextlib.closing(RuntimeDir()) as folder:
        try:
            deadline = time.monotonic() + START_SECONDS
            bootstrap = Child(folder.path, "bootstrap peer", ["bootstrap"])
            children.append(bootstrap)
            (first,) = _ready([bootstrap], deadline, say)
            address: str = first["addresses"][0]
            for index in range(servers):
                span = f"{index * blocks // servers}:{(index + 1) * blocks // servers}"
                arguments = ["serve", model, "--blocks", span, "--peers", address]
                arguments += ["--dtype", dtype, *options]
                children.append(Child(folder.path, f"server of blocks {span}", arguments))
            _ready(children[1:], deadline, say)
            yield LocalSwarm((address,), tuple(children[1:]))
        finally:
            _stop(children)


@contextlib.contextmanager
def joined(
    peers: Sequence[str], model: str, revision: str | None = None, cache_dir: Path | None = None
) -> Iterator[Sequence[str]]:
    """The addresses to join through; without any, a swarm on this machine for as long as the block lasts."""
    if not is_local(peers):
        yield peers
        return
    options = [] if revision is None else ["--revision", revision]
    with contextlib.ExitStack() as stack:
        with console.status("starting two servers here (the first time takes some minutes) …"):
            swarm = stack.enter_context(local_swarm(model, options=options, cache_dir=cache_dir))
        yield swarm.peers


def _ready(children: Sequence[Child], deadline: float, say: Callable[[str], None]) -> list[dict[str, Any]]:
    """What the processes' ready files say, once all are there; one that ends meanwhile ends the wait."""
    found: dict[str, dict[str, Any]] = {}
    while len(found) < len(children):
        for child in children:
            if child.name not in found and (about := child.about()) is not None:
                found[child.name] = about
                say(f"The {child.name} is ready: process {about['pid']}, peer …{about['peer_id'][-8:]}")
        if time.monotonic() > deadline:
            late = next(child.name for child in children if child.name not in found)
            raise SwarmUnavailable(f"The local {late} was not ready after {START_SECONDS:.0f} s.")
        time.sleep(0.05)
    return [found[child.name] for child in children]


def _stop(children: Sequence[Child]) -> None:
    deadline = time.monotonic() + STOP_SECONDS
    for child in reversed(children):
        child.ask_to_stop()
    for child in reversed(children):
        child.wait_stopped(deadline)
