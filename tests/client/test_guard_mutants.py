"""Each part of the guard, and of what keeps sessions exact, taken away: a row of the table of ways notices."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tests.client.ways.document  # noqa: F401  (all rows)
import torch
from tests.client.conftest import Pair
from tests.client.test_ways_in import assert_equal, case_of
from tests.client.ways.table import WAYS, Column, Way
from tests.mutants import Mistakes, assert_is_planted

from corolla.client import remote_blocks
from corolla.client.sessions import session
from corolla.client.sessions.generating import RowEnds
from corolla.errors import UsageError
from corolla.models import guard
from corolla.models.cache import RemoteCache
from corolla.models.shell import BaseModelHooks

PairOf = Callable[..., Pair]


def nothing(*_args: Any, **_kwargs: Any) -> None:
    """Instead of a check."""


def way_named(name: str) -> Way:
    """The first row of that name."""
    return next(one for one in WAYS if one.name == name)


def holds(pair: Pair, one: Way, column: Column, folder: Path) -> bool:
    """Whether the cell comes out as the table says."""
    case = case_of(pair, column, "llama", folder)
    sentence = one.sentence(column)
    try:
        found, expected = one.run(case)
    except UsageError as error:
        return sentence is not None and sentence in str(error)
    except Exception as error:
        assert_is_planted(error)
        return False
    if sentence is not None:
        return False
    try:
        assert_equal(found, expected)
    except AssertionError:
        return False
    return True


MUTANTS: dict[str, tuple[Any, str, Any, str, Column]] = {
    "masks of any length": (
        guard, "check_mask", nothing, "all tokens again, though the cache holds some", "none",
    ),
    "positions from anywhere": (guard, "_check_positions", nothing, "the same by position ids", "none"),
    "masks that change the past": (
        guard, "_check_past", nothing, "a mask that changes what was said of cached tokens", "none",
    ),
    "caches of anybody": (guard, "check_cache", nothing, "another model's session", "none"),
    "ids without an embedding": (
        guard, "known_ids", lambda ids, *_: ids, "a token that has no embedding", "none",
    ),
    "padding without an embedding": (
        guard, "known_ids", lambda ids, *_: ids, "padding whose token has no embedding", "none",
    ),
    "labels of any kind": (guard, "check_labels", nothing, "`labels` that are no tokens", "none"),
    "outputs from inside": (guard, "check_outputs", nothing, "`output_hidden_states=True`", "none"),
    "tokens that another library cut": (
        RemoteCache, "announce", nothing, "speculation from the prompt (`prompt_lookup_num_tokens`)", "peft prompt",
    ),
    "all tokens in speculation": (
        RemoteCache, "new_of", nothing, "later turns by speculation from the prompt", "none",
    ),
    "the mask of an earlier turn": (
        RemoteCache, "align_mask", nothing, "a batch of which one row ended early, later turns", "none",
    ),
    "generated padding as context": (
        RowEnds, "real", lambda _self, ids, given: torch.ones_like(ids[:, given:], dtype=torch.bool),
        "a batch of which one row ended early, later turns", "none",
    ),
    "a beginning with other embeddings": (
        session, "_same", lambda *_: True, "the same long prompt after the embeddings were changed", "none",
    ),
    "a deferred pass is forgotten": (
        remote_blocks.RemoteBlocks, "_catch_up", nothing, "passing the answer's cache on, without gradients", "none",
    ),
    "sequences of a row see each other": (
        BaseModelHooks, "_flat_rows", nothing,
        "batches without padding (`position_ids` that start anew, `use_cache=False`)", "ptune",
    ),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("mutant", MUTANTS)
def test_a_mutant_is_noticed(pair_of: PairOf, tmp_path: Path, mistakes: Mistakes, mutant: str) -> None:
    target, name, replacement, row, column = MUTANTS[mutant]
    pair, one = pair_of("llama"), way_named(row)
    assert holds(pair, one, column, tmp_path / "before")
    mistakes.setattr(target, name, replacement)
    assert not holds(pair, one, column, tmp_path / "after")
