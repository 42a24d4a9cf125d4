"""A study through a swarm: its loss and gradient are the local model's, and it goes on without asking anew."""

from __future__ import annotations

import copy
import json
import os
import shlex
import signal
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.client.conftest import random_ids
from tests.reference import Prefixed, relative
from tests.swarm_fixture import MemorySwarm
from tests.tuning.study_setup import CHUNKS, DOCUMENTS, FACTS, MODEL, TEXT, study_settings
from tests.tuning.tiny_setup import plain_model
from transformers import TrainerCallback
from typer.main import get_command

from corolla.cli.main import app
from corolla.client.model import losses
from corolla.client.model.heads import share_head
from corolla.client.model.losses import TopTokens, summed_distillation
from corolla.data.conversation import Turn
from corolla.data.documents import Chunk
from corolla.data.render import NO_LOSS, Renderer
from corolla.errors import DataError, UsageError
from corolla.tuning.batches import Taught, TaughtCollator
from corolla.tuning.bundle import load_bundle
from corolla.tuning.notebook import Notebook
from corolla.tuning.recall import WAYS, Fact, facts_asked, facts_given, recall, words_of
from corolla.tuning.report import again_command, recall_verdict
from corolla.tuning.study import lessons, study, teachers_loss, teaches
from corolla.tuning.teacher import ANSWER, SAID, Exchange, counted_words
from corolla.tuning.tune import TuneResult, TuneStopped

K = 7
SHORT = "The lamp is lit at nine."


@pytest.fixture(scope="module")
def swarm(tiny_folder: Path) -> Iterator[MemorySwarm]:
    with MemorySwarm(tiny_folder, [(0, 2), (2, 4)]) as made:
        yield made


def plain_loss(logits: torch.Tensor, teacher: TopTokens) -> torch.Tensor:
    """Cross-entropy of k + 1 classes, the last of which is everything else; row by row."""
    total = logits.new_zeros(())
    for row, ids, logprobs in zip(logits, teacher.ids, teacher.logprobs, strict=True):
        probabilities, wanted = row.softmax(-1), logprobs.to(row).exp()
        others = torch.ones(len(row), dtype=torch.bool).scatter(
            0, ids, torch.zeros_like(ids, dtype=torch.bool)
        )
        total = total - (wanted * probabilities[ids].log()).sum()
        total = total - (1 - wanted.sum()) * probabilities[others].sum().log()
    return total


def teachers(rows: int, width: int, dtype: torch.dtype = torch.float64) -> TopTokens:
    seen = torch.randn(rows, width, generator=torch.Generator().manual_seed(3), dtype=dtype) * 3
    found = seen.log_softmax(-1).topk(K)
    return TopTokens(found.indices, found.values)


@pytest.mark.parametrize("scale", [1.0, 0.5])
def test_the_loss_in_chunks_is_the_plain_one(
    tiny_folder: Path, monkeypatch: pytest.MonkeyPatch, scale: float
) -> None:
    """With a head that is a product and nothing else, and with one that scales its logits."""
    monkeypatch.setattr(losses, "CHUNK_ROWS", 5)
    plain = plain_model(tiny_folder).double().requires_grad_(False)
    shared = copy.deepcopy(plain)
    share_head(shared)
    width, teacher = plain.lm_head.out_features, teachers(13, plain.lm_head.out_features)
    hidden = torch.randn(13, plain.lm_head.in_features, dtype=torch.float64).requires_grad_()
    wanted = plain_loss(plain.lm_head(hidden) * scale, teacher)
    (gradient,) = torch.autograd.grad(wanted, hidden)
    for head in (plain.lm_head, shared.lm_head):
        logits = head(hidden) * scale if scale != 1 else head(hidden)
        assert logits.shape == (13, width)
        found = summed_distillation(logits, teacher)
        assert found.item() == pytest.approx(wanted.item(), rel=1e-9)
        assert relative(torch.autograd.grad(found, hidden)[0], gradient) < 1e-9


