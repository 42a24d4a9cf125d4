"""What a server is, beside the streams that it answers: its blocks, engine, budgets and counters.

Invariant: there is one of each, shared by all streams; a request is counted from its arrival to its answer.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch

from corolla.errors import UsageError
from corolla.models.attention.pages import Layout, PagePool, pages_for
from corolla.models.attention.windows import layout_of
from corolla.models.span import Span
from corolla.server.diary import Diary
from corolla.server.limits import PeerLimits
from corolla.server.scheduler.engine import Engine, Kind, run_pass
from corolla.server.scheduler.threads import FreeCpus, ThreadChooser
from corolla.server.sessions.bundles import Bundle, Entering, prefill
from corolla.server.sessions.kv_cache import CacheBudget
from corolla.server.sessions.store import SessionStore
from corolla.server.training.leases import Leases
from corolla.version import __version__
from corolla.wire.messages import ServerStatus

WORKING_BYTES = 4 * 2**30
LEASE_BYTES = 2 * 2**30


@dataclass
class Counters:
    """Totals since the server's start, in rows × tokens."""

    inference: int = 0
    forward: int = 0
    backward: int = 0
    redeemed: int = 0  # of the backwards' tokens, those whose graph had been kept


class BlockServer:
    """Answers requests for the blocks of one span."""

    def __init__(
        self,
        span: Span,
        budget: CacheBudget,
        *,
        model: str,
        working_bytes: int = WORKING_BYTES,
        limits: PeerLimits | None = None,
        leases: Leases | None = None,
        silence: float | None = None,
        layout: Layout | None = None,
        engine: Callable[..., Engine] = Engine,
    ) -> None:
        """`model` is the identity of the span's checkpoint; a computation that would need more than
        `working_bytes` beside weights and caches is refused; `silence` is the channels' (`swarm/channel.py`).
        `layout` is the span's, found out here if it is not known. `engine` makes the engine, which whoever owns the
        server starts and closes."""
        on_cpu, threads = span.device.type == "cpu", torch.get_num_threads()
        self.span = span
        self.model = model
        self.budget = budget
        self.working_bytes = working_bytes
        self.silence = silence
        self.limits = limits or PeerLimits()
        self.leases = Leases(LEASE_BYTES) if leases is None else leases
        self.pool = PagePool(
            budget.capacity, dtype=span.dtype, device=span.device, layout=layout or layout_of(span)
        )
        self.engine = engine(
            run_pass=ThreadChooser(threads).choosing(run_pass) if on_cpu else run_pass,
            when_quiet=self._tidy_up,
        )
        self.cpus = FreeCpus(threads)
        self.sessions = SessionStore(self.limits, self.engine)
        self.bundles: dict[str, Bundle] = {}  # by `models.prompts.digest`
        self.counters = Counters()
        self.diary = Diary()
        self.draining = False
        self._open_requests = 0
        self._untidy = True
        self._last_request = -float("inf")
        self._idle = asyncio.Event()
        self._idle.set()

    async def hold(self, prompts: Sequence[Entering]) -> None:
        """Compute prompts once for all clients, and keep them for good. Raises `UsageError` if there is no room."""
        needed = sum(pages_for(len(prompt.hidden)) for prompt in prompts) * self.pool.layout.tables
        if needed >= self.budget.capacity:
            raise UsageError(
                f"The bundles' prompts take {self.budget.tokens(needed)} of the "
                f"{self.budget.tokens(self.budget.capacity)} tokens that this "
                "server can cache: give more --cache-tokens, or fewer bundles."
            )
        self.budget.set_aside(needed)
        for prompt in prompts:
            work = partial(prefill, self.span, self.pool, prompt)
            self.bundles[prompt.name] = await self.engine.submit(Kind.TRAINING, work)

    def between_blocks(self) -> None:
        """In the middle of training: others' decode steps, and a look at who else needs the CPUs."""
        self.engine.run_pending_decodes()
        self.cpus.take()

    def _tidy_up(self) -> None:
        """Let go of what is not needed; on the compute thread, when nobody trains."""
        self.leases.expire()
        if self._untidy:
            _return_freed_memory()
        self._untidy = False

    @contextlib.contextmanager
    def request_open(self) -> Iterator[None]:
        """Counts a request while it is being answered."""
        self._open_requests += 1
        self._untidy = True
        self._idle.clear()
        try:
            yield
        finally:
            self._open_requests -= 1
            self._last_request = asyncio.get_running_loop().time()
            if not self._open_requests:
                self._idle.set()

    async def until_idle(self, quiet: float = 0.0) -> None:
        """Wait until no request is being answered and, for `quiet` seconds, none was.

        Between two steps of a reply, or a forward and its backward, a client computes too.
        """
        loop = asyncio.get_running_loop()
        while True:
            await self._idle.wait()
            missing = self._last_request + quiet - loop.time()
            if missing <= 0:
                return
            await asyncio.sleep(missing)

    def status(self) -> ServerStatus:
        """What `Ping` is answered with."""
        return ServerStatus(
            model=self.model,
            start=self.span.start,
            end=self.span.end,
            dtype=str(self.span.dtype).removeprefix("torch."),
            version=__version__,
            sessions=len(self.sessions),
            free_cache_tokens=self.free_tokens,
            tokens_inference=self.counters.inference,
            tokens_forward=self.counters.forward,
            tokens_backward=self.counters.backward,
        )

    @property
    def free_tokens(self) -> int:
        """Tokens that still fit for sure, in the place of closed sessions too."""
        return self.budget.tokens(self.budget.free + self.sessions.kept_pages)


def _return_freed_memory() -> None:
    """Give back what the C library holds and nobody uses, hundreds of megabytes after a training step, so that others
    on the machine can use it; takes milliseconds. Only glibc can be asked to."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
