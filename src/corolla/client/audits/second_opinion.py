"""Has an answer computed again by another server, or by several.

Invariant: what goes to a server is an ordinary `Forward` or `Backward`; the peer that is to be checked is never asked
about itself.
"""

from __future__ import annotations

import asyncio
import random
from dataclasses import dataclass

import torch
from torch import Tensor

from corolla.client.audits.audit import Answer, is_coarser
from corolla.client.view import SwarmView
from corolla.errors import MissingBlocks, RemoteError, SwarmUnavailable
from corolla.models.prompts import GIVEN
from corolla.swarm.channel import checked
from corolla.swarm.directory.directory import ServerRecord
from corolla.swarm.directory.routing import Hop, find_route
from corolla.text import get_logger
from corolla.wire.frames import Packet
from corolla.wire.messages import Backward, Forward

log = get_logger(__name__)

ANSWER_SECONDS = 60.0  # that each server may take to answer an audit
MOST_TRIED = 3  # other servers that are asked in turn when one does not answer


@dataclass(frozen=True)
class Opinion:
    """What somebody says to an answer's question."""

    values: dict[str, Tensor]
    hops: tuple[Hop, ...] = ()  # none for the client itself


async def ask_others(view: SwarmView, answer: Answer, kind: str, draw: random.Random) -> Opinion | None:
    """Another way through the same blocks, in arithmetic no coarser than `kind`; None when there is none."""
    tried = {answer.hop.peer_id}
    for _ in range(MOST_TRIED):
        try:
            hops = _pick(view, await view.usable(), answer.hop, kind, tried, draw)
        except (MissingBlocks, SwarmUnavailable):
            return None
        try:
            async with asyncio.timeout(ANSWER_SECONDS * len(hops)):
                return await _along(view, answer, hops)
        except TimeoutError:  # whatever signs of life they show
            tried.update(hop.peer_id for hop in hops)
        except RemoteError as error:
            log.info("an audit was not answered: %s", error)
            if error.peer_id is None:
                return None
            tried.add(error.peer_id)
            await view.failed(error)
    return None


def _pick(
    view: SwarmView, records: list[ServerRecord], hop: Hop, kind: str, without: set[str], draw: random.Random
) -> list[Hop]:
    """Somebody else for the same blocks, one alone and of the same arithmetic where that can be had.

    Chosen at random, so that a pair of liars cannot count on each other. Raises `MissingBlocks`.
    """
    others = [one for one in records if one.peer_id not in without and not is_coarser(one.numerics, kind)]
    doubted = view.health.doubted()
    clear = [one for one in others if one.peer_id not in doubted]
    alike = [[one for one in group if one.numerics == kind] for group in (clear, others)]
    for group in (*alike, others):
        alone = [one for one in group if one.start <= hop.start and hop.end <= one.end]
        if alone:
            return [Hop(draw.choice(alone).peer_id, hop.start, hop.end)]
    try:
        return find_route(alike[1], hop.start, hop.end)
    except MissingBlocks:
        return find_route(others, hop.start, hop.end)


async def _along(view: SwarmView, answer: Answer, hops: list[Hop]) -> Opinion:
    value, asked = answer.inputs["hidden"], []
    for hop in hops:
        inputs = _part(answer, hop) | {"hidden": value}
        asked.append(inputs)
        if answer.backward and hop is hops[-1]:
            break  # nobody needs its output
        message = Forward(model=view.model, start=hop.start, end=hop.end)
        reply = await view.channels.ask(hop.peer_id, Packet(message, inputs))
        value = view.output_of(reply, value, hop)
    if not answer.backward:
        return Opinion({"hidden": value}, tuple(hops))
    grad, pieces = answer.inputs["grad"], []
    wanted = next((name for name in GIVEN if name in answer.claimed), None)
    for hop, inputs in zip(reversed(hops), reversed(asked), strict=True):
        order = Backward(model=view.model, start=hop.start, end=hop.end, prompt_gradient=wanted is not None)
        reply = await view.channels.ask(hop.peer_id, Packet(order, inputs | {"grad": grad}))
        grad = checked(reply, "grad", inputs["hidden"], hop.peer_id)
        if wanted is not None:
            pieces.append(checked(reply, wanted, inputs[wanted], hop.peer_id))
    values = {"grad": grad} | ({} if wanted is None else {wanted: torch.cat(pieces[::-1])})
    return Opinion(values, tuple(hops))


def _part(answer: Answer, hop: Hop) -> dict[str, Tensor]:
    """The answer's inputs for some of its blocks; hidden states and gradients excepted."""
    inputs = {name: one for name, one in answer.inputs.items() if name not in ("hidden", "grad")}
    first = hop.start - answer.hop.start
    for name in GIVEN:
        if name in inputs:
            inputs[name] = inputs[name][first : first + hop.end - hop.start]
    return inputs