def test_all_of_a_vocabulary_or_a_teacher_that_is_sure_leaves_no_rest() -> None:
    logits = torch.randn(2, K).requires_grad_()
    ids = torch.arange(K).expand(2, -1)
    logprobs = torch.tensor([[0.0] + [-50.0] * (K - 1)] * 2)
    loss = summed_distillation(logits, TopTokens(ids, logprobs))
    loss.backward()
    assert loss.item() == pytest.approx(-logits.log_softmax(-1)[:, 0].sum().item(), abs=1e-4)
    assert logits.grad is not None
    assert bool(torch.isfinite(logits.grad).all())


def test_loss_and_gradient_of_a_batch_are_those_of_the_local_model_with_the_same_cache(
    swarm: MemorySwarm, tiny_folder: Path
) -> None:
    """`past_key_values` from the prefix, the teacher's rows in the order of the labels, padding beside them."""
    model = swarm.model(**MODEL)
    local = Prefixed(plain_model(tiny_folder).requires_grad_(False), model.prompts.values)
    ids = random_ids(2, 12).tolist()
    teacher = teachers(9, model.config.vocab_size, torch.float32)
    rows = teacher.ids.tolist(), teacher.logprobs.tolist()
    examples = [
        Taught(ids[0], [NO_LOSS] * 6 + ids[0][6:], ["reply"] * 12, "a", rows[0][:6], rows[1][:6]),
        Taught(ids[1][:8], [NO_LOSS] * 5 + ids[1][5:8], ["reply"] * 8, "b", rows[0][6:], rows[1][6:]),
    ]
    batch = TaughtCollator()(examples)
    given = batch.pop("teacher")
    del batch["labels"]
    found = summed_distillation(model(**batch).logits, given)
    found.backward()
    whole = [local.logits(torch.tensor([one.input_ids]))[0] for one in examples]
    wanted = plain_loss(torch.cat([whole[0][5:11], whole[1][4:7]]), teacher)
    wanted.backward()
    assert found.item() == pytest.approx(wanted.item(), abs=1e-4)
    assert local.values.grad is not None
    assert relative(model.prompts.trained.grad, local.values.grad[:, 1:]) < 1e-4


# --- the whole of it ----------------------------------------------------------------------------------------


class StopAt(TrainerCallback):  # type: ignore[misc]
    """Ctrl-C in that step."""

    def __init__(self, step: int) -> None:
        self._step = step

    def on_step_begin(self, _args: Any, state: Any, _control: Any, **_kwargs: Any) -> None:
        if state.global_step == self._step:
            os.kill(os.getpid(), signal.SIGINT)


