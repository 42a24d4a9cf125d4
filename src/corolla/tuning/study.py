"""One study: a model asks itself about documents, and a prompt learns to answer without them.

Invariant: a study ends as a training run does (`tune.py`), with its questions in the file beside the bundle; one that
is stopped while it asks loses none of the answers it has, and goes on with the others.

Self-study: Eyuboglu et al. 2025 (Cartridges, arXiv 2506.06266). Next-token training on the text itself does not do it.
"""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import closing
from copy import deepcopy
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console
from transformers import TrainerCallback

from corolla.data.conversation import Conversation, Turn
from corolla.data.documents import Chunk, Document, chunks_of
from corolla.data.render import NO_LOSS, Example, Kind, Renderer
from corolla.errors import DataError, UsageError
from corolla.models.limits import check_length
from corolla.tuning.batches import Prepared, Taught, TaughtCollator, split, subsample
from corolla.tuning.bundle import ModelInfo
from corolla.tuning.checkpoints import RunFolder
from corolla.tuning.evaluate import evaluate
from corolla.tuning.notebook import Notebook
from corolla.tuning.progress import counted
from corolla.tuning.recall import WAYS, facts_asked, facts_given, recall, values_of
from corolla.tuning.samples import Sample, base_model
from corolla.tuning.settings import StudySettings
from corolla.tuning.teacher import (
    ABOUT,
    ANSWER,
    GOES_ON,
    SAID,
    SEEDS,
    Exchange,
    check_room,
    counted_words,
    exchanges,
    telling_words,
)
from corolla.tuning.tune import TuneResult, TuneStopped, loaded_as, tune

FEWEST = 4  # answers to learn from and to be held out


def study(
    model: Any,
    tokenizer: Any,
    documents: Sequence[Document],
    out: str | Path,
    settings: StudySettings | None = None,
    about: ModelInfo | None = None,
    *,
    facts: Sequence[Conversation] = (),
    notes: Mapping[str, Any] | None = None,
    resume: bool = False,
    overwrite: bool = False,
    console: Console | None = None,
    callbacks: Sequence[TrainerCallback] = (),
) -> TuneResult | TuneStopped:
    """Teach `model.prompts` what `documents` say and write the bundle `out`.

    The model is best loaded with `tuning_mode="prefix"`, `prompt_init="text"` and the documents' text. `facts` are
    questions with their answers whose recall is measured; without any, held-out questions of the model's own.
    The other arguments, and what is raised, are as of `tune`. Ctrl-C while it asks is a `KeyboardInterrupt`.
    """
    settings, out, about = settings or StudySettings(), Path(out), about or loaded_as(model)
    console = console or Console(quiet=True)
    renderer = Renderer(tokenizer, settings.rendering)
    settings = replace(settings, rendering=renderer.settings)
    if model.prompts is None:
        raise UsageError("The model has no prompt to train: load it with tuning_mode='prefix'.")
    chunks = checked_chunks(model.config, renderer, documents, settings, facts)
    check_length(model.config, model.prompts.length, settings.rendering.max_length, about.name)
    unfinished = check_way(out, resume=resume, overwrite=overwrite, questions=settings.questions)
    notebook = Notebook(out)
    with RunFolder(out).locked():
        notebook.begin(_what_is_asked(documents, settings, about), resume=resume)
        _ask(model, renderer, chunks, settings, notebook, console)
    found = [one for number, one in sorted(notebook.exchanges.items()) if number < settings.questions]
    often = counted_words(chunk.text for chunk in chunks)
    worth = [one for one in found if teaches(one, often)]
    if len(worth) < len(found):
        line = (
            f"{len(found) - len(worth):,} of {len(found):,} questions are left out: their answers say nothing of the "
            "text, only repeat, or are the question. Where these are many, the model is too small to ask itself."
        )
        console.print(line, highlight=False, markup=False, soft_wrap=True)
    prepared, held_out = lessons(renderer, worth, settings)
    return tune(
        model,
        settings,
        prepared,
        out,
        about,
        notes={**(notes or {}), "documents": [one.name for one in documents]},
        resume=unfinished,
        overwrite=overwrite,
        console=console,
        callbacks=callbacks,
        further=partial(
            _recalled,
            model,
            prepared,
            held_out,
            chunks,
            settings,
            facts,
            deepcopy(model.prompts.state_dict()),
        ),
    )


