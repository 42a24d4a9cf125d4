"""Prefixes that peers need not send again: their own, within a budget, and the operator's."""

from __future__ import annotations

import pytest
import torch
from tests.server.world import END, START, opening
from torch import Tensor

from corolla.errors import RequestRefused
from corolla.server.kept import A_PEERS_PREFIXES, KnownPrefix, Prefixes
from corolla.wire.messages import OpenSession


def names(index: int) -> OpenSession:
    return opening(known=f"{index:064x}")


def prefix(value: float = 1.0) -> Tensor:
    return torch.full((END - START, 2, 8), value)


def known(kept: Prefixes, peer: str, index: int) -> Tensor | None:
    try:
        return kept.of(peer, names(index), None)
    except RequestRefused:
        return None


def test_a_peer_finds_its_own_and_nobody_elses() -> None:
    kept = Prefixes(10**6, lambda: 0.0)
    assert kept.of("alice", names(1), prefix()) is not None
    assert torch.equal(known(kept, "alice", 1), prefix())
    assert known(kept, "bob", 1) is None
    assert kept.of("bob", opening(), None) is None
    kept.everybodys[f"{7:064x}"] = KnownPrefix(START, prefix(7.0))
    assert torch.equal(known(kept, "bob", 7), prefix(7.0))


def test_a_part_of_the_operators_is_found_by_its_blocks() -> None:
    kept, whole = Prefixes(10**6, lambda: 0.0), torch.arange(4.0).view(4, 1, 1).expand(4, 2, 8)
    kept.everybodys["0" * 64] = KnownPrefix(0, whole)
    found = kept.of("alice", opening(start=1, end=3, known="0" * 64), None)
    assert torch.equal(found, whole[1:3])
    with pytest.raises(RequestRefused, match="has not got that prefix"):
        kept.of("alice", opening(start=3, end=5, known="0" * 64), None)


def test_the_newest_few_of_a_peer_are_kept_and_all_within_a_budget() -> None:
    kept = Prefixes(10**6, lambda: 0.0)
    for index in range(A_PEERS_PREFIXES + 2):
        kept.of("alice", names(index), prefix())
        assert known(kept, "alice", 1 if index > 1 else index) is not None  # which makes it the newest
    assert known(kept, "alice", 0) is None
    assert known(kept, "alice", 1) is not None
    small = Prefixes(3 * prefix().nbytes, lambda: 0.0)
    small.of("bob", names(0), prefix())
    for index in range(5):
        small.of("alice", names(index), prefix())
    assert small.held <= small.budget
    assert known(small, "bob", 0) is not None  # alice drove out her own
