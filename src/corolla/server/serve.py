"""A server's life: load its blocks, join the swarm, announce, serve, leave in order.

Invariant: the server is announced only while it can answer; when `serve` returns, for whatever reason, its
announcement is taken back, its ready file is gone and no process of it is left.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import psutil
import torch

from corolla.config import ServerConfig
from corolla.errors import CorollaError, UsageError
from corolla.files import ready_file
from corolla.models.attention.pages import PAGE
from corolla.models.attention.windows import layout_of
from corolla.models.checkpoints.checkpoint import Checkpoint, open_checkpoint
from corolla.models.checks.selfcheck import check_family, steps_stack
from corolla.models.checks.steps import steps_differ
from corolla.models.families import block_key_pattern
from corolla.models.kernels.apply import check_quantization, use_kernels
from corolla.models.kernels.helpers import give_up_helpers
from corolla.models.numerics import choose_dtype, dtype_name
from corolla.models.prompts import BlockVectors, LoraAdapter, Prompt
from corolla.models.span import Span
from corolla.models.stepwise import load_prepared
from corolla.server.block_server import BlockServer
from corolla.server.handlers import handle
from corolla.server.peers import Budgets, Leases, PeerLimits
from corolla.server.scheduler.engine import Engine
from corolla.server.scheduler.execution import LEAST_TIMED, Kind
from corolla.server.sessions.kv_cache import CacheBudget
from corolla.server.sessions.prefilled import EnteringPrompt, before_span, read_bundles
from corolla.server.sessions.session import default_capacity
from corolla.server.training import Sequences
from corolla.swarm.directory.directory import ServerRecord
from corolla.swarm.node import Node
from corolla.text import get_logger
from corolla.version import __version__
from corolla.wire.messages import PROTOCOL_NAME

T = TypeVar("T")

log = get_logger(__name__)

TTL_SECONDS = 60.0
DRAIN_SECONDS = 30.0
QUIET_SECONDS = 1.0  # a reply whose next step does not come for so long has ended

Watch = Callable[[BlockServer], contextlib.AbstractContextManager[Any]]


async def serve(
    config: ServerConfig,
    stop: asyncio.Event,
    say: Callable[[str], None],
    watch: Watch = contextlib.nullcontext,
) -> None:
    """Serve until `stop` is set; `say` gets a line for the user at each stage, `watch` the server while it is there.

    Raises `UsageError` and its kin before anything is announced, `SwarmUnavailable` for peers that do not
    answer. Stopped while it reads the blocks, it leaves the reading thread to the end of the process: see
    `still_loading`.
    """
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    opened = await _unless(stop, lambda: open_model(config, say))
    if opened is None:
        return
    node = await Node.create(
        initial_peers=config.node.initial_peers,
        listen=config.node.listen or None,
        announce=config.node.announce or None,
        identity=config.node.identity,
        guard=config.node.guard,
    )
    try:
        loaded = await _unless(stop, lambda: (run_bundles(opened, say), load_blocks(opened, say)))
        if loaded is not None:
            await _serve_span(config, node, *loaded, opened.checkpoint, stop, say, watch)
    finally:
        await node.close()


async def _serve_span(
    config: ServerConfig,
    node: Node,
    prompts: list[EnteringPrompt | BlockVectors],
    span: Span,
    checkpoint: Checkpoint,
    stop: asyncio.Event,
    say: Callable[[str], None],
    watch: Watch,
) -> None:
    server = _make_server(config, span, checkpoint)
    server.engine.start()
    watching = contextlib.ExitStack()
    try:
        watching.enter_context(watch(server))
        await server.prefill_bundles(prompts)
        await node.transport.serve(PROTOCOL_NAME, node.gate.guarded(partial(handle, server)))
        await give_threads_to(server.engine)
        throughput = await server.engine.submit(Kind.TRAINING, lambda: measure(span))
        await server.engine.submit(Kind.TRAINING, lambda: time_training(span), work=LEAST_TIMED)
        announcer = Announcer(node, server, checkpoint, throughput, config.quantization)
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
        watching.close()
        await server.engine.close()


def _make_server(config: ServerConfig, span: Span, checkpoint: Checkpoint) -> BlockServer:
    """With budgets that suit the machine's memory."""
    free, tokens = free_bytes(span.device), config.cache_tokens
    layout = layout_of(span)
    capacity = (
        default_capacity(span, free, layout) if tokens is None else max(1, tokens // PAGE) * layout.tables
    )
    limits = PeerLimits(Budgets.of_machine(config.peer_share, free))
    return BlockServer(
        span,
        CacheBudget(capacity, tables=layout.tables, history=limits.history),
        model=checkpoint.identity,
        working_bytes=free // 4,
        limits=limits,
        leases=Leases(free // 8 if config.lease_bytes is None else config.lease_bytes),
        layout=layout,
    )


# --- reading the blocks ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class OpenedModel:
    """What is known before any weight is read, checked as far as that goes."""

    checkpoint: Checkpoint
    start: int
    end: int
    dtype: torch.dtype
    device: torch.device
    packable: bool
    stackable: bool
    steps_differ: bool
    quantization: str
    prompts: list[Prompt] = field(default_factory=list)  # of the bundles


def open_model(config: ServerConfig, say: Callable[[str], None]) -> OpenedModel:
    """Find the checkpoint and check that these blocks of it can be served here. Raises `UsageError`."""
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
    # Read now: what it takes samples of may find no room beside the weights.
    log.info("the identity of %s is %s", checkpoint.name, checkpoint.identity)
    packable, stackable = check_family(checkpoint.config), steps_stack(checkpoint.config)
    dtype = choose_dtype(config.dtype, checkpoint.dtype, device)
    check_quantization(config.quantization, dtype, device)
    prompts = read_bundles(config.bundles, checkpoint)
    if not packable and not all(isinstance(one, LoraAdapter) for one in prompts):
        raise UsageError(
            f"Caches of {checkpoint.config.model_type} models cannot be shared between clients: leave --bundle out."
        )
    return OpenedModel(
        checkpoint,
        start,
        end,
        dtype,
        device,
        packable,
        stackable,
        steps_differ(checkpoint.config),
        config.quantization,
        prompts,
    )


def load_blocks(opened: OpenedModel, say: Callable[[str], None]) -> Span:
    """Read the blocks' weights into memory. Raises `CheckpointError`."""
    start, end, count = opened.start, opened.end, opened.checkpoint.num_blocks
    kept = "" if opened.quantization == "none" else f", weights in {opened.quantization}"
    say(f"Loading blocks {start}:{end} of {count} in {dtype_name(opened.dtype)}{kept}")
    span = load_prepared(
        opened.checkpoint,
        start,
        end,
        dtype=opened.dtype,
        device=opened.device,
        packable=opened.packable,
        stackable=opened.stackable,
        steps_differ=opened.steps_differ,
        prepare=lambda model: use_kernels(model, opened.quantization, opened.device),
    )
    if opened.checkpoint.stored_as is not None:
        say(_widened(opened, span))
    span.compile()
    log.info("blocks %d:%d take %d bytes", start, end, span.nbytes())
    return span


def _widened(opened: OpenedModel, span: Span) -> str:
    """What it costs that a quantized checkpoint's weights are made wide."""
    pattern = block_key_pattern(opened.checkpoint.config)

    def ours(name: str) -> bool:
        match = pattern.match(name)
        return match is not None and opened.start <= int(match["index"]) < opened.end

    stored, kept = opened.checkpoint.stored_bytes(ours), span.nbytes()
    return (
        f"Stored as {opened.checkpoint.stored_as}: these blocks' weights take {stored / 2**20:,.0f} MiB in the "
        f"checkpoint and {kept / 2**20:,.0f} MiB here"
    )


def run_bundles(opened: OpenedModel, say: Callable[[str], None]) -> list[EnteringPrompt | BlockVectors]:
    """The bundles' prompts where the server's first block begins. Raises `CheckpointError`."""
    if opened.prompts:
        say("Computing the bundles' prompts for all who chat with them")
    return before_span(
        opened.checkpoint,
        opened.prompts,
        opened.start,
        dtype=opened.dtype,
        device=opened.device,
        quantization=opened.quantization,
    )


LOADING = "corolla-load"


def still_loading() -> bool:
    """Whether a stopped `serve` has left its reading thread behind.

    It cannot be interrupted, and the interpreter must not be torn down under it: end with `files.exit_at_once`.
    """
    return any(thread.name == LOADING and thread.is_alive() for thread in threading.enumerate())


async def _unless(stop: asyncio.Event, work: Callable[[], T]) -> T | None:
    """The result of `work()`, on a thread of its own; None when `stop` is set before that."""
    result: Future[T] = Future()
    result.set_running_or_notify_cancel()  # from here on the thread alone settles it

    def run() -> None:
        try:
            result.set_result(work())
        except BaseException as error:
            result.set_exception(error)

    threading.Thread(target=run, name=LOADING, daemon=True).start()
    ready, stopped = asyncio.wrap_future(result), asyncio.ensure_future(stop.wait())
    both: set[asyncio.Future[Any]] = {ready, stopped}
    try:
        await asyncio.wait(both, return_when=asyncio.FIRST_COMPLETED)
        return ready.result() if ready.done() else None
    finally:
        ready.cancel()
        stopped.cancel()


async def give_threads_to(engine: Engine) -> None:
    """Let only the compute thread have others beside it, as many as torch has now."""
    await engine.submit(Kind.TRAINING, partial(torch.set_num_threads, give_up_helpers()))


def free_bytes(device: torch.device) -> int:
    """Memory that nobody uses where the span is."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return int(psutil.virtual_memory().available)


def measure(span: Span) -> float:
    """Tokens/s of single-token steps through the span: what routing weighs servers by."""
    hidden = torch.zeros(1, 1, span.width, dtype=span.dtype, device=span.device)
    with torch.inference_mode():
        span.forward(hidden, cache=span.new_cache())
        started, steps = time.perf_counter(), 0
        while time.perf_counter() - started < 0.2:
            span.forward(hidden, cache=span.new_cache())
            steps += 1
    return steps / (time.perf_counter() - started)


def time_training(span: Span) -> None:
    """A forward of as many tokens as say how long others will take."""
    hidden = torch.zeros(1, LEAST_TIMED, span.width, dtype=span.dtype)
    Sequences(span, {"hidden": hidden, "lengths": torch.tensor([LEAST_TIMED])}).forward()


def shown_name(name: str) -> str:
    """What a server's record calls its model: a hub's name, or a folder's, never the path to it."""
    path = Path(name)
    return path.resolve().name if path.exists() else name


class Announcer:
    """Keeps a server's record in the directory true."""

    def __init__(
        self, node: Node, server: BlockServer, checkpoint: Checkpoint, throughput: float, quantization: str
    ) -> None:
        self._node = node
        self._server = server
        self._checkpoint = checkpoint
        self._quantization = quantization
        self._throughput = throughput

    def record(self) -> ServerRecord:
        """What is true of the server now."""
        span = self._server.span
        return ServerRecord(
            peer_id=self._node.peer_id,
            model=self._checkpoint.identity,
            model_name=shown_name(self._checkpoint.name),
            num_blocks=self._checkpoint.num_blocks,
            start=span.start,
            end=span.end,
            dtype=dtype_name(span.dtype),
            quantization=self._quantization,
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
            self._server.usage.tell()
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
            await asyncio.wait_for(self._server.until_idle(QUIET_SECONDS), DRAIN_SECONDS)
