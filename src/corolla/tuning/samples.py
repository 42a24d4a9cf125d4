"""What a tuned model says to held-out conversations, beside the base model, and whether that is worth reading.

Invariant: the loss of a model that has learnt to say nothing but marks goes down too, so the figures alone do
not tell. This costs seconds, changes nothing, and a swarm that cannot answer now loses nothing but the samples.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList, StoppingCriteriaList

from corolla.data.conversation import Conversation, Turn
from corolla.data.render import Renderer
from corolla.data.replies import Beginnings, ReplyReader, TokensSeen, reply_ends
from corolla.errors import CorollaError
from corolla.text import one_line

COUNT = 10  # conversations
SHOWN = 4  # on a terminal
REPLY_TOKENS = 32
LONGEST_PROMPT = 96  # tokens; the opening of a conversation is enough to see
LINE = 120  # characters that are shown of what somebody says
SECONDS = 20.0  # for all replies together
MOSTLY = 0.6  # a share of a reply's tokens that are all the same


@dataclass(frozen=True)
class Sample:
    """One exchange. `held_back`: the model's own first choice would have ended the reply."""

    said: str
    reply: str
    tokens: tuple[int, ...]
    held_back: bool = False

    def problem(self) -> str | None:
        """What is wrong with it by itself, in a word or two."""
        if self.held_back or not self.reply.strip():
            return "empty"
        if _repeats(self.tokens):
            return "the same again and again"
        if _words(self.reply) and _words(self.reply) == _words(self.said):
            return "what was said to it"
        return None


@dataclass(frozen=True)
class Samples:
    """Some held-out exchanges, and what the base model would have replied in each (or nothing of it)."""

    exchanges: tuple[Sample, ...]
    base: tuple[Sample, ...] = ()

    def degenerate(self) -> str | None:
        """A sentence that says so and what to try; None when there is nothing to say."""
        found = Counter(one.problem() for one in self.exchanges)
        found.pop(None, None)
        parts = [f"{count} of {len(self.exchanges)} would be {what}" for what, count in found.most_common()]
        different = {" ".join(_words(one.reply)) for one in self.exchanges}
        if len(self.exchanges) > 2 and len(different) == 1 and not parts:
            parts = ["all are the same"]
        if not parts:
            return None
        return (
            f"These replies are not what a person would call replies ({', '.join(parts)}): try more --steps, "
            "a lower --lr (such as 3e-3), --style template, or more data."
        )

    def lines(self) -> list[str]:
        """For people to read."""
        said = []
        for one in self.exchanges[:SHOWN]:
            said.append(f"  You: {one_line(one.said, characters=LINE)}")
            said.append(f"  Bot: {one_line(one.reply, characters=LINE) or '(nothing)'}")
        problem = self.degenerate()
        return ["Replies to held-out conversations:", *said, *([] if problem is None else [problem])]

    def metrics(self) -> dict[str, Any]:
        """For a bundle."""
        replies = [{"said": one.said, "reply": one.reply, "problem": one.problem()} for one in self.exchanges]
        for row, base in zip(replies, self.base, strict=False):
            row["base"] = base.reply
        return {"degenerate": self.degenerate(), "replies": replies}


def sample_replies(
    model: Any, renderer: Renderer, talks: Sequence[Conversation], **sampling: Any
) -> Samples | None:
    """Replies to the beginnings of some conversations, all at once; None where there are none to have.

    `sampling` are arguments of `generate`; without any, replies are greedy. torch's generator is left as it was.

    Only a model that keeps its caches in sessions is asked: one with blocks of its own behind the same hooks
    has no cache to go on with.
    """
    if not hasattr(model, "inference_session"):
        return None
    tuned: tuple[Sample, ...] = ()
    with contextlib.suppress(CorollaError, KeyboardInterrupt):  # the prompt is trained and wants to be saved
        prompts = _prompts(renderer, talks)
        if prompts:
            tuned = replies(model, renderer, prompts, sampling)
            if model.prompts is not None:
                with base_model(model):
                    return Samples(tuned, replies(model, renderer, prompts, sampling))
    return Samples(tuned) if tuned else None


