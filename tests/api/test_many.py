"""Many at once, at the size that shows it."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from openai import AsyncOpenAI
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


TURNS = ("What of number {}?", "And of the rain?", "Why?")


@pytest.mark.nightly
@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
@pytest.mark.parametrize("at_once", [1, 16])
def test_fifty_conversations_while_servers_are_killed(worlds: Worlds, stream: bool, at_once: int) -> None:
    """Every reply of every turn is `generate`'s, and the next turn goes on from it."""
    world = worlds.make(f"fifty-{stream}-{at_once}", spans=((0, 2), (2, 4), (0, 4)))
    killed = iter(list(world.swarm.servers)[:2])
    replies = 0

    async def talk(client: AsyncOpenAI, free: asyncio.Semaphore, number: int) -> None:
        nonlocal replies
        said: list[dict[str, str]] = []
        for turn in TURNS:
            said.append({"role": "user", "content": turn.format(number)})
            async with free:
                reply = await ask(client, said, stream)
            assert reply == world.text(world.greedy(world.prompt(said), 10)), (number, turn)
            said.append({"role": "assistant", "content": reply})
            replies += 1
            if replies in (40, 100):
                world.swarm.kill(next(killed))

    async def all_of_them() -> None:
        free = asyncio.Semaphore(at_once)
        async with world.async_client() as client:
            await asyncio.gather(*(talk(client, free, number) for number in range(50)))

    asyncio.run(all_of_them())
    assert replies == 150


async def ask(client: AsyncOpenAI, talk: list[Any], stream: bool) -> str:
    """A greedy reply of 10 tokens."""
    how: dict[str, Any] = {"model": BASE, "messages": talk, "temperature": 0, "max_tokens": 10}
    if not stream:
        return (await client.chat.completions.create(**how)).choices[0].message.content or ""
    chunks = await client.chat.completions.create(**how, stream=True)
    return "".join([chunk.choices[0].delta.content or "" async for chunk in chunks])
