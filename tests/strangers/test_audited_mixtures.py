"""Audits among honest servers and liars who lie alike, at any mixture: who is condemned, and by what tolerance."""

from __future__ import annotations

import asyncio
import random
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from corolla.client.audits import second_opinion
from corolla.client.audits.audit import Answer
from corolla.client.audits.auditor import Auditor
from corolla.client.servers import Health, Verdicts
from corolla.errors import PeerSilent, RemoteError
from corolla.models.cut_layout import CutLayout, TokenLayout
from corolla.swarm.directory.directory import ServerRecord
from corolla.swarm.directory.routing import Hop
from corolla.wire.frames import Packet
from corolla.wire.messages import Output

AUDITS = [1000, pytest.param(10_000, marks=pytest.mark.nightly)]
GIVEN = torch.randn(1, 6, 16, generator=torch.Generator().manual_seed(1))
TRUE = GIVEN + torch.randn(1, 6, 16, generator=torch.Generator().manual_seed(2))


def noisy(size: float) -> Tensor:
    """The same lie for all who tell it."""
    return TRUE + size * torch.randn(TRUE.shape, generator=torch.Generator().manual_seed(3))


class OneServer:
    """What an auditor asks of a client's view, with servers that answer as they are told to."""

    def __init__(
        self, answers: dict[str, Tensor], kinds: dict[str, str], kind: str | None = "float32"
    ) -> None:
        self.now, self.numerics, self.wire, self.model = 0.0, kind, "compute", "m"
        self.cuts = CutLayout(TokenLayout(0, 1, (TRUE.shape[-1],)), depth=4)
        self.answers, self.kinds = answers, kinds
        self.health, self.verdicts = Health(lambda: self.now), Verdicts()
        self.channels = self

    async def usable(self) -> list[ServerRecord]:
        return [self._record(peer) for peer in self.answers if peer not in self.verdicts.condemned]

    def _record(self, peer: str) -> ServerRecord:
        dtype, _, quantization = self.kinds.get(peer, "float32").partition("+")
        return ServerRecord(
            peer_id=peer,
            model="m",
            model_name="m",
            num_blocks=4,
            start=0,
            end=4,
            dtype=dtype,
            quantization=quantization or "none",
        )

    def numerics_of(self, peer: str) -> str:
        return self._record(peer).numerics

    def expected_numerics(self, peer: str) -> str:
        return self.numerics or self.numerics_of(peer)

    def output_of(self, reply: Packet, _sent: Tensor, _hop: Hop) -> Tensor:
        return reply.tensors["hidden"]

    async def ask(self, peer: str, _packet: Packet) -> Packet:
        return Packet(Output(), {"hidden": self.answers[peer]})

    async def audit(self, times: int, draw: random.Random, own: Any) -> Auditor:
        """Have so many answers of everybody audited, whoever is still used."""
        auditor = Auditor(self, 1.0, own=own, draw=draw)  # type: ignore[arg-type]
        for _ in range(times):
            peer = draw.choice([one.peer_id for one in await self.usable()])
            answer = Answer(Hop(peer, 0, 4), "forward", {"hidden": GIVEN}, {"hidden": self.answers[peer]})
            auditor.saw(lambda _draw, answer=answer: answer)  # type: ignore[misc]
            await auditor.settled()
            self.now += 1.0
        return auditor


OWN = SimpleNamespace(
    fits=lambda _start, _end: True, kind_for=lambda kind: kind, answer=lambda _answer, _kind: {"hidden": TRUE}
)
MIXTURES = [(1, 1), (1, 2), (2, 2), (1, 5), (5, 1), (3, 7)]


def mixture(honest: int, liars: int, size: float = 0.04) -> dict[str, Tensor]:
    lie = noisy(size)
    return {f"honest-{index}": TRUE for index in range(honest)} | {
        f"liar-{index}": lie for index in range(liars)
    }


@pytest.mark.parametrize("audits", AUDITS)
@pytest.mark.parametrize(("honest", "liars"), MIXTURES)
async def test_where_the_client_can_compute_liars_are_condemned_and_nobody_else(
    honest: int, liars: int, audits: int
) -> None:
    for seed in range(4):
        world = OneServer(mixture(honest, liars), {})
        await world.audit(audits // 4, random.Random(seed), OWN)
        assert set(world.verdicts.condemned) == {f"liar-{index}" for index in range(liars)}


@pytest.mark.parametrize("audits", AUDITS)
@pytest.mark.parametrize(("honest", "liars"), MIXTURES)
async def test_where_it_cannot_nobody_is_condemned_and_everybody_comes_back(
    honest: int, liars: int, audits: int
) -> None:
    world = OneServer(mixture(honest, liars), {})
    auditor = await world.audit(audits, random.Random(0), None)
    assert not world.verdicts.condemned
    assert auditor.counts.unclear
    assert world.health.doubted()
    world.now += 3600.0
    assert not world.health.doubted()


@pytest.mark.parametrize("says", ["float32", "bfloat16", "float32+int8", "float32+nf4", "float64"])
async def test_the_accused_does_not_choose_its_tolerance(says: str) -> None:
    """It was asked as a server of float32, and says by now that it computes otherwise."""
    world = OneServer(mixture(1, 1), {"liar-0": says})
    await world.audit(20, random.Random(0), OWN)
    assert set(world.verdicts.condemned) == {"liar-0"}
    alone = OneServer(mixture(1, 1), {"liar-0": says})
    assert (await alone.audit(20, random.Random(0), None)).counts.wrong == 0
    assert not alone.verdicts.condemned


async def test_nor_does_a_second_opinion_choose_it() -> None:
    """An accomplice that says it computes coarsely agrees with anything."""
    answers = {"liar": noisy(0.04), "accomplice": TRUE + 0.01}
    world = OneServer(answers, {"accomplice": "float32+nf4"})
    auditor = await world.audit(40, random.Random(0), None)
    assert auditor.counts.right == 0


class Crowded(OneServer):
    """Among many who do not answer audits, or only show signs of life."""

    async def ask(self, peer: str, packet: Packet) -> Packet:
        if peer.startswith("mute"):
            raise PeerSilent("silent", peer_id=peer)
        if peer.startswith("alive"):
            await asyncio.Event().wait()
        return await super().ask(peer, packet)

    async def usable(self) -> list[ServerRecord]:
        avoided, resting, _ = self.health.now()
        return [one for one in await super().usable() if one.peer_id not in avoided | resting]

    async def failed(self, error: RemoteError) -> None:
        assert error.peer_id is not None
        self.health.failed(error.peer_id)


async def test_those_who_answer_no_audit_do_not_keep_audits_from_being_made(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(second_opinion, "ANSWER_SECONDS", 0.01)
    crowd = {f"mute-{index}": TRUE for index in range(12)} | {"alive": TRUE}
    world = Crowded({"honest-0": TRUE, "honest-1": TRUE}, {})
    auditor = Auditor(world, 1.0, draw=random.Random(0))  # type: ignore[arg-type]
    world.answers |= crowd
    for _ in range(20):
        answer = Answer(Hop("honest-0", 0, 4), "forward", {"hidden": GIVEN}, {"hidden": TRUE})
        auditor.saw(lambda _draw, answer=answer: answer)  # type: ignore[misc]
        await auditor.settled()
    assert auditor.counts.right > 10
