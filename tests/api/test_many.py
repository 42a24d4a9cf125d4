"""Many at once, at the size that shows it."""

from __future__ import annotations

import asyncio

import pytest
from tests.api.talking import TURNS, converse
from tests.api.world import BASE, World, Worlds


async def streamed(world: World, count: int, most: int) -> list[str]:
    async with world.async_client() as client:

        async def one(number: int) -> str:
            stream = await client.chat.completions.create(
                model=BASE,
                messages=[{"role": "user", "content": f"Number {number}: {'rain ' * (number % 7)}"}],
                temperature=0,
                max_tokens=most,
                stream=True,
            )
            return "".join([chunk.choices[0].delta.content or "" async for chunk in stream])

        return list(await asyncio.gather(*(one(number) for number in range(count))))


@pytest.mark.nightly
def test_a_hundred_streams_at_once(worlds: Worlds) -> None:
    world = worlds.make("many", at_once=128)
    expected = []
    for number in range(100):
        talk = [{"role": "user", "content": f"Number {number}: {'rain ' * (number % 7)}"}]
        expected.append(world.text(world.greedy(world.prompt(talk), 12)))
    assert asyncio.run(streamed(world, 100, 12)) == expected
    assert asyncio.run(streamed(world, 100, 12)) == expected, "again, from what is kept"
    assert world.api.generator.under_way == 0


@pytest.mark.nightly
@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
@pytest.mark.parametrize("at_once", [1, 16])
def test_fifty_conversations_while_servers_are_killed(worlds: Worlds, stream: bool, at_once: int) -> None:
    world = worlds.make(f"fifty-{stream}-{at_once}", spans=((0, 2), (2, 4), (0, 4)))
    killed = iter(list(world.swarm.servers)[:2])
    replies = 0

    def replied() -> None:
        nonlocal replies
        replies += 1
        if replies in (40, 100):
            world.swarm.kill(next(killed))

    converse(world, 50, at_once=at_once, streamed=lambda _number: stream, heard=lambda: None, replied=replied)
    assert replies == 50 * len(TURNS)
