"""Many at once, at the size that shows it."""

from __future__ import annotations

import asyncio

import pytest
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
