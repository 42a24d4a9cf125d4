"""One run's processes: a swarm of two servers, its clients, the local baselines. Started when first needed.

Invariant: one swarm at a time; while a baseline that needs no swarm runs, the swarm and its clients stand
still.
"""

from __future__ import annotations

import contextlib
import inspect
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Self

from benchmarks.processes import NotMeasured, Worker, only
from benchmarks.sizes import MODEL
from corolla.cli.local_swarm import LocalSwarm, local_swarm
from corolla.cli.main import SPIN_COUNT

# Compute threads spin for a moment, as in every process that the command line starts.
CLIENT_ENV: dict[str, str | None] = {"GOMP_SPINCOUNT": SPIN_COUNT}
# Whether idle threads of a baseline spin (OpenMP's default) or sleep: the one that is faster here is taken.
WAITING: dict[str, dict[str, str | None]] = {
    "spin": {"OMP_WAIT_POLICY": None},
    "sleep": {"OMP_WAIT_POLICY": "PASSIVE"},
}
# The parameter behind each option of `corolla serve` that older versions lack.
SERVE_OPTIONS = {"--quantization": "quantization", "--lease-bytes": "lease_bytes", "--threads": "threads"}
SPIN_GAIN = 1.01  # otherwise spinning is not tried again

Values = tuple[float, ...]


@dataclass
class Pair:
    """One run of a line: `run()` gives the figures' own values and their baselines', in the figures' order.

    `details` are further facts for the JSON line; `run` may add to them.
    """

    run: Callable[[], tuple[Values, Values]]
    details: dict[str, Any] = field(default_factory=dict)
    warm_up: bool = True
    clean_up: Callable[[], None] = lambda: None


@dataclass(frozen=True)
class Options:
    """How a run was asked for."""

    repeats: int = 5
    quick: bool = False
    llama_python: str | None = None


