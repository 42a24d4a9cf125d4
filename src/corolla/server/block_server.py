"""What a server is, beside the streams that it answers: its blocks, engine, budgets and counters.

There is one of each, shared by all streams. What is asked of a request before anything is computed stands here too.
Every refusal is typed and names the field that was wrong.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from corolla.errors import RequestRefused, UsageError
from corolla.models.attention.pages import PageLayout, PagePool, pages_for
from corolla.models.attention.windows import layout_of
from corolla.models.lora import named_parts, names_in, width
from corolla.models.prompts import GIVEN, BlockVectors
from corolla.models.span import Span
from corolla.server.kept_vectors import KeptVectors, KnownVectors
from corolla.server.peers import Leases, PeerLimits, UsageLog
from corolla.server.scheduler.engine import GOING_AWAY, Engine
from corolla.server.scheduler.execution import FreeCpus, Kind, ThreadChooser, run_pass
from corolla.server.sessions.kv_cache import CacheBudget
from corolla.server.sessions.prefilled import EnteringPrompt, PrefilledPrompt, prefill
from corolla.server.sessions.store import SessionStore
from corolla.version import __version__
from corolla.wire.messages import Backward, Forward, OpenSession, ServerStatus

WORKING_BYTES = 4 * 2**30
LEASE_BYTES = 2 * 2**30
MOST_TARGET_BYTES = 2**13
KEPT_BYTES = 2**28  # of what peers need not send again
REST_SECONDS = 30.0  # after training, until freed memory is given back


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
        layout: PageLayout | None = None,
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
        # Measured by passes of its own, which do not go together with the engine's.
        _ = span.cache_bytes, span.key_values, span.linear_layers
        self.pool = PagePool(
            budget.capacity, dtype=span.dtype, device=span.device, layout=layout or layout_of(span)
        )
        self.engine = engine(
            run_pass=ThreadChooser(threads).choosing(run_pass) if on_cpu else run_pass,
            when_quiet=self._tidy_up,
            history=self.limits.history,
        )
        self.cpus = FreeCpus(threads)
        self.sessions = SessionStore(self.engine)
        self.bundles: dict[str, PrefilledPrompt] = {}  # by `models.prompts.digest`
        self.kept = KeptVectors(KEPT_BYTES, time.monotonic)
        self.counters = Counters()
        self.usage = UsageLog()
        self.draining = False
        self._open_requests = 0
        self._trained: float | None = (
            time.monotonic()
        )  # since when freed memory may still be the process's own
        self._last_request = -float("inf")
        self._idle = asyncio.Event()
        self._idle.set()

    async def prefill_bundles(self, bundles: Sequence[EnteringPrompt | BlockVectors]) -> None:
        """Compute prompts once for all clients, and keep them, prefixes and adapters for good.

        Raises `UsageError` if there is no room, or for a prefix or adapter that these blocks cannot take.
        """
        for one in bundles:
            if isinstance(one, BlockVectors):
                self._keep_vectors(one)
        prompts = [one for one in bundles if isinstance(one, EnteringPrompt)]
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

    def _keep_vectors(self, vectors: BlockVectors) -> None:
        own = KnownVectors.whole(vectors, self.span.start, self.span.end)
        try:
            check_given(own.tensors, self.span)
        except RequestRefused as refusal:
            raise UsageError(f"A bundle is not for this model: {refusal}") from refusal
        self.kept.public[vectors.digest] = own

    def part(self, message: OpenSession | Forward | Backward) -> Span:
        """The part of the span that the message is for. Raises `RequestRefused`."""
        start, end = self.span.start, self.span.end
        if message.model != self.model:
            raise RequestRefused("This server serves another model.", code="wrong_model", field="model")
        if not start <= message.start < message.end <= end:
            raise RequestRefused(
                f"Blocks {message.start}:{message.end} are not all served here; this server has {start}:{end}.",
                code="wrong_blocks",
                field="end" if start <= message.start < end else "start",
            )
        return self.span.view(message.start, message.end)

    def check_staying(self) -> None:
        """That the server takes new work. Raises `RequestRefused`."""
        if self.draining:
            raise RequestRefused(GOING_AWAY, code="draining")

    def yield_to_others(self) -> float:
        """In the middle of training: what others ask comes in between, and a look at who else needs the CPUs.

        The seconds that others were given.
        """
        away = self.engine.yield_to_others()
        self.cpus.take()
        return away

    def _tidy_up(self) -> None:
        """Let go of what is not needed; on the compute thread, when nobody trains."""
        self.leases.expire()
        self.kept.expire()
        if self._trained is not None and time.monotonic() - self._trained > REST_SECONDS:
            _return_freed_memory()
            self._trained = None

    def note_training(self) -> None:
        """Memory is freed that is given back after a rest: the next step, and the next prompt, would ask for it again.

        Page by page, which takes longer than computing with a small model.
        """
        self._trained = time.monotonic()

    @contextlib.contextmanager
    def request_open(self) -> Iterator[None]:
        """Counts a request while it is being answered."""
        self._open_requests += 1
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


def malformed(field: str, why: str) -> RequestRefused:
    """What is wrong with a message's field or tensor, to be raised."""
    return RequestRefused(why, code="malformed", field=field)