def checked_chunks(
    config: Any,
    renderer: Renderer,
    documents: Sequence[Document],
    settings: StudySettings,
    facts: Sequence[Conversation],
) -> list[Chunk]:
    """The pieces of the documents. Raises `UsageError`, `SessionLimit` where they cannot be studied as is wanted."""
    chunks = chunks_of(documents, renderer.tokenizer, settings.chunk_tokens)
    asked = [fact.question for fact in facts_given(facts, chunks)] if chunks else ()
    check_room(config, renderer, chunks, settings, asked)
    return chunks


def check_way(out: Path, *, resume: bool, overwrite: bool, questions: int) -> bool:
    """Whether there is a training run to go on with; one on fewer or more questions is replaced with `overwrite`.

    Raises `UsageError` when something is in the way, or nothing is there to go on with.
    """
    folder = RunFolder(out)
    unfinished = resume and folder.has_begun()
    if unfinished and (noted := folder.noted().get("questions")) != questions:
        if not overwrite:
            raise UsageError(
                f"The unfinished run at {folder.path} is on {noted} questions: go on with --questions {noted}, "
                f"or train anew on {questions} with --resume --overwrite."
            )
        unfinished = False
    folder.check(resume=unfinished, overwrite=overwrite)
    Notebook(out).check(resume=resume, overwrite=overwrite)
    return unfinished


def _what_is_asked(
    documents: Sequence[Document], settings: StudySettings, about: ModelInfo
) -> dict[str, Any]:
    """All that an exchange of some number depends on."""
    texts = [hashlib.sha256(one.text.encode()).hexdigest()[:16] for one in documents]
    wording = hashlib.sha256(repr((SEEDS, ANSWER, ABOUT, GOES_ON)).encode()).hexdigest()[:16]
    return {"model": about.identity, "documents": texts, "wording": wording, **settings.asking()}


def _ask(
    model: Any,
    renderer: Renderer,
    chunks: Sequence[Chunk],
    settings: StudySettings,
    notebook: Notebook,
    console: Console,
) -> None:
    done = sum(number < settings.questions for number in notebook.exchanges)
    if done == settings.questions:
        return
    tokens = sum(chunk.tokens for chunk in chunks)
    each = settings.question_tokens + settings.answer_tokens
    line = (
        f"{tokens:,} tokens of text in {len(chunks)} part{'s'[: len(chunks) > 1]}; {settings.questions - done:,} "
        f"questions to ask and answer, of up to {each} tokens each: at most "
        f"{(settings.questions - done) * each:,}, and the first ones tell how long that takes"
    )
    console.print(line, highlight=False, markup=False, soft_wrap=True)
    with closing(exchanges(model, renderer, chunks, settings, notebook.exchanges)) as found:
        for one in counted(found, console, "questions", done=done, total=settings.questions):
            notebook.add(one)


def teaches(one: Exchange, often: Counter[str]) -> bool:
    """Whether something is to be learnt of the text, whose words there are so often. A sentence of it always is."""
    if one.seed == SAID:
        return True
    said = Sample(one.question, one.answer, tuple(one.tokens[: one.said]))
    return said.problem() is None and bool(telling_words(f"{one.question} {one.answer}", often))


