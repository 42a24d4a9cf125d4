"""Batches without padding: several sequences behind each other in a row, told apart by position ids.

Invariant: what comes out equals what each sequence gives by itself, a soft prompt in front of each; they are
computed as the rows of an ordinary batch, whose padding never reaches a server.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence


@dataclass(frozen=True)
class FlatRows:
    """Which stretches of a batch [R, T] are sequences: rows, first tokens and lengths, in order."""

    shape: tuple[int, int]
    stretches: tuple[tuple[int, int, int], ...]

    @classmethod
    def of(cls, positions: Tensor, rows: int) -> FlatRows:
        """By position ids [R or 1, T]."""
        length = int(positions.shape[-1])
        found = []
        for row, ids in enumerate(positions.expand(rows, -1)):
            borders = ((ids.diff() != 1).nonzero().flatten() + 1).tolist()
            for start, end in zip([0, *borders], [*borders, length], strict=True):
                found.append((row, start, end - start))
        return cls((rows, length), tuple(found))

    def split(self, batch: Tensor) -> Tensor:
        """[R, T, …] to one sequence a row [n, L, …], zeros behind the shorter ones."""
        parts = [batch[row, start : start + count] for row, start, count in self.stretches]
        return pad_sequence(parts, batch_first=True)

    def mask(self) -> Tensor:
        """The padding mask [n, L] of what `split` gives."""
        lengths = torch.tensor([count for _, _, count in self.stretches])
        return (torch.arange(int(lengths.max())) < lengths[:, None]).long()

    def join(self, split: Tensor) -> Tensor:
        """What `split` took apart, [n, L, …] to [R, T, …]."""
        parts = [split[index, :count] for index, (_, _, count) in enumerate(self.stretches)]
        return torch.cat(parts).reshape(*self.shape, *split.shape[2:])

    def split_call(self, named: dict[str, Any]) -> None:
        """Rewrite a base model's arguments: one sequence a row, and padding behind the shorter ones."""
        for name in ("input_ids", "inputs_embeds", "position_ids"):
            value = named.get(name)
            if value is not None:
                whole = value.expand(self.shape) if name == "position_ids" else value
                named[name] = self.split(whole)
                device = value.device
        named["attention_mask"] = self.mask().to(device)
