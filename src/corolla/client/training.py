"""Forward and backward of whole sequences through the swarm, in micro-batches that are in flight together.

Invariant: for every span that a micro-batch went through, the client keeps the input; so a backward whose
server is lost is done by any other that serves the blocks, with the same result. What a server keeps for
the backward (a lease) saves time, and nothing depends on it. Padding never travels: sequences are packed
one behind the other.
"""

from __future__ import annotations

import asyncio
import random
import secrets
from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor

from corolla.client.audits.audit import Answer, Observer
from corolla.client.retry import Retry
from corolla.client.sessions.span_session import History
from corolla.client.view import SwarmView
from corolla.errors import RemoteError, RequestRefused
from corolla.models.kernels.helpers import SPINNING
from corolla.models.prompts import BlockVectors
from corolla.swarm.channel import checked
from corolla.swarm.directory.routing import Hop
from corolla.wire.failures import Remedy, meaning
from corolla.wire.frames import Packet
from corolla.wire.messages import Backward, Forward, Message

MICRO_BATCH_TOKENS = 512  # small enough that two servers work at the same time on an ordinary batch
# What one may hold rather than be cut in two, of which each would read, and widen, all weights for few tokens.
MOST_MICRO_BATCH_TOKENS = 640
MOST_IN_FLIGHT = 8

T = TypeVar("T")


@dataclass
class Stage:
    """One span of a micro-batch's way: who ran it, on what input [1, N, H], and under which lease."""

    hop: Hop
    inputs: Tensor
    lease: str | None


@dataclass
class MicroBatch:
    """Some sequences of a batch, packed, on their way through the blocks."""

    places: Tensor  # int64 [N], where each packed token stands in the flattened batch [R × T]
    lengths: Tensor  # int64 [K]
    positions: Tensor | None  # int64 [1, N]; None when every sequence counts from 0
    stages: list[Stage] = field(default_factory=list)

    def extra(self, vectors: BlockVectors | None, start: int, end: int) -> dict[str, Tensor]:
        tensors = {"lengths": self.lengths}
        if self.positions is not None:
            tensors["positions"] = self.positions
        return tensors | ({} if vectors is None else vectors.of(start, end))

    def packed(self, batch: Tensor) -> Tensor:
        """This micro-batch's tokens [1, N, H] of a batch [R, T, H]."""
        return batch.reshape(-1, batch.shape[-1])[self.places].unsqueeze(0)


def micro_batches(
    rows: int, tokens: int, mask: Tensor | None, positions: Tensor | None
) -> Iterator[MicroBatch]:
    """A batch of `rows` × `tokens` cut into packed micro-batches of about `MICRO_BATCH_TOKENS` tokens each.

    `mask` is bool [rows, tokens], `positions` int64 [rows, tokens]. Rows without a token are left out.
    """
    columns = torch.arange(tokens)
    if mask is None:
        mask = torch.ones(rows, tokens, dtype=torch.bool)
    elif positions is None and not bool((mask == (columns < mask.sum(1, keepdim=True))).all()):
        positions = columns.expand(rows, -1)  # padding in front or in the middle: tokens keep their columns
    lengths = mask.sum(1)
    for group in _groups(lengths.tolist()):
        chosen = torch.tensor(group)
        places = (chosen[:, None] * tokens + columns)[mask[chosen]]
        ids = None if positions is None else positions.reshape(-1)[places].unsqueeze(0)
        yield MicroBatch(places, lengths[chosen], ids)


