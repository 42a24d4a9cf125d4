"""Servers that fail and are back at once, and three ways to generate through them.

Invariant: servers are real (the code, weights and compute threads of `corolla serve`), the network between
them is the in-memory twin, and who fails when is drawn from a seed. A server that fails loses its sessions
and its streams end; what it has loaded stays, so that it is back at once.

All clients use the same servers, each over a network of its own: what fails for one is not felt by another.
So runs at different rates of failure can take turns in short slices, and a busy machine slows them alike.
"""

from __future__ import annotations

import random
import time
from collections.abc import Sequence
from functools import partial
from types import TracebackType
from typing import Any, Protocol, Self

import torch
from torch import Tensor

from corolla.client.connection import SwarmConnection
from corolla.client.model.arguments import from_pretrained
from corolla.client.model.causal_lm import load_distributed
from corolla.config import NodeConfig, ServerConfig, SwarmConfig
from corolla.errors import SwarmUnavailable
from corolla.models.checkpoints.checkpoint import Checkpoint, open_checkpoint
from corolla.server.block_server import BlockServer
from corolla.server.handlers import handle
from corolla.server.serve import load_blocks, open_model
from corolla.server.sessions.kv_cache import CacheBudget
from corolla.swarm.directory.directory import ServerRecord
from corolla.swarm.directory.directory_memory import Board, MemoryDirectory
from corolla.swarm.loop import EventLoopThread
from corolla.swarm.node import Node
from corolla.swarm.transport.memory import MemoryNetwork
from corolla.wire.messages import PROTOCOL_NAME

PAGES = 4096  # of attention cache a server
SLICE = 32  # tokens after which another run has its turn
FOREVER = 1e6
IMPATIENT = 0.0  # seconds after which a client without recovery gives up on a step: at its first error


