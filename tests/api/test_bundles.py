"""Bundles as models: they come and go with their folders, share the head, and reply as they were trained."""

from __future__ import annotations

import asyncio
import shutil
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from openai import NotFoundError
from peft import PeftModel
from tests.api.world import BASE, World, Worlds, write_bundle
from tests.client.test_lora import adapted
from tests.reference import Prefixed, Prompted

from corolla.models.prompts import KeyValuePrefix, SoftPrompt

ASK = [{"role": "user", "content": "What of the moon?"}]


def expected(world: World, prompt: object, ids: list[int], most: int) -> str:
    """What the local model with that prompt says."""
    local: Any
    if isinstance(prompt, PeftModel):
        local = SimpleNamespace(logits=lambda ids: prompt(input_ids=ids).logits)
    elif isinstance(prompt, KeyValuePrefix):
        local = Prefixed(world.local, prompt.values)
    else:
        assert isinstance(prompt, SoftPrompt)
        local = Prompted(world.local, prompt.input, prompt.deep)
    said: list[int] = []
    for _ in range(most):
        with torch.no_grad():
            said.append(int(local.logits(torch.tensor([[*ids, *said]]))[0, -1].argmax()))
        if said[-1] == 2:
            break
    return world.text(said)


def test_bundles_come_reply_and_go(worlds: Worlds) -> None:
    world = worlds.make("bundles")
    client, identity = world.client(), world.swarm.checkpoint.identity
    assert [one.id for one in client.models.list()] == [BASE]
    first = write_bundle(world.bundles / "poet", world.folder, identity)
    second = write_bundle(world.bundles / "cook", world.folder, identity, mode="deep_ptune", seed=2)
    third = write_bundle(world.bundles / "seer", world.folder, identity, mode="prefix", seed=3)
    fourth = adapted(world.local, world.bundles / "scout")  # as peft leaves it
    adapted(world.local, world.bundles / "giant", r=64)
    write_bundle(world.bundles / "stranger", world.folder, "0" * 32)
    assert [one.id for one in client.models.list()] == [BASE, "cook", "poet", "scout", "seer"]
    assert client.models.retrieve("poet").id == "poet"
    ids = world.prompt(ASK)

    def reply(name: str) -> str | None:
        found = client.chat.completions.create(model=name, messages=ASK, temperature=0, max_tokens=10)
        return found.choices[0].message.content

    texts = {name: reply(name) for name in (BASE, "poet", "cook", "seer", "scout")}
    assert texts[BASE] == world.text(world.greedy(ids, 10))
    assert texts["poet"] == expected(world, first, ids, 10)
    assert texts["cook"] == expected(world, second, ids, 10)
    assert texts["seer"] == expected(world, third, ids, 10)
    assert texts["scout"] == expected(world, fourth, ids, 10)
    assert len(set(texts.values())) == 5
    head = world.api.partners.base.model.get_output_embeddings()
    for name in ("poet", "cook", "seer", "scout"):
        assert world.api.partners.find(name).model.get_output_embeddings() is head, "one head for all"

    async def at_once() -> list[str | None]:
        async with world.async_client() as several:
            replies = await asyncio.gather(
                *(
                    several.chat.completions.create(model=name, messages=ASK, temperature=0, max_tokens=10)
                    for name in list(texts) * 4
                )
            )
        return [one.choices[0].message.content for one in replies]

    assert asyncio.run(at_once()) == list(texts.values()) * 4
    # A chat that changes partners, to bundles of other modes and back: each goes on in its own session.
    for name, prompt in (("seer", third), ("scout", fourth), ("cook", second), ("seer", third)):
        talk = [*ASK, {"role": "assistant", "content": texts["seer"]}, {"role": "user", "content": "Why?"}]
        found = client.chat.completions.create(model=name, messages=talk, temperature=0, max_tokens=10)
        assert found.choices[0].message.content == expected(world, prompt, world.prompt(talk), 10)
    assert found.usage is not None
    assert found.usage.prompt_tokens_details.cached_tokens == found.usage.prompt_tokens - 1
    kept = world.api.generator.pool.count
    shutil.rmtree(world.bundles / "poet")
    write_bundle(world.bundles / "new", world.folder, identity, seed=3)
    assert [one.id for one in client.models.list()] == [BASE, "cook", "new", "scout", "seer"]
    with pytest.raises(NotFoundError):
        client.chat.completions.create(model="poet", messages=ASK)
    assert world.api.generator.pool.count < kept, "nobody will go on with its conversations"
    # Another bundle in the same place is another model.
    shutil.rmtree(world.bundles / "new")
    other = write_bundle(world.bundles / "new", world.folder, identity, seed=4)
    assert reply("new") == expected(world, other, ids, 10)


def test_a_damaged_bundle_is_not_offered(worlds: Worlds) -> None:
    world = worlds.make("damaged")
    write_bundle(world.bundles / "bad", world.folder, world.swarm.checkpoint.identity)
    (world.bundles / "bad" / "bundle.json").write_text("{")
    assert [one.id for one in world.client().models.list()] == [BASE]
    for name in ("bad", "../damaged/bad", "", "/etc"):
        with pytest.raises(Exception, match=r"bundle|no model|40"):
            world.client().chat.completions.create(model=name, messages=ASK)
