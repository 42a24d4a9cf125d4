"""Conversations of several turns over an API, each reply compared with the local model's own."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

from openai import AsyncOpenAI
from tests.api.world import BASE, Served

TURNS = ("What of number {}?", "And of the rain?", "Why?")
TOKENS = 10  # of a reply
Heard = Callable[[], object]


def converse(
    world: Served, count: int, *, at_once: int, streamed: Callable[[int], bool], heard: Heard, replied: Heard
) -> None:
    """`count` conversations of all `TURNS`, so many `at_once`; those that are `streamed` by their number call `heard`
    for each piece. Whatever happens, every reply is what `generate` gives, and the next turn goes on from it."""

    async def talk(client: AsyncOpenAI, free: asyncio.Semaphore, number: int) -> None:
        said: list[dict[str, str]] = []
        for turn in TURNS:
            said.append({"role": "user", "content": turn.format(number)})
            async with free:
                reply = await ask(client, said, heard if streamed(number) else None)
            assert reply == world.text(world.greedy(world.prompt(said), TOKENS)), (number, turn)
            said.append({"role": "assistant", "content": reply})
            replied()

    async def all_of_them() -> None:
        free = asyncio.Semaphore(at_once)
        async with world.async_client() as client:
            await asyncio.gather(*(talk(client, free, number) for number in range(count)))

    asyncio.run(all_of_them())


async def ask(client: AsyncOpenAI, talk: list[Any], heard: Heard | None) -> str:
    """A greedy reply, streamed where somebody wants to hear of its pieces."""
    how: dict[str, Any] = {"model": BASE, "messages": talk, "temperature": 0, "max_tokens": TOKENS}
    if heard is None:
        return (await client.chat.completions.create(**how)).choices[0].message.content or ""
    text = ""
    async for chunk in await client.chat.completions.create(**how, stream=True):
        text += chunk.choices[0].delta.content or ""
        heard()
    return text
