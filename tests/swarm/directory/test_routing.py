"""Routes: the cheapest chain, compared with trying them all."""

from __future__ import annotations

import random
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from corolla.errors import MissingBlocks
from corolla.swarm.directory.directory import ServerRecord
from corolla.swarm.directory.routing import (
    ENOUGH,
    HOP_SECONDS,
    SLOW_IN_A_ROW,
    SLOW_MEMORY_SECONDS,
    Hop,
    Paces,
    block_seconds,
    find_route,
    first_hops,
    is_too_slow,
    ranges,
    uncovered,
)

BLOCKS = 6


def server(
    peer_id: str, start: int, end: int, throughput: float = 10.0, state: str = "serving", name: str = "smol"
) -> ServerRecord:
    return ServerRecord(
        peer_id=peer_id,
        model="m",
        model_name=name,
        num_blocks=BLOCKS,
        start=start,
        end=end,
        dtype="float32",
        throughput=throughput,
        state=state,  # type: ignore[arg-type]
    )


@st.composite
def swarms(draw: st.DrawFn) -> list[ServerRecord]:
    records = []
    for index in range(draw(st.integers(0, 6))):
        start = draw(st.integers(0, BLOCKS - 1))
        end = draw(st.integers(start + 1, BLOCKS))
        throughput = draw(st.sampled_from([0.0, 1.0, 10.0, 100.0, 37.5]))
        state = draw(st.sampled_from(["serving"] * 5 + ["draining"]))
        records.append(server(f"p{index}", start, end, throughput, state))
    return records


def cost(route: list[Hop], records: list[ServerRecord]) -> float:
    by_peer = {record.peer_id: record for record in records}
    return sum(HOP_SECONDS + (h.end - h.start) * block_seconds(by_peer[h.peer_id]) for h in route)


def all_routes(records: list[ServerRecord], start: int, end: int) -> Iterator[list[Hop]]:
    if start == end:
        yield []
    for record in records:
        if record.start <= start < record.end:
            for stop in range(start + 1, min(record.end, end) + 1):
                for rest in all_routes(records, stop, end):
                    yield [Hop(record.peer_id, start, stop), *rest]


@given(
    swarms(),
    st.integers(0, BLOCKS - 1),
    st.integers(1, BLOCKS),
    st.sets(st.sampled_from(["p0", "p1", "p2"])),
)
def test_no_chain_is_cheaper(records: list[ServerRecord], start: int, length: int, avoid: set[str]) -> None:
    end = min(BLOCKS, start + length)
    eligible = [r for r in records if r.state == "serving" and r.peer_id not in avoid]
    expected = min((cost(route, records) for route in all_routes(eligible, start, end)), default=None)
    if expected is None:
        with pytest.raises(MissingBlocks):
            find_route(records, start, end, avoid=avoid)
        return
    route = find_route(records, start, end, avoid=avoid)
    assert cost(route, records) == pytest.approx(expected)
    assert [hop.start for hop in route] == [start, *(hop.end for hop in route[:-1])]
    assert route[-1].end == end
    for hop in route:
        assert any(r.peer_id == hop.peer_id and r.start <= hop.start < hop.end <= r.end for r in eligible)


@given(swarms(), st.randoms(use_true_random=False))
def test_the_records_order_does_not_matter(records: list[ServerRecord], rng: random.Random) -> None:
    if uncovered((r for r in records if r.state == "serving"), 0, BLOCKS):
        return
    shuffled = rng.sample(records, len(records))
    assert find_route(records, 0, BLOCKS) == find_route(shuffled, 0, BLOCKS)


def test_ties_go_to_fewer_hops_then_to_the_first_peers() -> None:
    twins = [server("b", 0, 6), server("a", 0, 6), server("c", 0, 3), server("d", 3, 6)]
    assert find_route(twins, 0, 6) == [Hop("a", 0, 6)]


