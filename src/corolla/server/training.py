"""Training at a server: whole sequences through a span, forward or backward, without a cache.

Invariant: a backward gives the same whether its graph was kept or is computed again, so it may be asked of
any server that has the blocks. Sequences travel packed; only families that cannot be packed are padded, here.
Model code runs in `result`, on the compute thread.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from corolla.errors import RequestRefused
from corolla.models.attention.packing import PackedBatch, segments_of
from corolla.models.kernels.helpers import SPINNING
from corolla.models.lora import Adapter, names_in, of_all
from corolla.models.prompts import GIVEN, DeepRows
from corolla.models.span import Span
from corolla.server.block_server import (
    BlockServer,
    check_given,
    check_hidden,
    check_lengths,
    malformed,
)
from corolla.server.memory import check_memory, working_bytes
from corolla.server.peers import Lease
from corolla.server.scheduler.execution import Kind, Preemptible, Request
from corolla.server.sessions.session import Client
from corolla.wire.frames import Packet
from corolla.wire.messages import Backward, Forward, Gradients, Output

SHORT_SECONDS = 0.05  # of computing, that others wait for
MOST_SECONDS = 600.0  # of computing that one request may ask for
BACKWARD = 2.0  # forwards that a backward takes, of a graph that is there


class TrainingRequest(Request):
    """What `Forward` and `Backward` have in common: `hidden` [1, T, H] of packed sequences of `lengths`."""

    def __init__(
        self, server: BlockServer, client: Client, message: Forward | Backward, tensors: dict[str, Tensor]
    ) -> None:
        """Raises `RequestRefused` for blocks that are not served here."""
        super().__init__(Kind.TRAINING, client.peer)
        self.span = server.part(message)
        self._server = server
        self._lease = message.lease
        self._tensors = tensors
        if message.known is not None:
            self._tensors = server.kept.with_known(client.peer, message, tensors)

    @cached_property
    def sequences(self) -> Sequences:
        """Its sequences. Raises `RequestRefused`."""
        return Sequences(self.span, self._tensors)

    def check_memory(self, *, with_gradients: bool) -> None:
        """That the sequences can be computed here. Raises `RequestRefused`."""
        sizes, limit = self.sequences.sizes, self._server.working_bytes
        needed = self._working_bytes(with_gradients=with_gradients)
        check_memory(needed, rows=sizes["rows"], tokens=sizes["tokens"], limit=limit)

    def _working_bytes(self, *, with_gradients: bool) -> int:
        return working_bytes(self.span, **self.sequences.sizes, with_gradients=with_gradients)

    def check_time(self, tokens: float) -> None:
        """That so many tokens can be computed here in a time that others can bear. Raises `RequestRefused`."""
        self.work = (
            tokens * (self.span.end - self.span.start) / (self._server.span.end - self._server.span.start)
        )
        seconds = self._server.engine.seconds_of(self.work)
        if seconds > MOST_SECONDS:
            raise RequestRefused(
                f"Computing this would take about {seconds / 60:.0f} minutes of the {MOST_SECONDS / 60:.0f} that a "
                "request may take here: send fewer rows or shorter sequences.",
                code="too_large",
                field="hidden",
            )

    async def computed(self) -> Any:
        """What `compute` gives."""
        SPINNING.pause()
        self._server.engine.enqueue([self])
        return await self.done

    def result(self) -> Any:
        """See `Request`. What does not take long is not cut: that costs every operator a call."""
        self._server.note_training()
        short = self._server.engine.seconds_of(self.work) < SHORT_SECONDS
        with self._server.cpus.used(), nullcontext() if short else Preemptible(self._server.yield_to_others):
            return self.compute()

    def compute(self) -> Any:
        """What `done` is to hold, on the compute thread."""
        raise NotImplementedError


class ForwardRequest(TrainingRequest):
    """A `Forward`, whose graph is kept for its backward where there is room."""

    def check(self) -> None:
        """See `handlers.Answered`."""
        self._server.check_staying()
        self.check_memory(with_gradients=False)
        self.check_time(self.sequences.work)

    async def run(self) -> Packet:
        """The outputs."""
        output = await self.computed()
        self._server.counters.forward += self.sequences.tokens
        return Packet(Output(), {"hidden": output})

    def compute(self) -> Tensor:
        """The outputs [1, T, H]."""
        if self._lease is None or not self._may_keep():
            return self.sequences.forward()
        output, lease = self.sequences.forward_kept()
        self._server.leases.keep(self.peer, self._lease, lease)
        return output

    def _may_keep(self) -> bool:
        """Whether there is room for the graph, in memory and among the leases."""
        needed = self._working_bytes(with_gradients=True)
        return needed <= self._server.working_bytes and self._server.leases.may_fit(self.sequences.tokens)


class BackwardRequest(TrainingRequest):
    """A `Backward`, with the name of a graph that was kept, or with the forward's inputs.

    Not refused while the server drains: its forward may have been done here.
    """

    def __init__(
        self, server: BlockServer, client: Client, message: Backward, tensors: dict[str, Tensor]
    ) -> None:
        super().__init__(server, client, message, tensors)
        self._grad = tensors["grad"]
        self._prompt_gradient = message.prompt_gradient

    def check(self) -> None:
        """See `handlers.Answered`."""
        if self._lease is not None:
            self.check_time(BACKWARD * int(self._grad.shape[1]))
            return
        if "hidden" not in self._tensors or "lengths" not in self._tensors:
            raise malformed("hidden", "A backward without a lease needs its inputs.")
        self._check_gradient((1, self.sequences.tokens, self.span.width_behind))
        self.check_memory(with_gradients=True)
        self.check_time((1 + BACKWARD) * self.sequences.work)

    async def run(self) -> Packet:
        """The gradients of the inputs and, where wanted, of the deep prompts."""
        grads = await self.computed()
        self._server.counters.backward += int(self._grad.shape[1])
        return Packet(Gradients(), grads)

    def compute(self) -> dict[str, Tensor]:
        """The gradients. Raises `RequestRefused` for a graph that is gone (no_lease)."""
        if self._lease is None:
            return self.sequences.backward(self._prompt_gradient, self._grad)
        return backward_of(self._redeemed(self._lease), self._grad, self._prompt_gradient)

    def _redeemed(self, name: str) -> Lease:
        lease = self._server.leases.take(self.peer, name)
        if lease is None or lease.blocks != (self.span.start, self.span.end):
            raise RequestRefused("The forward's graph is gone; send its inputs.", code="no_lease")
        self._check_gradient(lease.output.shape)
        self._server.counters.redeemed += lease.tokens
        return lease

    def _check_gradient(self, shape: Sequence[int]) -> None:
        if list(self._grad.shape) != list(shape):
            raise malformed("grad", f"The gradient must be {list(shape)}, as the forward's output was.")


class Sequences:
    """Packed sequences on their way through a span, without a server around it."""

    def __init__(self, span: Span, tensors: dict[str, Tensor]) -> None:
        """Raises `RequestRefused` for tensors that do not fit the span."""
        check_hidden(tensors["hidden"], span)
        check_given(tensors, span)
        self._before = int(tensors["prefix"].shape[1]) if "prefix" in tensors else 0
        self.lengths = _checked_lengths(tensors)
        self.tokens = sum(self.lengths)
        self._span = span
        self._tensors = tensors

    @property
    def sizes(self) -> dict[str, int]:
        """What their computation's memory depends on, as `memory.working_bytes` takes it."""
        longest = max(self.lengths) + self._before
        form = self._span.key_values if self._before else None
        copied = 0 if form is None else len(self.lengths) * longest * form.width
        rows, tokens = len(self.lengths), longest - self._before
        if self._span.packable:
            rows, tokens = 1, self.tokens
        adapted = rows * tokens * self._adapted
        return {"rows": rows, "tokens": tokens, "total": longest, "copied": copied, "adapted": adapted}

    @property
    def _adapted(self) -> int:
        """Numbers that an adapter makes of a token in a block: A·x, and what it widens."""
        if "lora" not in self._tensors:
            return 0
        _, rank, width = self._tensors["lora"].shape
        widened = int(width) if self._span.dtype.itemsize < 4 else 0
        return int(rank) * len(names_in(self._tensors["targets"])) + widened

    @property
    def work(self) -> float:
        """What their forward takes, in tokens whose attention is over next to nothing."""
        # In a block, a token takes some 24 H^2 operations for products with weights, and 2 H for each that it sees.
        seen = sum(length * (length + 2 * self._before) for length in self.lengths)
        return self.tokens + seen / (12 * self._span.hidden_size)

    def forward(self) -> Tensor:
        """Outputs [1, T, H] on the CPU, in the dtype of the inputs."""
        with torch.inference_mode():
            output = self._run(self._moved(self._tensors["hidden"]), self._given(False))
        return self._answer(output)

    def forward_kept(self) -> tuple[Tensor, Lease]:
        """As `forward`, with the graph for a backward."""
        hidden, given = self._moved(self._tensors["hidden"]).requires_grad_(), self._given(True)
        saved = Saved([*self._span.blocks.parameters(), *self._span.blocks.buffers()])
        with torch.enable_grad(), saved.counting():
            output = self._run(hidden, given)
        nbytes = saved.nbytes + output.nbytes + hidden.nbytes
        blocks = (self._span.start, self._span.end)
        return self._answer(output.detach()), Lease(blocks, output, hidden, given, nbytes, self.tokens)

    def backward(self, prompt_gradient: bool, grad: Tensor) -> dict[str, Tensor]:
        """Gradients for the inputs and, where wanted, what blocks are given besides (float32), on the CPU."""
        _, lease = self.forward_kept()
        return backward_of(lease, grad, prompt_gradient)

    def _answer(self, output: Tensor) -> Tensor:
        return output.to("cpu", self._tensors["hidden"].dtype)

    def _moved(self, tensor: Tensor) -> Tensor:
        return tensor.to(self._span.device, self._span.dtype).detach()

    def _given(self, with_gradient: bool) -> dict[str, Tensor]:
        """Deep prompts, a prefix or an adapter, by name."""
        found = {}
        for name in GIVEN:
            if name in self._tensors:
                sent = self._tensors[name]
                # The sequences' gradients are summed in this dtype; in a float64 span no digit is lost.
                dtype = torch.promote_types(sent.dtype, self._span.dtype)
                found[name] = sent.to(self._span.device, dtype).detach().requires_grad_(with_gradient)
        return found

    def _run(self, hidden: Tensor, given: dict[str, Tensor]) -> Tensor:
        if not self._span.packable:
            return self._run_padded(hidden, given)
        segments = segments_of(self.lengths)
        prompts, prefix, deep = given.get("prompts"), given.get("prefix"), None
        if prompts is not None:
            deep = DeepRows.of([(one.begin, 0, one.count) for one in segments], [prompts] * len(segments))
        adapter, targets = given.get("lora"), self._tensors.get("targets")
        if adapter is not None and targets is not None:
            adapters = of_all(Adapter(adapter, names_in(targets)), self.tokens)
        else:
            adapters = None
        output = self._span.forward_packed(
            hidden[0],
            PackedBatch(segments, prefix=None if prefix is None else self._span.by_block(prefix)),
            positions=self._positions(hidden.device) + self._before,
            deep=deep,
            adapters=adapters,
        )
        return output.unsqueeze(0)

    def _positions(self, device: torch.device) -> Tensor:
        given = self._tensors.get("positions")
        if given is not None:
            return given[0].to(device)
        return torch.cat([torch.arange(length, device=device) for length in self.lengths])

    def _run_padded(self, hidden: Tensor, given: dict[str, Tensor]) -> Tensor:
        rows = pad_sequence(list(torch.split(hidden[0], self.lengths)), batch_first=True)
        places = torch.arange(rows.shape[1], device=hidden.device)
        real = places < torch.tensor(self.lengths, device=hidden.device)[:, None]
        positions = None
        if "positions" in self._tensors:
            parts = torch.split(self._positions(hidden.device), self.lengths)
            positions = pad_sequence(list(parts), batch_first=True)
        mask = None if bool(real.all()) and positions is None else real
        beside = {"targets": self._tensors["targets"]} if "targets" in self._tensors else {}
        output = self._span.forward(rows, mask=mask, positions=positions, cache=None, **given, **beside)
        return output[real].unsqueeze(0)


