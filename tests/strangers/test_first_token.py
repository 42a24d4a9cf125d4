"""How long a new client's first reply takes beside strangers that cost themselves nothing. In virtual time, where
nothing but waiting takes time."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import pytest

from corolla.client.race import FIRST_SECONDS, STAGGER_SECONDS
from corolla.client.servers import LONGEST_WAIT
from corolla.swarm.channel import Channel
from corolla.swarm.transport.base import Stream
from corolla.wire.messages import PROTOCOL_NAME, FailureCode
from tests.schedules.world import ServerPlan
from tests.strangers.simulated import Strange, Talk, alive, check_reply, mute, opens_only, refusing

LATE = 10.0  # seconds that a first token may come later than without strangers
KINDS = ("float32", "bfloat16", "float16", "float64")
HONEST = [ServerPlan("honest", 0, 4, 100.0)]
TWO = [ServerPlan("first", 0, 2, 100.0), ServerPlan("second", 2, 4, 100.0)]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("strangers")


@pytest.fixture
def strange(root: Path, request: pytest.FixtureRequest) -> Iterator[Strange]:
    made = Strange(root, getattr(request, "param", HONEST))
    yield made
    made.close()


@pytest.mark.parametrize("dtype", ["aaa", "float", "Float32", *KINDS])
@pytest.mark.parametrize("talk", [None, mute], ids=["nobody", "mute"])
def test_one_record_of_another_kind(strange: Strange, dtype: str, talk: Talk | None) -> None:
    strange.add("ghost", talk, dtype=dtype)
    assert strange.first_reply() <= LATE


def test_a_record_of_an_unknown_quantization(strange: Strange) -> None:
    strange.add("ghost", None, quantization="none of these")
    assert strange.first_reply() <= LATE


def many(strange: Strange, count: int, talk: Talk | None, **record: Any) -> None:
    for index in range(count):
        strange.add(f"0-{index}", talk, **record)


@pytest.mark.parametrize("count", [1, 4, 16, 100, pytest.param(1000, marks=pytest.mark.nightly)])
@pytest.mark.parametrize("talk", [None, mute], ids=["nobody", "mute"])
def test_many_that_never_answer(strange: Strange, count: int, talk: Talk | None) -> None:
    many(strange, count, talk)
    assert strange.first_reply() <= max(LATE, FIRST_SECONDS + STAGGER_SECONDS * (math.log2(count) + 1))


@pytest.mark.parametrize("count", [4, 100])
def test_many_of_all_kinds(strange: Strange, count: int) -> None:
    for index in range(count):
        strange.add(f"0-{index}", mute, dtype=KINDS[index % 4], quantization=("none", "int8")[index % 2])
    assert strange.first_reply() <= LATE


@pytest.mark.parametrize("strange", [TWO], indirect=True, ids=["two"])
@pytest.mark.parametrize("ranges", [[(0, 4)], [(0, 2), (2, 4)], [(0, 1), (1, 4)], [(0, 3), (3, 4)]])
def test_many_beside_a_chain(strange: Strange, ranges: list[tuple[int, int]]) -> None:
    for index in range(40):
        start, end = ranges[index % len(ranges)]
        strange.add(f"0-{index}", mute, start=start, end=end)
    assert strange.first_reply() <= LATE


@pytest.mark.parametrize("code", get_args(FailureCode))
def test_a_server_that_refuses_everything(strange: Strange, code: str) -> None:
    """Whatever it says: `evicted` for ever, or that the request is malformed."""
    many(strange, 3, refusing(code))
    assert strange.first_reply() <= LATE
    model = strange.model()
    check_reply(model, strange.checkpoint.name, seed=1)


@pytest.mark.parametrize("count", [1, 8])
def test_servers_that_only_show_signs_of_life(strange: Strange, count: int) -> None:
    many(strange, count, alive)
    assert strange.first_reply() <= 4 * LATE


@pytest.mark.parametrize("count", [1, 16])
def test_servers_that_open_sessions_and_do_nothing_in_them(strange: Strange, count: int) -> None:
    many(strange, count, opens_only)
    assert strange.first_reply() <= 2 * LATE


def test_training_beside_many_that_never_answer(strange: Strange) -> None:
    many(strange, 100, mute)
    began = strange.swarm.loop.time()
    strange.train()
    assert strange.swarm.loop.time() - began <= LATE


def test_what_was_found_out_is_not_paid_for_twice(strange: Strange) -> None:
    many(strange, 30, mute)
    model = strange.model()
    check_reply(model, strange.checkpoint.name)
    began, asked = strange.swarm.loop.time(), sum(strange.asked.values())
    for seed in range(5):
        check_reply(model, strange.checkpoint.name, seed)
    assert strange.swarm.loop.time() == began
    assert sum(strange.asked.values()) == asked


class Turncoat:
    """A server that does its work, until from some moment on it does something else."""

    def __init__(self, strange: Strange, honest: str) -> None:
        self.talk: Talk | None = None
        serving = strange.swarm.network.peers[honest].handlers
        work = serving[PROTOCOL_NAME]

        async def handle(stream: Stream) -> None:
            await (work(stream) if self.talk is None else self.talk(Channel(stream, side="server")))

        serving[PROTOCOL_NAME] = handle


@pytest.mark.parametrize("strange", [[*HONEST, ServerPlan("other", 0, 4, 50.0)]], indirect=True, ids=["two"])
@pytest.mark.parametrize("talk", [alive, mute, refusing("malformed"), refusing("evicted")])
def test_a_server_that_turns(strange: Strange, talk: Talk) -> None:
    """Which has answered before, so it is trusted further than a stranger, but not for ever."""
    turncoat = Turncoat(strange, "honest")
    model = strange.model()
    check_reply(model, strange.checkpoint.name)
    turncoat.talk = talk
    strange.swarm.loop.run(model.blocks.connection.view.channels.drop("honest"))
    began = strange.swarm.loop.time()
    check_reply(model, strange.checkpoint.name, seed=1)
    assert strange.swarm.loop.time() - began <= (LONGEST_WAIT + LATE if talk is alive else LATE)
