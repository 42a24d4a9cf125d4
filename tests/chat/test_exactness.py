"""A chat through one session says what the local model says to the whole text, and costs what it should."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import takewhile
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.chat.reference import VOCABULARY, LocalReference, byte_tokenizer
from tests.swarm_fixture import MemorySwarm
from tests.tiny_models import write_tiny
from transformers import AutoModelForCausalLM

from corolla.chat.engine import ChatEngine
from corolla.chat.sampling import SamplingSettings
from corolla.data.render import Renderer, RenderSettings

MESSAGES = ["Hello!", "how are you", "Ünïcode 🌸 too", "a\nb", "well?", "Good bye."]
MOST = 16
# Family to seed and delimiter, chosen so that some replies end by themselves and others are cut.
FAMILIES = {"llama": (1, "##"), "bloom": (1, "|"), "gemma2": (0, "\n-----\n")}
MODES = [None, "ptune", "deep_ptune"]
END = 2


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


class Expected:
    """The conversation as it must go, and what its turns cost a server; renders without Corolla's renderer."""

    def __init__(self, reference: LocalReference, tokenizer: Any, style: str, delimiter: str) -> None:
        self._reference = reference
        self._tokenizer = tokenizer
        template = style == "template"
        self._fed = "<|user|>{}</s>\n<|assistant|>" if template else "{}" + delimiter.replace("{", "{{")
        self._closing = self._ids("</s>\n" if template else delimiter)
        self._stop = [END] if template else self._closing
        self.ids: list[int] = []
        self.cached = 0  # of `ids`, by the servers

    def turn(self, text: str, most: int = MOST) -> tuple[list[int], int, bool]:
        """The reply's tokens, how many tokens a server computes for it, and whether it ended by itself."""
        prompt = [*self.ids, *self._ids(self._fed.format(text))]
        said = self._reference.greedy(prompt, most=most, stop=self._stop, ends=[END])
        held = [*prompt, *said[:-1]]  # what was said last has not been computed
        cost = len(held) - self.cached
        ended = said[-len(self._stop) :] == self._stop or said[-1] == END
        reply = without_end(said, self._stop)
        self.ids = [*prompt, *reply, *self._closing]
        self.cached = len(list(takewhile(lambda pair: pair[0] == pair[1], zip(held, self.ids, strict=False))))
        return reply, cost, ended

    def _ids(self, text: str) -> list[int]:
        ids: list[int] = self._tokenizer(text, add_special_tokens=False).input_ids
        return ids


def without_end(said: list[int], stop: list[int]) -> list[int]:
    """A reply without what ended it, be it only the beginning of a delimiter."""
    if said[-len(stop) :] == stop:
        return said[: -len(stop)]
    if said[-1] == END:
        said = said[:-1]
    for size in range(len(stop) - 1, 0, -1):
        if said[-size:] == stop[:size]:
            return said[:-size]
    return said


@pytest.mark.parametrize(
    ("family", "mode", "style"),
    [
        *[("llama", mode, style) for mode in MODES for style in ("delimiter", "template")],
        *[("bloom", mode, "delimiter") for mode in MODES],
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
        expected = Expected(local(swarm, model.prompts), rendered.tokenizer, style, delimiter)
        said: list[int] = []
        endings = set()
        for number, text in enumerate(MESSAGES):
            before = swarm.counted()
            pieces = list(engine.reply(text))
            reply, cost, ended = expected.turn(text)
            assert engine.tokens == expected.ids
            assert "".join(pieces) == engine.transcript()[-1]["content"] == rendered.reply_text(reply)
            prompt = model.prompts.length if mode is not None and number == 0 else 0
            assert {peer: count - before[peer] for peer, count in swarm.counted().items()} == dict.fromkeys(
                before, cost + prompt
            )
            said += reply
            endings.add(ended)
        assert len(set(said)) > 15, "too uniform to prove anything"
        if mode is None:
            assert endings == {True, False}, "the test should see replies that end and replies that are cut"
        engine.close()
