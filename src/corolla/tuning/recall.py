"""What a model recalls of a text, in each way of knowing it: not at all, before it, or by a prompt.

Invariant: the same questions are asked in every way, greedily; whether a reply is right is judged by its words alone,
so a figure says how much of the answers comes back, not how well it is said.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

from corolla.data.conversation import Conversation, Turn
from corolla.data.documents import Chunk
from corolla.data.render import Renderer
from corolla.tuning.samples import base_model, replies
from corolla.tuning.settings import StudySettings
from corolla.tuning.teacher import WORD, Exchange, Reading, counted_words, telling_words

WAYS = ("no context", "text in context", "plain prompt", "studied prompt")
BATCH = 16


@dataclass(frozen=True)
class Fact:
    """A question about the text, the words that its answer has to have, and which piece says so."""

    question: str
    words: frozenset[str]
    chunk: int

    def recalled(self, reply: str) -> float:
        """The share of the words that a reply has."""
        return len(self.words & words_of(reply)) / len(self.words)


def words_of(text: str) -> frozenset[str]:
    """The different words of a text, without regard to case."""
    return frozenset(WORD.findall(text.casefold()))


def facts_asked(exchanges: Sequence[Exchange], chunks: Sequence[Chunk]) -> list[Fact]:
    """Facts of the model's own questions: words of the answer that are seldom in the text, and not in the question."""
    often = counted_words(chunk.text for chunk in chunks)
    found = []
    for one in exchanges:
        words = frozenset(telling_words(one.answer.casefold(), often)) - words_of(one.question)
        if words:
            found.append(Fact(one.question, words, one.chunk))
    return found


def facts_given(talks: Sequence[Conversation], chunks: Sequence[Chunk]) -> list[Fact]:
    """Facts of somebody's questions and answers; the piece is the one that has most of the question's words."""
    read = [words_of(chunk.text) for chunk in chunks]
    found = []
    for talk in talks:
        said = {turn.role: turn.text for turn in reversed(talk.turns)}
        question, answer = said.get("user", ""), said.get("assistant", "")
        words = words_of(answer) - words_of(question) or words_of(answer)
        if question.strip() and words:
            asked = words_of(question)
            found.append(Fact(question, words, max(range(len(read)), key=lambda one: len(asked & read[one]))))
    return found


def recall(
    model: Any,
    renderer: Renderer,
    facts: Sequence[Fact],
    chunks: Sequence[Chunk],
    settings: StudySettings,
    start: dict[str, Any],
) -> dict[str, float]:
    """The mean share that is recalled in each of `WAYS`; `start` are the prompt's values before training."""
    shares: dict[str, float] = {}
    with base_model(model):
        shares["no context"] = _without_text(model, renderer, facts, settings)
        shares["text in context"] = _with_text(model, renderer, facts, chunks, settings)
    with values_of(model.prompts, start):
        shares["plain prompt"] = _without_text(model, renderer, facts, settings)
    shares["studied prompt"] = _without_text(model, renderer, facts, settings)
    return shares


def _without_text(model: Any, renderer: Renderer, facts: Sequence[Fact], settings: StudySettings) -> float:
    total = 0.0
    for first in range(0, len(facts), BATCH):
        some = facts[first : first + BATCH]
        prompts = [(fact.question, renderer.prompt_ids([Turn("user", fact.question)])) for fact in some]
        said = replies(model, renderer, prompts, {}, most=settings.answer_tokens, seconds=None)
        total += sum(fact.recalled(one.reply) for fact, one in zip(some, said, strict=True))
    return total / len(facts)


def _with_text(
    model: Any, renderer: Renderer, facts: Sequence[Fact], chunks: Sequence[Chunk], settings: StudySettings
) -> float:
    total = 0.0
    for place, chunk in enumerate(chunks):
        about = [fact for fact in facts if fact.chunk == place]
        if about:
            with Reading(model, renderer, chunk.text, settings) as reading:
                total += sum(fact.recalled(reading.answer(fact.question).text) for fact in about)
    return total / len(facts)


@contextlib.contextmanager
def values_of(prompt: Any, values: dict[str, Any]) -> Iterator[None]:
    """Within the block the prompt has these values."""
    own = deepcopy(prompt.state_dict())
    prompt.load_state_dict(values)
    try:
        yield
    finally:
        prompt.load_state_dict(own)
