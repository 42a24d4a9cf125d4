"""A graph that was kept for a backward is freed when it is let go, used or not."""

from __future__ import annotations

import weakref
from typing import Any

import pytest
import torch
from tests.server.world import HIDDEN, noise, span_of

from corolla.server.peers import Lease
from corolla.server.training import Sequences, backward_of


class Token:
    """Lives as long as the graph that it was put into."""


class Mark(torch.autograd.Function):
    """Passes its input on and leaves a token in the graph."""

    tokens: list[weakref.ref[Token]] = []  # noqa: RUF012

    @staticmethod
    def forward(ctx: Any, value: torch.Tensor) -> torch.Tensor:
        ctx.token = Token()
        Mark.tokens.append(weakref.ref(ctx.token))
        return value.clone()

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
        return grad


def kept_graph(family: str) -> Lease:
    """A lease whose graph is marked where its last block begins."""
    span = span_of(family)
    tensors = {"hidden": noise(1, 6, HIDDEN), "lengths": torch.tensor([4, 2])}
    work = Sequences(span, tensors)
    mark = span.blocks[-1].register_forward_pre_hook(lambda _, inputs: (Mark.apply(inputs[0]), *inputs[1:]))
    try:
        _, lease = work.forward_kept()
    finally:
        mark.remove()
    return lease


@pytest.mark.parametrize("family", ["llama", "bloom", "gemma2", "falcon"])
@pytest.mark.parametrize("used", [True, False])
def test_a_graph_is_freed_with_its_lease(family: str, used: bool) -> None:
    lease = kept_graph(family)
    alive = Mark.tokens[-1]
    assert alive() is not None
    assert lease.nbytes > 2 * 6 * HIDDEN * 8
    if used:
        backward_of(lease, noise(1, 6, HIDDEN), prompt_gradient=False)
    del lease
    assert alive() is None
