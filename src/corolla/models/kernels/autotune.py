"""Which backend multiplies the quickest on this machine: each is tried, and what was found is kept in the cache.

Invariant: a shape of weights has the same backends for as long as the process lives, so the same rows give the same
bits. Trying ends when its time is over; what was not found out by then, or not clearly, is done by the default ones.
Whatever is wrong with the cache costs the time to try again, at most.
"""

from __future__ import annotations

import hashlib
import math
import os
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from corolla.errors import CorollaError
from corolla.files import write_json
from corolla.json_files import JsonError, load_object
from corolla.models.kernels.linear import (
    BACKENDS,
    BOUNDS,
    Backend,
    Backends,
    NarrowLinear,
    PackedLinear,
    default_backends,
    is_packable,
)
from corolla.models.kernels.narrow import OUTPUTS, Narrow, as_it_is
from corolla.models.kernels.native import cpu, version
from corolla.places import cache_root
from corolla.text import get_logger

log = get_logger(__name__)

SECONDS = 1.0  # for all shapes that are loaded together
SHARE = 0.3  # of what is left of them, for one shape
LEAST = 2**16  # smaller weights are multiplied by the default ones: there is nothing to win
SAMPLES = (2**22, 2**20)  # weights of a larger one that are tried, with few rows and with many
TRIED = (1, 4, 16, 64, 256)  # rows, one number for each class of `linear.BOUNDS`
FROM_MEMORY = 7  # rows up to which what takes the time is reading the weights, as a rule from memory
ROUNDS = 3
MARGIN = 0.07  # by so much a backend has to be quicker than the default
NOISE = 0.5  # by so much the two best rounds may differ in what is kept for the next start
CACHES = 2**25  # bytes that are read so that a CPU's caches hold something else
# By which the libraries can be told to take a CPU for an older one.
LIMITS = ("COROLLA_ISA", "ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA", "MKL_ENABLE_INSTRUCTIONS")

# Seconds: by backend, by class of rows (the last: a gradient), by round.
Times = dict[Backend | str, list[list[float]]]


class Autotuner:
    """The time that there is for the weights which are loaded together."""

    def __init__(self, seconds: float = SECONDS, known: dict[str, Backends] | None = None) -> None:
        """`known` is what was decided already, by shape; left out: what this process has decided."""
        self._left = seconds
        self._known = _KNOWN if known is None else known

    def backends(self, narrow: Narrow) -> Backends:
        """The backends for a weight, tried here or before."""
        own = narrow.has_kernel
        if narrow.shape[0] * narrow.shape[1] < LEAST or not is_packable(narrow.values.device, torch.float32):
            return default_backends(own)
        name = _name(narrow)
        with _lock:
            if name not in self._known:
                self._known[name] = self._find(name, narrow)
            return self._known[name]

    def _find(self, name: str, narrow: Narrow) -> Backends:
        kept = _read(name, own=narrow.has_kernel)
        if kept is not None:
            log.info("Products of %s: %s (tried before)", name, kept)
            return kept
        started = time.perf_counter()
        times = _tried(narrow, until=started + SHARE * self._left)
        took = time.perf_counter() - started
        self._left -= took
        if times is None:
            log.info("Products of %s: as usual, there was no time to try others", name)
            return default_backends(narrow.has_kernel)
        found = best(times, default_backends(narrow.has_kernel))
        log.info("Products of %s: %s (tried for %.2f s)", name, found, took)
        if is_clear(times):
            _write(name, found)
        return found


def backends_for(weight: Tensor) -> Backends:
    """The backends for a plain weight [out, in] of any kind, where torch alone knows others than float32 on a CPU."""
    if not is_packable(weight.device, weight.dtype):
        return default_backends(own=False)
    return Autotuner().backends(as_it_is(weight))


_lock = threading.Lock()
_KNOWN: dict[str, Backends] = {}


def _name(narrow: Narrow) -> str:
    """Weights of the same name take the same time."""
    rows, columns = narrow.shape
    steps = (
        "" if narrow.steps is None else f"-{narrow.steps.dtype}-{narrow.steps.shape[1]}".replace("torch.", "")
    )
    return f"{rows}x{columns}-{narrow.form}{steps}{'' if narrow.offsets is None else '-offsets'}"


# --- trying -----------------------------------------------------------------------------------------------


