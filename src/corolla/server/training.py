"""Training at a server: whole sequences through a span, forward or backward, without a cache.

Invariant: a backward gives the same whether its graph was kept or is computed again, so it may be asked of
any server that has the blocks. Sequences travel packed; only families that cannot be packed are padded, here.
Model code runs in `result`, on the compute thread.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from corolla.errors import RequestRefused
from corolla.models.attention.packing import PackedBatch, segments_of
from corolla.models.kernels.helpers import SPINNING
from corolla.models.prompts import DeepRows
from corolla.models.span import Span
from corolla.server.block_server import (
    BlockServer,
    check_hidden,
    check_memory,
    check_prompts,
    malformed,
    working_bytes,
)
from corolla.server.peers import Lease
from corolla.server.scheduler.engine import Kind, Request
from corolla.server.sessions.session import Client
from corolla.wire.frames import Packet
from corolla.wire.messages import Backward, Forward, Gradients, Output


class TrainingRequest(Request):
    """What `Forward` and `Backward` have in common: `hidden` [1, T, H] of packed sequences of `lengths`."""

    def __init__(
        self, server: BlockServer, client: Client, message: Forward | Backward, tensors: dict[str, Tensor]
    ) -> None:
        super().__init__(Kind.TRAINING, client.peer)
        self._server = server
        self._lease = message.lease
        self._message = message
        self._tensors = tensors

    @cached_property
    def span(self) -> Span:
        """The blocks that it is for. Raises `RequestRefused`."""
        return self._server.part(self._message)

    @cached_property
    def sequences(self) -> Sequences:
        """Its sequences. Raises `RequestRefused`."""
        return Sequences(self.span, self._tensors, between=self._server.between_blocks)

    def check_memory(self, *, with_gradients: bool) -> None:
        """That the sequences can be computed here. Raises `RequestRefused`."""
        sizes, limit = self.sequences.sizes, self._server.working_bytes
        check_memory(self.span, **sizes, with_gradients=with_gradients, limit=limit)

    async def computed(self) -> Any:
        """What `result` gives."""
        SPINNING.pause()
        self._server.engine.enqueue([self])
        return await self.done


class ForwardRequest(TrainingRequest):
    """A `Forward`, whose graph is kept for its backward where there is room."""

    def check(self) -> None:
        """See `handlers.Answered`."""
        self._server.check_staying()
        self.check_memory(with_gradients=False)

    async def run(self) -> Packet:
        """The outputs."""
        output = await self.computed()
        self._server.counters.forward += self.sequences.tokens
        return Packet(Output(), {"hidden": output})

    def result(self) -> Tensor:
        """The outputs [1, T, H], on the compute thread."""
        server, work = self._server, self.sequences
        with server.cpus.used():
            if self._lease is None or not self._may_keep():
                return work.forward()
            output, lease = work.forward_kept()
            server.leases.keep(self.peer, self._lease, lease)
            return output

    def _may_keep(self) -> bool:
        """Whether there is room for the graph, in memory and among the leases."""
        needed = working_bytes(self.span, **self.sequences.sizes, with_gradients=True)
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
        self._server.part(self._message)
        if self._lease is not None:
            return
        if "hidden" not in self._tensors or "lengths" not in self._tensors:
            raise malformed("hidden", "A backward without a lease needs its inputs.")
        self.check_memory(with_gradients=True)

    async def run(self) -> Packet:
        """The gradients of the inputs and, where wanted, of the deep prompts."""
        grads = await self.computed()
        self._server.counters.backward += int(self._grad.shape[1])
        return Packet(Gradients(), grads)

    def result(self) -> dict[str, Tensor]:
        """The gradients, on the compute thread. Raises `RequestRefused` for a graph that is gone (no_lease)."""
        with self._server.cpus.used():
            if self._lease is None:
                return self.sequences.backward(self._prompt_gradient, self._grad)
            lease = self._redeemed(self._lease)
            return backward_of(lease, self._grad, self._prompt_gradient)

    def _redeemed(self, name: str) -> Lease:
        lease = self._server.leases.take(self.peer, name)
        if lease is None or lease.blocks != (self.span.start, self.span.end):
            raise RequestRefused("The forward's graph is gone; send its inputs.", code="no_lease")
        if self._grad.shape != lease.output.shape:
            raise malformed(
                "grad", f"The gradient must be {list(lease.output.shape)}, as the forward's output was."
            )
        self._server.counters.redeemed += lease.tokens
        return lease


class Sequences:
    """Packed sequences on their way through a span, without a server around it."""

    def __init__(
        self, span: Span, tensors: dict[str, Tensor], *, between: Callable[[], None] | None = None
    ) -> None:
        """`between` is called before each block. Raises `RequestRefused` for tensors that do not fit the span."""
        check_hidden(tensors["hidden"], span)
        check_prompts(tensors.get("prompts"), span)
        self.lengths = _checked_lengths(tensors)
        self.tokens = sum(self.lengths)
        self._span = span
        self._tensors = tensors
        self._between = between

    @property
    def sizes(self) -> dict[str, int]:
        """What their computation's memory depends on, as `block_server.working_bytes` takes it."""
        longest = max(self.lengths)
        if self._span.packable:
            return {"rows": 1, "tokens": self.tokens, "total": longest}
        return {"rows": len(self.lengths), "tokens": longest, "total": longest}

    def forward(self) -> Tensor:
        """Outputs [1, T, H] on the CPU, in the dtype of the inputs."""
        with torch.inference_mode():
            output = self._run(self._moved(self._tensors["hidden"]), self._prompts(False))
        return self._answer(output)

    def forward_kept(self) -> tuple[Tensor, Lease]:
        """As `forward`, with the graph for a backward."""
        hidden, prompts = self._moved(self._tensors["hidden"]), self._prompts(True)
        saved = Saved([*self._span.blocks.parameters(), *self._span.blocks.buffers()])
        hidden.requires_grad_()
        with torch.enable_grad(), saved.counting():
            output = self._run(hidden, prompts)
        nbytes = saved.nbytes + output.nbytes + hidden.nbytes
        return self._answer(output.detach()), self._lease(output, hidden, prompts, nbytes)

    def backward(self, prompt_gradient: bool, grad: Tensor) -> dict[str, Tensor]:
        """Gradients for the inputs and, where wanted, the deep prompts (float32), on the CPU."""
        hidden, prompts = (
            self._moved(self._tensors["hidden"]).requires_grad_(),
            self._prompts(prompt_gradient),
        )
        with torch.enable_grad():
            output = self._run(hidden, prompts)
        return backward_of(self._lease(output, hidden, prompts, 0), grad, prompt_gradient)

    def _lease(self, output: Tensor, hidden: Tensor, prompts: Tensor | None, nbytes: int) -> Lease:
        blocks = (self._span.start, self._span.end)
        return Lease(blocks, output, hidden, prompts, nbytes, self.tokens)

    def _answer(self, output: Tensor) -> Tensor:
        return output.to("cpu", self._tensors["hidden"].dtype)

    def _moved(self, tensor: Tensor) -> Tensor:
        return tensor.to(self._span.device, self._span.dtype).detach()

    def _prompts(self, with_gradient: bool) -> Tensor | None:
        prompts = self._tensors.get("prompts")
        if prompts is None:
            return None
        # The sequences' gradients are summed in this dtype; in a float64 span no digit is lost.
        dtype = torch.promote_types(prompts.dtype, self._span.dtype)
        return prompts.to(self._span.device, dtype).detach().requires_grad_(with_gradient)

    def _run(self, hidden: Tensor, prompts: Tensor | None) -> Tensor:
        if not self._span.packable:
            return self._run_padded(hidden, prompts)
        segments = segments_of(self.lengths)
        deep = None
        if prompts is not None:
            deep = DeepRows.of([(one.begin, 0, one.count) for one in segments], [prompts] * len(segments))
        output = self._span.forward_packed(
            hidden[0],
            PackedBatch(segments),
            positions=self._positions(hidden.device),
            deep=deep,
            between=self._between,
        )
        return output.unsqueeze(0)

    def _positions(self, device: torch.device) -> Tensor:
        given = self._tensors.get("positions")
        if given is not None:
            return given[0].to(device)
        return torch.cat([torch.arange(length, device=device) for length in self.lengths])

    def _run_padded(self, hidden: Tensor, prompts: Tensor | None) -> Tensor:
        rows = pad_sequence(list(torch.split(hidden[0], self.lengths)), batch_first=True)
        places = torch.arange(rows.shape[1], device=hidden.device)
        real = places < torch.tensor(self.lengths, device=hidden.device)[:, None]
        positions = None
        if "positions" in self._tensors:
            parts = torch.split(self._positions(hidden.device), self.lengths)
            positions = pad_sequence(list(parts), batch_first=True)
        mask = None if bool(real.all()) and positions is None else real
        output = self._span.forward(rows, mask=mask, positions=positions, prompts=prompts)
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
    wanted = [lease.hidden]
    if prompt_gradient and lease.prompts is not None:
        wanted.append(lease.prompts)
    grads = torch.autograd.grad(lease.output, wanted, grad.to(lease.output.device, lease.output.dtype))
    answer = {"grad": grads[0].to("cpu", grad.dtype)}
    if len(grads) > 1:
        answer["prompts"] = grads[1].to("cpu", torch.float32)
    return answer


def _checked_lengths(tensors: dict[str, Tensor]) -> list[int]:
    """The sequences' lengths, which must cover the packed tokens exactly. Raises `RequestRefused`."""
    hidden, lengths = tensors["hidden"], tensors["lengths"]
    total = int(hidden.shape[1])
    # Compared as Python numbers, which do not overflow.
    found: list[int] = lengths.tolist()
    if hidden.shape[0] != 1 or min(found) < 1 or sum(found) != total:
        raise malformed(
            "lengths", f"The lengths must be at least 1 and add up to the {total} packed tokens of one row."
        )
    return found