def _groups(lengths: list[int]) -> list[list[int]]:
    """Rows in groups of about as many tokens each, so that no server waits for a large one; empty rows left out."""
    rows = sum(length > 0 for length in lengths)
    for number in range(-(-sum(lengths) // MICRO_BATCH_TOKENS), rows):
        groups = _even(lengths, number)
        if all(sum(lengths[row] for row in group) <= MOST_MICRO_BATCH_TOKENS for group in groups):
            return groups
    return _even(lengths, rows)


def _even(lengths: list[int], count: int) -> list[list[int]]:
    """The rows in `count` groups: from the longest on, each goes where least is."""
    groups: list[list[int]] = [[] for _ in range(count)]
    sizes = [0] * count
    for row in sorted(range(len(lengths)), key=lambda row: -lengths[row]):
        if lengths[row]:
            least = sizes.index(min(sizes))
            groups[least].append(row)
            sizes[least] += lengths[row]
    return [sorted(group) for group in groups]


def step_answer(
    hop: Hop,
    history: History,
    mask: Tensor | None,
    vectors: BlockVectors | None,
    output: Tensor,
    draw: random.Random,
) -> Answer | None:
    """A session's newest step [R, T, H] as the end of some whole sequences; None when it had only padding."""
    past = history.inputs()
    if past is None:
        return None
    hidden, positions = past
    rows, length = int(hidden.shape[0]), int(hidden.shape[1])
    before = length - int(output.shape[1])
    micro = draw.choice(list(micro_batches(rows, length, mask, positions)))
    row, column = micro.places // length, micro.places % length
    newest = column >= before
    if not bool(newest.any()):
        return None
    claimed = torch.zeros(1, len(row), output.shape[-1], dtype=output.dtype)
    claimed[0, newest] = output[row[newest], column[newest] - before]
    inputs = {"hidden": micro.packed(hidden)} | micro.extra(vectors, hop.start, hop.end)
    return Answer(hop, "step", inputs, {"hidden": claimed}, newest)


class TrainingPass:
    """One batch's way through blocks [start, end) and back. Runs on the event loop."""

    def __init__(
        self,
        view: SwarmView,
        retry: Retry,
        audits: Observer | None,
        *,
        start: int,
        end: int,
        vectors: BlockVectors | None,
        lend: bool,
    ) -> None:
        """`vectors` are of all the model's blocks; `lend` says that a backward will follow."""
        self._view = view
        self._retry = retry
        self._audits = audits
        self._start, self._end = start, end
        self._vectors = None if vectors is None else vectors.detached()
        self._lend = lend
        self._micro_batches: list[MicroBatch] = []
        self._entered = torch.empty(0)  # of the form of what entered, before the backward

    async def forward(self, hidden: Tensor, mask: Tensor | None, positions: Tensor | None) -> Tensor:
        """Outputs [R, T, H] for inputs [R, T, H]; `mask` is bool [R, T], `positions` int64 [R, T].

        Outputs of padding are zero.
        """
        self._begin()
        self._entered = hidden[..., :1].expand_as(hidden)  # its form, and none of its memory
        rows, tokens = int(hidden.shape[0]), int(hidden.shape[1])
        ids = None if positions is None else positions.expand(rows, -1)
        self._micro_batches = list(micro_batches(rows, tokens, mask, ids))

        async def one(micro: MicroBatch) -> Tensor:
            return await self._forward(micro, micro.packed(hidden), self._start, self._end)

        return self._unpacked(
            await _together(one, self._micro_batches),
            self._view.leaving(hidden, self._start, self._end),
        )

    async def backward(self, grad: Tensor) -> tuple[Tensor, Tensor | None]:
        """Gradients for the inputs [R, T, H] and, where blocks are given more, for that [blocks, P, D], fp32.

        As `forward`, raises `LyingServer` when an audit has condemned a peer meanwhile.
        """
        self._begin()

        async def one(micro: MicroBatch) -> tuple[Tensor, list[tuple[Hop, Tensor]]]:
            return await self._backward(micro, micro.packed(grad))

        results = await _together(one, self._micro_batches)
        vectors_grad = None if self._vectors is None else torch.zeros_like(self._vectors.values)
        if vectors_grad is not None:
            for _, pieces in results:  # in the order of the batch, so that sums are the same every time
                for hop, piece in pieces:
                    vectors_grad[hop.start : hop.end] += piece
        return self._unpacked([grad_hidden for grad_hidden, _ in results], self._entered), vectors_grad

    def _begin(self) -> None:
        if self._audits is not None:
            self._view.verdicts.tell()
        SPINNING.pause()

    def _show(self, answer: Answer) -> None:
        if self._audits is not None:
            self._audits.saw(lambda _draw: answer)

    def _unpacked(self, parts: Sequence[Tensor], like: Tensor) -> Tensor:
        """The micro-batches' results [1, N, H] in their places of a batch [R, T, H]."""
        whole = like.new_zeros(like.shape[0] * like.shape[1], like.shape[2])
        for micro, part in zip(self._micro_batches, parts, strict=True):
            whole[micro.places] = part[0]
        return whole.view(like.shape)

    async def _forward(self, micro: MicroBatch, hidden: Tensor, start: int, end: int) -> Tensor:
        """Take a micro-batch through blocks [start, end), noting each span's input in `micro.stages`."""
        value, block = hidden, start
        numerics: str | None = None  # the arithmetic of what has been computed so far

        async def one_span(hop: Hop, careful: bool) -> tuple[Stage, Tensor]:
            if careful and value.shape[1] > 1:
                await self._ask_little(hop, value)
            lease = secrets.token_hex(16) if self._lend else None
            message = Forward(model=self._view.model, start=hop.start, end=hop.end, lease=lease)
            tensors = {"hidden": value} | micro.extra(self._vectors, hop.start, hop.end)
            reply = await self._exchange(hop, message, tensors)
            output = self._view.output_of(reply, value, hop)
            self._show(Answer(hop, "forward", tensors, {"hidden": output}))
            return Stage(hop, value, lease), output

        async def attempt() -> Tensor:
            nonlocal value, block, numerics
            if block > start and self._view.restarts_elsewhere(numerics, block, start, end):
                value, block, numerics = hidden, start, None
                micro.stages.clear()
            while block < end:
                stage, value = await self._view.first(
                    block, end, one_span, tokens=len(micro.places), numerics=numerics
                )
                micro.stages.append(stage)
                block, numerics = stage.hop.end, self._view.expected_numerics(stage.hop.peer_id)
            return value

        output = await self._retry.run(attempt, what="a forward pass", done=lambda: block)
        self._view.settle_numerics(numerics, start, end)
        return output

    async def _ask_little(self, hop: Hop, value: Tensor) -> None:
        """Have a single token computed, to see whether anybody is there for more."""
        tensors = {"hidden": value[:, :1], "lengths": torch.ones(1, dtype=torch.int64)}
        message = Forward(model=self._view.model, start=hop.start, end=hop.end, lease=None)
        reply = await self._exchange(hop, message, tensors)
        self._view.output_of(reply, tensors["hidden"], hop)

    async def _backward(self, micro: MicroBatch, grad: Tensor) -> tuple[Tensor, list[tuple[Hop, Tensor]]]:
        stages = list(micro.stages)
        value, lost, done = grad, False, 0
        pieces: list[tuple[Hop, Tensor]] = []

        async def attempt() -> Tensor:
            nonlocal value, lost, done
            while stages:
                stage = stages[-1]
                if lost:
                    stages[-1:] = await self._reroute(micro, stage)
                    lost = False
                    continue
                try:
                    value, piece = await self._backward_hop(micro, stage, value)
                except RemoteError:
                    lost = True
                    raise
                stages.pop()
                done += 1
                if piece is not None:
                    pieces.append((stage.hop, piece))
            return value

        return await self._retry.run(attempt, what="a backward pass", done=lambda: done), pieces

    async def _backward_hop(
        self, micro: MicroBatch, stage: Stage, grad: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        hop = stage.hop
        tensors = {"hidden": stage.inputs, "grad": grad} | micro.extra(self._vectors, hop.start, hop.end)
        reply = await self._redeem(stage, grad)
        if reply is None:
            reply = await self._exchange(hop, self._backward_message(hop, None), tensors)
        pieces = {}
        if self._vectors is not None:
            name = self._vectors.name
            pieces[name] = checked(reply, name, tensors[name], hop.peer_id)
        value = checked(reply, "grad", stage.inputs, hop.peer_id)
        self._show(Answer(hop, "backward", tensors, {"grad": value} | pieces))
        return value, next(iter(pieces.values()), None)

    async def _redeem(self, stage: Stage, grad: Tensor) -> Packet | None:
        """The gradients through the graph that the server kept; None when it has not kept it."""
        if stage.lease is None:
            return None
        lease, stage.lease = stage.lease, None  # good for one try
        message = self._backward_message(stage.hop, lease)
        try:
            return await self._exchange(stage.hop, message, {"grad": grad})
        except RequestRefused as refusal:
            if meaning(refusal).remedy is not Remedy.SEND_MORE:
                raise
            return None

    def _backward_message(self, hop: Hop, lease: str | None) -> Backward:
        return Backward(
            model=self._view.model,
            start=hop.start,
            end=hop.end,
            prompt_gradient=self._vectors is not None,
            lease=lease,
        )

    async def _reroute(self, micro: MicroBatch, stage: Stage) -> list[Stage]:
        """Stages that replace a lost one; their inputs are computed again, also to see who answers at all."""
        start, end = stage.hop.start, stage.hop.end
        route = await self._view.route(start, end)
        if len(route) == 1 and route[0].peer_id in self._view.health.proven:
            return [Stage(route[0], stage.inputs, None)]
        detour = MicroBatch(micro.places, micro.lengths, micro.positions)
        await self._forward(detour, stage.inputs, start, end)
        return detour.stages

    async def _exchange(self, hop: Hop, message: Message, tensors: dict[str, Tensor]) -> Packet:
        began = self._view.now()
        packet, ask = Packet(message, tensors), partial(self._view.channels.ask, hop.peer_id)
        if self._vectors is not None and self._vectors.kept_by_servers and self._vectors.name in tensors:
            reply = await self._view.sent_vectors.ask(hop, packet, self._vectors, ask)
        else:
            reply = await ask(packet)
        sent = next(iter(tensors.values()))
        nbytes = 2 * sum(tensor.nbytes for tensor in tensors.values())
        self._view.answered(hop, int(sent.shape[1]), nbytes, self._view.now() - began)
        return reply


async def _together(work: Callable[[MicroBatch], Awaitable[T]], micros: Sequence[MicroBatch]) -> list[T]:
    """All results in order, some in flight together; the first error cancels the rest and is raised as it is."""
    limit = asyncio.Semaphore(MOST_IN_FLIGHT)

    async def limited(micro: MicroBatch) -> T:
        async with limit:
            return await work(micro)

    tasks = [asyncio.ensure_future(limited(micro)) for micro in micros]
    try:
        return list(await asyncio.gather(*tasks))
    except BaseException:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        raise