def check_hidden(hidden: Tensor, span: Span) -> None:
    """As wide as what enters the span. Raises `RequestRefused`."""
    if hidden.shape[2] != span.width:
        raise malformed("hidden", f"Hidden states are {span.width} wide here, not {hidden.shape[2]}.")


def check_lengths(lengths: Tensor, total: int) -> list[int]:
    """As numbers, which cover so many tokens exactly. Raises `RequestRefused`."""
    # Compared as Python numbers, which do not overflow.
    found: list[int] = lengths.tolist()
    if min(found) < 1 or sum(found) != total:
        raise malformed("lengths", f"The lengths must be at least 1 and add up to the {total} tokens.")
    return found


def check_given(
    tensors: Mapping[str, Tensor],
    span: Span,
    *,
    prompts_at_most: int | None = None,
    prefix_at_most: int | None = None,
) -> None:
    """What the span's blocks are to be given besides hidden states. Raises `RequestRefused`."""
    check_prompts(tensors.get("prompts"), span, at_most=prompts_at_most)
    check_prefix(tensors.get("prefix"), span, at_most=prefix_at_most)
    check_adapter(tensors.get("lora"), tensors.get("targets"), span)
    given = [name for name in GIVEN if name in tensors]
    if len(given) > 1:
        raise malformed(given[1], "Blocks are given deep prompts, a prefix or an adapter, not two of these.")


def check_prompts(prompts: Tensor | None, span: Span, *, at_most: int | None = None) -> None:
    """Deep prompts [blocks, P, H] for exactly the span's blocks, or none. Raises `RequestRefused`.

    P may be bounded: a session keeps its prompts, so their room must be bounded by that of its tokens.
    """
    if prompts is None:
        return
    if prompts.shape[0] != span.end - span.start or prompts.shape[2] != span.hidden_size:
        raise malformed(
            "prompts",
            f"Deep prompts for these blocks are {span.end - span.start} by tokens by {span.hidden_size}.",
        )
    if at_most is not None and prompts.shape[1] > at_most:
        raise malformed(
            "prompts",
            f"Deep prompts for {prompts.shape[1]} tokens are more than the {at_most} that the session holds.",
        )


def check_prefix(prefix: Tensor | None, span: Span, *, at_most: int | None = None) -> None:
    """A prefix [blocks, P, D] for exactly the span's blocks, or none; P may be bounded. Raises `RequestRefused`."""
    if prefix is None:
        return
    form = span.key_values
    if form is None:
        raise malformed(
            "prefix",
            f"Blocks of {span.config.model_type} models keep other things than keys and values of one form, so no "
            "prefix can stand for them: use a prompt.",
        )
    if prefix.shape[0] != span.end - span.start or prefix.shape[2] != form.width:
        raise malformed(
            "prefix", f"A prefix for these blocks is {span.end - span.start} by tokens by {form.width}."
        )
    if at_most is not None and prefix.shape[1] > at_most:
        raise malformed(
            "prefix",
            f"A prefix of {prefix.shape[1]} tokens is more than the {at_most} that can be cached here.",
        )


def check_adapter(adapter: Tensor | None, targets: Tensor | None, span: Span) -> None:
    """An adapter [blocks, R, F] of some layers of exactly the span's blocks, or none. Raises `RequestRefused`."""
    if adapter is None and targets is None:
        return
    if adapter is None or targets is None or len(targets) > MOST_TARGET_BYTES:
        raise malformed("targets", "An adapter comes with the names of its layers, and they with it.")
    try:
        names = names_in(targets)
    except ValueError:
        raise malformed("targets", "The names of an adapter's layers are UTF-8.") from None
    asked, needed = set(names), width(span.linear_layers, names)
    for block, layers in zip(span.blocks, span.linear_layers, strict=True):
        other = next((name for name in named_parts(block) if name in asked and name not in layers), None)
        if other is not None:
            raise malformed(
                "targets",
                f"{other} is not a linear layer that sees each token once, so it takes no adapter here.",
            )
    if len(asked) < len(names) or not 0 < adapter.shape[1] <= span.hidden_size:
        raise malformed(
            "lora", f"An adapter names each layer once, and its rank is at most {span.hidden_size}."
        )
    if adapter.shape[0] != span.end - span.start or adapter.shape[2] < needed:
        raise malformed(
            "lora", f"An adapter of these layers is {span.end - span.start} by its rank by {needed} at least."
        )
