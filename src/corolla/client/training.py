"""Forward and backward of whole sequences through the swarm, in micro-batches that are in flight together.

Invariant: for every span that a micro-batch went through, the client keeps the input; so a backward whose
server is lost is done by any other that serves the blocks, with the same result. Servers keep nothing that
the client depends on.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import torch
from torch import Tensor

from corolla.client.chain import checked
from corolla.client.retry import Retry
from corolla.client.view import SwarmView
from corolla.errors import RemoteError
from corolla.swarm.channel import request
from corolla.swarm.routing import Hop
from corolla.wire.frames import Packet
from corolla.wire.messages import Backward, Forward, Message

MICRO_BATCH_TOKENS = 512  # small enough that two servers work at the same time on an ordinary batch
MOST_IN_FLIGHT = 8

T = TypeVar("T")


@dataclass
class MicroBatch:
    """Some rows of a batch on their way through the blocks."""

    mask: Tensor | None  # bool [r, T]
    positions: Tensor | None  # int64 [r, T]
    stages: list[tuple[Hop, Tensor]] = field(default_factory=list)  # each span and its input [r, T, H]

    def extra(self, deep: Tensor | None, start: int, end: int) -> dict[str, Tensor]:
        tensors = {
            "mask": self.mask,
            "positions": self.positions,
            "prompts": None if deep is None else deep[start:end],
        }
        return {name: tensor for name, tensor in tensors.items() if tensor is not None}


class TrainingPass:
    """One batch's way through blocks [start, end) and back. Runs on the event loop."""

    def __init__(self, view: SwarmView, retry: Retry, *, start: int, end: int, deep: Tensor | None) -> None:
        """`deep` holds the deep prompts of all the model's blocks, fp32 [blocks, P, H]."""
        self._view = view
        self._retry = retry
        self._start, self._end = start, end
        self._deep = None if deep is None else deep.detach().float().cpu()
        self._micro_batches: list[MicroBatch] = []

    async def forward(self, hidden: Tensor, mask: Tensor | None, positions: Tensor | None) -> Tensor:
        """Outputs [R, T, H] for inputs [R, T, H]; `mask` is bool [R, T], `positions` int64 [R, T]."""
        rows = max(1, MICRO_BATCH_TOKENS // int(hidden.shape[1]))
        parts = torch.split(hidden, rows)
        masks = [None] * len(parts) if mask is None else torch.split(mask, rows)
        ids = (
            [None] * len(parts) if positions is None else torch.split(positions.expand(len(hidden), -1), rows)
        )
        self._micro_batches = [MicroBatch(m, p) for m, p in zip(masks, ids, strict=True)]
        limit = asyncio.Semaphore(MOST_IN_FLIGHT)

        async def one(micro: MicroBatch, part: Tensor) -> Tensor:
            async with limit:
                return await self._forward(micro, part, self._start, self._end)

        outputs = await _together([one(m, p) for m, p in zip(self._micro_batches, parts, strict=True)])
        return torch.cat(outputs)

    async def backward(self, grad: Tensor) -> tuple[Tensor, Tensor | None]:
        """Gradients for the inputs [R, T, H] and, with deep prompts, for those [blocks, P, H], fp32."""
        rows = self._micro_batches[0].stages[0][1].shape[0]
        deep_grad = None if self._deep is None else torch.zeros_like(self._deep)
        limit = asyncio.Semaphore(MOST_IN_FLIGHT)

        async def one(micro: MicroBatch, part: Tensor) -> tuple[Tensor, list[tuple[Hop, Tensor]]]:
            async with limit:
                return await self._backward(micro, part)

        parts = zip(self._micro_batches, torch.split(grad, rows), strict=True)
        results = await _together([one(micro, part) for micro, part in parts])
        if deep_grad is not None:
            for _, pieces in results:  # in the order of the batch, so that sums are the same every time
                for hop, piece in pieces:
                    deep_grad[hop.start : hop.end] += piece
        return torch.cat([grad_hidden for grad_hidden, _ in results]), deep_grad

    async def _forward(self, micro: MicroBatch, hidden: Tensor, start: int, end: int) -> Tensor:
        """Take a micro-batch through blocks [start, end), noting each span's input in `micro.stages`."""
        value, block = hidden, start
        route: list[Hop] = []

        async def attempt() -> Tensor:
            nonlocal value, block, route
            while block < end:
                route = route or await self._view.route(block, end)
                hop, route = route[0], []
                message = Forward(model=self._view.model, start=hop.start, end=hop.end)
                tensors = {"hidden": value} | micro.extra(self._deep, hop.start, hop.end)
                reply = await self._exchange(hop, message, tensors)
                output = checked(reply, "hidden", value, hop)
                micro.stages.append((hop, value))
                value, block = output, hop.end
            return value

        return await self._retry.run(attempt, what="a forward pass")

    async def _backward(self, micro: MicroBatch, grad: Tensor) -> tuple[Tensor, list[tuple[Hop, Tensor]]]:
        stages = list(micro.stages)
        value, lost = grad, False
        pieces: list[tuple[Hop, Tensor]] = []

        async def attempt() -> Tensor:
            nonlocal value, lost
            while stages:
                hop, inputs = stages[-1]
                if lost:
                    stages[-1:] = await self._reroute(micro, hop, inputs)
                    lost = False
                    continue
                try:
                    value, piece = await self._backward_hop(micro, hop, inputs, value)
                except RemoteError:
                    lost = True
                    raise
                stages.pop()
                if piece is not None:
                    pieces.append((hop, piece))
            return value

        return await self._retry.run(attempt, what="a backward pass"), pieces

    async def _backward_hop(
        self, micro: MicroBatch, hop: Hop, inputs: Tensor, grad: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        wants_prompts = self._deep is not None
        message = Backward(
            model=self._view.model, start=hop.start, end=hop.end, prompt_gradient=wants_prompts
        )
        tensors = {"hidden": inputs, "grad": grad} | micro.extra(self._deep, hop.start, hop.end)
        reply = await self._exchange(hop, message, tensors)
        piece = None
        if self._deep is not None:
            piece = checked(reply, "prompts", self._deep[hop.start : hop.end], hop)
        return checked(reply, "grad", inputs, hop), piece

    async def _reroute(self, micro: MicroBatch, hop: Hop, inputs: Tensor) -> list[tuple[Hop, Tensor]]:
        """Stages that replace a lost one; where the new spans are shorter, their inputs are computed again."""
        route = await self._view.route(hop.start, hop.end)
        if len(route) == 1:
            return [(route[0], inputs)]
        detour = MicroBatch(micro.mask, micro.positions)
        await self._forward(detour, inputs, hop.start, hop.end)
        return detour.stages

    async def _exchange(self, hop: Hop, message: Message, tensors: dict[str, Tensor]) -> Packet:
        channel = await self._view.channel(hop.peer_id)
        try:
            reply = await request(channel, Packet(message, tensors))
        except BaseException:
            await channel.close()
            raise
        self._view.release(channel)
        self._view.succeeded(hop.peer_id)
        return reply


async def _together(work: Sequence[Awaitable[T]]) -> list[T]:
    """All results in order; the first error cancels the rest and is raised as it is."""
    tasks = [asyncio.ensure_future(item) for item in work]
    try:
        return list(await asyncio.gather(*tasks))
    except BaseException:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        raise
