"""Whole sequences on their way through a span, forward or backward, without a cache (training).

Invariant: a backward gives the same whether its graph was kept or is computed again, so it may be asked of
any server that has the blocks. Sequences travel packed; only families that cannot be packed are padded, here.
Model code runs in `forward` and `backward`, on the compute thread.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from corolla.errors import RequestRefused
from corolla.models.attention.packing import PackedBatch, segments_of
from corolla.models.prompts import DeepRows
from corolla.models.span import Span
from corolla.server.checks import check_hidden, check_memory, check_prompts
from corolla.server.training.leases import Lease, Saved


class Sequences:
    """The tensors of one `Forward` or `Backward` request: hidden [1, T, H] of sequences of `lengths`."""

    def __init__(
        self,
        span: Span,
        tensors: dict[str, Tensor],
        *,
        with_gradients: bool,
        memory_limit: int,
        between: Callable[[], None] | None = None,
    ) -> None:
        """Raises `RequestRefused` for tensors that do not fit the span or, computed, its memory."""
        check_hidden(tensors["hidden"], span)
        check_prompts(tensors.get("prompts"), span)
        self.lengths = _checked_lengths(tensors)
        self.tokens = sum(self.lengths)
        self._limit = memory_limit
        self._span = span
        self._tensors = tensors
        self._between = between
        self._check_memory(with_gradients)

    def _check_memory(self, with_gradients: bool) -> None:
        longest, count = max(self.lengths), len(self.lengths)
        if self._span.packable:
            sizes = {"rows": 1, "tokens": self.tokens, "total": longest}
        else:
            sizes = {"rows": count, "tokens": longest, "total": longest}
        check_memory(self._span, **sizes, with_gradients=with_gradients, limit=self._limit)

    def forward(self) -> Tensor:
        """Outputs [1, T, H] on the CPU, in the dtype of the inputs."""
        with torch.inference_mode():
            output = self._run(self._moved(self._tensors["hidden"]), self._prompts(False))
        return self._answer(output)

    def forward_kept(self) -> tuple[Tensor, Lease | None]:
        """As `forward`, with the graph for a backward; None for that when memory does not allow it."""
        try:
            self._check_memory(True)
        except RequestRefused:
            return self.forward(), None
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
        raise RequestRefused(
            f"The lengths must be at least 1 and add up to the {total} packed tokens of one row.",
            code="malformed",
            field="lengths",
        )
    return found
