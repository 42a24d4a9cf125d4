"""What an audit asks, and how two answers are compared; no network here.

Invariant: an `Answer` holds all that another needs to be asked the same thing as an ordinary request, so no
server can tell an audit from other work; and what honest servers differ by is within `TOLERANCES`, which
says nothing of how large a lie may be: what is larger than that is found.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from corolla.client.servers import What
from corolla.config import WireFormat
from corolla.models.prompts import GIVEN
from corolla.swarm.directory.routing import Hop


@dataclass(frozen=True)
class Answer:
    """What one server answered, and to what.

    `inputs` are the tensors of a `Forward`, or of a `Backward` without a lease; `claimed` holds `hidden`
    [1, N, H], or `grad` [1, N, H] and perhaps one of `prompts` and `prefix` [blocks, P, D]. `newest` bool [N] says
    which tokens were answered, where the others are only what came before them.
    """

    hop: Hop
    what: What
    inputs: dict[str, Tensor]
    claimed: dict[str, Tensor]
    newest: Tensor | None = None

    @property
    def backward(self) -> bool:
        """Whether gradients were asked for."""
        return self.what == "backward"


class Observer(Protocol):
    """What is told of every answer that a client gets; must be quick, and never raise."""

    def saw(self, make: Callable[[random.Random], Answer | None]) -> None:
        """Where the answer is to be checked, `make` gives it, later than now."""

    async def close(self) -> None:
        """Nothing is asked afterwards."""


# --- Comparing ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Deviation:
    """How far two answers are apart, in parts of what the blocks do to a token: 0.01 is one per cent of it.

    `typical` is the root mean square over tokens but for the farthest tenth, `worst` the largest of one token.
    """

    typical: float
    worst: float

    def within(self, tolerance: Deviation) -> bool:
        """False for anything that is not a number."""
        return self.typical <= tolerance.typical and self.worst <= tolerance.worst

    def times(self, tolerance: Deviation) -> float:
        """How many times the tolerance this is."""
        return max(self.typical / tolerance.typical, self.worst / tolerance.worst)


@dataclass(frozen=True)
class Tolerance:
    """What honest servers may differ by: in outputs, and in gradients, where rounding adds up more."""

    output: Deviation
    gradient: Deviation


# The largest differences of honest servers that benchmarks/audit.py measured on SmolLM2 in spans of 15 blocks,
# typical/worst, of outputs and of gradients:
#   float64   1e-15/1e-15 and 0
#   float32   1.5e-6/9e-6 and 1.4e-5/9e-5; noise of 0.1 % is 175 tolerances
#   half      bfloat16 against float32: 0.016/0.75 and 0.08/0.9
#   8 bits    two alike: 0.06/0.06 in steps, whose compiled passes round otherwise, else 0; machines with our
#             kernels and without, taken for twice as bad as they are: 0.11/0.95 and 0.42/2.8. So a lie of a few per
#             cent, such as one of 15 blocks left out, may pass.
#   4 bits    not measured; rounding is four times as coarse as in 8 bits with one number an activation
# A single token may be far off where numbers are coarse, so there `worst` only finds what is plainly wrong.
TOLERANCES: dict[str, Tolerance] = {
    "float64": Tolerance(Deviation(1e-9, 1e-8), Deviation(1e-9, 1e-8)),
    "float32": Tolerance(Deviation(5e-5, 2e-4), Deviation(2e-4, 1e-3)),
    "half": Tolerance(Deviation(0.05, 2.0), Deviation(0.5, 3.0)),
    "8 bits": Tolerance(Deviation(0.25, 2.5), Deviation(0.8, 6.0)),
    "4 bits": Tolerance(Deviation(0.5, 3.0), Deviation(1.0, 8.0)),
}
_COARSENESS = list(TOLERANCES)


def tolerance_of(kinds: Iterable[str], *, gradient: bool, wire: WireFormat = "compute") -> Deviation:
    """What honest servers of these kinds (`ServerRecord.numerics`) may differ by: that of the coarsest."""
    classes = [_class_of(kind) for kind in kinds]
    if wire != "compute":
        classes.append("8 bits" if wire == "int8" else "half")
    tolerance = TOLERANCES[max(classes, key=_COARSENESS.index)]
    return tolerance.gradient if gradient else tolerance.output


def is_coarser(kind: str, other: str) -> bool:
    """Whether honest servers of a kind may differ by more than those of another."""
    return _COARSENESS.index(_class_of(kind)) > _COARSENESS.index(_class_of(other))


def _class_of(kind: str) -> str:
    dtype, _, quantization = kind.partition("+")
    if quantization:
        return "4 bits" if quantization == "nf4" else "8 bits"
    return dtype if dtype in TOLERANCES else "half"


# A token that the blocks hardly change, or one whose gradient is next to nothing, is measured by this part of
# its own size, or of the others' change: rounding is no smaller than that for any of them.
OWN_SIZE = 0.05
OTHERS = 0.1
# One of so many tokens, the farthest off, does not count for what is typical: where numbers are coarse, honest servers
# are far apart on a token now and then (one that has taken attention in for the others, say).
OUTLIERS = 10


def deviation(answer: Answer, claimed: dict[str, Tensor], reference: dict[str, Tensor]) -> Deviation:
    """How far `claimed` is from `reference`, two answers to what `answer` was asked."""
    given = answer.inputs["grad" if answer.backward else "hidden"]
    name = "grad" if answer.backward else "hidden"
    found = [_apart(*(_rows(one, answer.newest) for one in (claimed[name], reference[name], given)))]
    found += [
        _apart(_rows(claimed[more], None), _rows(reference[more], None), None)
        for more in GIVEN
        if more in reference and more in claimed
    ]
    return Deviation(max(one.typical for one in found), max(one.worst for one in found))


def _rows(tensor: Tensor, chosen: Tensor | None) -> Tensor:
    rows = tensor.detach().reshape(-1, tensor.shape[-1]).double()
    return rows if chosen is None else rows[chosen]


def _apart(claimed: Tensor, reference: Tensor, given: Tensor | None) -> Deviation:
    """For vectors [N, H]; `given` is what the blocks made the reference of."""
    size = reference.norm(dim=-1)
    if given is not None and given.shape != reference.shape:  # more than hidden states
        given = None
    change = size if given is None else (reference - given).norm(dim=-1) + OWN_SIZE * size
    scale = change.clamp_min(OTHERS * float(change.square().mean().sqrt()))
    difference = (claimed - reference).norm(dim=-1)
    each = torch.where(difference == 0, 0.0, difference / scale)
    # Where a number format overflows, honest servers overflow together.
    both = ~claimed.isfinite().all(-1) & ~reference.isfinite().all(-1)
    each = each.masked_fill(both, 0.0).nan_to_num(nan=torch.inf)
    kept = each.sort().values[: len(each) - len(each) // OUTLIERS]
    return Deviation(float(kept.square().mean().sqrt()), float(each.max()))
