"""Steps of one client's sessions that travel together: nothing about them is different."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
import torch
from tests.client.conftest import Pair, random_ids
from tests.covering import covering
from tests.reference import Prompted
from tests.virtual_time import in_virtual_time
from torch import Tensor

from corolla.client.sessions import step_batcher
from corolla.client.sessions.step_batcher import StepBatcher
from corolla.errors import PeerSilent, ProtocolError, RequestRefused
from corolla.server.sessions.kv_cache import CacheBudget
from corolla.swarm.channel import Channel, ChannelPool
from corolla.wire.frames import Packet
from corolla.wire.messages import Outputs, Part, Step, Steps

PairOf = Callable[..., Pair]
COUNT, NEW = 6, 12
GREEDY: dict[str, Any] = {"do_sample": False}


@pytest.fixture
def sent(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many steps each message of a client held; 1 for those that came by themselves."""
    counts: list[int] = []
    own = Channel.send

    async def send(channel: Channel, packet: Packet) -> None:
        if isinstance(packet.message, Steps):
            counts.append(len(packet.message.parts))
        elif isinstance(packet.message, Step):
            counts.append(1)
        await own(channel, packet)

    monkeypatch.setattr(Channel, "send", send)
    return counts


def replies(
    model: Any, prompts: list[Tensor], during: Callable[[int], None] = lambda _: None
) -> list[Tensor]:
    """Greedy replies to all prompts, each in a session and a thread of its own; all begin at once.

    `during` is called behind every session's third token with the session's number.
    """
    found: dict[int, Tensor] = {}
    ready = threading.Barrier(len(prompts))

    def reply(index: int) -> None:
        with model.inference_session(max_length=100) as session:
            model.generate(prompts[index], max_new_tokens=1, session=session, **GREEDY)
            ready.wait(60)
            model.generate(None, max_new_tokens=2, session=session, **GREEDY)
            during(index)
            model.generate(None, max_new_tokens=NEW - 3, session=session, **GREEDY)
            found[index] = session.output_ids

    threads = [threading.Thread(target=reply, args=(index,)) for index in range(len(prompts))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    return [found[index] for index in range(len(prompts))]


def prompts_of(count: int = COUNT) -> list[Tensor]:
    """Of one or two rows each."""
    return [random_ids(1 + index % 2, 3 + index, seed=index) for index in range(count)]


def local_replies(pair: Pair, model: Any, prompts: list[Tensor]) -> list[Tensor]:
    if model.prompts is None:
        width = pair.local.get_input_embeddings().embedding_dim
        local = Prompted(pair.local, torch.zeros(0, width))
    else:
        local = Prompted(pair.local, model.prompts.input, model.prompts.deep)
    return [local.greedy(ids, NEW) for ids in prompts]


def assert_equal(found: list[Tensor], wanted: list[Tensor]) -> None:
    for own, local in zip(found, wanted, strict=True):
        assert own.tolist() == local.tolist()


@pytest.mark.parametrize(
    ("family", "mode"),
    covering(["llama", "bloom", "gemma2"], {"none": None, "deep_ptune": "deep_ptune"}, together=1),
)
def test_a_crowd_of_sessions_replies_as_each_would_alone(
    pair_of: PairOf, family: str, mode: str | None, sent: list[int]
) -> None:
    pair = pair_of(family)
    model = pair.model(tuning_mode=mode, pre_seq_len=3)
    if mode is not None:
        model.prompts.deep.data.normal_(0, 0.3, generator=torch.Generator().manual_seed(1))
    prompts = prompts_of()
    assert_equal(replies(model, prompts), local_replies(pair, model, prompts))
    assert max(sent) > 1


def test_a_session_alone_sends_its_steps_by_themselves(pair_of: PairOf, sent: list[int]) -> None:
    pair = pair_of("llama")
    model, prompts = pair.model(), prompts_of(1)
    assert_equal(replies(model, prompts), local_replies(pair, model, prompts))
    assert set(sent) == {1}


def test_a_family_that_takes_no_batches(pair_of: PairOf, sent: list[int]) -> None:
    """It is asked once a session and span, and never again."""
    pair = pair_of("falcon")
    model, prompts = pair.model(), prompts_of()
    assert_equal(replies(model, prompts), local_replies(pair, model, prompts))
    refused = sum(count for count in sent if count > 1)
    assert refused <= 2 * COUNT


def test_steps_that_ask_for_more_room_travel_together_too(
    pair_of: PairOf, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first of each call does."""
    pair, alone = pair_of("llama"), list[int]()
    model, prompts, own = pair.model(), prompts_of(3), Channel.send
    ready, over = threading.Barrier(len(prompts)), threading.Barrier(len(prompts))

    async def send(channel: Channel, packet: Packet) -> None:
        if isinstance(packet.message, Step):
            alone.append(int(packet.tensors["hidden"].shape[1]))
        await own(channel, packet)

    def reply(ids: Tensor) -> None:
        with model.inference_session() as session:
            model.generate(ids, max_new_tokens=1, session=session, **GREEDY)
            ready.wait(60)
            model.generate(None, max_new_tokens=40, session=session, **GREEDY)
            over.wait(60)

    monkeypatch.setattr(Channel, "send", send)
    threads = [threading.Thread(target=reply, args=(ids,)) for ids in prompts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert sorted(set(alone)) == [3, 4, 5]  # the prompts


def test_where_more_room_is_not_free_a_step_goes_by_itself_and_later_ones_together(
    pair_of: PairOf, sent: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    pair, refused = pair_of("llama"), list[int]()

    def never(_budget: CacheBudget, _holder: Any, pages: int) -> bool:
        refused.append(pages)
        return False

    model, prompts = pair.model(), prompts_of(3)
    monkeypatch.setattr(CacheBudget, "reserve_now", never)
    assert_equal(replies(model, prompts), local_replies(pair, model, prompts))
    assert refused
    assert max(sent) > 1


@pytest.mark.parametrize("wire", ["float16", "int8"])
def test_what_is_rounded_on_the_way_is_rounded_alike(pair_of: PairOf, wire: str, sent: list[int]) -> None:
    pair, prompts = pair_of("llama"), prompts_of()
    model = pair.model(wire=wire)
    alone = [replies(model, [ids])[0] for ids in prompts]
    assert max(sent) == 1
    assert_equal(replies(model, prompts), alone)
    assert max(sent) > 1


@pytest.mark.parametrize("how", ["kill", "stop"])
def test_a_server_lost_in_the_middle_of_all_replies(pair_of: PairOf, how: str, sent: list[int]) -> None:
    pair = pair_of("llama", ((0, 4),))
    spare = pair.swarm.add(0, 4, throughput=1.0)
    model, prompts = pair.model(patience=60.0), prompts_of()
    first = next(peer for peer in pair.swarm.servers if peer != spare)
    once = threading.Lock()

    def lose(_index: int) -> None:
        if once.acquire(blocking=False):
            sent.clear()
            getattr(pair.swarm, how)(first)

    assert_equal(replies(model, prompts, lose), local_replies(pair, model, prompts))
    assert max(sent) > 1  # they travel together at the other server too


def test_an_answer_of_another_shape_is_no_answer(pair_of: PairOf, monkeypatch: pytest.MonkeyPatch) -> None:
    pair = pair_of("llama")
    model, prompts, wrong = pair.model(), prompts_of(), iter(range(2))
    own = ChannelPool.ask

    async def odd(self: ChannelPool, peer: str, packet: Packet) -> Packet:
        answer = await own(self, peer, packet)
        if not isinstance(packet.message, Steps):
            return answer
        if next(wrong, None) is None:
            return answer
        return Packet(answer.message, {"hidden": answer.tensors["hidden"][..., :-1]})

    monkeypatch.setattr(ChannelPool, "ask", odd)
    assert_equal(replies(model, prompts), local_replies(pair, model, prompts))
    assert next(wrong, None) is None


# --- when a message goes ----------------------------------------------------------------------------------


class Line:
    """A server that answers when it is told to."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.sent: list[list[str]] = []
        self.free = asyncio.Event()
        self.free.set()
        self.batcher = StepBatcher("peer", lambda packet: self.ask(packet))
        self.ask: Callable[[Packet], Awaitable[Packet]] = self.answer
        monkeypatch.setattr(step_batcher, "UNDER_WAY", 1)

    async def answer(self, packet: Packet) -> Packet:
        assert isinstance(packet.message, Steps)
        self.sent.append([part.name for part in packet.message.parts])
        await self.free.wait()
        return Packet(Outputs(), {"hidden": packet.tensors["hidden"] + 1})

    def step(self, name: str, hidden: Tensor | None = None) -> asyncio.Task[Tensor]:
        self.batcher.enter(name)
        value = torch.zeros(1, 1, 4) if hidden is None else hidden
        part = Part(name=name, position=0, rows=len(value))
        return asyncio.create_task(self.batcher.step(part, value))


A, B, C = "a" * 16, "b" * 16, "c" * 16


async def test_what_comes_while_a_message_is_under_way_goes_in_the_next(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    line = Line(monkeypatch)
    line.free.clear()
    first = line.step(A)
    while not line.sent:
        await asyncio.sleep(0)
    rest = [line.step(B), line.step(C)]
    for _ in range(5):
        await asyncio.sleep(0)
    assert line.sent == [[A]]
    line.free.set()
    await asyncio.gather(first, *rest)
    assert line.sent == [[A], [B, C]]


async def test_a_step_that_was_given_up_is_not_sent_and_nobody_misses_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    line = Line(monkeypatch)
    line.free.clear()
    under_way = line.step(A)
    while not line.sent:
        await asyncio.sleep(0)
    waiting, other = line.step(B), line.step(C)
    await asyncio.sleep(0)
    waiting.cancel()
    under_way.cancel()
    await asyncio.wait([waiting, under_way])
    line.free.set()
    assert torch.equal(await other, torch.ones(1, 1, 4))
    assert line.sent == [[A], [C]]


async def test_no_more_than_so_many_go_together_and_only_those_of_one_form(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    line, count = Line(monkeypatch), step_batcher.TOGETHER + 3
    odd = line.step("odd" * 6, torch.zeros(1, 1, 4, dtype=torch.float64))
    steps = [
        line.step(f"{index:016}", torch.full((1 + index % 2, 1, 4), float(index))) for index in range(count)
    ]
    for index, one in enumerate(steps):
        assert torch.equal(await one, torch.full((1 + index % 2, 1, 4), index + 1.0))
    assert (await odd).dtype == torch.float64
    assert sorted(len(names) for names in line.sent) == [1, 3, step_batcher.TOGETHER]


async def test_as_many_messages_are_under_way_as_may_be(monkeypatch: pytest.MonkeyPatch) -> None:
    line = Line(monkeypatch)
    monkeypatch.setattr(step_batcher, "UNDER_WAY", 2)
    line.free.clear()
    steps = []
    for name in (A, B, C):
        steps.append(line.step(name))
        for _ in range(10):
            await asyncio.sleep(0)
    assert line.sent == [[A], [B]]
    line.free.set()
    await asyncio.gather(*steps)
    assert line.sent == [[A], [B], [C]]


@in_virtual_time
async def test_a_step_waits_for_those_that_are_due(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two that come at the same pace, one a little later each time."""
    line = Line(monkeypatch)
    for _ in range(3):
        steps = [line.step(A)]
        await asyncio.sleep(0.01)
        steps.append(line.step(B))
        await asyncio.gather(*steps)
        await asyncio.sleep(0.1)
    assert line.sent[-1] == [A, B]


@in_virtual_time
async def test_those_that_have_begun_apart_meet_and_stay_together(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each takes 0.1 s from one answer to its next step, and they have begun 0.05 s apart."""
    line = Line(monkeypatch)

    async def talk(name: str, begin: float) -> None:
        await asyncio.sleep(begin)
        for _ in range(12):
            await line.step(name)
            await asyncio.sleep(0.1)

    await asyncio.gather(talk(A, 0.0), talk(B, 0.05))
    assert line.sent[0] == [A]
    assert [sorted(names) for names in line.sent[-8:-1]] == [[A, B]] * 7


@in_virtual_time
async def test_those_of_one_message_wait_for_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    """One comes back later each time, by more than what is waited for anybody else."""
    line = Line(monkeypatch)
    later = 1.5 * step_batcher.GATHER_SECONDS

    async def talk(name: str, late: float) -> None:
        for turn in range(8):
            await line.step(name)
            await asyncio.sleep(0.3 + late * (turn % 2))

    await asyncio.gather(talk(A, 0.0), talk(B, later))
    assert [sorted(names) for names in line.sent] == [[A, B]] * 8


@in_virtual_time
async def test_one_that_does_not_come_back_is_waited_for_once(monkeypatch: pytest.MonkeyPatch) -> None:
    line = Line(monkeypatch)
    loop = asyncio.get_running_loop()
    for _ in range(3):
        await asyncio.gather(line.step(A), line.step(B))
        await asyncio.sleep(0.1)
    monkeypatch.setattr(step_batcher, "MEET_EVERY", 100)
    waited = []
    for _ in range(3):
        began = loop.time()
        await line.step(A)
        waited.append(loop.time() - began)
        await asyncio.sleep(0.1)
    assert waited[0] <= 0.1 * step_batcher.GATHER_SHARE + 0.001
    assert waited[1:] == [0.0, 0.0]


@in_virtual_time
async def test_whoever_begins_is_met_by_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """One begins while another is in the middle of a reply, half a token apart."""
    line = Line(monkeypatch)

    async def talk(name: str, begin: float) -> None:
        await asyncio.sleep(begin)
        for _ in range(6):
            await line.step(name)
            await asyncio.sleep(0.1)

    monkeypatch.setattr(step_batcher, "MEET_EVERY", 1000)
    await asyncio.gather(talk(A, 0.0), talk(B, 0.25))
    first = line.sent.index([B])
    assert [sorted(names) for names in line.sent[first + 1 : first + 3]] == [[A, B]] * 2


@in_virtual_time
async def test_those_of_another_pace_are_waited_for_now_and_then_only(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    line = Line(monkeypatch)
    began, ends = asyncio.get_running_loop().time(), dict[str, float]()

    async def talk(name: str, pace: float, count: int) -> None:
        for _ in range(count):
            await line.step(name)
            await asyncio.sleep(pace)
        ends[name] = asyncio.get_running_loop().time() - began

    await asyncio.gather(talk(A, 0.1, 64), talk(B, 0.17, 40))
    assert ends[A] < 1.25 * 64 * 0.1
    assert ends[B] < 1.25 * 40 * 0.17


async def test_nobody_waits_for_a_session_that_has_left(monkeypatch: pytest.MonkeyPatch) -> None:
    line = Line(monkeypatch)
    monkeypatch.setattr(step_batcher, "GATHER_SECONDS", 3600.0)
    monkeypatch.setattr(step_batcher, "GATHER_SHARE", 1e9)
    for _ in range(2):
        await asyncio.gather(line.step(A), line.step(B))
    line.batcher.leave(B)
    async with asyncio.timeout(20):
        await line.step(A)
    assert line.sent[-1] == [A]


async def test_an_error_is_everybodys_and_the_next_message_goes(monkeypatch: pytest.MonkeyPatch) -> None:
    line = Line(monkeypatch)

    async def failing(_packet: Packet) -> Packet:
        line.ask = line.answer
        raise ProtocolError("no", peer_id="peer")

    line.ask = failing
    results = await asyncio.gather(line.step(A), line.step(B), return_exceptions=True)
    assert [type(one) for one in results] == [ProtocolError, ProtocolError]
    assert torch.equal(await line.step(A), torch.ones(1, 1, 4))


@pytest.mark.parametrize("lost", [True, False])
async def test_those_that_wait_hear_of_a_lost_server_too(monkeypatch: pytest.MonkeyPatch, lost: bool) -> None:
    line = Line(monkeypatch)
    line.free.clear()

    async def failing(packet: Packet) -> Packet:
        await line.answer(packet)
        line.ask = line.answer
        raise PeerSilent("no") if lost else RequestRefused("later", code="busy")

    line.ask = failing
    first = line.step(A)
    while not line.sent:
        await asyncio.sleep(0)
    waiting = line.step(B)
    await asyncio.sleep(0)
    line.free.set()
    results = await asyncio.gather(first, waiting, return_exceptions=True)
    assert isinstance(results[0], PeerSilent if lost else RequestRefused)
    assert isinstance(results[1], PeerSilent if lost else Tensor)


async def test_closing_gives_up_what_is_under_way(monkeypatch: pytest.MonkeyPatch) -> None:
    line = Line(monkeypatch)
    line.free.clear()
    going = line.step(A)
    while not line.sent:
        await asyncio.sleep(0)
    line.batcher.close()
    with pytest.raises(asyncio.CancelledError):
        await going
