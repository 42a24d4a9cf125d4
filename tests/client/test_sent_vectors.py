"""A prefix is sent once to a server, and again only when it says that it has not got it."""

from __future__ import annotations

import pytest
import torch

from corolla.client.sent_vectors import MOST_HOPS, SentVectors
from corolla.errors import RequestRefused
from corolla.models.prompts import BlockVectors
from corolla.swarm.directory.routing import Hop
from corolla.wire.frames import Packet
from corolla.wire.messages import Forward, Output

FIRST, SECOND = (BlockVectors(torch.full((4, 2, 6), value), name="prefix") for value in (1.0, 2.0))


class Server:
    """Notes what it is asked: the digest, and whether the prefix came with it."""

    def __init__(self) -> None:
        self.known: set[str | None] = set()
        self.asked: list[tuple[str | None, bool]] = []

    async def answer(self, packet: Packet) -> Packet:
        message = packet.message
        assert isinstance(message, Forward)
        whole = "prefix" in packet.tensors
        self.asked.append((message.known, whole))
        if not whole and message.known not in self.known:
            raise RequestRefused("send it", code="no_bundle")
        self.known.add(message.known)
        return Packet(Output())


async def ask(
    sent: SentVectors, server: Server, given: BlockVectors, start: int = 0, curious: bool = False
) -> None:
    hop = Hop("server", start, start + 2)
    packet = Packet(Forward(model="m", start=start, end=start + 2), given.of(start, start + 2))
    await sent.ask(hop, packet, given, server.answer, curious=curious)


async def test_it_is_sent_once() -> None:
    sent, server = SentVectors(), Server()
    for given in (FIRST, FIRST, SECOND, SECOND):
        await ask(sent, server, given)
    first, second = FIRST.digest, SECOND.digest
    assert server.asked == [(first, True), (first, False), (second, True), (second, False)]
    await ask(sent, server, SECOND, start=2)  # other blocks, which it was not sent
    assert server.asked[-1] == (second, True)


async def test_a_server_that_has_lost_it_is_sent_it_again() -> None:
    sent, server = SentVectors(), Server()
    await ask(sent, server, FIRST)
    server.known.clear()
    await ask(sent, server, FIRST)
    await ask(sent, server, FIRST)
    assert [whole for _, whole in server.asked] == [True, False, True, False]


async def test_what_is_remembered_is_bounded() -> None:
    sent, server = SentVectors(), Server()
    for start in [*range(MOST_HOPS + 1), 0, MOST_HOPS]:
        await ask(sent, server, FIRST, start)
    assert [whole for _, whole in server.asked[-2:]] == [True, False]


async def test_who_is_curious_asks_once_whether_the_operator_has_it() -> None:
    sent, server = SentVectors(), Server()
    server.known.add(FIRST.digest)
    await ask(sent, server, FIRST, curious=True)
    assert [whole for _, whole in server.asked] == [False]
    for _ in range(2):
        await ask(sent, server, SECOND, curious=True)
    assert [whole for _, whole in server.asked] == [False, False, True, False]


async def test_other_refusals_are_not_asked_again() -> None:
    sent = SentVectors()

    async def refuse(_packet: Packet) -> Packet:
        raise RequestRefused("busy", code="busy")

    packet = Packet(Forward(model="m", start=0, end=2), FIRST.of(0, 2))
    with pytest.raises(RequestRefused, match="busy"):
        await sent.ask(Hop("server", 0, 2), packet, FIRST, refuse)


def test_a_name_stands_for_one_prefix() -> None:
    other = FIRST.values.clone()
    other[3, 1, 5] += 1e-6
    assert BlockVectors(other, name="prefix").digest != FIRST.digest
    assert BlockVectors(FIRST.values.clone(), name="prefix").digest == FIRST.digest
    assert BlockVectors(FIRST.values.reshape(2, 4, 6), name="prefix").digest != FIRST.digest
