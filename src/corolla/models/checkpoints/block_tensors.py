"""What some blocks need of a checkpoint, wherever that holds it.

Invariant: nothing else is read. Weights that several blocks have in common are held once, in one of them
(`families.py: tied_weights`): whoever has another of these blocks reads them there.
"""

from __future__ import annotations

import torch
from torch import Tensor

from corolla.models.checkpoints.checkpoint import Checkpoint
from corolla.models.families import block_key_pattern, tied_weights


def tensors_of_blocks(checkpoint: Checkpoint, start: int, end: int, dtype: torch.dtype) -> dict[str, Tensor]:
    """Those of blocks [start, end), counted from `start`, by names as in "0.norm.weight"."""
    pattern = block_key_pattern(checkpoint.config)
    tied = {
        name: source
        for name, source in tied_weights(checkpoint.config).items()
        if start <= int(name.partition(".")[0]) < end
    }
    elsewhere = set(tied.values())  # where a checkpoint holds what several blocks have

    def name_of(key: str) -> str | None:
        match = pattern.match(key)
        return None if match is None else f"{int(match['index'])}.{match['rest']}"

    def wanted(key: str) -> bool:
        name = name_of(key)
        return name is not None and (start <= int(name.partition(".")[0]) < end or name in elsewhere)

    read = {name_of(key): tensor for key, tensor in checkpoint.tensors(wanted, widen_to=dtype).items()}
    found = {name: read[name] for name in read if name is not None}
    found |= {name: found[source] for name, source in tied.items() if name not in found and source in found}
    parted = ((*name.partition(".")[::2], tensor) for name, tensor in found.items())
    return {f"{int(index) - start}.{rest}": one for index, rest, one in parted if start <= int(index) < end}
