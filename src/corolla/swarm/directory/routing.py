"""Which servers to use, in which order: pure functions of the records that are passed in.

Invariant: the same records, in whatever order, give the same route; a route covers its range exactly, each
hop lies within what its server announced, and no chain of eligible servers has a lower estimated cost.
"""

from __future__ import annotations

import shlex
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass

from corolla.errors import MissingBlocks
from corolla.swarm.directory.directory import ServerRecord

HOP_SECONDS = 0.005  # what a hop costs besides its blocks: serialisation, scheduling, an unmeasured link
UNMEASURED_BLOCK_SECONDS = 0.005  # per token, for a server that announces no throughput


@dataclass(frozen=True)
class Hop:
    """Run blocks [start, end) at one peer."""

    peer_id: str
    start: int
    end: int


@dataclass(frozen=True, order=True)
class _Path:
    """The best known way through the blocks up to somewhere; compared by strangers, cost, hops, then peers."""

    strangers: int  # hops at peers that have never answered
    cost: float
    hops: int
    peers: tuple[str, ...]
    entries: tuple[int, ...]  # where each peer's part begins

    def enter(self, peer_id: str, block: int, cost: float, *, strange: bool) -> _Path:
        peers, entries = (*self.peers, peer_id), (*self.entries, block)
        return _Path(self.strangers + strange, self.cost + cost, self.hops + 1, peers, entries)

    def advance(self, cost: float) -> _Path:
        return _Path(self.strangers, self.cost + cost, self.hops, self.peers, self.entries)


def block_seconds(record: ServerRecord) -> float:
    """Estimated time of one token in one block of a server, from the throughput of its whole span."""
    if record.throughput <= 0:
        return UNMEASURED_BLOCK_SECONDS
    return 1.0 / (record.throughput * (record.end - record.start))


def find_route(
    records: Sequence[ServerRecord],
    start: int,
    end: int,
    *,
    avoid: Collection[str] = (),
    proven: Collection[str] | None = None,
) -> list[Hop]:
    """The cheapest chain of servers for blocks [start, end), of those with the fewest peers that are not `proven`.

    A hop costs `HOP_SECONDS`, plus its blocks' time. Peers in `avoid` and servers that are draining are not used. Ties
    go to fewer hops, then to the peer ids that sort first. Raises `MissingBlocks` when some block has no eligible
    server, `ValueError` for an empty range.
    """
    if not 0 <= start < end:
        raise ValueError(f"Blocks {start}:{end} are not a range.")
    usable = _best_of_each_range(_eligible(records, avoid), proven)
    done = _Path(0, 0.0, 0, (), ())
    inside: dict[int, _Path] = {}  # the best path whose last server is usable[i]
    for block in range(start, end):
        reached: dict[int, _Path] = {}
        for index, record in enumerate(usable):
            if not record.start <= block < record.end:
                continue
            strange = _strange(record, proven)
            entered = done.enter(record.peer_id, block, HOP_SECONDS, strange=strange)
            stayed = inside.get(index)
            best = entered if stayed is None else min(stayed, entered)
            reached[index] = best.advance(block_seconds(record))
        if not reached:
            raise _missing(records, start, end, avoid)
        inside, done = reached, min(reached.values())
    exits = (*done.entries[1:], end)
    return [Hop(*part) for part in zip(done.peers, done.entries, exits, strict=True)]


def first_hops(
    records: Sequence[ServerRecord],
    start: int,
    end: int,
    *,
    avoid: Collection[str] = (),
    proven: Collection[str] | None = None,
) -> list[Hop]:
    """Whom to ask for block `start` of [start, end): the first hop of `find_route`, then everybody else who may be.

    Those come in the order `proven` first, then by how far they reach, then by what they say they cost. Raises as
    `find_route`.
    """
    best = find_route(records, start, end, avoid=avoid, proven=proven)[0]
    others = [one for one in _eligible(records, avoid) if one.start <= start < one.end]
    others.sort(key=lambda one: (_strange(one, proven), -min(one.end, end), block_seconds(one), one.peer_id))
    return [best, *(Hop(r.peer_id, start, min(r.end, end)) for r in others if r.peer_id != best.peer_id)]


