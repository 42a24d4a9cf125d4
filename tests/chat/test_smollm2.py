"""A real model: a chat through the swarm says what the local model says to the whole text."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from tests.chat.reference import END, CachingReference, Expected, Form, delimited
from tests.swarm_fixture import MemorySwarm
from transformers import AutoModelForCausalLM, AutoTokenizer

from corolla import ChatEngine, Renderer, RenderSettings, SamplingSettings, load_tokenizer

MOST = 10
DELIMITER = "\n-----\n"
TEMPLATE = Form(
    opening="<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n",
    fed="<|im_start|>user\nTEXT<|im_end|>\n<|im_start|>assistant\n",
    closing="<|im_end|>\n",
    stop=[END],
)
MESSAGES = [
    # In the delimiter style, the model learns from this how a reply ends.
    "Hi!\n-----\nHello!\n-----\nHow are you?\n-----\nFine.\n-----\nAre you hungry?\n-----\nYes.\n-----\nSay yes.",
    "What is your name?",
    "Where do you live?",
    "Is it warm there? ☀️",
    "Say no.",
    "Good bye.",
]


@pytest.fixture(scope="module")
def swarm() -> Iterator[MemorySwarm]:
    with MemorySwarm("smollm2", [(0, 15), (15, 30)]) as swarm:
        yield swarm


@pytest.mark.parametrize(
    ("mode", "style"),
    [
        pytest.param(None, "delimiter", marks=pytest.mark.nightly),
        pytest.param("ptune", "delimiter", marks=pytest.mark.nightly),
        ("deep_ptune", "template"),
    ],
)
def test_turns_equal_recomputing_the_text(swarm: MemorySwarm, mode: str | None, style: str) -> None:
    messages = MESSAGES if style == "delimiter" else MESSAGES[1:4]
    tokenizer = load_tokenizer("smollm2")
    local = AutoModelForCausalLM.from_pretrained(swarm.checkpoint.source.location, dtype=torch.float32).eval()
    rendered = Renderer(tokenizer, RenderSettings(style=style, delimiter=DELIMITER))
    sampling = SamplingSettings(temperature=0, max_new_tokens=MOST)
    with swarm.model(
        tuning_mode=mode, pre_seq_len=4, prompt_init="text", prompt_text=" A friendly talk."
    ) as model:
        if mode == "deep_ptune":
            generator = torch.Generator().manual_seed(7)
            model.prompts.deep.data = torch.randn(model.prompts.deep.shape, generator=generator) * 0.1
        by_name = AutoTokenizer.from_pretrained(model.name_or_path)
        assert by_name(MESSAGES).input_ids == tokenizer(MESSAGES).input_ids
        form = TEMPLATE if style == "template" else delimited(DELIMITER)
        expected = Expected(CachingReference(local, model.prompts), tokenizer, form)
        with ChatEngine(model, rendered, sampling=sampling, max_context=1000) as engine:
            ended = [
                exchange(swarm, engine, expected, text, model, number) for number, text in enumerate(messages)
            ]
    # Both ways in which a reply ends: by the delimiter, and because it gets too long.
    assert all(ended) if style == "delimiter" else not all(ended)


def exchange(
    swarm: MemorySwarm, engine: ChatEngine, expected: Expected, text: str, model: Any, number: int
) -> bool:
    before = swarm.counted()
    shown = "".join(engine.reply(text))
    _, cost, ended = expected.turn(text, MOST)
    assert engine.tokens == expected.ids
    assert shown == engine.transcript()[-1]["content"]
    assert "--" not in shown
    first = model.prompts.length if number == 0 and model.prompts is not None else 0
    assert {count - before[peer] for peer, count in swarm.counted().items()} == {cost + first}
    return ended
