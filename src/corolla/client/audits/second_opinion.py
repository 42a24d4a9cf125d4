"""Has an answer computed again: by another server, by several, or by the client itself.

Invariant: what goes to a server is an ordinary `Forward` or `Backward`; the peers that are to be checked are
never asked about themselves.
"""

from __future__ import annotations

import asyncio
import logging
import random
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from corolla.client.audits.audit import Answer
from corolla.client.view import SwarmView
from corolla.errors import MissingBlocks, RemoteError, SwarmUnavailable
from corolla.swarm.channel import checked, request
from corolla.swarm.directory.directory import ServerRecord
from corolla.swarm.directory.routing import Hop, find_route
from corolla.wire.frames import Packet
from corolla.wire.messages import Backward, Forward, Message

log = logging.getLogger(__name__)

MOST_TRIED = 3  # other servers that are asked in turn when one does not answer


class Own(Protocol):
    """The client's own way to compute an answer (`own_blocks.OwnBlocks`)."""

    def kind_for(self, kind: str | None) -> str: ...

    def fits(self, start: int, end: int) -> bool: ...

    def answer(self, answer: Answer, kind: str) -> dict[str, Tensor]: ...


@dataclass(frozen=True)
class Opinion:
    """What others say to an answer's question. `legs` are their own answers; none for the client itself."""

    values: dict[str, Tensor]
    kinds: tuple[str, ...]
    legs: tuple[Answer, ...] = ()

    @property
    def hops(self) -> list[Hop]:
        return [leg.hop for leg in self.legs]

    @property
    def own(self) -> bool:
        """Whether the client computed it."""
        return not self.legs


class SecondOpinions:
    """Used from the client's event loop only."""

    def __init__(self, view: SwarmView, own: Own | None, draw: random.Random) -> None:
        self._view = view
        self._own = own
        self._draw = draw

    async def by_self(self, answer: Answer) -> Opinion | None:
        """The client's own; None where the blocks do not fit here. Raises `CheckpointError`."""
        own = self._own
        if own is None:
            return None
        if not await asyncio.to_thread(own.fits, answer.hop.start, answer.hop.end):
            return None
        kind = own.kind_for(self._view.numerics_of(answer.hop.peer_id))
        return Opinion(await asyncio.to_thread(own.answer, answer, kind), (kind,))

    async def by_others(self, answer: Answer, without: set[str]) -> Opinion | None:
        """Another way through the same blocks, by none of the peers `without`; None when there is none."""
        tried = set(without)
        for _ in range(MOST_TRIED):
            try:
                hops = self._pick(await self._view.usable(), answer.hop, tried)
                return await self._along(answer, hops)
            except (MissingBlocks, SwarmUnavailable):
                return None
            except RemoteError as error:
                log.info("an audit was not answered: %s", error)
                if error.peer_id is None:
                    return None
                tried.add(error.peer_id)
        return None

    def _pick(self, records: list[ServerRecord], hop: Hop, without: set[str]) -> list[Hop]:
        """Somebody else for the same blocks, one alone and of the same arithmetic where that can be had.

        Chosen at random, so that a pair of liars cannot count on each other. Raises `MissingBlocks`.
        """
        others = [one for one in records if one.peer_id not in without]
        kind = self._view.numerics_of(hop.peer_id)
        alike = [one for one in others if one.numerics == kind]
        for group in (alike, others):
            alone = [one for one in group if one.start <= hop.start and hop.end <= one.end]
            if alone:
                return [Hop(self._draw.choice(alone).peer_id, hop.start, hop.end)]
        try:
            return find_route(alike, hop.start, hop.end)
        except MissingBlocks:
            return find_route(others, hop.start, hop.end)

    async def _along(self, answer: Answer, hops: list[Hop]) -> Opinion:
        legs = await self._forward(answer, hops)
        if answer.backward:
            legs = await self._backward(answer, hops, legs)
            values = {"grad": legs[0].claimed["grad"]}
            if "prompts" in answer.claimed:
                values["prompts"] = torch.cat([leg.claimed["prompts"] for leg in legs])
        else:
            values = {"hidden": legs[-1].claimed["hidden"]}
        kinds = tuple(self._view.numerics_of(hop.peer_id) or "" for hop in hops)
        return Opinion(values, kinds, tuple(legs))

    async def _forward(self, answer: Answer, hops: list[Hop]) -> list[Answer]:
        """The legs forward; for a backward, the last one's answer is not needed and not asked for."""
        value, legs = answer.inputs["hidden"], []
        for index, hop in enumerate(hops):
            inputs = _part(answer, hop) | {"hidden": value}
            if answer.backward and index == len(hops) - 1:
                legs.append(Answer(hop, "forward", inputs, {}))
                break
            message = Forward(model=self._view.model, start=hop.start, end=hop.end)
            value = checked(await self._exchange(hop, message, inputs), "hidden", value, hop.peer_id)
            legs.append(Answer(hop, "forward", inputs, {"hidden": value}))
        return legs

    async def _backward(self, answer: Answer, hops: list[Hop], forward: list[Answer]) -> list[Answer]:
        grad, legs = answer.inputs["grad"], []
        wanted = "prompts" in answer.claimed
        for hop, leg in zip(reversed(hops), reversed(forward), strict=True):
            inputs = leg.inputs | {"grad": grad}
            message = Backward(model=self._view.model, start=hop.start, end=hop.end, prompt_gradient=wanted)
            reply = await self._exchange(hop, message, inputs)
            grad = checked(reply, "grad", grad, hop.peer_id)
            claimed = {"grad": grad}
            if wanted:
                claimed["prompts"] = checked(reply, "prompts", inputs["prompts"], hop.peer_id)
            legs.append(Answer(hop, "backward", inputs, claimed))
        return legs[::-1]

    async def _exchange(self, hop: Hop, message: Message, inputs: dict[str, Tensor]) -> Packet:
        channel = await self._view.channels.take(hop.peer_id)
        try:
            reply = await request(channel, Packet(message, inputs))
        except BaseException:
            await channel.close()
            raise
        self._view.channels.give(channel)
        return reply


def _part(answer: Answer, hop: Hop) -> dict[str, Tensor]:
    """The answer's inputs for some of its blocks; hidden states and gradients excepted."""
    inputs = {name: one for name, one in answer.inputs.items() if name not in ("hidden", "grad")}
    if "prompts" in inputs:
        first = hop.start - answer.hop.start
        inputs["prompts"] = inputs["prompts"][first : first + hop.end - hop.start]
    return inputs