@contextlib.contextmanager
def base_model(model: Any) -> Iterator[None]:
    """Within the block the model has no prompt."""
    prompt, model.prompts = model.prompts, None
    try:
        yield
    finally:
        model.prompts = prompt


def _prompts(renderer: Renderer, talks: Sequence[Conversation]) -> list[tuple[str, list[int]]]:
    """What was said last, and the tokens to which a reply is due."""
    found: list[tuple[str, list[int]]] = []
    for talk in talks:
        turns = _opening(talk.turns)
        if turns and len(ids := renderer.prompt_ids(turns)) <= LONGEST_PROMPT:
            found.append((turns[-1].text, ids))
        if len(found) == COUNT:
            break
    return found


def _opening(turns: Sequence[Turn]) -> list[Turn]:
    """Up to the first turn that is answered."""
    for index, turn in enumerate(turns[1:], start=1):
        if turn.role == "assistant" and turns[index - 1].role == "user":
            return list(turns[:index])
    return []


def replies(
    model: Any,
    renderer: Renderer,
    prompts: Sequence[tuple[str, list[int]]],
    sampling: dict[str, Any],
    *,
    most: int = REPLY_TOKENS,
    seconds: float | None = SECONDS,
) -> tuple[Sample, ...]:
    """Replies of up to `most` tokens to what was said last, whose tokens `prompts` have besides."""
    longest = max(len(ids) for _, ids in prompts)
    rows = torch.zeros(len(prompts), longest, dtype=torch.long)
    mask = torch.zeros_like(rows)
    for row, (_, ids) in enumerate(prompts):
        rows[row, longest - len(ids) :] = torch.tensor(ids)
        mask[row, longest - len(ids) :] = 1
    ends = reply_ends(model, renderer)
    beginnings = Beginnings.of(renderer, ends)
    first = _FirstChoice(beginnings, longest)
    readers = [ReplyReader.of(renderer, ends) for _ in prompts]
    tokens: list[list[int]] = [[] for _ in prompts]  # with those that ended the reply

    def take(row: int, token: int) -> bool:
        tokens[row].append(token)
        readers[row].push(token)
        return readers[row].ended

    with torch.no_grad(), torch.random.fork_rng():
        torch.manual_seed(0)
        model.generate(
            rows.to(model.device),
            attention_mask=mask.to(model.device),
            do_sample=bool(sampling),
            **sampling,
            num_beams=1,
            max_new_tokens=most,
            max_time=seconds,
            eos_token_id=None,
            pad_token_id=0,
            logits_processor=LogitsProcessorList([first, beginnings.processor(longest, most)]),
            stopping_criteria=StoppingCriteriaList([TokensSeen(take, longest)]),
        )
    for reader in readers:
        if not reader.ended:
            reader.finish()
    return tuple(
        Sample(said, reader.text.strip(), tuple(own), held_back)
        for (said, _), reader, own, held_back in zip(prompts, readers, tokens, first.would_end, strict=True)
    )


class _FirstChoice(LogitsProcessor):  # type: ignore[misc]
    """Looks at what each row would say first, if it could."""

    def __init__(self, beginnings: Beginnings, prompt_tokens: int) -> None:
        self._beginnings = beginnings
        self._prompt_tokens = prompt_tokens
        self.would_end: list[bool] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        if input_ids.shape[1] == self._prompt_tokens:
            self.would_end = self._beginnings.ends(scores.argmax(dim=-1)).tolist()
        return scores


def _repeats(tokens: Sequence[int]) -> bool:
    """Whether most of it is one token, or its end says the same three times."""
    count = len(tokens)
    if count < 6:
        return False
    if Counter(tokens).most_common(1)[0][1] >= MOSTLY * count:
        return True
    return any(
        3 * period >= MOSTLY * count
        and tokens[-period:] == tokens[-2 * period : -period] == tokens[-3 * period : -2 * period]
        for period in range(1, count // 3 + 1)
    )


def _words(text: str) -> list[str]:
    return "".join(one if one.isalnum() else " " for one in text.lower()).split()
