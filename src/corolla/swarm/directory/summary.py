"""What a directory's records say together: models, and what of them nobody serves.

Invariant: what is said is what the records say, nothing is guessed; where they do not agree on a model's size or name,
most of them decide.
"""

from __future__ import annotations

from collections.abc import Sequence
from statistics import mode
from typing import Any

import msgspec

from corolla.swarm.directory.directory import ServerRecord
from corolla.swarm.directory.routing import ranges, uncovered


def by_model(records: Sequence[ServerRecord]) -> dict[str, list[ServerRecord]]:
    """The records of each model that agree with most of them on its number of blocks; models with most first."""
    groups: dict[str, list[ServerRecord]] = {}
    for record in records:
        groups.setdefault(record.model, []).append(record)
    for model, group in groups.items():
        size = mode(record.num_blocks for record in group)
        groups[model] = [record for record in group if record.num_blocks == size]
    return dict(sorted(groups.items(), key=lambda one: (-len(one[1]), one[0])))


def missing_blocks(records: Sequence[ServerRecord]) -> list[tuple[int, int]]:
    """Ranges [start, end) of one model's blocks that no serving record covers."""
    serving = [record for record in records if record.state == "serving"]
    return ranges(uncovered(serving, 0, records[0].num_blocks))


def as_plain(records: Sequence[ServerRecord]) -> dict[str, Any]:
    """The map as JSON: servers, and for each model the ranges that nobody serves."""
    return {
        "servers": [msgspec.to_builtins(record) for record in records],
        "models": [
            {
                "model": model,
                "name": mode(record.model_name for record in group),
                "blocks": group[0].num_blocks,
                "missing": missing_blocks(group),
            }
            for model, group in by_model(records).items()
        ],
    }
