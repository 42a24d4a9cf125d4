"""Chats that outgrow the model's context, and chats whose servers are lost."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.chat.reference import VOCABULARY, Expected, LocalReference, byte_tokenizer, delimited
from tests.swarm_fixture import MemorySwarm
from tests.tiny_models import write_tiny
from transformers import AutoModelForCausalLM

from corolla.chat.engine import ChatEngine
from corolla.chat.sampling import SamplingSettings
from corolla.data.render import Renderer, RenderSettings
from corolla.errors import SessionLimit, SwarmUnavailable

DELIMITER = "##"
MOST = 8
SYSTEM = "Be kind."
MESSAGES = [
    "Hello!",
    "how are you",
    "tell me more",
    "a\nb",
    "well?",
    "Good bye.",
    "one",
    "two",
    "three",
    "four",
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny("llama", tmp_path_factory.mktemp("llama"), seed=1, vocab_size=VOCABULARY)


@pytest.fixture
def swarm(folder: Path) -> Iterator[MemorySwarm]:
    with MemorySwarm(folder, [(0, 2), (2, 4)]) as swarm:
        yield swarm


def deep_model(swarm: MemorySwarm, **options: Any) -> Any:
    model = swarm.model(tuning_mode="deep_ptune", pre_seq_len=5, **options)
    generator = torch.Generator().manual_seed(7)
    for parameter in model.prompts.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator) * 0.3
    return model


def expectation(folder: Path, model: Any) -> Expected:
    local = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    return Expected(LocalReference(local, model.prompts), byte_tokenizer(), delimited(DELIMITER))


def chat_engine(model: Any, **options: Any) -> ChatEngine:
    options.setdefault("max_context", 400)
    rendered = Renderer(byte_tokenizer(), RenderSettings(delimiter=DELIMITER))
    return ChatEngine(
        model, rendered, sampling=SamplingSettings(temperature=0, max_new_tokens=MOST), **options
    )


def test_a_chat_that_outgrows_the_context_goes_on_with_the_newest_turns(
    folder: Path, swarm: MemorySwarm
) -> None:
    limit = 80
    notices: list[str] = []
    with deep_model(swarm) as model:
        expected = expectation(folder, model)
        engine = chat_engine(model, max_context=limit, system=SYSTEM, notify=notices.append)
        system = byte_tokenizer()(SYSTEM + DELIMITER).input_ids
        expected.ids = list(system)
        exchanges: list[list[int]] = []  # tokens of each, all turns
        moved = []
        for number, text in enumerate(MESSAGES):
            fed = byte_tokenizer()(text + DELIMITER).input_ids
            anew = number == 0
            if len(expected.ids) + len(fed) > limit - MOST:
                first = min(
                    first
                    for first in range(len(exchanges) + 1)
                    if len(system) + len(fed) + sum(map(len, exchanges[first:])) <= (limit - MOST) // 2
                    or first == len(exchanges)
                )
                expected.go_back([*system, *(token for exchange in exchanges[first:] for token in exchange)])
                expected.cached = 0
                moved.append(number)
                anew = True
            before, start = swarm.counted(), len(expected.ids)
            list(engine.reply(text))
            _, cost, _ = expected.turn(text, MOST)
            exchanges.append(expected.ids[start:])
            assert engine.tokens == expected.ids
            assert len(engine.tokens) - len(expected.ids[start:]) <= limit
            spent = {count - before[peer] for peer, count in swarm.counted().items()}
            assert spent == {cost + (model.prompts.length if anew else 0)}
            assert len(notices) == len(moved)
        assert len(moved) >= 2
        assert len(moved) < len(MESSAGES) // 2, "not every turn may cost the history's tokens"
        assert [m["content"] for m in engine.transcript() if m["role"] == "user"] == MESSAGES
        assert str(limit) in notices[0]
        engine.close()


def test_undo_after_the_context_moved_on_brings_older_turns_back(folder: Path, swarm: MemorySwarm) -> None:
    notices: list[str] = []
    with deep_model(swarm) as model:
        engine = chat_engine(model, max_context=60, notify=notices.append)
        while not notices:
            list(engine.reply("tell me more"))
        while len(engine.transcript()) > 2:
            engine.undo()
        expected = expectation(folder, model)
        expected.turn("tell me more", MOST)
        list(engine.reply("two"))
        expected.turn("two", MOST)
        assert engine.tokens == expected.ids
        engine.close()


def test_a_message_that_is_too_long_changes_nothing(folder: Path, swarm: MemorySwarm) -> None:
    with deep_model(swarm) as model:
        engine = chat_engine(model, max_context=60)
        list(engine.reply("Hello!"))
        tokens, before = engine.tokens, swarm.counted()
        with pytest.raises(SessionLimit, match="shorten it"):
            next(engine.reply("x" * 60))
        assert engine.tokens == tokens
        assert swarm.counted() == before
        expected = expectation(folder, model)
        expected.turn("Hello!", MOST)
        list(engine.reply("one"))
        expected.turn("one", MOST)
        assert engine.tokens == expected.ids
        engine.close()


def test_a_chat_outlives_its_servers(folder: Path, swarm: MemorySwarm) -> None:
    """Killed between two turns and in the middle of a reply, with a replica up: nothing but time is lost."""
    with deep_model(swarm) as model:
        expected = expectation(folder, model)
        engine = chat_engine(model)
        list(engine.reply(MESSAGES[0]))
        expected.turn(MESSAGES[0], MOST)
        first, second = swarm.servers
        swarm.add(2, 4)
        swarm.kill(second)
        list(engine.reply(MESSAGES[1]))
        expected.turn(MESSAGES[1], MOST)
        assert engine.tokens == expected.ids
        pieces = engine.reply(MESSAGES[2])
        next(pieces)
        swarm.add(0, 2)
        swarm.kill(first)
        list(pieces)
        expected.turn(MESSAGES[2], MOST)
        assert engine.tokens == expected.ids
        engine.close()


def test_a_reply_that_nobody_can_give_is_forgotten(folder: Path, swarm: MemorySwarm) -> None:
    with deep_model(swarm, patience=0.5) as model:
        expected = expectation(folder, model)
        engine = chat_engine(model)
        list(engine.reply(MESSAGES[0]))
        expected.turn(MESSAGES[0], MOST)
        _, second = swarm.servers
        swarm.kill(second)
        with pytest.raises(SwarmUnavailable):
            list(engine.reply(MESSAGES[1]))
        assert engine.tokens == expected.ids
        swarm.add(2, 4)
        list(engine.reply(MESSAGES[2]))
        expected.turn(MESSAGES[2], MOST)
        assert engine.tokens == expected.ids
        engine.close()
