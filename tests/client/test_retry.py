"""The retry loop: how long it waits, what it says, when it ends. In virtual time."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Iterator
from itertools import pairwise
from typing import Any

import pytest
from tests.virtual_time import VirtualLoopThread

from corolla.client.retry import LONGEST_PAUSE, Retry
from corolla.config import SwarmConfig
from corolla.errors import MissingBlocks, PeerSilent, RemoteError, RequestRefused, SwarmUnavailable

PATIENCE = SwarmConfig.patience
Attempt = Callable[[], Awaitable[Any]]
MISSING = MissingBlocks("Block 3 is served by nobody; start one.", blocks=[3])


class View:
    """What the loop needs of a view."""

    def __init__(self) -> None:
        self.blamed: list[RemoteError] = []

    async def failed(self, error: RemoteError) -> None:
        self.blamed.append(error)

    @property
    def health(self) -> View:
        return self

    def next_return(self) -> float:
        return 0.0


@pytest.fixture
def loop() -> Iterator[VirtualLoopThread]:
    thread = VirtualLoopThread()
    yield thread
    thread.close()


def retry(patience: float = PATIENCE) -> Retry:
    return Retry(View(), patience=patience)  # type: ignore[arg-type]


def failing(times: int, error: Exception, at: list[float], loop: VirtualLoopThread) -> Attempt:
    """An attempt that fails so often; notes when it was made."""

    async def attempt() -> str:
        at.append(loop.time())
        if len(at) <= times:
            raise error
        return "done"

    return attempt


def test_patience_ends_after_ten_minutes_without_progress(loop: VirtualLoopThread) -> None:
    at: list[float] = []
    with pytest.raises(SwarmUnavailable, match=r"Gave up on a step after 600 s: Block 3 is served by nobody"):
        loop.run(retry().run(failing(10**6, MISSING, at, loop), what="a step"))
    assert loop.time() == pytest.approx(600, abs=0.1)


def test_patience_counts_from_the_last_progress(loop: VirtualLoopThread) -> None:
    reached = 0

    async def attempt() -> str:
        nonlocal reached
        await asyncio.sleep(8 * 60)
        reached += 1
        if reached < 5:
            raise PeerSilent("silent", peer_id="a")
        return "done"

    assert loop.run(retry().run(attempt, what="a step", done=lambda: reached)) == "done"
    assert loop.time() > 3 * PATIENCE


def test_progress_that_is_lost_again_is_none(loop: VirtualLoopThread) -> None:
    tries = 0

    async def attempt() -> str:
        nonlocal tries
        tries += 1
        await asyncio.sleep(50)
        raise PeerSilent("silent", peer_id="a")

    with pytest.raises(SwarmUnavailable):
        loop.run(retry().run(attempt, what="a step", done=lambda: tries % 2))
    assert loop.time() <= 100 + 600 + 50


def test_a_call_around_one_that_gave_up_gives_up_too(loop: VirtualLoopThread) -> None:
    one = retry(patience=60)

    async def inner() -> str:
        return await one.run(failing(10**6, MISSING, [], loop), what="a part")

    with pytest.raises(SwarmUnavailable, match="Gave up on a part"):
        loop.run(one.run(inner, what="the whole"))
    assert loop.time() < 61


def test_waits_back_off_with_jitter(loop: VirtualLoopThread) -> None:
    runs = []
    for _ in range(2):
        at: list[float] = []
        loop.run(retry().run(failing(20, MISSING, at, loop), what="a step"))
        runs.append([later - sooner for sooner, later in pairwise(at)])
    first, second = runs
    assert first[0] < 0.2
    assert all(0.5 * LONGEST_PAUSE < gap < 1.5 * LONGEST_PAUSE for gap in first[8:])
    assert all(abs(one - other) > 1e-9 for one, other in zip(first, second, strict=True))


def test_another_server_takes_over_at_once(loop: VirtualLoopThread) -> None:
    at: list[float] = []
    loop.run(retry().run(failing(3, PeerSilent("silent", peer_id="a"), at, loop), what="a step"))
    assert at == [0.0] * 4


@pytest.mark.parametrize(
    "error",
    [PeerSilent("silent"), RequestRefused("gone", code="evicted", peer_id="a")],
    ids=["nameless", "evicted"],
)
def test_what_can_go_round_in_a_circle_is_slowed_down(loop: VirtualLoopThread, error: RemoteError) -> None:
    at: list[float] = []
    loop.run(retry().run(failing(12, error, at, loop), what="a step"))
    assert loop.time() > 15


def test_a_server_that_is_out_of_room_once_is_replayed_at_once(loop: VirtualLoopThread) -> None:
    at: list[float] = []
    evicted = RequestRefused("gone", code="evicted", peer_id="a")
    loop.run(retry().run(failing(1, evicted, at, loop), what="a step"))
    assert loop.time() == 0


def test_many_calls_and_tries_make_one_line_at_the_beginning_and_one_at_the_end(
    loop: VirtualLoopThread, caplog: pytest.LogCaptureFixture
) -> None:
    one = retry()

    async def all_wait() -> None:
        calls = [one.run(failing(40, MISSING, [], loop), what="a step") for _ in range(8)]
        await asyncio.gather(*calls)

    with caplog.at_level(logging.WARNING, logger="corolla"):
        loop.run(all_wait())
    begun, over = [record.getMessage() for record in caplog.records]
    assert begun.startswith("Waiting up to ")
    assert "a step: Block 3 is served by nobody" in begun
    assert over.startswith("Going on after ")


def test_a_short_wait_is_not_worth_a_line(loop: VirtualLoopThread, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, logger="corolla"):
        loop.run(retry().run(failing(2, MISSING, [], loop), what="a step"))
    assert not caplog.records


@pytest.mark.parametrize(("silent", "lines"), [(1, 0), (2, 2), (3, 2)])
def test_servers_that_are_silent_one_after_the_other_are_worth_a_line(
    loop: VirtualLoopThread, caplog: pytest.LogCaptureFixture, silent: int, lines: int
) -> None:
    """Though nobody sleeps: each of them is waited for in vain."""
    left = silent

    async def attempt() -> None:
        nonlocal left
        if left:
            left -= 1
            await asyncio.sleep(4)
            raise PeerSilent(f"Peer {left} was silent.", peer_id=f"{left}")

    with caplog.at_level(logging.WARNING, logger="corolla"):
        loop.run(retry().run(attempt, what="a step"))
    assert len(caplog.records) == lines
    if lines:
        assert "a step: Peer" in caplog.records[0].getMessage()


def test_giving_up_names_the_last_fault_of_a_server(loop: VirtualLoopThread) -> None:
    faults: list[Exception] = [RequestRefused("You may not.", code="not_allowed", peer_id="a")]

    async def attempt() -> None:
        raise faults.pop() if faults else MISSING

    with pytest.raises(SwarmUnavailable, match="You may not"):
        loop.run(retry().run(attempt, what="a step"))
