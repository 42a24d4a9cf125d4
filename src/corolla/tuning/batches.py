"""From conversations to the batches that training and evaluation run on.

Invariant: held-out conversations are never trained on, and the same settings give the same examples in the
same order.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any, TypeVar

import torch

from corolla.client.model.losses import TopTokens
from corolla.data.collate import Collator
from corolla.data.conversation import Conversation
from corolla.data.render import NO_LOSS, Example, Renderer, RenderSettings
from corolla.data.styles import delimiter_note
from corolla.errors import DataError
from corolla.tuning.settings import TuneSettings

T = TypeVar("T")
TRIED = 32  # conversations: some begin with more than is shown
TEACHER = "teacher"
MOST_HELD_OUT = 32  # conversations, unless the user says otherwise


@dataclass(frozen=True)
class Taught(Example):
    """An example whose labels a teacher has said, with its distributions, as `TopTokens`, for each of them."""

    top_ids: list[list[int]]
    top_logprobs: list[list[float]]


class TaughtCollator(Collator):
    """As `Collator`; the batch of examples that are all `Taught` has a `TopTokens` besides, as its `TEACHER`."""

    def __call__(self, examples: Sequence[Example]) -> dict[str, Any]:
        """See `Collator`. The teacher's rows are in the order of the logits that `logits_to_keep` leaves."""
        batch: dict[str, Any] = super().__call__(examples)
        taught = [one for one in examples if isinstance(one, Taught)]
        if taught and len(taught) == len(examples):
            batch[TEACHER] = TopTokens(
                torch.tensor([ids for one in taught for ids in one.top_ids]),
                torch.tensor([row for one in taught for row in one.top_logprobs], dtype=torch.float32),
            )
        return batch


@dataclass(frozen=True)
class Prepared:
    """Examples for training and for evaluation, and what makes batches of them."""

    train: list[Example]
    held_out: list[Example]
    batches: Collator
    renderer: Renderer
    notes: tuple[str, ...] = ()  # what a person should know of the rendering
    talks: tuple[Conversation, ...] = ()  # of the held-out conversations some, to be tried in a chat

    def fingerprint(self) -> str:
        """Equal for equal examples in equal order."""
        digest = hashlib.sha256()
        for example in [*self.train, *self.held_out]:
            digest.update(repr((example.input_ids, example.labels)).encode())
        return digest.hexdigest()[:16]


def prepare(tokenizer: Any, settings: TuneSettings, conversations: Sequence[Conversation]) -> Prepared:
    """Split, render and subsample. Raises `DataError` when nothing is left to train or evaluate on."""
    renderer = Renderer(tokenizer, settings.rendering)
    conversations, refused = _renderable(renderer, conversations)
    try:
        train, held_out = split(conversations, settings)
    except DataError as error:
        raise DataError(f"{error} {_left_out(refused)}" if refused else str(error)) from error
    return Prepared(
        train=_draw(renderer, train, _needed(settings), settings.seed, "training", refused),
        held_out=_draw(renderer, held_out, settings.held_out_samples, settings.seed, "evaluation", refused),
        batches=Collator(),  # masked; the padding token may have no row in the embedding
        renderer=renderer,
        notes=tuple(_notes(renderer.settings, conversations, refused)),
        talks=tuple(subsample(held_out, len(held_out), settings.seed)[:TRIED]),
    )


def prepare_evaluation(
    tokenizer: Any, settings: TuneSettings, conversations: Sequence[Conversation]
) -> Prepared:
    """As `prepare`, of conversations that nothing was trained on: all are held out. Raises `DataError`."""
    renderer = Renderer(tokenizer, settings.rendering)
    conversations, refused = _renderable(renderer, conversations)
    return Prepared(
        train=[],
        held_out=_draw(
            renderer, conversations, settings.held_out_samples, settings.seed, "evaluation", refused
        ),
        batches=Collator(),
        renderer=renderer,
        notes=tuple(_notes(renderer.settings, conversations, refused)),
        talks=tuple(subsample(conversations, len(conversations), settings.seed)[:TRIED]),
    )


def _renderable(
    renderer: Renderer, conversations: Sequence[Conversation]
) -> tuple[list[Conversation], list[str]]:
    """Those that can be rendered, and why others cannot. Raises `DataError` where none can."""
    refusals = [renderer.refusal(conversation) for conversation in conversations]
    refused = [why for why in refusals if why is not None]
    if conversations and len(refused) == len(conversations):
        raise DataError(f"None of {len(conversations)} conversations can be rendered: {refused[0]}")
    return [one for one, why in zip(conversations, refusals, strict=True) if why is None], refused