def _eligible(records: Iterable[ServerRecord], avoid: Collection[str]) -> list[ServerRecord]:
    return [r for r in records if r.state == "serving" and r.peer_id not in avoid and r.start < r.end]


def _strange(record: ServerRecord, proven: Collection[str] | None) -> bool:
    return proven is not None and record.peer_id not in proven


def _best_of_each_range(
    records: Sequence[ServerRecord], proven: Collection[str] | None
) -> list[ServerRecord]:
    """No route needs two servers of the same blocks, so however many there are, few are looked at."""
    best: dict[tuple[int, int], ServerRecord] = {}

    def order(record: ServerRecord) -> tuple[bool, float, str]:
        return _strange(record, proven), block_seconds(record), record.peer_id

    for one in records:
        before = best.get((one.start, one.end))
        if before is None or order(one) < order(before):
            best[one.start, one.end] = one
    return list(best.values())


def announced_seconds(record: ServerRecord, hop: Hop, tokens: int) -> float:
    """How long `tokens` (rows × tokens) would take in the blocks of a hop, one by one, if its server were right."""
    return tokens * (hop.end - hop.start) * block_seconds(record)


# Kinds of arithmetic in which a server may compute, the more exact ones before those that say less of a number.
KINDS = tuple(
    dtype + quantization
    for quantization in ("", "+int8", "+nf4")
    for dtype in ("float32", "float64", "bfloat16", "float16")
)


def numerics_of(records: Iterable[ServerRecord]) -> list[str]:
    """The kinds of arithmetic that are offered, in the order of `KINDS`."""
    offered = {record.numerics for record in records}
    return [kind for kind in KINDS if kind in offered]


def uncovered(records: Iterable[ServerRecord], start: int, end: int) -> list[int]:
    """The blocks of [start, end) that none of `records` covers, ascending."""
    covered: set[int] = set()
    for record in records:
        covered.update(range(max(start, record.start), min(end, record.end)))
    return [block for block in range(start, end) if block not in covered]


def ranges(blocks: Iterable[int]) -> list[tuple[int, int]]:
    """Ascending blocks as half-open ranges: 1, 2, 5 become (1, 3), (5, 6)."""
    result: list[tuple[int, int]] = []
    for block in blocks:
        if result and result[-1][1] == block:
            result[-1] = (result[-1][0], block + 1)
        else:
            result.append((block, block + 1))
    return result


def _missing(records: Sequence[ServerRecord], start: int, end: int, avoid: Collection[str]) -> MissingBlocks:
    nobody = uncovered(records, start, end)
    if nobody:
        return _served_by_nobody(records, nobody)
    serving = [r for r in records if r.state == "serving"]
    leaving = uncovered(serving, start, end)
    if leaving:
        return MissingBlocks(
            f"{_in_words(leaving)} served only by servers that are going away; wait for another one or start it.",
            blocks=leaving,
        )
    failed = uncovered((r for r in serving if r.peer_id not in avoid), start, end)
    return MissingBlocks(
        f"{_in_words(failed)} served only by servers that have just failed; wait until they are back.",
        blocks=failed,
    )


def _served_by_nobody(records: Sequence[ServerRecord], blocks: list[int]) -> MissingBlocks:
    # The name comes from strangers, and the command is there to be pasted into a shell.
    name = shlex.quote(
        min((r.model_name for r in records if r.model_name and r.model_name.isprintable()), default="")
        or "MODEL"
    )
    commands = " and ".join(f"`corolla serve {name} --blocks {a}:{b} --peers …`" for a, b in ranges(blocks))
    return MissingBlocks(f"{_in_words(blocks)} served by nobody; start {commands}.", blocks=blocks)


def _in_words(blocks: Sequence[int]) -> str:
    parts = [str(a) if b == a + 1 else f"{a}-{b - 1}" for a, b in ranges(blocks)]
    listed = parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"
    return f"Block {listed} is" if len(blocks) == 1 else f"Blocks {listed} are"
