"""A live server with a stranger and an honest client on it, and the account of how far messages came."""

from __future__ import annotations

import random
from collections import Counter
from typing import Any

import torch
from torch import Tensor

from corolla.errors import PeerDisconnected, ProtocolError
from corolla.models.attention.pages import PAGE
from corolla.server.peers import Budgets, Leases, PeerLimits
from corolla.server.scheduler.execution import Kind
from corolla.server.sessions.prefilled import EnteringPrompt
from corolla.swarm.channel import Channel, Conversation, following, request
from corolla.wire.failures import meaning
from corolla.wire.frames import PREAMBLE_SIZE, Packet, expand, parse_header, parse_payload, parse_preamble
from corolla.wire.messages import (
    PROTOCOL_NAME,
    ClientMessage,
    CloseSession,
    Failure,
    Opened,
    OpenSession,
    Output,
    Step,
)
from tests.fuzz.frames import BUNDLE, strangers
from tests.server.world import HIDDEN, Clock, OneServer, RawClient, assert_same, noise, opening

STREAMS = 3
HONEST_TOKENS = 24
LEASE_BYTES = 200_000
# Of all messages, what must at least have come so far: the share that read well as a frame, as a message
# with its tensors, and that was legal at its moment and handed to the session or the blocks.
LEAST = {"framed": 0.8, "decoded": 0.4, "reached the table": 0.35, "answered with work": 0.25}


class Target:
    """One server. What strangers send is judged by the same rules beside it, so each answer is known."""

    def __init__(self, family: str) -> None:
        self.clock = Clock()
        self.world = OneServer(
            family,
            capacity=3000,
            limits=PeerLimits(Budgets(malformed=10**9)),
            leases=Leases(LEASE_BYTES, self.clock),
        )
        self.stages: Counter[str] = Counter()
        self.codes: Counter[str] = Counter()
        self.guests: list[Stranger] = []
        self._honest: Channel | None = None
        self._tokens = noise(2, HONEST_TOKENS, HIDDEN, seed=77)
        self._wanted = self.world.reference.forward(self._tokens)
        self._at = 0
        self.honest_steps = 0

    async def start(self) -> None:
        await self.world.start()
        if self.world.span.packable:  # a bundle, in which nobody may change anything
            await self.world.server.prefill_bundles(
                [EnteringPrompt(BUNDLE, noise(1, 3, HIDDEN)[0], None, torch.float64)]
            )
        self._bundles = await self._kept()
        self._peer = self.world.network.transport("honest")
        await self.honest_step()

    async def honest_step(self) -> None:
        """The next token of a session that lives through everything; its output is compared."""
        if self._honest is None:
            stream = await self._peer.open("server", PROTOCOL_NAME)
            self._honest = Channel(stream, side="client", silence=20)
        if self._at == 0:
            await request(self._honest, Packet(opening(rows=2, tokens=HONEST_TOKENS)))
        here = slice(self._at, self._at + 1)
        answer = await request(
            self._honest, Packet(Step(position=self._at), {"hidden": self._tokens[:, here].contiguous()})
        )
        assert_same(answer.tensors["hidden"], self._wanted[:, here])
        self._at += 1
        self.honest_steps += 1
        if self._at == HONEST_TOKENS:
            await request(self._honest, Packet(CloseSession()))
            self._at = 0

    async def stranger(self, rng: random.Random) -> Stranger:
        """One of a few streams at a time; a new one where the old one has ended."""
        self.guests = [one for one in self.guests if not one.ended]
        if len(self.guests) < STREAMS:
            stream = await self.world.client.open("server", PROTOCOL_NAME)
            self.guests.append(Stranger(self, RawClient(stream)))
            return self.guests[-1]
        return rng.choice(self.guests)

    async def finish(self) -> None:
        """Everybody leaves; nothing may be left of them, and the server serves."""
        for one in self.guests:
            await one.leave()
        await self.honest_step()
        assert self._honest is not None
        await self._honest.close()
        await self.world.all_streams_ended()
        server = self.world.server
        assert server.leases.held <= LEASE_BYTES
        self.clock.now += 1e6
        await self.world.engine.submit(Kind.TRAINING, server.leases.expire)
        for session, _ in list(server.sessions._kept.values()):
            session.close()
        assert self.world.held == (0, 0, 0)
        bundles = await self._kept()
        assert await self.world.pages_held() == len(server.bundles)
        assert all(torch.equal(one, other) for one, other in zip(bundles, self._bundles, strict=True))
        assert (len(server.leases), server.leases.held) == (0, 0)
        limits = server.limits
        assert [one.taken for one in (limits.streams, limits.in_flight)] == [0] * 2
        assert not server.sessions._named

    async def _kept(self) -> list[Tensor]:
        """What the bundle's page holds."""
        server = self.world.server

        def read() -> list[Tensor]:
            slots = [one.row.tables[0].pages[0] * PAGE for one in server.bundles.values()]
            stores = server.pool._stores.values()
            return [side[slot : slot + 3].clone() for slot in slots for store in stores for side in store]

        return await self.world.engine.submit(Kind.DECODE, read)

    async def close(self) -> None:
        await self.world.close()

    def report(self, suite: str, **more: float) -> dict[str, Any]:
        """How far messages came, as plain values."""
        return {"suite": suite, "stages": dict(self.stages), "codes": dict(self.codes), **more}

    def check_shares(self) -> None:
        for name, least in LEAST.items():
            assert self.stages[name] >= least * self.stages["sent"], self.report("shares")


