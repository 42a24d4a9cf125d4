"""Prefixes that peers need not send again: their own, within a budget, and the operator's."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from itertools import count

import pytest
import torch
from tests.server.world import END, START, opening
from torch import Tensor

from corolla.errors import RequestRefused
from corolla.server.kept_vectors import A_PEERS_KEPT, KeptVectors, KnownVectors
from corolla.wire.messages import OpenSession


def names(index: int) -> OpenSession:
    return opening(known=f"{index:064x}")


def prefix(value: float = 1.0) -> Tensor:
    return torch.full((END - START, 2, 8), value)


def given(kept: KeptVectors, peer: str, message: OpenSession, sent: Tensor | None) -> Tensor:
    return kept.with_known(peer, message, {} if sent is None else {"prefix": sent})["prefix"]


def known(kept: KeptVectors, peer: str, index: int) -> Tensor | None:
    try:
        return given(kept, peer, names(index), None)
    except RequestRefused:
        return None


def _raised(work: Callable[[], None]) -> list[BaseException]:
    try:
        work()
    except BaseException as error:
        return [error]
    return []


def test_a_peer_finds_its_own_and_nobody_elses() -> None:
    kept = KeptVectors(10**6, lambda: 0.0)
    assert given(kept, "alice", names(1), prefix()) is not None
    assert torch.equal(known(kept, "alice", 1), prefix())
    assert known(kept, "bob", 1) is None
    kept.public[f"{7:064x}"] = KnownVectors(START, END - START, {"prefix": prefix(7.0)})
    assert torch.equal(known(kept, "bob", 7), prefix(7.0))


def test_who_sends_something_else_by_the_operators_name_is_given_the_operators() -> None:
    kept = KeptVectors(10**6, lambda: 0.0)
    kept.public[f"{7:064x}"] = KnownVectors(START, END - START, {"prefix": prefix(7.0)})
    found = given(kept, "bob", names(7), prefix(8.0))
    assert found.data_ptr() == kept.public[f"{7:064x}"].tensors["prefix"].data_ptr()
    assert not kept.held


def test_a_part_of_the_operators_is_found_by_its_blocks() -> None:
    kept, whole = KeptVectors(10**6, lambda: 0.0), torch.arange(4.0).view(4, 1, 1).expand(4, 2, 8)
    kept.public["0" * 64] = KnownVectors(0, 4, {"prefix": whole})
    found = given(kept, "alice", opening(start=1, end=3, known="0" * 64), None)
    assert torch.equal(found, whole[1:3])
    with pytest.raises(RequestRefused, match="has not got that prefix"):
        given(kept, "alice", opening(start=3, end=5, known="0" * 64), None)


def test_the_newest_few_of_a_peer_are_kept_and_all_within_a_budget() -> None:
    kept = KeptVectors(10**6, lambda: 0.0)
    for index in range(A_PEERS_KEPT + 2):
        given(kept, "alice", names(index), prefix())
        assert known(kept, "alice", 1 if index > 1 else index) is not None  # which makes it the newest
    assert known(kept, "alice", 0) is None
    assert known(kept, "alice", 1) is not None
    small = KeptVectors(3 * prefix().nbytes, lambda: 0.0)
    given(small, "bob", names(0), prefix())
    for index in range(5):
        given(small, "alice", names(index), prefix())
    assert small.held <= small.budget
    assert known(small, "bob", 0) is not None  # alice drove out her own


def test_what_is_kept_holds_no_other_memory() -> None:
    """A prefix comes in one piece of memory with the hidden states beside it, which may be much more."""
    kept, payload = KeptVectors(10**6, lambda: 0.0), torch.ones(2**18)
    sent = payload[: prefix().numel()].view(prefix().shape)
    found = [given(kept, "alice", names(1), one) for one in (sent, None)]
    assert all(torch.equal(one, prefix()) for one in found)
    assert [one.untyped_storage().nbytes() for one in found] == [prefix().nbytes] * 2


def test_requests_ask_while_another_thread_lets_go_of_what_is_old() -> None:
    times, done = count(), threading.Event()
    kept = KeptVectors(10**6, lambda: 20.0 * next(times))  # each grows old within some requests

    def expire() -> None:
        while not done.is_set():
            kept.expire()

    failed = list[BaseException]()
    thread = threading.Thread(target=lambda: failed.extend(_raised(expire)))
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    thread.start()
    try:
        for index in range(2000):
            assert given(kept, "alice", names(index % 20), prefix()) is not None
    finally:
        done.set()
        thread.join()
        sys.setswitchinterval(before)
    assert not failed
