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
    HOP_SECONDS,
    Hop,
    block_seconds,
    find_route,
    first_hops,
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
