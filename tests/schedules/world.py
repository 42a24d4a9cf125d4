"""A swarm of real servers and clients on the in-memory network in virtual time, to which faults are done.

It also keeps the truth that a client's error is judged by: since when which blocks are served by nobody.
"""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch

from corolla.client.connection import SwarmConnection
from corolla.config import SwarmConfig
from corolla.errors import SwarmUnavailable
from corolla.models.checkpoints.checkpoint import Checkpoint, open_checkpoint
from corolla.models.checks.forms import cuts_of
from corolla.models.checks.selfcheck import check_family, steps_stack
from corolla.models.checks.steps import steps_differ
from corolla.models.families import slice_config
from corolla.models.prompts import BlockVectors
from corolla.models.span import Span, load_span
from corolla.server.block_server import BlockServer
from corolla.server.handlers import handle
from corolla.server.kept_vectors import KnownVectors
from corolla.server.sessions.kv_cache import CacheBudget
from corolla.server.sessions.prefilled import EnteringPrompt, before_span, prefill
from corolla.swarm.directory.directory import ServerRecord
from corolla.swarm.directory.directory_memory import Board, MemoryDirectory
from corolla.swarm.node import Node
from corolla.swarm.transport.memory import MemoryNetwork
from corolla.wire.messages import PROTOCOL_NAME
from tests.models.every_family import tiny
from tests.schedules.workloads import Workload, prompt_of, with_experts_in_64_bits
from tests.tiny_models import FAMILIES, VOCABULARY, tiny_model, write_tiny
from tests.virtual_time import SimulatedEngine, VirtualLoopThread

DTYPE = torch.float64
BLOCKS = 4
PAGES = 256
RECORD_SECONDS = 60.0  # how long a dead server's record stays
FOREVER = 1e9


@dataclass(frozen=True)
class ServerPlan:
    """A server as it starts: its blocks [start, end), the tokens/s that it announces, and whether it has computed
    the clients' prompts by itself."""

    peer: str
    start: int
    end: int
    throughput: float
    bundles: bool = False


@cache
def checkpoint_of(family: str, root: Path) -> Checkpoint:
    """The family's tiny model, in this process's folder."""
    folder = root / family
    if not folder.exists() and family in FAMILIES:
        write_tiny(family, folder, layers=BLOCKS, dtype=DTYPE)
    elif not folder.exists():
        config = slice_config(tiny(family), 0, BLOCKS)
        for name in ("vocab_size", "vocab_size_per_layer_input"):
            if hasattr(config, name):
                setattr(config, name, VOCABULARY)
        tiny_model(config, dtype=DTYPE).save_pretrained(folder)
    return open_checkpoint(str(folder))


@cache
def entering(checkpoint: Checkpoint, work: Workload, start: int) -> list[EnteringPrompt | BlockVectors]:
    """A workload's prompt as it enters a server's first block."""
    prompt = prompt_of(work, checkpoint.config)
    prompts = [] if prompt is None else [prompt]
    how = {"dtype": DTYPE, "device": torch.device("cpu"), "quantization": "none"}
    return before_span(checkpoint, prompts, start, **how)


class _Spans:
    """Spans that were loaded once and serve one server at a time."""

    def __init__(self) -> None:
        self._free: dict[tuple[str, int, int], list[Span]] = defaultdict(list)

    def take(self, checkpoint: Checkpoint, start: int, end: int) -> Span:
        free = self._free[checkpoint.name, start, end]
        if free:
            return free.pop()
        config = checkpoint.config
        span = load_span(
            checkpoint,
            start,
            end,
            dtype=DTYPE,
            packable=check_family(config),
            stackable=steps_stack(config),
            steps_differ=steps_differ(config),
        )
        with_experts_in_64_bits(span.model)
        return span

    def give(self, checkpoint: Checkpoint, span: Span) -> None:
        self._free[checkpoint.name, span.start, span.end].append(span)


SPANS = _Spans()