def _tried(narrow: Narrow, until: float) -> Times | None:
    """The times of all backends, or None where the time was over before each had two rounds."""
    few, many = (_layers(_part(narrow, numbers)) for numbers in SAMPLES)
    times: Times = {backend: [[] for _ in range(len(TRIED) + 1)] for backend in few}
    others = torch.zeros(CACHES // 4, dtype=torch.float32)
    works = []
    for at, rows in enumerate(TRIED):
        value = torch.ones(rows, narrow.shape[1], dtype=torch.float32)
        layers = few if rows <= FROM_MEMORY else many
        works += [(backend, at, partial(layer.multiply, value)) for backend, layer in layers.items()]
    for backend, layer in many.items():
        if backend != "own":
            gradient = torch.ones(TRIED[-1], layer.out_features, dtype=torch.float32)
            works.append((backend, len(TRIED), partial(layer.multiply_back, gradient)))
    with torch.inference_mode():
        for done in range(-1, ROUNDS):  # in the first, memory is asked for and kernels are made
            for backend, at, work in works:
                if time.perf_counter() > until:
                    return times if done >= 2 else None
                if at < len(TRIED) and TRIED[at] <= FROM_MEMORY:
                    others.sum()
                seconds = _timed(work)
                if done >= 0:
                    times[backend][at].append(seconds)
    return times


def _part(narrow: Narrow, numbers: int) -> Narrow:
    """About so many of the weights, as a narrower layer's."""
    rows, columns = narrow.shape
    return narrow.beginning(min(rows, max(OUTPUTS, numbers // columns // OUTPUTS * OUTPUTS)))


def _layers(narrow: Narrow) -> dict[Backend | str, NarrowLinear | PackedLinear]:
    """The weight as a layer that multiplies in one backend, for each backend that there is."""
    backends = [backend for backend in BACKENDS if backend != "own" or narrow.has_kernel]
    layers: dict[Backend | str, NarrowLinear | PackedLinear] = {
        backend: NarrowLinear(narrow, backends=Backends((backend,) * len(TRIED), backend))
        for backend in backends
    }
    # A weight in oneDNN's layout keeps blocks from being compiled, so it is for machines where none are.
    if narrow.form == "float32" and not narrow.has_kernel:
        layers["packed"] = PackedLinear(narrow.values)
    return layers


def _timed(work: Callable[[], Tensor]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def best(times: Times, before: Backends) -> Backends:
    """The backends by these times; the default ones unless others are clearly quicker."""

    def quickest(at: int, before: Backend) -> Backend:
        least = {
            backend: min(times[backend][at])
            for backend in BACKENDS
            if times.get(backend, [[]] * (at + 1))[at]
        }
        first = min(least, key=lambda backend: least[backend])
        return first if least[first] < (1 - MARGIN) * least[before] else before

    classes = range(len(TRIED))
    forward = tuple(quickest(at, before.forward[at]) for at in classes)
    found = Backends(forward, quickest(len(TRIED), before.backward))
    if "packed" in times:
        ratios = [min(times["packed"][at]) / min(times[found.forward[at]][at]) for at in classes]
        packed = math.prod(ratios) ** (1 / len(ratios)) < 1 - MARGIN
        return Backends(found.forward, found.backward, packed=packed)
    return found


def is_clear(times: Times) -> bool:
    """Whether nothing else can have kept the CPU busy for the most part."""
    rounds = [sorted(own) for backend in times.values() for own in backend if own]
    return all(len(own) == ROUNDS and own[1] <= (1 + NOISE) * own[0] for own in rounds)


# --- the cache --------------------------------------------------------------------------------------------


def _file(name: str) -> Path:
    about = [
        cpu(),
        torch.__version__,
        version(),
        torch.backends.cpu.get_cpu_capability(),
        torch.get_num_threads(),
    ]
    about += [os.environ.get(limit, "") for limit in LIMITS]
    machine = hashlib.sha256(repr(about).encode()).hexdigest()[:16]
    return cache_root() / "autotune" / machine / f"{name}.json"


def _read(name: str, *, own: bool) -> Backends | None:
    """What was found before, or None."""
    try:
        content = load_object(_file(name))
    except (JsonError, OSError, CorollaError):
        return None
    forward, backward, packed = (content.get(one) for one in ("forward", "backward", "packed"))
    possible = [backend for backend in BACKENDS if own or backend != "own"]
    if not isinstance(forward, list) or len(forward) != len(BOUNDS) + 1 or backward == "own":
        return None
    if not all(one in possible for one in (*forward, backward)) or not isinstance(packed, bool):
        return None
    return None if packed and own else Backends(tuple(forward), backward, packed)  # type: ignore[arg-type]


def _write(name: str, backends: Backends) -> None:
    content = {"forward": list(backends.forward), "backward": backends.backward, "packed": backends.packed}
    try:
        file = _file(name)
        file.parent.mkdir(parents=True, exist_ok=True)
        write_json(file, content)
    except (OSError, CorollaError) as error:
        log.info("What was found out about products is not kept: %s", error)