@pytest.fixture(scope="module")
def whole(swarm: MemorySwarm, tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> TuneResult:
    out = tmp_path_factory.mktemp("study") / "notes"
    result = study(swarm.model(**MODEL), tokenizer, DOCUMENTS, out, study_settings(), facts=FACTS)
    assert isinstance(result, TuneResult)
    return result


def test_a_study_ends_in_a_bundle_that_says_what_is_recalled(whole: TuneResult, swarm: MemorySwarm) -> None:
    bundle = load_bundle(whole.bundle)
    assert bundle.mode == "prefix"
    assert bundle.training["documents"] == ["lamp.txt", "bread.md"]
    ways = {one["way"]: one for one in bundle.metrics["recall"]["ways"]}
    assert bundle.metrics["recall"]["of"] == "2 questions given with the study"
    assert all(0 <= one["recalled"] <= 1 for one in ways.values())
    assert list(ways) == ["no context", "text in context", "plain prompt", "studied prompt"]
    assert ways["plain prompt"]["loss"] == pytest.approx(whole.before.reply_loss, abs=1e-5)
    assert ways["studied prompt"]["loss"] == pytest.approx(whole.after.reply_loss, abs=1e-5)
    assert len({one["loss"] for one in ways.values()}) == 4 or whole.best_step == 0
    words = shlex.split(again_command(bundle))
    commands: Any = get_command(app)
    given = commands.commands["study"].make_context("study", words[2:]).params
    for name in ("learning_rate", "steps", "batch_size", "seed", "questions", "chunk_tokens", "held_out"):
        assert given[name] == bundle.training[name], name
    assert [one.name for one in given["documents"]] == ["lamp.txt", "bread.md"]
    assert (given["prompt_tokens"], given["max_length"]) == (6, 64)
    page = (whole.bundle / "report.html").read_text()
    assert "What it knows of the text" in page
    assert "text in context" in page
    loaded = swarm.model(prompts=str(whole.bundle))
    assert loaded.prompts.length == 6
    lines = (whole.bundle.parent / "notes.questions.jsonl").read_text().splitlines()
    assert len(lines) == 13
    assert {"question", "answer", "top_logprobs"} <= json.loads(lines[1]).keys()


@pytest.mark.parametrize("when", ["asking", "training"])
def test_one_that_is_stopped_goes_on_without_asking_anew(
    whole: TuneResult,
    swarm: MemorySwarm,
    tokenizer: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    when: str,
) -> None:
    out = tmp_path / "notes"
    stop = StopAt(2)
    if when == "asking":
        add = Notebook.add

        def interrupted(self: Notebook, exchange: Exchange) -> None:
            add(self, exchange)
            if len(self.exchanges) == 5:
                raise KeyboardInterrupt

        monkeypatch.setattr(Notebook, "add", interrupted)
        with pytest.raises(KeyboardInterrupt):
            study(swarm.model(**MODEL), tokenizer, DOCUMENTS, out, study_settings())
        monkeypatch.setattr(Notebook, "add", add)
    else:
        stopped = study(swarm.model(**MODEL), tokenizer, DOCUMENTS, out, study_settings(), callbacks=[stop])
        assert isinstance(stopped, TuneStopped)
        assert stopped.step == 3
    kept = out.with_name("notes.questions.jsonl").read_bytes()
    with pytest.raises(UsageError, match="--resume"):
        study(swarm.model(**MODEL), tokenizer, DOCUMENTS, out, study_settings())
    if when == "training":
        with pytest.raises(UsageError, match=r"on 12 questions: .* or train anew on 20"):
            study(swarm.model(**MODEL), tokenizer, DOCUMENTS, out, study_settings(questions=20), resume=True)
        assert out.with_name("notes.questions.jsonl").read_bytes() == kept  # nothing was asked
    with pytest.raises(UsageError, match="with another documents"):
        study(swarm.model(**MODEL), tokenizer, DOCUMENTS[:1], out, study_settings(), resume=True)
    result = study(swarm.model(**MODEL), tokenizer, DOCUMENTS, out, study_settings(), resume=True)
    assert isinstance(result, TuneResult)
    now = out.with_name("notes.questions.jsonl").read_bytes()
    assert now.startswith(kept)
    assert len(now.splitlines()) == 13
    assert now == kept or when == "asking"
    assert result.losses == pytest.approx(whole.losses, abs=1e-5)
    mine, theirs = (load_bundle(one.bundle).metrics["recall"] for one in (result, whole))
    for one, other in zip(mine["ways"], theirs["ways"], strict=True):
        assert one["loss"] == pytest.approx(other["loss"], abs=1e-4)


def exchange(number: int, question: str, answer: str = "an answer") -> Exchange:
    rows = [[5, 6], [6, 5], [2, 5]]
    return Exchange(number, 0, "fact", question, answer, [5, 6, 2], 2, rows, [[-0.5, -2.0]] * 3)


def test_lessons_are_of_different_questions_and_none_is_both_learnt_and_held_out(tokenizer: Any) -> None:
    renderer = Renderer(tokenizer, study_settings().rendering)
    found = [exchange(number, f"What of {number % 6}?") for number in range(12)]
    found += [exchange(12, ""), exchange(13, "Unanswered?", "")]
    prepared, held_out = lessons(renderer, found, study_settings(held_out=2))
    names = [one.conversation for one in (*prepared.train, *prepared.held_out)]
    assert sorted(names, key=int) == [str(number) for number in range(6)]
    assert [str(one.number) for one in held_out] == [one.conversation for one in prepared.held_out]
    assert not any(isinstance(one, Taught) for one in prepared.held_out)
    first = prepared.train[0]
    prompt = renderer.prompt_ids([Turn("user", f"What of {first.conversation}?")])
    assert first.input_ids == [*prompt, 5, 6, 2]
    assert first.labels == [*[NO_LOSS] * len(prompt), 5, 6, 2]
    assert first.kinds[-3:] == ["reply", "reply", "marker"]
    assert teachers_loss(held_out) == pytest.approx(0.5)
    with pytest.raises(DataError, match="only 2 different ones"):
        lessons(renderer, found[:2], study_settings())


@pytest.mark.parametrize(
    ("question", "answer", "tokens", "wanted"),
    [
        ("Who keeps the lamp?", "Orla keeps it.", [5, 6, 7], True),
        (
            "What is the answer?",
            "The answer is the boat.",
            [5, 6, 7],
            False,
        ),  # nothing that is said there alone
        ("Who is Orla?", "who is orla", [5, 6, 7], False),
        ("Who is Orla?", "Orla Orla Orla Orla", [5] * 12, False),
    ],
)
def test_what_only_repeats_or_says_nothing_of_the_text_is_not_learnt(
    question: str, answer: str, tokens: list[int], wanted: bool
) -> None:
    often = counted_words([TEXT, "The boat. A boat, boat by boat."])
    rows = [[5, 6]] * len(tokens)
    one = Exchange(1, 0, "fact", question, answer, tokens, len(tokens), rows, [[-0.5, -2.0]] * len(tokens))
    assert teaches(one, often) is wanted
    assert teaches(replace(one, seed=SAID), often)


def test_each_way_of_knowing_is_tried_with_what_it_knows(
    swarm: MemorySwarm, tiny_folder: Path, tokenizer: Any
) -> None:
    """A fact is what the local model says in one of the ways; in that way all of it is recalled, in others less."""
    chosen = study_settings(answer_tokens=8)
    model, plain = swarm.model(**MODEL), plain_model(tiny_folder)
    renderer, start = Renderer(tokenizer, chosen.rendering), copy.deepcopy(model.prompts.state_dict())
    starting = Prefixed(plain, model.prompts.values)
    model.prompts.trained.data.normal_(0, 0.5, generator=torch.Generator().manual_seed(1))
    trained = Prefixed(plain, model.prompts.values)
    none = Prefixed(plain, model.prompts.values[:, :0])
    sayers = {WAYS[0]: none, WAYS[1]: none, WAYS[2]: starting, WAYS[3]: trained}
    for way, local in sayers.items():
        before = f"{SHORT}\n\n{ANSWER}" if way == WAYS[1] else ""
        facts = []
        for question in ("why?", "who?", "where?", "and what?", "when?", "how?"):
            prompt = renderer.prompt_ids([Turn("user", before + question)])
            said = local.greedy(torch.tensor([prompt]), 8)[0, len(prompt) :].tolist()
            words = words_of(tokenizer.decode(said))
            if words and 2 not in said and "|" not in tokenizer.decode(said):
                facts.append(Fact(question, words, 0))
            if len(facts) == 2:
                break
        assert facts
        found = recall(model, renderer, facts, [Chunk("a.txt", SHORT, len(SHORT))], chosen, start)
        assert found[way] == pytest.approx(1.0, abs=1 / len(facts) / 8), way
        assert sum(share == 1 for share in found.values()) == 1, found
    assert torch.equal(model.prompts.values, trained.values)


@pytest.mark.parametrize(
    ("plain", "studied", "wanted"), [(0.14, 0.02, "recalls 2%"), (0.14, 0.4, None), (0.14, None, None)]
)
def test_a_study_that_was_worth_nothing_says_so(
    plain: float, studied: float | None, wanted: str | None
) -> None:
    shares = {"plain prompt": plain, "studied prompt": studied}
    ways = [{"way": way, "loss": 1.0, "recalled": share} for way, share in shares.items()]
    said = recall_verdict({"recall": {"of": "2 questions", "ways": ways}})
    assert (said is None) if wanted is None else (said is not None and wanted in said)
    assert recall_verdict({}) is None


def test_what_is_recalled_are_the_words_that_an_answer_is_about() -> None:
    facts = facts_given(FACTS, CHUNKS)
    assert [fact.chunk for fact in facts] == [0, 1]
    assert facts[0].words == {"orla", "it"}
    assert facts[1].recalled("It is 42.") == 0.5
    assert facts[1].recalled("PENCE! 42 of them") == 1.0
    assert Fact("?", words_of("a b"), 0).recalled("no") == 0.0
    own = facts_asked(
        [exchange(0, "Who?", "Orla, the veska, at 42 or nowhere"), exchange(1, "x", "the it")], CHUNKS
    )
    assert [fact.words for fact in own] == [{"orla", "veska", "42"}]
