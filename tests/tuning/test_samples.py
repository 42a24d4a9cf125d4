"""What a tuned model says is shown, and said to be degenerate when it is."""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from tests.swarm_fixture import MemorySwarm
from tests.tuning.tiny_setup import conversations, settings

from corolla.chat.engine import ChatEngine
from corolla.chat.sampling import SamplingSettings
from corolla.data.conversation import Conversation, Turn
from corolla.tuning.batches import prepare
from corolla.tuning.bundle import ModelInfo, load_bundle
from corolla.tuning.samples import COUNT, REPLY_TOKENS, Sample, Samples, sample_replies
from corolla.tuning.tune import TuneResult, tune


def sample(reply: str, tokens: tuple[int, ...] = (1, 2, 3), **about: Any) -> Sample:
    return Sample(about.pop("said", "How are you?"), reply, tokens, **about)


@pytest.mark.parametrize(
    ("one", "problem"),
    [
        (sample("Fine, and you?"), None),
        (sample(""), "empty"),
        (sample(" \n"), "empty"),
        (sample("well", held_back=True), "empty"),
        (sample("no no no no no no no", (5,) * 7), "the same again and again"),
        (sample("I am. I am. I am. I am.", (1, 2, 3) * 4), "the same again and again"),
        (sample("Oh, I am. I am. I am.", (9, 8, 1, 2, 3, 1, 2, 3, 1, 2, 3)), "the same again and again"),
        (sample("no, no", (5, 6, 5)), None),
        (sample("I like tea, I like tea.", (1, 2, 3, 4, 1, 2, 3, 5)), None),
        (sample("how are you"), "what was said to it"),
    ],
)
def test_what_is_wrong_with_a_reply(one: Sample, problem: str | None) -> None:
    assert one.problem() == problem


def test_the_sentence_counts_and_says_what_to_try() -> None:
    good, empty = sample("Fine."), sample("x", held_back=True)
    assert Samples((good, sample("Tea."), sample("Rain."))).degenerate() is None
    said = Samples((good, empty, empty, sample("How are you?"))).degenerate()
    assert said is not None
    assert "2 of 4 would be empty, 1 of 4 would be what was said to it" in said
    assert "--steps" in said
    assert "all are the same" in str(Samples((good, good, sample("fine"))).degenerate())
    lines = Samples((good, empty, empty)).lines()
    assert lines[1:3] == ["  You: How are you?", "  Bot: Fine."]
    assert "what a person would call replies" in lines[-1]


def test_a_reply_is_one_line_and_cannot_steer_the_terminal() -> None:
    _, said, reply = Samples((sample("a\n\x1b[31mb\u202ec\ttea", said="x" * 200),)).lines()
    assert said == "  You: " + "x" * 119 + "…"
    assert reply == "  Bot: a [31mbc tea"


@pytest.fixture(scope="module")
def swarm(tiny_folder: Path) -> Iterator[MemorySwarm]:
    with MemorySwarm(tiny_folder, [(0, 2), (2, 4)]) as made:
        yield made


def test_samples_are_what_a_chat_says(swarm: MemorySwarm, tokenizer: Any) -> None:
    prepared = prepare(tokenizer, settings(held_out=12), conversations())
    model = swarm.model(tuning_mode="ptune", pre_seq_len=4)
    found = sample_replies(model, prepared.renderer, prepared.talks)
    assert found is not None
    assert len(found.exchanges) == len(found.base) == COUNT
    assert len({one.said for one in found.exchanges}) > 1
    assert [one.reply for one in found.exchanges] != [one.reply for one in found.base]
    greedy = SamplingSettings(temperature=0, max_new_tokens=REPLY_TOKENS)
    for prompt, exchanges in ((model.prompts, found.exchanges[:4]), (None, found.base[:4])):
        model.prompts = prompt
        for one in exchanges:
            with ChatEngine(model, prepared.renderer, sampling=greedy, max_context=300) as chat:
                assert one.reply == "".join(chat.reply(one.said)).strip()


def test_a_model_that_says_only_the_delimiter_is_found_out(
    swarm: MemorySwarm, tokenizer: Any, tiny_folder: Path, tmp_path: Path
) -> None:
    prepared = prepare(tokenizer, settings(steps=1), conversations())
    model = swarm.model(tuning_mode="ptune", pre_seq_len=4)
    delimiter = tokenizer("|").input_ids

    def prefer(_head: Any, _inputs: Any, logits: torch.Tensor) -> torch.Tensor:
        logits = logits + 0.0
        logits[..., delimiter] += 100.0
        return logits

    model.lm_head.register_forward_hook(prefer)
    shown = io.StringIO()
    about = ModelInfo(str(tiny_folder), swarm.checkpoint.identity)
    console = Console(file=shown, width=200)
    result = tune(model, settings(steps=1), prepared, tmp_path / "out", about, console=console)
    assert isinstance(result, TuneResult)
    assert "5 of 5 would be empty" in shown.getvalue()
    assert shown.getvalue().count("  You: ") == 4
    noted = load_bundle(tmp_path / "out").metrics["samples"]
    assert "5 of 5 would be empty" in noted["degenerate"]
    assert all(one["reply"] and one["problem"] == "empty" for one in noted["replies"])


def test_a_swarm_that_is_lost_by_then_costs_the_samples_only(tiny_folder: Path, tokenizer: Any) -> None:
    prepared = prepare(tokenizer, settings(), conversations())
    with MemorySwarm(tiny_folder, [(0, 4)]) as lost:
        model = lost.model(tuning_mode="ptune", pre_seq_len=4, patience=0.2)
        lost.kill(next(iter(lost.servers)))
        assert sample_replies(model, prepared.renderer, prepared.talks) is None


def test_conversations_without_an_answered_opening_give_none(swarm: MemorySwarm, tokenizer: Any) -> None:
    renderer = prepare(tokenizer, settings(), conversations()).renderer
    model = swarm.model(tuning_mode="ptune", pre_seq_len=4)
    mute = Conversation((Turn("user", "hm"), Turn("user", "well?")), id="mute")
    long = Conversation((Turn("user", "x" * 500), Turn("assistant", "y")), id="long")
    assert sample_replies(model, renderer, [mute, long]) is None