class Saved:
    """Counts the bytes that autograd keeps for a backward."""

    def __init__(self, weights: Iterable[Tensor] = ()) -> None:
        """`weights` are there anyway, so neither they nor views of them count."""
        self._weights = {one.untyped_storage().data_ptr() for one in weights if one.layout is torch.strided}
        self._storages: dict[int, int] = {}

    @property
    def nbytes(self) -> int:
        """Bytes of all distinct tensors' memory, without weights."""
        return sum(self._storages.values())

    @contextmanager
    def counting(self) -> Iterator[None]:
        """Everything that is saved inside is counted."""
        with torch.autograd.graph.saved_tensors_hooks(self._pack, _same):
            yield

    def _pack(self, tensor: Tensor) -> Tensor:
        if tensor.layout is torch.strided:
            storage = tensor.untyped_storage()  # which views and slices share
            if storage.data_ptr() not in self._weights:
                self._storages[storage.data_ptr()] = storage.nbytes()
        # Detached: a node that held its own output with its history would hold itself, and be freed never.
        return tensor.detach()


def _same(tensor: Tensor) -> Tensor:
    return tensor


def backward_of(lease: Lease, grad: Tensor, prompt_gradient: bool) -> dict[str, Tensor]:
    """Gradients through a graph, which is used up, given that of its output [1, T, H]; on the CPU."""
    given = lease.given if prompt_gradient else {}
    wanted = [lease.hidden, *given.values()]
    given_grad = grad.to(lease.output.device, lease.output.dtype)
    # Not every span has layers that an adapter is for.
    grads = torch.autograd.grad(lease.output, wanted, given_grad, materialize_grads=True)
    found = {name: one.to("cpu", torch.float32) for name, one in zip(given, grads[1:], strict=True)}
    return {"grad": grads[0].to("cpu", grad.dtype)} | found


def _checked_lengths(tensors: dict[str, Tensor]) -> list[int]:
    """The sequences' lengths, which must cover the packed tokens exactly. Raises `RequestRefused`."""
    hidden = tensors["hidden"]
    if hidden.shape[0] != 1:
        raise malformed("lengths", "Sequences are packed into one row.")
    return check_lengths(tensors["lengths"], int(hidden.shape[1]))
