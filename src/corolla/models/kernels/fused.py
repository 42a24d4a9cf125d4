"""Frozen layers that read the same input, computed as one.

Invariant: each part gives what it would give alone. The first part that sees an input computes all of them and
keeps the results only until the last of its siblings has asked for its own, with the very same tensor. Like the
span that they belong to, the parts of a group may be used by one thread at a time.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from corolla.models.kernels.linear import FrozenLinear


class Group:
    """One layer [sum of outs, in] behind several parts."""

    def __init__(self, layer: FrozenLinear, sizes: Sequence[int]) -> None:
        self.layer = layer
        self.sizes = list(sizes)
        self._input: Tensor | None = None
        self._with_grad = False
        self._results: dict[int, Tensor] = {}

    def take(self, index: int, value: Tensor) -> Tensor:
        """Part `index` of layer(value)."""
        # The input is held while results wait, so no other tensor can come to stand for it.
        known = self._input is value and self._with_grad == torch.is_grad_enabled()
        if not known or index not in self._results:
            self._input, self._with_grad = value, torch.is_grad_enabled()
            # Each part is asked for once and nobody has the whole, so a family's code may write to its part.
            parts = torch.unsafe_split_with_sizes(self.layer(value), self.sizes, dim=-1)
            self._results = dict(enumerate(parts))
        result = self._results.pop(index)
        if not self._results:
            self._input = None
        return result

    def weight(self, index: int) -> Tensor:
        """A plain copy of part `index` of the weight."""
        return torch.split(self.layer.weight, self.sizes)[index].clone()


class FusedPart(FrozenLinear):
    """One of the layers that a group computes together."""

    def __init__(self, group: Group, index: int) -> None:
        biases = None if group.layer.bias is None else torch.split(group.layer.bias, group.sizes)
        super().__init__(
            group.sizes[index], group.layer.in_features, None if biases is None else biases[index]
        )
        self.group = group
        self._index = index

    @property
    def weight(self) -> Tensor:
        """A plain copy of this part's weight, float32 [out, in]; made anew at each reading."""
        return self.group.weight(self._index)

    def weight_bytes(self) -> int:
        """Memory of this part's weight and bias in bytes."""
        group = self.group
        return group.layer.weight_bytes() * self.out_features // sum(group.sizes)

    def forward(self, input: Tensor) -> Tensor:
        """float32 [..., in] to [..., out]. Raises `UsageError` for another dtype or width."""
        return self.group.take(self._index, input)
