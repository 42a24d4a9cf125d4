"""A chat through one session says what the local model says to the whole text, and costs what it should."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.chat.reference import (
    TEMPLATED,
    VOCABULARY,
    Expected,
    LocalReference,
    byte_tokenizer,
    delimited,
)
from tests.covering import covering
from tests.swarm_fixture import MemorySwarm
from tests.tiny_models import write_tiny
from transformers import AutoModelForCausalLM

from corolla.chat.engine import ChatEngine
from corolla.chat.sampling import SamplingSettings
from corolla.data.render import Renderer, RenderSettings

MESSAGES = ["Hello!", "how are you", "Ünïcode 🌸 too", "a\nb", "well?", "Good bye."]
MOST = 16
# Family to seed and delimiter, chosen so that some replies end by themselves and others are cut.
FAMILIES = {"llama": (1, "by"), "bloom": (1, "|"), "gemma2": (0, "\n-----\n")}
MODES = {"none": None, "ptune": "ptune", "deep_ptune": "deep_ptune"}


@pytest.fixture(scope="module")
def swarms(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, MemorySwarm]]:
    made: dict[str, MemorySwarm] = {}
    for family, (seed, _) in FAMILIES.items():
        folder = tmp_path_factory.mktemp(family)
        write_tiny(family, folder, seed=seed, vocab_size=VOCABULARY)
        made[family] = MemorySwarm(folder, [(0, 2), (2, 4)])
    yield made
    for swarm in made.values():
        swarm.close()


def distributed(swarm: MemorySwarm, mode: str | None) -> Any:
    model = swarm.model(tuning_mode=mode, pre_seq_len=5)
    generator = torch.Generator().manual_seed(7)
    for parameter in model.prompts.parameters() if model.prompts is not None else ():
        parameter.data = torch.randn(parameter.shape, generator=generator) * 0.3
    return model


def local(swarm: MemorySwarm, prompts: Any) -> LocalReference:
    model = AutoModelForCausalLM.from_pretrained(Path(swarm.checkpoint.name), dtype=torch.float32)
    return LocalReference(model.eval(), prompts)


def renderer(style: str, delimiter: str = "\n-----\n") -> Renderer:
    return Renderer(byte_tokenizer(), RenderSettings(style=style, delimiter=delimiter))


def greedy(most: int = MOST) -> SamplingSettings:
    return SamplingSettings(temperature=0, max_new_tokens=most)


def said_in(rendered: Renderer, reply: list[int]) -> str:
    text: str = rendered.tokenizer.decode(reply, skip_special_tokens=True)
    return text.partition(rendered.stop_text)[0] if rendered.stop_text else text


def prompt_length(model: Any) -> int:
    return 0 if model.prompts is None else int(model.prompts.length)


def costs(swarm: MemorySwarm, before: dict[str, int]) -> set[int]:
    """What each server has computed since, in tokens."""
    return {count - before[peer] for peer, count in swarm.counted().items()}


@pytest.mark.parametrize(
    ("family", "mode", "style"),
    [
        *covering(["llama"], MODES, ["delimiter", "template"], together=1),
        ("bloom", "ptune", "delimiter"),
        *[
            pytest.param("bloom", mode, "delimiter", marks=pytest.mark.nightly)
            for mode in (None, "deep_ptune")
        ],
        ("gemma2", "deep_ptune", "template"),
    ],
)
def test_six_turns_equal_recomputing_the_text(
    swarms: dict[str, MemorySwarm], family: str, mode: str | None, style: str
) -> None:
    swarm, delimiter = swarms[family], FAMILIES[family][1]
    with distributed(swarm, mode) as model:
        rendered = renderer(style, delimiter)
        engine = ChatEngine(model, rendered, sampling=greedy(), max_context=400)
        form = TEMPLATED if style == "template" else delimited(delimiter)
        expected = Expected(local(swarm, model.prompts), rendered.tokenizer, form)
        said: list[int] = []
        endings = set()
        for number, text in enumerate(MESSAGES):
            before = swarm.counted()
            pieces = list(engine.reply(text))
            reply, cost, ended = expected.turn(text, MOST)
            assert engine.tokens == expected.ids
            assert "".join(pieces) == engine.transcript()[-1]["content"] == said_in(rendered, reply)
            assert costs(swarm, before) == {cost + (0 if number else prompt_length(model))}
            said += reply
            endings.add(ended)
        assert len(set(said)) > 15, "too uniform to prove anything"
        if mode is None:
            assert endings == {True, False}, "the test should see replies that end and replies that are cut"
        engine.close()


@pytest.fixture(params=[None, pytest.param("ptune", marks=pytest.mark.nightly), "deep_ptune"])
def llama(request: pytest.FixtureRequest, swarms: dict[str, MemorySwarm]) -> Iterator[tuple[Any, ...]]:
    """Swarm, model, engine and what is expected of it, with each kind of prompt."""
    swarm, delimiter = swarms["llama"], FAMILIES["llama"][1]
    rendered = renderer("delimiter", delimiter)
    with distributed(swarm, request.param) as model:
        expected = Expected(local(swarm, model.prompts), rendered.tokenizer, delimited(delimiter))
        with ChatEngine(model, rendered, sampling=greedy(), max_context=400) as engine:
            yield swarm, model, engine, expected


def test_undo_is_as_if_it_had_not_been(llama: tuple[Any, ...]) -> None:
    swarm, _, engine, expected = llama
    list(engine.reply(MESSAGES[0]))
    expected.turn(MESSAGES[0], MOST)
    first = list(expected.ids)
    for text in MESSAGES[1:3]:
        list(engine.reply(text))
        expected.turn(text, MOST)
    assert engine.undo() == MESSAGES[2]
    assert engine.undo() == MESSAGES[1]
    assert engine.tokens == first
    expected.go_back(first)
    before = swarm.counted()
    list(engine.reply(MESSAGES[3]))
    _, cost, _ = expected.turn(MESSAGES[3], MOST)
    assert engine.tokens == expected.ids
    assert costs(swarm, before) == {cost}
    assert [m["content"] for m in engine.transcript() if m["role"] == "user"] == [MESSAGES[0], MESSAGES[3]]


def test_undoing_everything_begins_anew(llama: tuple[Any, ...]) -> None:
    """The prompt, which comes before the first token, must come again."""
    swarm, model, engine, expected = llama
    list(engine.reply(MESSAGES[1]))
    assert engine.undo() == MESSAGES[1]
    assert engine.undo() is None
    assert engine.tokens == []
    before = swarm.counted()
    list(engine.reply(MESSAGES[0]))
    _, cost, _ = expected.turn(MESSAGES[0], MOST)
    assert engine.tokens == expected.ids
    assert costs(swarm, before) == {cost + prompt_length(model)}


def test_reset_begins_anew(llama: tuple[Any, ...]) -> None:
    swarm, model, engine, expected = llama
    for text in MESSAGES[1:3]:
        list(engine.reply(text))
    engine.reset()
    assert engine.transcript() == []
    before = swarm.counted()
    list(engine.reply(MESSAGES[0]))
    _, cost, _ = expected.turn(MESSAGES[0], MOST)
    assert engine.tokens == expected.ids
    assert costs(swarm, before) == {cost + prompt_length(model)}


@pytest.mark.parametrize("interrupt", [False, True])
def test_a_stopped_reply_is_kept_and_the_next_turn_is_exact(llama: tuple[Any, ...], interrupt: bool) -> None:
    _, _, engine, expected = llama
    whole, _, _ = expected.turn(MESSAGES[0], MOST)
    prompt = expected.ids[: -len(whole) - 2]
    pieces = engine.reply(MESSAGES[0])
    shown = next(pieces) + next(pieces)
    if interrupt:
        with pytest.raises(KeyboardInterrupt):
            pieces.throw(KeyboardInterrupt)
    else:
        pieces.close()
    kept = engine.tokens[len(prompt) : -2]
    assert engine.tokens[: len(prompt)] == prompt
    assert engine.tokens[-2:] == expected.ids[-2:]  # the delimiter was added
    assert len(kept) >= 2
    assert kept == whole[: len(kept)]
    assert engine.transcript()[-1]["content"].startswith(shown)
    expected.go_back(engine.tokens)
    list(engine.reply(MESSAGES[1]))
    expected.turn(MESSAGES[1], MOST)
    assert engine.tokens == expected.ids