def test_a_faster_server_is_worth_a_hop_only_if_it_saves_more() -> None:
    slow = server("slow", 0, 6, throughput=10.0)  # 1/60 s a block
    assert find_route([slow, server("fast", 2, 6, throughput=1000.0)], 0, 6) == [
        Hop("slow", 0, 2),
        Hop("fast", 2, 6),
    ]
    assert find_route([slow, server("same", 2, 6, throughput=15.1)], 0, 6) == [Hop("slow", 0, 6)]


def test_nobody_serves_some_blocks() -> None:
    records = [server("a", 0, 1, name="org/it's"), server("b", 3, 4)]
    with pytest.raises(MissingBlocks) as missing:
        find_route(records, 0, 6)
    assert missing.value.blocks == (1, 2, 4, 5)
    assert str(missing.value) == (
        "Blocks 1-2 and 4-5 are served by nobody; start `corolla serve 'org/it'\"'\"'s' --blocks 1:3 --peers …` "
        "and `corolla serve 'org/it'\"'\"'s' --blocks 4:6 --peers …`."
    )


def test_an_empty_swarm() -> None:
    with pytest.raises(
        MissingBlocks, match=r"^Block 3 is served by nobody; start `corolla serve MODEL --blocks 3:4 "
    ):
        find_route([], 3, 4)


def test_blocks_whose_servers_failed_or_leave() -> None:
    with pytest.raises(MissingBlocks, match="just failed") as failed:
        find_route([server("a", 0, 6), server("b", 0, 2)], 0, 6, avoid={"a"})
    assert failed.value.blocks == (2, 3, 4, 5)
    with pytest.raises(MissingBlocks, match="going away") as leaving:
        find_route([server("a", 0, 6, state="draining"), server("b", 0, 2)], 0, 6)
    assert leaving.value.blocks == (2, 3, 4, 5)


@pytest.mark.parametrize(("start", "end"), [(2, 2), (3, 2), (-1, 2)])
def test_an_empty_range_is_our_own_mistake(start: int, end: int) -> None:
    with pytest.raises(ValueError, match="not a range"):
        find_route([server("a", 0, 6)], start, end)


def test_a_thousand_servers_are_routed_quickly() -> None:
    rng = random.Random(0)
    records = []
    for index in range(1000):
        start = rng.randrange(0, 80)
        records.append(
            server(f"p{index}", start, min(80, start + 1 + rng.randrange(20)), rng.uniform(1, 100))
        )
    route = find_route(records, 0, 80)
    assert (route[0].start, route[-1].end) == (0, 80)


def test_ranges() -> None:
    assert ranges([]) == []
    assert ranges([1, 2, 5, 7, 8]) == [(1, 3), (5, 6), (7, 9)]


# --- servers that are slower than they say -------------------------------------------------------------------

HOP = Hop("slow", 0, 4)
SAYS_100 = server("slow", 0, 4, throughput=100.0)


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
    assert is_too_slow(SAYS_100, HOP, tokens, nbytes, seconds) is too_slow


def test_who_announced_no_speed_is_never_too_slow() -> None:
    assert not is_too_slow(server("slow", 0, 4, throughput=0.0), HOP, 1, 0, 1e6)


def test_a_part_of_a_span_is_due_sooner_than_the_whole() -> None:
    assert is_too_slow(SAYS_100, Hop("slow", 1, 2), 10, 0, 1.0)
    assert not is_too_slow(SAYS_100, HOP, 10, 0, 1.0)


