"""How one weight of a model comes from the tensors that a quantized checkpoint stores for it.

Invariant: a weight is made from its own few tensors alone, one weight at a time; what is missing or does not fit
together is one sentence, raised by the headers, before a weight is read, where they can tell.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from corolla.models.checkpoints.shards import TensorEntry

Entries = Mapping[str, TensorEntry]  # by role
Parts = Mapping[str, Tensor]  # by role


class Unfit(ValueError):
    """Stored tensors that do not belong together: a clause of a sentence that names the weight."""


@dataclass(frozen=True)
class Layout:
    """One way to store a weight."""

    parts: Mapping[
        str, str
    ]  # by role what a stored tensor's name ends in, after what all of a weight's share
    marker: str  # the role whose presence says that a weight is stored in this way
    target: str  # what the weight's own name ends in
    shape: Callable[[Entries], tuple[int, ...]]  # of the weight; raises `Unfit`
    widen: Callable[[Parts, torch.dtype], Tensor]  # the weight itself; raises `Unfit`
    optional: frozenset[str] = frozenset()  # roles that a weight may lack
    main: str = ""  # without this role, what looks like the marker is another tensor


@dataclass(frozen=True)
class Recipe:
    """What one tensor of the model is made of."""

    name: str  # its key in an unquantized checkpoint
    parts: Mapping[str, str]  # keys in this checkpoint, by role
    layout: Layout | None = None  # None: it is stored as it is
    missing: tuple[str, ...] = ()  # keys that it needs and the checkpoint has not

    def shape(self, entries: Entries) -> tuple[int, ...]:
        """The tensor's shape, from the headers of its parts. Raises `Unfit`."""
        return entries[AS_IT_IS].shape if self.layout is None else self.layout.shape(entries)


AS_IT_IS = "tensor"  # the one role of a tensor that is stored so


def recipes(keys: Iterable[str], layouts: Iterable[Layout], dropped: tuple[str, ...]) -> list[Recipe]:
    """The model's tensors that the keys of a checkpoint hold.

    `dropped` are ends of keys that nothing is made of (scales of activations, of caches).
    """
    known = set(keys)
    taken: set[str] = set()
    found: list[Recipe] = []
    for layout in layouts:
        end = layout.parts[layout.marker]
        for key in sorted(one for one in known if one.endswith(end)):
            shared = key.removesuffix(end)
            named = {role: shared + ending for role, ending in layout.parts.items()}
            if key in taken or (layout.main and named[layout.main] not in known):
                continue
            there = {role: one for role, one in named.items() if one in known}
            needed = [role for role in named if role not in there and role not in layout.optional]
            found.append(Recipe(shared + layout.target, there, layout, tuple(named[role] for role in needed)))
            taken.update(there.values())
    plain = (key for key in known - taken if not key.endswith(dropped))
    return sorted([*found, *(Recipe(key, {AS_IT_IS: key}) for key in plain)], key=lambda one: one.name)
