"""Whole sequences on their way through a span, forward or backward, without a cache (training).

Invariant: nothing is kept between requests; a backward computes its forward again, so it may be asked of any
server that has the blocks. Model code runs in `forward` and `backward`, on the compute thread.
"""

from __future__ import annotations

import torch
from torch import Tensor

from corolla.models.span import Span
from corolla.server.checks import check_hidden, check_memory, check_prompts


class Sequences:
    """The tensors of one `Forward` or `Backward` request."""

    def __init__(
        self, span: Span, tensors: dict[str, Tensor], *, with_gradients: bool, memory_limit: int
    ) -> None:
        """Raises `RequestRefused` for tensors that do not fit the span or, computed, its memory."""
        check_hidden(tensors["hidden"], span)
        check_prompts(tensors.get("prompts"), span)
        rows, tokens = (int(size) for size in tensors["hidden"].shape[:2])
        check_memory(
            span, rows=rows, tokens=tokens, total=tokens, with_gradients=with_gradients, limit=memory_limit
        )
        self._span = span
        self._tensors = tensors
        self.tokens = rows * tokens

    def forward(self) -> Tensor:
        """Outputs [R, T, H] on the CPU, in the dtype of the inputs."""
        hidden = self._tensors["hidden"]
        with torch.inference_mode():
            output = self._run(self._moved(hidden), self._tensors.get("prompts"))
        return output.to("cpu", hidden.dtype)

    def backward(self, prompt_gradient: bool) -> dict[str, Tensor]:
        """Gradients for the inputs and, where wanted, the deep prompts (float32), on the CPU."""
        sent = self._tensors["hidden"]
        hidden = self._moved(sent).requires_grad_()
        prompts = self._tensors.get("prompts")
        if prompts is not None:
            prompts = prompts.to(self._span.device).requires_grad_(prompt_gradient)
        wanted = [hidden] if prompts is None or not prompt_gradient else [hidden, prompts]
        with torch.enable_grad():
            output = self._run(hidden, prompts)
        grads = torch.autograd.grad(output, wanted, self._moved(self._tensors["grad"]))
        answer = {"grad": grads[0].to("cpu", sent.dtype)}
        if len(grads) > 1:
            answer["prompts"] = grads[1].to("cpu", torch.float32)
        return answer

    def _moved(self, tensor: Tensor) -> Tensor:
        return tensor.to(self._span.device, self._span.dtype).detach()

    def _run(self, hidden: Tensor, prompts: Tensor | None) -> Tensor:
        mask, positions = self._tensors.get("mask"), self._tensors.get("positions")
        device = self._span.device
        return self._span.forward(
            hidden,
            mask=None if mask is None else mask.to(device),
            positions=None if positions is None else positions.to(device),
            prompts=None if prompts is None else prompts.to(device),
        )
