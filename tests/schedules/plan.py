"""A schedule from one integer: servers, clients with their work, and faults.

Every fault either leaves each block with a server or is undone in time, but for the few schedules that are
`lost` on purpose: in those a block is served by nobody for ever.
"""

from __future__ import annotations

import random
from collections.abc import Iterable
from dataclasses import dataclass, replace
from itertools import pairwise

from tests.faults import KINDS, REPLY_ONLY, REQUEST_ONLY, Fault
from tests.schedules.workloads import MODES, VARIANTS, WORKLOADS, Workload
from tests.schedules.world import BLOCKS, ServerPlan

FAMILIES = ("llama", "llama", "llama", "qwen3", "qwen3", "falcon")  # falcon's passes cannot be packed
CUTS: tuple[tuple[int, ...], ...] = ((), (1,), (2,), (3,), (1, 2), (1, 3), (2, 3), (1, 2, 3))
# After these a server is gone for good, unless it comes back.
LASTING = frozenset({"kill", "kill halfway", "hang", "drain", "cut", "directory", "moved"})
THROUGHPUT = 100.0


@dataclass(frozen=True)
class Schedule:
    """All that a run needs."""

    seed: int
    servers: tuple[ServerPlan, ...]
    clients: tuple[Workload, ...]
    faults: tuple[Fault, ...]
    lost: bool


def plan(seed: int) -> Schedule:
    """The schedule of a seed."""
    draw = random.Random(seed)
    family = draw.choice(FAMILIES)
    servers = _servers(draw)
    clients = tuple(
        Workload(family, draw.choice(MODES), draw.choice(WORKLOADS), draw.randrange(VARIANTS))
        for _ in range(draw.choice([1, 1, 1, 2]))
    )
    lost = draw.random() < 0.03
    faults = _faults(draw, servers, lost)
    if (
        family != "falcon" and draw.random() < 0.5
    ):  # some of the servers have computed the prompts by themselves
        servers = tuple(replace(one, bundles=draw.random() < 0.6) for one in servers)
    return Schedule(seed, servers, clients, faults, lost)


def _servers(draw: random.Random) -> tuple[ServerPlan, ...]:
    main = _chain(draw, "main", lambda: THROUGHPUT)
    replicas = draw.choices(["chain", "some", "none"], [6, 2, 2])[0]
    if replicas == "chain":
        return (*main, *_chain(draw, "spare", lambda: draw.uniform(10, 60)))
    if replicas == "some":
        start = draw.randrange(BLOCKS)
        end = draw.randint(start + 1, BLOCKS)
        return (*main, ServerPlan("spare-0", start, end, draw.uniform(10, 60)))
    return main


def _chain(draw: random.Random, name: str, throughput: object) -> tuple[ServerPlan, ...]:
    edges = (0, *draw.choice(CUTS), BLOCKS)
    return tuple(
        ServerPlan(f"{name}-{index}", start, end, throughput())  # type: ignore[operator]
        for index, (start, end) in enumerate(pairwise(edges))
    )


def _faults(draw: random.Random, servers: tuple[ServerPlan, ...], lost: bool) -> tuple[Fault, ...]:
    gone: set[str] = set()
    faults = []
    for index in range(draw.choices([1, 2, 3], [4, 4, 2])[0]):
        fault = _fault(draw, servers, gone, anyone=index > 0 and draw.random() < 0.6)
        faults.append(fault)
    if lost:
        victim = draw.choice([one.peer for one in servers if one.peer.startswith("main")])
        blocks = next(one for one in servers if one.peer == victim)
        also = tuple(
            one.peer
            for one in servers
            if one.peer != victim and one.start < blocks.end and blocks.start < one.end
        )
        faults = [Fault(draw.choice(["kill", "hang"]), victim, n=draw.randint(1, 6), also=also)]
    return tuple(faults)


def _fault(draw: random.Random, servers: tuple[ServerPlan, ...], gone: set[str], *, anyone: bool) -> Fault:
    kind = draw.choice(KINDS)
    names = [one.peer for one in servers if one.peer.startswith("main")]
    peer = None if anyone else draw.choice(names)
    also: tuple[str, ...] = ()
    if kind in ("kill", "hang", "cut", "restart", "evict") and draw.random() < 0.25:
        also = tuple(draw.sample([name for name in names if name != peer], k=min(1, len(names) - 1)))
    victims = {name for name in (peer, *also) if name is not None}
    if kind == "moved" and not (peer and _covered(servers, gone | victims)):
        kind = "restart"
    returns: float | None = draw.choice([0.3, 3.0, 20.0, 90.0]) * draw.uniform(0.5, 1.5)
    if kind in LASTING and peer is not None and _covered(servers, gone | victims):
        if kind == "moved":
            gone |= victims
        elif draw.random() < 0.6:
            returns = None
            gone |= victims
    on = "reply" if kind in REPLY_ONLY or (kind not in REQUEST_ONLY and draw.random() < 0.5) else "request"
    return Fault(
        kind,
        peer,
        on=on,  # type: ignore[arg-type]
        n=draw.randint(1, 3) if peer is None else draw.choice([1, 2, 3, draw.randint(4, 12)]),
        returns=returns,
        blocks=_other_blocks(draw) if kind == "moved" else None,
        also=also,
        seed=draw.randrange(2**32),
    )


def _other_blocks(draw: random.Random) -> tuple[int, int]:
    start = draw.randrange(BLOCKS)
    return start, draw.randint(start + 1, BLOCKS)


def _covered(servers: Iterable[ServerPlan], gone: set[str]) -> bool:
    """Whether the others serve every block."""
    left = [one for one in servers if one.peer not in gone]
    return all(any(one.start <= block < one.end for one in left) for block in range(BLOCKS))