class Servers:
    """`stages` × `replicas` servers of a model, and the networks that lead to them."""

    def __init__(self, model: str, *, stages: int, replicas: int) -> None:
        self.checkpoint: Checkpoint = open_checkpoint(model)
        self.loop = EventLoopThread()
        self._servers: dict[str, BlockServer] = {}
        self._connections: list[SwarmConnection] = []
        blocks = self.checkpoint.num_blocks
        for stage in range(stages):
            span = stage * blocks // stages, (stage + 1) * blocks // stages
            for replica in range(replicas):
                self._servers[f"stage {stage}, replica {replica}"] = self._load(span)

    def _load(self, blocks: tuple[int, int]) -> BlockServer:
        config = ServerConfig(self.checkpoint.name, NodeConfig(), blocks=blocks, dtype="float32")
        span = load_blocks(open_model(config, _silent), _silent)

        async def start() -> BlockServer:
            server = BlockServer(span, CacheBudget(PAGES), model=self.checkpoint.identity)
            server.engine.start()
            return server

        return self.loop.run(start())

    @property
    def peers(self) -> Sequence[str]:
        """All servers' ids."""
        return list(self._servers)

    def network(self) -> MemoryNetwork:
        """A network of a client's own, with every server on it."""
        network = MemoryNetwork()
        for peer in self._servers:
            self.loop.run(self._appear(network, peer))
        return network

    async def _appear(self, network: MemoryNetwork, peer: str) -> None:
        await network.transport(peer).serve(PROTOCOL_NAME, partial(handle, self._servers[peer]))

    def fail(self, network: MemoryNetwork, peers: Sequence[str]) -> None:
        """These servers lose what clients on this network have there; then they are back."""

        async def fail() -> None:
            for peer in peers:
                network.kill(peer)
                await self._appear(network, peer)

        self.loop.run(fail())

    def client(self, network: MemoryNetwork, **options: Any) -> Any:
        """A distributed model on a network; `options` are `SwarmConfig`'s."""

        async def node() -> Node:
            board = Board()
            for peer, server in self._servers.items():
                await MemoryDirectory(board).announce(self._record(peer, server), FOREVER)
            return Node(network.transport(), MemoryDirectory(board))

        connection = SwarmConnection(
            self.loop,
            self.loop.run(node()),
            SwarmConfig(**options),
            model=self.checkpoint.identity,
            model_name=self.checkpoint.name,
            num_blocks=self.checkpoint.num_blocks,
            owns_loop=False,
        )
        self._connections.append(connection)
        model = load_distributed(
            from_pretrained(self.checkpoint.name, dtype=torch.float32), connection=connection
        )
        model.generation_config.eos_token_id = None
        model.generation_config.pad_token_id = 0
        return model

    def _record(self, peer: str, server: BlockServer) -> ServerRecord:
        return ServerRecord(
            peer_id=peer,
            model=self.checkpoint.identity,
            model_name="",
            num_blocks=self.checkpoint.num_blocks,
            start=server.span.start,
            end=server.span.end,
            dtype="float32",
            throughput=100.0,
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for connection in self._connections:
            connection.close()
        for server in self._servers.values():
            self.loop.run(server.engine.close())
        self.loop.close()


class Failures:
    """Draws before every step which servers fail. A logits processor, so that it is called in the middle."""

    def __init__(self, servers: Servers, network: MemoryNetwork, rate: float, seed: int) -> None:
        self._servers, self._network, self.rate = servers, network, rate
        self._random = random.Random(seed)
        self.count = 0

    def __call__(self, ids: Tensor, scores: Tensor) -> Tensor:
        self.strike()
        return scores

    def strike(self) -> None:
        """One step's failures."""
        failing = [peer for peer in self._servers.peers if self._random.random() < self.rate]
        if failing:
            self._servers.fail(self._network, failing)
            self.count += len(failing)


class Way(Protocol):
    """A way to generate `wanted` tokens after a prompt, in slices."""

    wanted: int
    steps: int  # towards the result; less than were computed, where a way begins anew
    seconds: float
    failures: Failures

    def advance(self) -> None:
        """Go on for one slice."""


class Resuming:
    """Ours: a session that mends itself."""

    def __init__(self, servers: Servers, prompt: Tensor, wanted: int, rate: float, seed: int) -> None:
        network = servers.network()
        self._model = servers.client(network)
        self._session = self._model.inference_session()
        self._prompt: Tensor | None = prompt
        self.wanted, self.steps, self.seconds = wanted, 0, 0.0
        self.failures = Failures(servers, network, rate, seed)

    def advance(self) -> None:
        count = min(SLICE, self.wanted - self.steps)
        started = time.perf_counter()
        _generate(self._model, self._prompt, count, self._session, self.failures)
        self.seconds += time.perf_counter() - started
        self.steps += count
        self._prompt = None
        if self.steps == self.wanted:
            self._session.close()

    @property
    def tokens(self) -> list[int]:
        """What was generated."""
        ids = self._session.output_ids
        assert ids is not None
        found: list[int] = ids[0, -self.wanted :].tolist()
        return found


class Restarting:
    """The first simple way: attention caches, and after a failure everything from the beginning."""

    def __init__(self, servers: Servers, prompt: Tensor, wanted: int, rate: float, seed: int) -> None:
        network = servers.network()
        self._model = servers.client(network, patience=IMPATIENT)
        self._first = prompt
        self._session = self._model.inference_session()
        self.wanted, self.steps, self.seconds, self.restarts = wanted, 0, 0.0, 0
        self.failures = Failures(servers, network, rate, seed)

    def advance(self) -> None:
        count = min(SLICE, self.wanted - self.steps)
        started = time.perf_counter()
        try:
            _generate(self._model, None if self.steps else self._first, count, self._session, self.failures)
            self.steps += count
        except SwarmUnavailable:
            self.steps, self.restarts = 0, self.restarts + 1
            self._session.close()
            self._session = self._model.inference_session()
        self.seconds += time.perf_counter() - started
        if self.steps == self.wanted:
            self._session.close()


class Cacheless:
    """The second simple way: no caches, all tokens anew at every step, and after a failure that step again.

    Only one step in `every` is computed, and counts for all of them: what a step costs grows with its length.
    """

    def __init__(
        self, servers: Servers, prompt: Tensor, wanted: int, rate: float, seed: int, *, every: int
    ) -> None:
        network = servers.network()
        self._model = servers.client(network, patience=IMPATIENT)
        self._prompt, self._every = prompt, every
        self.wanted, self.steps, self.seconds = wanted, 0, 0.0
        self.failures = Failures(servers, network, rate, seed)

    def advance(self) -> None:
        width = min(self._every, self.wanted - self.steps)
        length = int(self._prompt.shape[1]) + self.steps + width // 2
        ids = self._prompt.repeat(1, length // int(self._prompt.shape[1]) + 1)[:, :length]
        started = time.perf_counter()
        while True:
            self.failures.strike()
            try:
                with torch.no_grad():
                    self._model(ids, use_cache=False, logits_to_keep=1)
                break
            except SwarmUnavailable:
                continue
        self.seconds += width * (time.perf_counter() - started)
        self.steps += width


def take_turns(ways: Sequence[Way], limit: float) -> None:
    """Run all to their ends, slice by slice in turns; one that has taken `limit` seconds is left undone."""
    while True:
        going = [way for way in ways if way.steps < way.wanted and way.seconds < limit]
        if not going:
            return
        for way in going:
            way.advance()


def _generate(model: Any, ids: Tensor | None, count: int, session: Any, failures: Failures) -> None:
    model.generate(ids, max_new_tokens=count, do_sample=False, session=session, logits_processor=[failures])


def _silent(line: str) -> None:
    pass
