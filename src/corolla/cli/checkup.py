"""What `corolla doctor` finds out: tiny models of families split and compared, and speed beside transformers.

Invariant: both sides compute the same on the same device, in the same dtype and by the same loops (`measure.py`);
nothing is known beforehand.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import count
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig

from corolla.cli.local_swarm import local_swarm
from corolla.cli.measure import Step, decode, dense, prefill, sessions, token_ids
from corolla.client.model.causal_lm import AutoDistributedModelForCausalLM
from corolla.errors import UnsupportedFamily, UsageError
from corolla.models.checkpoints.checkpoint import open_checkpoint
from corolla.models.checkpoints.pretrained import load_whole
from corolla.models.checks.selfcheck import check_family
from corolla.models.numerics import DTYPES

VECTORS = 16  # that are trained
NEW, CONTEXT, MANY, ROWS, LENGTH, LONG = 24, 16, 16, 4, 128, 512  # tokens, sessions and rows of what is timed
RUNS = 2  # in turns, after one that does not count; the better of each side counts
# Of the logits' norm: what rounding does, in float32 and in 16 bits.
ROUNDING, ROUNDING_IN_16_BITS = 1e-4, 0.05


@dataclass(frozen=True)
class Finding:
    """One line: what was looked at, whether it is as it should be, and what is said of it."""

    name: str
    good: bool
    said: str


def find_device(name: str) -> torch.device:
    """The device of that name. Raises `UsageError` where nothing can be computed on it."""
    try:
        device = torch.device(name)
        torch.ones(1, device=device).sum().item()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise UsageError(f"--device {name} is not available on this machine.") from error
    return device


def find_dtype(name: str) -> torch.dtype:
    """The dtype of that name. Raises `UsageError`."""
    if name not in DTYPES:
        raise UsageError(f"Unknown dtype {name!r}; use {', '.join(DTYPES)}.")
    return DTYPES[name]


# --- families ---------------------------------------------------------------------------------------------


def compared(families: Sequence[str], device: torch.device) -> Iterator[Finding]:
    """Each family's miniature, cut into spans on a device, beside the whole of it: states, caches, gradients.

    Raises `UsageError` for a family that transformers does not know.
    """
    for family in families:
        config, started = _config(family), time.perf_counter()
        try:
            said = "the same, packed" if check_family(config, device) else "the same, by request"
        except UnsupportedFamily as error:
            yield Finding(family, False, str(error))
        else:
            yield Finding(family, True, f"{said} ({time.perf_counter() - started:.1f} s)")


def _config(family: str) -> Any:
    try:
        return AutoConfig.for_model(family)
    except ValueError as error:
        raise UsageError(
            f"transformers knows no family {family}; give the model_type of a config, such as llama."
        ) from error


# --- speed ------------------------------------------------------------------------------------------------


def beside_transformers(name: str, device: torch.device, dtype: str) -> Iterator[Finding]:
    """A model through a server and a client of this machine: its logits, then its speed.

    Raises `UsageError` for a model or dtype that there is not, `SwarmUnavailable` where the server does not start.
    """
    whole: Any = load_whole(open_checkpoint(name), find_dtype(dtype))
    whole = whole.to(device).eval().requires_grad_(False)
    options = ["--device", str(device)]
    with local_swarm(name, servers=1, dtype=dtype, options=options) as swarm:
        load = partial(
            AutoDistributedModelForCausalLM.from_pretrained,
            *(name,),
            initial_peers=swarm.peers,
            dtype=dtype,
            device_map=str(device),
        )
        ours: Any = load()
        yield _logits(ours, whole)
        yield from _speeds(ours, whole, load(tuning_mode="ptune", pre_seq_len=VECTORS))


@torch.no_grad()
def _logits(ours: Any, whole: Any) -> Finding:
    ids = token_ids(2, CONTEXT, below=whole.config.vocab_size).to(whole.device)
    found, wanted = (one(input_ids=ids).logits.float() for one in (ours, whole))
    difference = float((found - wanted).norm() / wanted.norm())
    most = ROUNDING_IN_16_BITS if whole.dtype.itemsize == 2 else ROUNDING
    return Finding("logits", difference <= most, f"differ by {difference:.1e} of their norm")


def _speeds(ours: Any, whole: Any, tuned: Any) -> Iterator[Finding]:
    new = partial(_new_ids, count(), whole.config.vocab_size)
    prompted = Prompted(whole)
    steps = Step([*tuned.prompts.parameters()]), Step([prompted.vectors])
    works: dict[str, tuple[Callable[[], float], Callable[[], float]]] = {
        "decode, 1 session": (
            lambda: decode(ours, new(1, CONTEXT), NEW),
            lambda: decode(whole, new(1, CONTEXT), NEW),
        ),
        f"decode, {MANY} sessions, beside a batch": (
            lambda: sessions(ours, new(MANY, CONTEXT), NEW),
            lambda: decode(whole, new(MANY, CONTEXT), NEW),
        ),
        f"prefill, {LONG} tokens": (
            lambda: prefill(ours, new(1, LONG)),
            lambda: prefill(whole, new(1, LONG)),
        ),
        f"training step, {ROWS} x {LENGTH} tokens": (
            lambda: dense(tuned, steps[0], new(ROWS, LENGTH)),
            lambda: dense(prompted, steps[1], new(ROWS, LENGTH)),
        ),
    }
    for name, both in works.items():
        runs = [[work() for work in both] for _ in range(1 + RUNS)][1:]
        mine, theirs = map(max, zip(*runs, strict=True))
        yield Finding(name, True, f"{mine:,.1f} tokens/s, transformers {theirs:,.1f}: {mine / theirs:.2f}x")


def _new_ids(seeds: Iterator[int], vocabulary: int, rows: int, length: int) -> Tensor:
    """Tokens of which no server keeps anything."""
    return token_ids(rows, length, next(seeds), below=vocabulary)


class Prompted(nn.Module):
    """A local model behind vectors that are trained, as `ptune` does it."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self._model = model
        self.vectors = nn.Parameter(model.get_input_embeddings().weight[:VECTORS].float().clone())

    @property
    def device(self) -> torch.device:
        """Where it computes."""
        return self.vectors.device

    def forward(self, input_ids: Tensor, labels: Tensor) -> Any:
        """As of a causal model of transformers."""
        embedded = self._model.get_input_embeddings()(input_ids)
        vectors = self.vectors.to(embedded.dtype).expand(len(input_ids), -1, -1)
        labels = nn.functional.pad(labels, (VECTORS, 0), value=-100)
        return self._model(inputs_embeds=torch.cat([vectors, embedded], 1), labels=labels)
