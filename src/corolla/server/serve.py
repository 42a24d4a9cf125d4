"""A server's life: load its blocks, join the swarm, announce, serve, leave in order.

Invariant: the server is announced only while it can answer; when `serve` returns, for whatever reason, its
announcement is taken back, its ready file is gone and no process of it is left.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import torch

from corolla import __version__
from corolla.config import ServerConfig
from corolla.errors import CorollaError, UsageError
from corolla.models.checkpoint import Checkpoint, open_checkpoint
from corolla.models.numerics import choose_dtype, dtype_name
from corolla.models.selfcheck import check_family
from corolla.models.span import Span, load_span
from corolla.server.engine import Engine, Kind
from corolla.server.handlers import BlockServer
from corolla.server.kv_cache import CacheBudget, default_capacity
from corolla.swarm.directory import ServerRecord
from corolla.swarm.node import Node
from corolla.swarm.ready_file import ready_file
from corolla.wire.messages import PROTOCOL_NAME

log = logging.getLogger(__name__)

TTL_SECONDS = 60.0
DRAIN_SECONDS = 30.0


async def serve(config: ServerConfig, stop: asyncio.Event, say: Callable[[str], None]) -> None:
    """Serve until `stop` is set; `say` gets a line for the user at each stage.

    Raises `UsageError` and its kin before anything is announced, `SwarmUnavailable` for peers that do not
    answer.
    """
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    span, checkpoint = await asyncio.to_thread(load, config, say)
    node = await Node.create(
        initial_peers=config.node.initial_peers,
        listen=config.node.listen or None,
        announce=config.node.announce or None,
        identity=config.node.identity,
    )
    engine = Engine()
    engine.start()
    try:
        capacity = config.cache_tokens
        free = psutil.virtual_memory().available
        blocks = span.end - span.start
        budget = CacheBudget(default_capacity(span, free) if capacity is None else capacity * blocks)
        server = BlockServer(span, engine, budget, model=checkpoint.identity)
        await node.transport.serve(PROTOCOL_NAME, server.handle)
        throughput = await engine.submit(Kind.TRAINING, lambda: measure(span))
        announcer = Announcer(node, server, checkpoint, throughput)
        await announcer.announce()
        addresses = await node.join_addresses()
        say(f"Serving blocks {span.start}:{span.end} of {checkpoint.name} as {node.peer_id}")
        say(f"Others join with: --peers {addresses[0]}")
        about = {"peer_id": node.peer_id, "addresses": addresses, "blocks": [span.start, span.end]}
        with ready_file(config.node.ready_file, about | {"pid": os.getpid()}):
            await announcer.run_until(stop)
        say("Finishing what has begun, then leaving…")
        await announcer.drain()
    finally:
        await engine.close()
        await node.close()


def load(config: ServerConfig, say: Callable[[str], None]) -> tuple[Span, Checkpoint]:
    """The server's blocks, checked to be splittable and read into memory."""
    say(f"Opening {config.model}")
    checkpoint = open_checkpoint(
        config.model, revision=config.revision, token=config.token, cache_dir=config.cache_dir
    )
    start, end = config.blocks or (0, checkpoint.num_blocks)
    if end > checkpoint.num_blocks:
        raise UsageError(
            f"--blocks {start}:{end} is out of range: {config.model} has blocks 0:{checkpoint.num_blocks}."
        )
    try:
        device = torch.device(config.device)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UsageError(f"--device {config.device} is not available on this machine.") from error
    check_family(checkpoint.config)
    dtype = choose_dtype(config.dtype, checkpoint.dtype, device)
    say(f"Loading blocks {start}:{end} of {checkpoint.num_blocks} in {dtype_name(dtype)}")
    span = load_span(checkpoint, start, end, dtype=dtype, device=device)
    log.info("blocks %d:%d take %d bytes", start, end, span.nbytes())
    return span, checkpoint


def measure(span: Span) -> float:
    """Tokens/s of single-token steps through the span: what routing weighs servers by."""
    hidden = torch.zeros(1, 1, span.hidden_size, dtype=span.dtype, device=span.device)
    with torch.inference_mode():
        span.forward(hidden, cache=span.new_cache())
        started, steps = time.perf_counter(), 0
        while time.perf_counter() - started < 0.2:
            span.forward(hidden, cache=span.new_cache())
            steps += 1
    return steps / (time.perf_counter() - started)


class Announcer:
    """Keeps a server's record in the directory true."""

    def __init__(self, node: Node, server: BlockServer, checkpoint: Checkpoint, throughput: float) -> None:
        self._node = node
        self._server = server
        self._checkpoint = checkpoint
        self._throughput = throughput

    def record(self) -> ServerRecord:
        """What is true of the server now."""
        span = self._server.span
        return ServerRecord(
            peer_id=self._node.peer_id,
            model=self._checkpoint.identity,
            model_name=Path(self._checkpoint.name).name
            if os.sep in self._checkpoint.name
            else self._checkpoint.name,
            num_blocks=self._checkpoint.num_blocks,
            start=span.start,
            end=span.end,
            dtype=dtype_name(span.dtype),
            throughput=self._throughput,
            free_cache_tokens=min(self._server.free_tokens, 2**31 - 1),
            version=__version__,
            state="draining" if self._server.draining else "serving",
        )

    async def announce(self) -> None:
        """Publish the record."""
        await self._node.directory.announce(self.record(), TTL_SECONDS)

    async def run_until(self, stop: asyncio.Event) -> None:
        """Keep announcing, three times in a record's life, until `stop` is set."""
        while not stop.is_set():
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(stop.wait(), TTL_SECONDS / 3)
            if stop.is_set():
                return
            try:
                await self.announce()
            except CorollaError as error:
                log.warning("The announcement did not reach the directory: %s", error)

    async def drain(self) -> None:
        """Take the announcement back, take nothing new, and wait for what has begun (not for idle sessions)."""
        self._server.draining = True
        with contextlib.suppress(CorollaError):
            await self._node.directory.withdraw(self.record())
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._server.until_idle(), DRAIN_SECONDS)
