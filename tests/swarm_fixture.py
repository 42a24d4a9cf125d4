"""A swarm in one process: real servers and clients of a checkpoint on the in-memory network.

Everything runs on one event-loop thread, as a client's own loop does; `MemorySwarm.network` makes faults.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from corolla.client.connection import SwarmConnection
from corolla.client.model.arguments import from_pretrained
from corolla.client.model.causal_lm import load_distributed
from corolla.client.model.loading import auditing
from corolla.config import SwarmConfig
from corolla.models.attention.pages import MARGIN, PAGE
from corolla.models.attention.windows import layout_of
from corolla.models.checkpoints.checkpoint import open_checkpoint
from corolla.models.checks.forms import cuts_of
from corolla.models.checks.selfcheck import check_family, steps_stack
from corolla.models.checks.steps import steps_differ
from corolla.models.kernels.apply import use_kernels
from corolla.models.span import load_span
from corolla.server.block_server import BlockServer
from corolla.server.handlers import handle
from corolla.server.sessions.kv_cache import CacheBudget
from corolla.server.sessions.prefilled import before_span, read_bundles
from corolla.swarm.directory.directory import ServerRecord
from corolla.swarm.directory.directory_memory import Board, MemoryDirectory
from corolla.swarm.loop import EventLoopThread
from corolla.swarm.node import Node
from corolla.swarm.transport.memory import MemoryNetwork
from corolla.wire.messages import PROTOCOL_NAME

FOREVER = 1e6


class MemorySwarm:
    """Servers for `spans` of the checkpoint in `folder`; `model()` loads a distributed model from it."""

    def __init__(
        self,
        folder: Path | str,
        spans: Sequence[tuple[int, int]],
        *,
        dtype: torch.dtype = torch.float32,
        cache_tokens: int = 100_000,
        margin: int = MARGIN,
    ) -> None:
        self.checkpoint = open_checkpoint(str(folder))
        self.dtype = dtype
        self.cache_tokens = cache_tokens
        self.margin = margin
        self.network = MemoryNetwork()
        self.board = Board()
        self.loop = EventLoopThread()
        self.servers: dict[str, BlockServer] = {}
        self._connections: list[SwarmConnection] = []
        for start, end in spans:
            self.add(start, end)

    def add(
        self,
        start: int,
        end: int,
        peer_id: str | None = None,
        throughput: float = 100.0,
        quantization: str = "none",
        bundles: Sequence[Path] = (),
    ) -> str:
        """Start a server, which computes the prompts of `bundles` by itself; gives its peer id."""
        config = self.checkpoint.config
        span = load_span(
            self.checkpoint,
            start,
            end,
            dtype=self.dtype,
            packable=check_family(config),
            stackable=steps_stack(config),
            steps_differ=steps_differ(config),
        )
        if quantization != "none" or bundles:  # a prompt's earlier blocks are always computed with them
            use_kernels(span.model, quantization, span.device)
        prompts = before_span(
            self.checkpoint,
            read_bundles(bundles, self.checkpoint),
            start,
            dtype=self.dtype,
            device=span.device,
            quantization=quantization,
        )
        return self.loop.run(self._add(span, peer_id, throughput, quantization, prompts))

    async def _add(
        self, span: Any, peer_id: str | None, throughput: float, quantization: str, prompts: list[Any]
    ) -> str:
        transport = self.network.transport(peer_id)
        layout = layout_of(span, self.margin)
        budget = CacheBudget(max(1, self.cache_tokens // PAGE) * layout.tables, tables=layout.tables)
        server = BlockServer(span, budget, model=self.checkpoint.identity, layout=layout)
        server.engine.start()
        await server.prefill_bundles(prompts)
        await transport.serve(PROTOCOL_NAME, partial(handle, server))
        record = ServerRecord(
            peer_id=transport.peer_id,
            model=self.checkpoint.identity,
            model_name=self.checkpoint.name,
            num_blocks=self.checkpoint.num_blocks,
            start=span.start,
            end=span.end,
            dtype="float32",
            throughput=throughput,
            quantization=quantization,
        )
        await MemoryDirectory(self.board).announce(record, FOREVER)
        self.servers[transport.peer_id] = server
        return transport.peer_id

    def kill(self, peer_id: str) -> None:
        """SIGKILL a server; its record stays."""

        async def kill() -> None:
            self.network.kill(peer_id)

        self.loop.run(kill())

    def stop(self, peer_id: str) -> None:
        """SIGSTOP a server: it stays silent, its streams stay open."""

        async def stop() -> None:
            self.network.stop(peer_id)

        self.loop.run(stop())

    def connect(self, config: SwarmConfig | None = None, *, observe: Any = None) -> SwarmConnection:
        """A new client's connection."""
        config = config or SwarmConfig()
        if observe is None:
            observe = auditing(self.checkpoint, config.audit, self.dtype)

        async def node() -> Node:
            return Node(self.network.transport(), MemoryDirectory(self.board))

        connection = SwarmConnection(
            self.loop,
            self.loop.run(node()),
            config,
            model=self.checkpoint.identity,
            model_name=self.checkpoint.name,
            num_blocks=self.checkpoint.num_blocks,
            cuts=cuts_of(self.checkpoint.config),
            steps_differ=steps_differ(self.checkpoint.config),
            observe=observe,
            owns_loop=False,
        )
        self._connections.append(connection)
        return connection

    def model(
        self,
        *,
        patience: float = 20.0,
        observe: Any = None,
        asked: Any = from_pretrained,
        chosen: Any = None,
        **arguments: Any,
    ) -> Any:
        """A distributed model over this swarm; `arguments` as for `from_pretrained`.

        `observe` makes an auditor of the test's own; `asked` and `chosen` say which class is loaded.
        """
        arguments.setdefault("dtype", self.dtype)
        request = asked(self.checkpoint.name, patience=patience, **arguments)
        connection = self.connect(request.swarm, observe=observe)
        return load_distributed(request, connection=connection, chosen=chosen)

    def counted(self, name: str = "inference") -> dict[str, int]:
        """A counter of each server: `inference`, `forward` or `backward`, in rows × tokens."""
        return {peer: int(getattr(server.counters, name)) for peer, server in self.servers.items()}

    def reserved(self) -> list[int]:
        """What each server's cache budget has given to open sessions, in pages."""
        return [server.budget.reserved - server.sessions.kept_pages for server in self.servers.values()]

    def close(self) -> None:
        """End the servers and the loop."""
        for connection in self._connections:
            connection.close()
        for server in self.servers.values():
            self.loop.run(server.engine.close())
        self.loop.close()

    def __enter__(self) -> MemorySwarm:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