@dataclass
class _Running:
    server: BlockServer
    engine: SimulatedEngine
    record: ServerRecord
    draining: bool = False


class OutageDirectory(MemoryDirectory):
    """A directory that may be gone: it then knows nothing, fails, or fails after its own time limit."""

    def __init__(self, board: Board) -> None:
        super().__init__(board)
        self.outage: str | None = None

    async def servers(self, model: str) -> list[ServerRecord]:
        if self.outage == "slow":
            await asyncio.sleep(3.0)
        if self.outage in ("slow", "error"):
            raise SwarmUnavailable("The directory does not answer.")
        return [] if self.outage else await super().servers(model)


class SimulatedSwarm:
    """The world of one schedule; see `tests.faults.FaultTarget` for what can be done to it."""

    def __init__(
        self, checkpoint: Checkpoint, plans: Sequence[ServerPlan], clients: Sequence[Workload] = ()
    ) -> None:
        self.checkpoint = checkpoint
        self._clients = clients
        self.loop = VirtualLoopThread()
        self.network = MemoryNetwork()
        self._plans = {plan.peer: plan for plan in plans}
        self._board = Board(self.loop.time)
        self._directory = OutageDirectory(self._board)
        self._up: dict[str, _Running] = {}
        self._stopped: set[str] = set()
        self._cut: set[str] = set()
        self._ended: list[tuple[SimulatedEngine, Span]] = []
        self._connections: list[SwarmConnection] = []
        self._served_by_nobody: float | None = None  # since when some block is not served
        self.opened: dict[str, int] = defaultdict(int)  # sessions that each server ever opened

        async def start_all() -> None:
            for plan in plans:
                self.start(plan.peer)

        self.loop.run(start_all())

    def connect(self, name: str, patience: float) -> SwarmConnection:
        """A client's connection."""

        async def node() -> Node:
            return Node(self.network.transport(name), self._directory)

        connection = SwarmConnection(
            self.loop,
            self.loop.run(node()),
            SwarmConfig(patience=patience),
            model=self.checkpoint.identity,
            model_name=self.checkpoint.name,
            num_blocks=self.checkpoint.num_blocks,
            cuts=cuts_of(self.checkpoint.config),
            steps_differ=steps_differ(self.checkpoint.config),
            owns_loop=False,
        )
        self._connections.append(connection)
        return connection

    def close(self) -> None:
        """End everything; the spans may serve another world."""

        async def heal() -> None:
            self.network.tap = None
            for peer in list(self._stopped):
                self.resume(peer)
            for client, peer in list(self._pairs()):
                self.network.heal(client, peer)
            for peer in list(self._up):
                self.kill(peer)
            for engine, _ in self._ended:
                await engine.close()

        for connection in self._connections:
            connection.close()
        self.loop.run(heal())
        self.loop.close()
        for _, span in self._ended:
            SPANS.give(self.checkpoint, span)

    def _pairs(self) -> list[tuple[str, str]]:
        return [tuple(sorted(pair)) for pair in self.network._cuts]  # type: ignore[misc]

    # --- what faults do, on the loop ---------------------------------------------------------------------

    def start(self, peer: str, blocks: tuple[int, int] | None = None) -> None:
        """A server comes up (again), with its own blocks or others; nothing of its earlier life is left."""
        if peer in self._up:
            return
        plan = self._plans[peer]
        start, end = blocks or (plan.start, plan.end)
        span = SPANS.take(self.checkpoint, start, end)
        engines: list[SimulatedEngine] = []

        def simulated(**how: Any) -> SimulatedEngine:
            engines.append(SimulatedEngine(self.loop, **how))
            return engines[0]

        budget = CacheBudget(PAGES, self.loop.time)
        server = BlockServer(span, budget, model=self.checkpoint.identity, engine=simulated)
        (engine,) = engines
        engine.start()
        for one in self._entering(start) if plan.bundles else []:
            if isinstance(one, BlockVectors):
                server.kept.public[one.digest] = KnownVectors.whole(one, 0, len(one.values))
                continue
            server.budget.set_aside(1)
            server.bundles[one.name] = prefill(span, server.pool, one)  # the engine has no work yet
        transport = self.network.transport(peer)
        transport.handlers[PROTOCOL_NAME] = partial(handle, server)
        record = ServerRecord(
            peer_id=peer,
            model=self.checkpoint.identity,
            model_name=self.checkpoint.name,
            num_blocks=self.checkpoint.num_blocks,
            start=start,
            end=end,
            dtype="float64",
            throughput=plan.throughput,
        )
        self._board.put(record, FOREVER)
        self._up[peer] = _Running(server, engine, record)
        self._look()

    def _entering(self, start: int) -> list[EnteringPrompt | BlockVectors]:
        found = [one for work in self._clients for one in entering(self.checkpoint, work, start)]
        return list({one.name: one for one in found}.values())

    def kill(self, peer: str) -> None:
        """As SIGKILL; its record stays for a while."""
        if peer not in self._up:
            return
        running = self._up.pop(peer)
        self._stopped.discard(peer)
        self.network.kill(peer)
        self._ended.append((running.engine, running.server.span))

        def expire() -> None:
            if peer not in self._up:
                self._board.drop(running.record)

        asyncio.get_running_loop().call_later(RECORD_SECONDS, expire)
        self._look()

    def stop(self, peer: str) -> None:
        self._stopped.add(peer)
        self.network.stop(peer)
        self._look()

    def resume(self, peer: str) -> None:
        if peer in self._stopped:
            self._stopped.discard(peer)
            self.network.resume(peer)
        self._look()

    def cut(self, client: str, peers: Sequence[str]) -> None:
        for peer in peers:
            self.network.cut(client, peer)
        self._cut.update(peers)
        self._look()

    def heal(self, client: str, peers: Sequence[str]) -> None:
        for peer in peers:
            self.network.heal(client, peer)
        self._cut.difference_update(peers)
        self._look()

    def drain(self, peer: str) -> None:
        running = self._up[peer]
        running.draining = running.server.draining = True
        self._board.drop(running.record)
        self._look()

    def evict(self, peer: str) -> None:
        server = self._up[peer].server
        for holder in list(server.budget._holders):
            if not getattr(holder, "users", 0):
                holder.evicted = True
                server.budget.release(holder)
                holder.on_evicted()
        server.leases._kept.clear()

    def fill(self, peer: str) -> Callable[[], None]:
        budget = self._up[peer].server.budget
        taken, budget.reserved = budget.free, budget.capacity

        def undo() -> None:
            budget.reserved -= taken
            budget._changed.set()

        return undo

    def slow_down(self, peer: str, factor: float) -> None:
        running = self._up[peer]
        running.engine.delay = factor / running.record.throughput

    def directory_gone(self, gone: bool, how: str = "empty") -> None:
        self._directory.outage = how if gone else None

    def servers_up(self) -> list[str]:
        return sorted(self._up)

    def is_up(self, peer: str) -> bool:
        return peer in self._up and peer not in self._stopped

    # --- the truth -------------------------------------------------------------------------------------------

    def _look(self) -> None:
        well = [
            one.record
            for peer, one in self._up.items()
            if peer not in self._stopped | self._cut and not one.draining
        ]
        covered = {block for record in well for block in range(record.start, record.end)}
        if len(covered) == self.checkpoint.num_blocks:
            self._served_by_nobody = None
        elif self._served_by_nobody is None:
            self._served_by_nobody = self.loop.time()

    def unserved_seconds(self) -> float:
        """For how long some block has been served by nobody."""
        began = self._served_by_nobody
        return 0.0 if began is None else self.loop.time() - began

    def counters(self, name: str) -> dict[str, int]:
        """A counter of each server that is up."""
        return {peer: int(getattr(one.server.counters, name)) for peer, one in self._up.items()}

    def server(self, peer: str) -> Any:
        """The server itself, for checks."""
        return self._up[peer].server