def in_words(report: dict[str, Any]) -> str:
    """A report as one line."""
    stages, codes = Counter(report["stages"]), Counter(report["codes"])
    total = max(1, stages["sent"])
    shares = ", ".join(
        f"{name} {stages[name] / total:.0%} (at least {least:.0%})" for name, least in LEAST.items()
    )
    answers = ", ".join(f"{code} {count}" for code, count in codes.most_common())
    more = "".join(
        f"; {name} {value:,}" for name, value in report.items() if name not in ("suite", "stages", "codes")
    )
    return f"{report['suite']}: {total} messages: {shares}; answers: {answers}{more}"


class Stranger:
    """One stream, and what its server should think of it."""

    def __init__(self, target: Target, client: RawClient) -> None:
        self.client = client
        self.ended = False
        self._target = target
        self._state = Conversation()
        self._cached = (0, 0)  # rows and tokens of the session
        self._pending = b""
        self.last = "nothing"  # what was answered last: kind of request, and of answer

    async def leave(self) -> None:
        self.ended = True
        await self.client.stream.close()

    async def send(self, rng: random.Random) -> bytes:
        """Send one drawn frame, and check every answer that is due; gives what was sent."""
        data = strangers(rng, self._state.state, self._cached)
        await self.feed(data)
        # Half a frame: the stranger stops there, or talks on.
        if self._pending and not self.ended and rng.random() < 0.5:
            await self.leave()
        return data

    async def feed(self, data: bytes) -> None:
        """Send these bytes, and check every answer that is due."""
        self._target.stages["sent"] += 1
        self._pending += data
        await self.client.stream.write([data])
        while not self.ended and await self._exchange():
            pass

    async def _exchange(self) -> bool:
        """The server's answer to the first pending frame; False when it waits for the rest of it."""
        try:
            packet = self._read()
            if packet is None:
                return False
        except ProtocolError as error:
            await self._expect_the_end(error)
            return False
        self._state.advance(packet.message)
        self._count("reached the table")
        answer = await self.client.answer()
        await self._check(packet, answer)
        return bool(self._pending)

    def _read(self) -> Packet | None:
        data = bytearray(self._pending)
        if len(data) < PREAMBLE_SIZE:
            return None
        sizes = parse_preamble(data[:PREAMBLE_SIZE])
        body = PREAMBLE_SIZE + sizes.header
        if len(data) < body:
            return None
        self._count("framed")
        header = parse_header(data[PREAMBLE_SIZE:body], sizes.payload, ClientMessage)
        self._count("decoded")
        following(self._state.state, header.message)  # is refused before its tensors are there
        if len(data) < body + sizes.payload:
            return None
        packet = parse_payload(header, data[body : body + sizes.payload])
        self._pending = bytes(data[body + sizes.payload :])
        return Packet(packet.message, expand(packet.tensors)[0])

    def _count(self, stage: str) -> None:
        self._target.stages[stage] += 1

    async def _expect_the_end(self, error: ProtocolError) -> None:
        """The typed refusal that names the field, and then nothing more."""
        refusal = (await self.client.answer()).message
        assert isinstance(refusal, Failure), refusal
        assert meaning(refusal).stream_lost, refusal
        assert refusal.field == (None if error.field is None else error.field[:128])
        assert refusal.field is not None
        self._target.codes[refusal.code] += 1
        self.last = f"{refusal.code} {(refusal.field or '')[:16]}"
        await self._over()

    async def _over(self) -> None:
        self.ended = True
        try:
            await self.client.next()
        except PeerDisconnected:
            return
        raise AssertionError("The server went on with a stream that is over.")

    async def _check(self, packet: Packet, answer: Packet) -> None:
        self._state.advance(answer.message)
        message = answer.message
        self.last = f"{type(packet.message).__name__} {getattr(message, 'code', type(message).__name__)}"
        if not isinstance(message, Failure):
            self._count("answered with work")
            self._note(packet, answer)
            return
        assert message.code != "internal", message
        self._target.codes[message.code] += 1
        if meaning(message).stream_lost:
            assert message.field is not None
            await self._over()

    def _note(self, packet: Packet, answer: Packet) -> None:
        asked = packet.message
        if isinstance(answer.message, Opened) and isinstance(asked, OpenSession):
            self._cached = (0, 0)  # of an origin's rows nothing is known here
            if "hidden" in answer.tensors:
                self._cached = (asked.rows, answer.message.position)
        elif isinstance(answer.message, Output) and isinstance(asked, Step):
            hidden: Tensor = packet.tensors["hidden"]
            assert answer.tensors["hidden"].shape == hidden.shape
            self._cached = (int(hidden.shape[0]), asked.position + int(hidden.shape[1]))


async def run(target: Target, rng: random.Random, messages: int, every: int = 20) -> None:
    """So many messages, with the honest client in between."""
    for number in range(messages):
        await (await target.stranger(rng)).send(rng)
        if number % every == 0:
            await target.honest_step()
