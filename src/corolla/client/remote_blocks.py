"""The blocks as the client's model sees them: one callable that runs on other machines, with gradients.

Invariant: with `requires_grad` anywhere in its inputs the output carries the exact gradient of the remote
computation; with a session, tokens are run once and only once. Tensors go to the wire from the CPU and come
back to the device that they came from.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx

from corolla.client.connection import SwarmConnection
from corolla.client.local_blocks import LocalBlocks, LocalSession
from corolla.client.sessions.chain import SessionChain
from corolla.client.training import TrainingPass
from corolla.errors import UsageError
from corolla.models import guard, padded_rows
from corolla.models.cache import BlocksCall, DeferredPass, RemoteCache, on_cpu
from corolla.models.cut_layout import CutLayout
from corolla.models.prompts import BlockVectors


class RemoteBlocks:
    """Blocks [start, end) of a model in the swarm; `blocks[i:j]` is a part of them, `blocks[i:j](hidden)` runs it."""

    def __init__(
        self,
        connection: SwarmConnection,
        cuts: CutLayout,
        start: int,
        end: int,
        local: LocalBlocks | None = None,
        padding_changes_rows: Callable[..., bool] = lambda **_where: False,
    ) -> None:
        """`cuts` is what crosses the cuts between the model's blocks; `local` are the first ones, where this
        client runs them itself; the rest says what `models/checks/padding.py` finds."""
        self.connection = connection
        self.cuts = cuts
        self.start, self.end = start, end
        self.local = local
        self._padding_changes_rows = padding_changes_rows

    def __len__(self) -> int:
        return self.end - self.start

    def __getitem__(self, index: slice | int) -> RemoteBlocks:
        if not isinstance(index, slice):
            position = range(len(self))[operator.index(index)]
            index = slice(position, position + 1)
        start, stop, step = index.indices(len(self))
        if step != 1 or start >= stop:
            raise UsageError(
                f"Blocks are taken as a range such as blocks[0:{len(self)}], in order and not empty."
            )
        start, end = self.start + start, self.start + stop
        return RemoteBlocks(self.connection, self.cuts, start, end, self.local, self._padding_changes_rows)

    @property
    def remote_start(self) -> int:
        """The first block that is left to the swarm."""
        return self.start if self.local is None else min(max(self.start, self.local.end), self.end)

    def __call__(
        self, hidden: Tensor, *, mask: Tensor | None = None, positions: Tensor | None = None
    ) -> Tensor:
        """Hidden states [R, T, H] after these blocks; `mask` [R, T] is 1 for tokens, `positions` int64 [R, T].

        Where a family's blocks are given more (`models/cut_layout.py`), all of that stands beside the hidden states.
        Differentiable in `hidden`. Raises `UsageError` for another width, `MissingBlocks` or `SwarmUnavailable`.
        """
        width = self.cuts.width(self.start)
        if not isinstance(hidden, Tensor) or hidden.ndim != 3 or not hidden.is_floating_point():
            raise UsageError(
                "Blocks take hidden states: a tensor [rows, tokens, hidden size] of numbers with a point."
            )
        rows, tokens = int(hidden.shape[0]), int(hidden.shape[1])
        guard.check_continues(None, rows, tokens, {"attention_mask": mask, "position_ids": positions})
        positions = None if positions is None else guard.known_positions(positions, mask)
        if hidden.shape[-1] != width:
            raise UsageError(
                f"What enters block {self.start} of this model is {width} numbers a token (hidden states, and "
                f"whatever else its blocks need), not {hidden.shape[-1]}."
            )
        mask = None if mask is None or bool(mask.all()) else mask.bool()
        return self.run(hidden, BlocksCall(mask, positions, None, None, 0))

    def open_chain(self, vectors: BlockVectors | None = None) -> SessionChain:
        """A session over these blocks, which no server hears of before its first step; see `SessionChain`."""
        front = None
        if self.local is not None and self.start < self.remote_start:
            front = LocalSession(self.local, self.start, self.remote_start)
        swarm = self.connection
        return SessionChain(
            swarm.view,
            swarm.retry,
            swarm.audits,
            swarm.run,
            start=self.remote_start,
            end=self.end,
            vectors=vectors,
            front=front,
        )

    def run(self, hidden: Tensor, call: BlocksCall) -> Tensor:
        """What the pseudo-layer does: a session's step when there is a cache, otherwise a training pass."""
        wanted = torch.is_grad_enabled() and (
            hidden.requires_grad or (call.vectors is not None and call.vectors.requires_grad)
        )
        if call.cache is None:
            apart = not wanted and self._needs_padding(call)
            return self._run_apart(hidden, call) if apart else self._run_whole(hidden, call, wanted)
        if call.start == 0 and (wanted or (call.cache.lazy and not self._needs_padding(call))):
            output = self._run_whole(hidden, call, wanted)
            vectors = None if call.vectors is None else call.vectors.kept()  # training goes on with it
            call.cache.deferred = DeferredPass(hidden.detach(), replace(call, cache=None, vectors=vectors))
            return output
        output = self._step(hidden, call)
        if not wanted:
            return output
        values = None if call.vectors is None else call.vectors.values
        once: Tensor = _NoGradients.apply(output, hidden, values)  # type: ignore[no-untyped-call]
        return once

    def _run_whole(self, hidden: Tensor, call: BlocksCall, wanted: bool) -> Tensor:
        if self.local is not None and self.start < self.remote_start:
            hidden = self.local.run(hidden, call, self.start, self.remote_start, None)
            if self.remote_start == self.end:
                return hidden
        if wanted and self._needs_padding(call):
            padded_rows.refuse_padding()
        output: Tensor = _RemoteForward.apply(  # type: ignore[no-untyped-call]
            hidden, None if call.vectors is None else call.vectors.values, self, call, wanted
        )
        return output

    def _needs_padding(self, call: BlocksCall) -> bool:
        """Whether blocks must be told of the padding, as by a session's step; a pass without a cache is sent none."""
        before, between = padded_rows.padding_before_tokens(call.mask)
        return (before or between) and self._padding_changes_rows(before=before, between=between)

    def _run_apart(self, hidden: Tensor, call: BlocksCall) -> Tensor:
        """A pass as a session's only step."""
        chain = self.open_chain(call.vectors)
        try:
            return chain.step(hidden, call)
        finally:
            close_soon(self.connection, chain)

    @torch.no_grad()
    def _step(self, hidden: Tensor, call: BlocksCall) -> Tensor:
        assert call.cache is not None
        self._catch_up(call.cache, call.start)
        call.cache.deferred = None
        return call.cache.session.step(hidden, call)

    def _catch_up(self, cache: RemoteCache, start: int) -> None:
        """Give the session a pass that was deferred, unless this step takes it back."""
        if cache.deferred is not None and start:
            cache.session.step(cache.deferred.hidden, cache.deferred.call)


