"""Servers that are slower than they say."""

from __future__ import annotations

import pytest
from tests.swarm.directory.test_routing import server

from corolla.client.servers import ENOUGH, SLOW_IN_A_ROW, SLOW_MEMORY_SECONDS, Paces, is_too_slow
from corolla.swarm.directory.directory import ServerRecord
from corolla.swarm.directory.routing import Hop, announced_seconds, block_seconds, find_route

HOP = Hop("slow", 0, 4)
SAYS_100 = server("slow", 0, 4, throughput=100.0)


def took(paces: Paces, record: ServerRecord, tokens: int, seconds: float, now: float) -> None:
    hop = Hop(record.peer_id, record.start, record.end)
    paces.took(hop, tokens, 0, seconds, now, block_seconds(record) if record.throughput else None)


@pytest.mark.parametrize(
    ("tokens", "nbytes", "seconds", "too_slow"),
    [
        (1, 4096, 1.0, True),  # a hundred times slower than announced
        (1, 4096, 0.2, False),  # twenty times is still a full house
        (1, 4096, 0.44, False),
        (1000, 4096, 100.0, False),  # a long prompt at a tenth of the speed
        (1000, 4096, 1000.0, True),
        (1, 2_000_000, 8.0, False),  # a slow line
    ],
)
def test_what_counts_as_too_slow(tokens: int, nbytes: int, seconds: float, too_slow: bool) -> None:
    assert is_too_slow(announced_seconds(SAYS_100, HOP, tokens), nbytes, seconds) is too_slow


def test_who_announced_no_speed_is_never_too_slow() -> None:
    paces = Paces()
    for moment in range(SLOW_IN_A_ROW):
        took(paces, server("slow", 0, 4, throughput=0.0), 1, 1e6, moment)
    assert not paces.is_slow("slow", 0.0)


def test_a_part_of_a_span_is_due_sooner_than_the_whole() -> None:
    for hop, slow in ((Hop("slow", 1, 2), True), (HOP, False)):
        paces = Paces()
        for moment in range(SLOW_IN_A_ROW):
            paces.took(hop, 10, 0, 1.0, moment, block_seconds(SAYS_100))
        assert paces.is_slow("slow", 5.0) is slow


def test_a_slow_server_is_left_after_several_times_in_a_row_and_for_a_while() -> None:
    paces, other = Paces(), server("other", 0, 4, throughput=1.1)
    for moment in range(SLOW_IN_A_ROW - 1):
        took(paces, SAYS_100, 1, 1.0, moment)
    took(paces, SAYS_100, 1, 0.01, 3.0)  # once as announced: it counts anew
    for moment in range(4, 3 + SLOW_IN_A_ROW):
        took(paces, SAYS_100, 1, 1.0, moment)
    assert not paces.is_slow("slow", 7.0)
    assert find_route(paces.seen([SAYS_100, other], 7.0), 0, 4) == [HOP]
    took(paces, SAYS_100, 1, 2.0, 8.0)
    assert paces.is_slow("slow", 8.0)
    assert find_route(paces.seen([SAYS_100, other], 8.0), 0, 4) == [Hop("other", 0, 4)]
    assert find_route(paces.seen([SAYS_100], 8.0), 0, 4) == [HOP]  # better than nobody
    assert not paces.is_slow("slow", 8.0 + SLOW_MEMORY_SECONDS)


def test_of_two_slow_servers_the_less_slow_is_taken() -> None:
    paces, worse = Paces(), server("worse", 0, 4, throughput=100.0)
    for moment in range(SLOW_IN_A_ROW):
        took(paces, SAYS_100, 1, 1.0, moment)
        took(paces, worse, 1, 3.0, moment)
    assert find_route(paces.seen([SAYS_100, worse], 5.0), 0, 4) == [HOP]


def test_what_a_server_announces_counts_within_bounds_of_what_it_was_found_to_take() -> None:
    boaster, honest = server("boaster", 0, 4, throughput=1e9), server("honest", 0, 4, throughput=10.0)
    paces = Paces()
    for moment in range(ENOUGH):
        assert find_route(paces.seen([boaster, honest], 0.0), 0, 4) == [Hop("boaster", 0, 4)]
        took(paces, boaster, 1, 0.24, moment)  # too little to be called slow
        took(paces, honest, 1, 0.04, moment)
    assert find_route(paces.seen([boaster, honest], 9.0), 0, 4) == [Hop("honest", 0, 4)]
    close = server("close", 0, 4, throughput=30.0)
    for moment in range(ENOUGH):
        took(paces, close, 1, 0.05, moment)
    assert find_route(paces.seen([close, honest], 9.0), 0, 4) == [
        Hop("close", 0, 4)
    ]  # about as fast, and says more