def test_a_slow_server_is_left_after_several_times_in_a_row_and_for_a_while() -> None:
    paces, other = Paces(), server("other", 0, 4, throughput=1.1)
    for moment in range(SLOW_IN_A_ROW - 1):
        paces.took(SAYS_100, HOP, 1, 0, 1.0, moment)
    paces.took(SAYS_100, HOP, 1, 0, 0.01, 3.0)  # once as announced: it counts anew
    for moment in range(4, 3 + SLOW_IN_A_ROW):
        paces.took(SAYS_100, HOP, 1, 0, 1.0, moment)
    assert not paces.is_slow("slow", 7.0)
    assert find_route(paces.seen([SAYS_100, other], 7.0), 0, 4) == [HOP]
    paces.took(SAYS_100, HOP, 1, 0, 2.0, 8.0)
    assert paces.is_slow("slow", 8.0)
    assert find_route(paces.seen([SAYS_100, other], 8.0), 0, 4) == [Hop("other", 0, 4)]
    assert find_route(paces.seen([SAYS_100], 8.0), 0, 4) == [HOP]  # better than nobody
    assert not paces.is_slow("slow", 8.0 + SLOW_MEMORY_SECONDS)


def test_of_two_slow_servers_the_less_slow_is_taken() -> None:
    paces, worse = Paces(), server("worse", 0, 4, throughput=100.0)
    for moment in range(SLOW_IN_A_ROW):
        paces.took(SAYS_100, HOP, 1, 0, 1.0, moment)
        paces.took(worse, Hop("worse", 0, 4), 1, 0, 3.0, moment)
    assert find_route(paces.seen([SAYS_100, worse], 5.0), 0, 4) == [HOP]


def test_what_a_server_announces_counts_within_bounds_of_what_it_was_found_to_take() -> None:
    boaster, honest = server("boaster", 0, 4, throughput=1e9), server("honest", 0, 4, throughput=10.0)
    paces = Paces()
    for moment in range(ENOUGH):
        assert find_route(paces.seen([boaster, honest], 0.0), 0, 4) == [Hop("boaster", 0, 4)]
        paces.took(boaster, Hop("boaster", 0, 4), 1, 0, 0.24, moment)  # too little to be called slow
        paces.took(honest, Hop("honest", 0, 4), 1, 0, 0.04, moment)
    assert find_route(paces.seen([boaster, honest], 9.0), 0, 4) == [Hop("honest", 0, 4)]
    close = server("close", 0, 4, throughput=30.0)
    for moment in range(ENOUGH):
        paces.took(close, Hop("close", 0, 4), 1, 0, 0.05, moment)
    assert find_route(paces.seen([close, honest], 9.0), 0, 4) == [
        Hop("close", 0, 4)
    ]  # about as fast, and says more


@given(swarms(), st.sets(st.sampled_from(["p0", "p1", "p2"])), st.sets(st.sampled_from(["p2", "p3", "p4"])))
def test_the_first_of_those_who_may_be_asked_begins_the_best_route(
    records: list[ServerRecord], avoid: set[str], proven: set[str]
) -> None:
    try:
        route = find_route(records, 0, BLOCKS, avoid=avoid, proven=proven)
    except MissingBlocks:
        with pytest.raises(MissingBlocks):
            first_hops(records, 0, BLOCKS, avoid=avoid, proven=proven)
        return
    hops = first_hops(records, 0, BLOCKS, avoid=avoid, proven=proven)
    assert hops[0] == route[0]
    may = {r.peer_id for r in records if r.state == "serving" and r.peer_id not in avoid and r.start == 0}
    assert [hop.peer_id for hop in hops].count(hops[0].peer_id) == 1
    assert {hop.peer_id for hop in hops} == may
    known = [hop.peer_id in proven for hop in hops[1:]]
    assert known == sorted(known, reverse=True)


@given(swarms(), st.sets(st.sampled_from(["p0", "p1", "p2", "p3"])))
def test_no_route_has_fewer_strangers(records: list[ServerRecord], proven: set[str]) -> None:
    eligible = [r for r in records if r.state == "serving"]
    found = [sum(hop.peer_id not in proven for hop in route) for route in all_routes(eligible, 0, BLOCKS)]
    if found:
        route = find_route(records, 0, BLOCKS, proven=proven)
        assert sum(hop.peer_id not in proven for hop in route) == min(found)