def lessons(
    renderer: Renderer, found: Sequence[Exchange], settings: StudySettings
) -> tuple[Prepared, list[Exchange]]:
    """Examples of the exchanges, of those with one question the first, and which were held out.

    Raises `DataError` where too few of them teach anything.
    """
    by_question = {
        " ".join(one.question.casefold().split()): one
        for one in reversed(found)
        if one.question and one.answer
    }
    longest = settings.rendering.max_length
    by_id = {str(one.number): one for one in sorted(by_question.values(), key=lambda one: one.number)}
    examples = {name: taught(renderer, one) for name, one in by_id.items()}
    talks = [
        Conversation((Turn("user", one.question), Turn("assistant", one.answer)), id=name)
        for name, one in by_id.items()
        if len(examples[name].input_ids) <= longest
    ]
    if len(talks) < FEWEST:
        raise DataError(
            f"Of {len(found)} questions only {len(talks)} different ones were answered within {longest} tokens: "
            "study a longer text, ask more --questions, or take a model that has learnt to follow instructions."
        )
    train, held_out = split(talks, settings)
    held_out = held_out[: settings.held_out_samples]
    kept = subsample(train, settings.samples or len(train), settings.seed)
    return Prepared(
        train=[examples[talk.id] for talk in kept],
        # Plain ones, so that what is evaluated are losses of answers, as everywhere.
        held_out=[_plain(examples[talk.id]) for talk in held_out],
        batches=TaughtCollator(),
        renderer=renderer,
        talks=tuple(held_out),
    ), [by_id[talk.id] for talk in held_out]


def taught(renderer: Renderer, exchange: Exchange) -> Taught:
    """An exchange as a chat without the text has it: the question, and the very tokens that the teacher said."""
    prompt = renderer.prompt_ids([Turn("user", exchange.question)])
    kinds: list[Kind] = ["context"] * len(prompt)
    kinds += ["reply"] * exchange.said
    kinds += ["marker"] * (len(exchange.tokens) - exchange.said)
    return Taught(
        prompt + exchange.tokens,
        [NO_LOSS] * len(prompt) + exchange.tokens,
        kinds,
        str(exchange.number),
        exchange.top_ids,
        exchange.top_logprobs,
    )


def _plain(example: Example) -> Example:
    return Example(example.input_ids, example.labels, example.kinds, example.conversation)


def _recalled(
    model: Any,
    prepared: Prepared,
    held_out: Sequence[Exchange],
    chunks: Sequence[Chunk],
    settings: StudySettings,
    given: Sequence[Conversation],
    start: dict[str, Any],
) -> dict[str, Any]:
    """For the bundle: losses of held-out answers, and the facts that are recalled, in each way of knowing the text."""
    facts = facts_given(given, chunks) if given else facts_asked(held_out, chunks)
    shares = recall(model, prepared.renderer, facts, chunks, settings, start) if facts else {}
    losses = dict.fromkeys(WAYS, math.nan)
    with base_model(model):
        losses["no context"] = _loss(model, prepared, settings)
    losses["text in context"] = teachers_loss(held_out)
    losses["studied prompt"] = _loss(model, prepared, settings)
    with values_of(model.prompts, start):
        losses["plain prompt"] = _loss(model, prepared, settings)
    ways = [
        {"way": way, "loss": losses[way] if math.isfinite(losses[way]) else None, "recalled": shares.get(way)}
        for way in WAYS
    ]
    whose = "given with the study" if given else "of the model's own that were held out"
    return {"recall": {"of": f"{len(facts)} questions {whose}", "ways": ways}}


def _loss(model: Any, prepared: Prepared, settings: StudySettings) -> float:
    return evaluate(model, prepared.held_out, prepared.batches, settings.batch_size).reply_loss


def teachers_loss(exchanges: Sequence[Exchange]) -> float:
    """Mean loss, in nats, of the answers' tokens to who gave them: the model with the text in context; of none NaN."""
    # What is not among the likeliest was chosen by settings of the checkpoint's own, and is less likely than those.
    losses = [
        -dict(zip(ids, logprobs, strict=True)).get(token, logprobs[-1])
        for one in exchanges
        for token, ids, logprobs in zip(one.tokens[: one.said], one.top_ids, one.top_logprobs, strict=False)
    ]
    return math.fsum(losses) / len(losses) if losses else math.nan