def _notes(
    rendering: RenderSettings, conversations: Sequence[Conversation], refused: Sequence[str]
) -> Iterator[str]:
    if refused:
        yield _left_out(refused)
    if rendering.style == "delimiter":
        note = delimiter_note(conversations, rendering.delimiter)
        if note is not None:
            yield note


def _left_out(refused: Sequence[str]) -> str:
    count = len(refused)
    return (
        f"{count:,} conversation{'s' if count > 1 else ''} left out that could not be rendered: {refused[0]}"
    )


def _needed(settings: TuneSettings) -> int | None:
    """How many training examples the run can use; None means all."""
    if settings.samples is not None or settings.steps is None:
        return settings.samples
    return settings.steps * settings.batch_size * settings.accumulate


def _draw(
    renderer: Renderer,
    conversations: Sequence[Conversation],
    count: int | None,
    seed: int,
    purpose: str,
    refused: list[str],
) -> list[Example]:
    """`count` examples of these conversations; None: all. Of those that cannot be rendered `refused` gets why.

    One of each conversation comes before a second of any: examples of one conversation have much in common.
    Rendering a large data set takes long, so no more is rendered than needed.
    """
    rounds: list[list[Example]] = []
    for conversation in subsample(conversations, len(conversations), seed):
        try:
            windows = [example for example in renderer.examples(conversation) if _has_label(example)]
        except DataError as error:
            refused.append(str(error))
            continue
        random.Random(f"{seed}:{conversation.id}").shuffle(windows)
        rounds += [[] for _ in range(len(windows) - len(rounds))]
        for examples, window in zip(rounds, windows, strict=False):
            examples.append(window)
        if count is not None and rounds and len(rounds[0]) >= count:
            break
    if not rounds:
        raise DataError(
            f"Of {len(conversations)} conversations none gives an example for {purpose}: "
            + (refused[-1] if refused else "use more data or a larger --max-length.")
        )
    return [example for examples in rounds for example in examples][:count]


def stretches(example: Example, tokenizer: Any) -> Iterator[tuple[str, bool]]:
    """An example's text in order, and of each stretch whether its tokens carry loss."""
    tokens = zip(example.input_ids, example.labels, strict=True)
    for learnt, run in groupby(tokens, key=lambda pair: pair[1] != NO_LOSS):
        yield str(tokenizer.decode([token for token, _ in run], skip_special_tokens=False)), learnt


def _has_label(example: Example) -> bool:
    """The first token does not count: nothing predicts it."""
    return any(label != NO_LOSS for label in example.labels[1:])


def split(
    conversations: Sequence[Conversation], settings: TuneSettings
) -> tuple[list[Conversation], list[Conversation]]:
    """Training and held-out conversations, as many as the settings say. Raises `DataError`."""
    wanted = settings.held_out
    if wanted is None:
        wanted = min(MOST_HELD_OUT, max(1, len(conversations) // 10))
    return split_conversations(conversations, held_out=wanted, seed=settings.seed)


def split_conversations(
    conversations: Sequence[Conversation], *, held_out: float | int, seed: int
) -> tuple[list[Conversation], list[Conversation]]:
    """Training and held-out conversations; `held_out` below 1 is a share, else a number of conversations.

    Who is held out depends on the seed and the ids only, not on their order. Raises `DataError` when nothing would be
    left to train on.
    """
    ids = sorted({conversation.id for conversation in conversations}, key=lambda name: _rank(name, seed))
    count = max(1, round(held_out * len(ids)) if held_out < 1 else int(held_out))
    if count >= len(ids):
        there = "is 1 conversation" if len(ids) == 1 else f"are {len(ids)} conversations"
        same = " (rows that are equal, or have one id, are one)" if len(conversations) > len(ids) else ""
        raise DataError(
            f"There {there}{same}, too few to hold {count} out and train on the rest: give more data or a smaller "
            "--held-out."
        )
    kept_out = set(ids[:count])
    train = [conversation for conversation in conversations if conversation.id not in kept_out]
    return train, [conversation for conversation in conversations if conversation.id in kept_out]


def subsample(items: Sequence[T], count: int, seed: int) -> list[T]:
    """`count` items (or all there are) drawn without replacement, in random order."""
    chosen = list(items)
    random.Random(seed).shuffle(chosen)
    return chosen[:count]


def _rank(name: str, seed: int) -> bytes:
    return hashlib.sha256(f"{seed}:{name}".encode()).digest()