class Bench:
    """What the lines are measured with."""

    def __init__(self, options: Options) -> None:
        self.options = options
        self._swarm: tuple[tuple[str, ...], LocalSwarm] | None = None
        self._stack = contextlib.ExitStack()  # the swarm and its clients
        self._clients: dict[tuple[str | None, ...], Worker] = {}
        self._stack_of_run = contextlib.ExitStack()  # the baselines
        self._baselines: dict[tuple[str, str], Worker] = {}
        self._chosen: dict[tuple[str, str], tuple[str, dict[str, Any]]] = {}

    def size(self, full: int, quick: int) -> int:
        """A number of tokens (or the like), small in a quick run."""
        return quick if self.options.quick else full

    # --- the swarm and its clients ------------------------------------------------------------------------

    def swarm(self, *serve_options: str, model: str = MODEL) -> LocalSwarm:
        """A swarm with these options of `corolla serve`. Raises `NotMeasured` where it has no such option."""
        wanted = (model, *serve_options)
        if self._swarm is None or self._swarm[0] != wanted:
            self.end_swarm()
            _check_serve(serve_options)
            started = local_swarm(model, dtype="float32", options=serve_options)
            self._swarm = wanted, self._stack.enter_context(started)
        return self._swarm[1]

    def client(self, quantization: str | None = None, tuning_mode: str | None = None) -> Worker:
        """The client process of the swarm with that quantization."""
        if quantization is not None:
            _check_client("quantization")
        swarm = self.swarm(*([] if quantization is None else ["--quantization", quantization]))
        key = (quantization, tuning_mode)
        if key not in self._clients:
            self._clients[key] = self.new_client(swarm, quantization=quantization, tuning_mode=tuning_mode)
        return self._clients[key]

    def new_client(self, swarm: LocalSwarm, *, model: str = MODEL, **settings: Any) -> Worker:
        """One more client process, which ends with the swarm."""
        worker = Worker("ours", env=CLIENT_ENV)
        self._stack.callback(worker.close)
        worker.ask("connect", name=model, peers=list(swarm.peers), **settings)
        return worker

    def end_swarm(self) -> None:
        """End the swarm and its clients, if there are any."""
        self._clients.clear()
        self._swarm = None
        self._stack.close()

    # --- baselines ------------------------------------------------------------------------------------------

    def local(self, kind: str, folder: str | None = None) -> tuple[list[Worker], dict[str, Any]]:
        """The processes of the local models that are best at a kind of work, set up for it: see `_fastest`.

        Kinds are those of `workers/local.py`, `folder` is that of a model other than the usual one. Gives what was
        tried, too.
        """
        more: dict[str, Any] = {"tries": self.size(3, 1)} | ({} if folder is None else {"folder": folder})
        named = f"{kind} {folder or ''}"
        return self._fastest("local", named, lambda worker: worker.ask("use", kind=kind, **more))

    def llama(self, path: str) -> tuple[list[Worker], dict[str, Any]]:
        """The same for llama.cpp, in an interpreter of its own. Raises `NotMeasured` when it is not there."""
        use = {"path": path, "threads": cores()}
        return self._fastest("llama", path, lambda worker: worker.ask("use", **use))

    def any_local(self) -> Worker:
        """Some process of the local models."""
        return self._baseline("local", "sleep")

    def _fastest(
        self, module: str, kind: str, use: Callable[[Worker], dict[str, Any]]
    ) -> tuple[list[Worker], dict[str, Any]]:
        self._forget_ended(module)
        if (module, kind) not in self._chosen:
            tried = {}
            for waiting in WAITING:
                worker = self._baseline(module, waiting)
                with only(worker):
                    tried[waiting] = use(worker)
            rates = {waiting: float(about["tokens/s"]) for waiting, about in tried.items()}
            best = "spin" if rates["spin"] > SPIN_GAIN * rates["sleep"] else "sleep"
            self._chosen[module, kind] = best, {"idle threads": best, **tried}
        best, about = self._chosen[module, kind]
        # Spinning gains little on an idle machine and loses most of the speed beside anything else that runs;
        # so sleeping is measured with it every time, and the better one counts.
        return [self._baseline(module, waiting) for waiting in dict.fromkeys((best, "sleep"))], about

    def _forget_ended(self, module: str) -> None:
        """A baseline's process that has ended (for want of memory, say) is started and set up again."""
        ended = [
            key for key, one in self._baselines.items() if key[0] == module and one.process.poll() is not None
        ]
        for key in ended:
            self._baselines.pop(key).close()
        if ended:
            self._chosen = {key: found for key, found in self._chosen.items() if key[0] != module}

    def _baseline(self, module: str, waiting: str) -> Worker:
        if (module, waiting) not in self._baselines:
            python = self.options.llama_python if module == "llama" else None
            worker = Worker(module, python=python or sys.executable, env=WAITING[waiting])
            self._stack_of_run.callback(worker.close)
            self._baselines[module, waiting] = worker
        return self._baselines[module, waiting]

    def beside_local(
        self,
        client: Worker,
        ours: Callable[[], float],
        workers: Sequence[Worker],
        baseline: Callable[[Worker], float],
    ) -> Pair:
        """Ours, then the baseline with everything else standing still: the best of these processes."""

        def run() -> tuple[Values, Values]:
            found = ours()
            beside = []
            for worker in workers:
                with only(worker):
                    beside.append(baseline(worker))
            client.ask("touch")
            return (found,), (max(beside),)

        return Pair(run)

    def beside_transformers(
        self, client: Worker, ours: Callable[[], float], kind: str, do: str, **arguments: Any
    ) -> Pair:
        """As `beside_local`, with a command of the local worker, set up as is best for `kind`.

        A `folder` among the arguments is that of the model.
        """
        workers, about = self.local(kind, arguments.get("folder"))
        client.ask("touch")
        pair = self.beside_local(client, ours, workers, lambda worker: float(worker.ask(do, **arguments)))
        pair.details["baseline"] = about
        return pair

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.end_swarm()
        self._stack_of_run.close()


def _check_serve(options: Sequence[str]) -> None:
    from corolla.cli.serve import serve

    known = inspect.signature(serve).parameters
    for option in options:
        if option in SERVE_OPTIONS and SERVE_OPTIONS[option] not in known:
            raise NotMeasured(f"`corolla serve` has no {option}")


def _check_client(option: str) -> None:
    from corolla import AutoDistributedModelForCausalLM

    if option not in inspect.signature(AutoDistributedModelForCausalLM.from_pretrained).parameters:
        raise NotMeasured(f"from_pretrained has no {option}")


def cores() -> int:
    """How many threads a baseline gets."""
    return os.cpu_count() or 1