def close_soon(connection: SwarmConnection, chain: SessionChain) -> None:
    """For finalizers, which may run on any thread."""
    if connection.is_open and chain.is_open:
        connection.run_soon(chain.close())


class _NoGradients(torch.autograd.Function):
    """A step's output, as if it depended on what entered: whoever asks for the gradient is told that there is none."""

    @staticmethod
    def forward(_ctx: Any, output: Tensor, _hidden: Tensor, _vectors: Tensor | None) -> Tensor:
        return output.view_as(output)

    @staticmethod
    def backward(_ctx: Any, *_grads: Any) -> Any:
        raise UsageError(
            "Gradients do not go through a session's caches: compute the loss of the whole text in one call, outside "
            "of the session or with use_cache=False."
        )


class _RemoteForward(torch.autograd.Function):
    """Autograd's view of a `TrainingPass`."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        values: Tensor | None,  # of `call.vectors`, where autograd sees them
        blocks: RemoteBlocks,
        call: BlocksCall,
        lend: bool,
    ) -> Tensor:
        connection = blocks.connection
        training = TrainingPass(
            connection.view,
            connection.retry,
            connection.audits,
            start=blocks.remote_start,
            end=blocks.end,
            vectors=call.vectors,
            lend=lend,
        )
        work = training.forward(on_cpu(hidden), on_cpu(call.mask), on_cpu(call.positions))
        output = connection.run(work)
        ctx.training, ctx.connection, ctx.values = training, connection, values
        return output.to(hidden.device)

    @staticmethod
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor, Tensor | None, None, None, None]:
        if torch.is_grad_enabled():  # by `create_graph` only
            raise UsageError(
                "Gradients of gradients do not go through the swarm: leave out create_graph=True, and what needs it "
                "(gradient penalties)."
            )
        work = ctx.training.backward(on_cpu(grad))  # type: ignore[attr-defined]
        grad_hidden, grad_vectors = ctx.connection.run(work)  # type: ignore[attr-defined]
        values: Tensor | None = ctx.values  # type: ignore[attr-defined]
        if values is not None and grad_vectors is not None:
            grad_vectors = grad_vectors.to(values.device, values.dtype)
        return grad_hidden.to(grad.device), grad_vectors, None, None, None
