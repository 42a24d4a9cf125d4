"""The teacher's answers and distributions are the local model's with the text in context."""

from __future__ import annotations

import random
from collections.abc import Iterator
from concurrent.futures import CancelledError
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.swarm_fixture import MemorySwarm
from tests.tuning.study_setup import CHUNKS, MODEL, study_settings
from tests.tuning.tiny_setup import plain_model

from corolla.data.conversation import Turn
from corolla.data.documents import Chunk
from corolla.data.render import Renderer
from corolla.errors import BundleError, SessionLimit, UsageError
from corolla.tuning.notebook import Notebook
from corolla.tuning.study import taught
from corolla.tuning.teacher import (
    ANSWER,
    SAID,
    SEEDS,
    Exchange,
    Reading,
    about_sentence,
    check_room,
    counted_words,
    exchanges,
    sentences_of,
    telling_words,
)

SETTINGS = study_settings(questions=5)


@pytest.fixture(scope="module")
def swarm(tiny_folder: Path) -> Iterator[MemorySwarm]:
    with MemorySwarm(tiny_folder, [(0, 1), (1, 4)]) as made:
        yield made


@pytest.fixture(scope="module")
def model(swarm: MemorySwarm) -> Any:
    return swarm.model(**MODEL)


@pytest.fixture(scope="module")
def renderer(tokenizer: Any) -> Renderer:
    return Renderer(tokenizer, SETTINGS.rendering)


@pytest.fixture(scope="module")
def asked(model: Any, renderer: Renderer) -> list[Exchange]:
    return sorted(exchanges(model, renderer, CHUNKS, SETTINGS, ()), key=lambda one: one.number)


def test_distributions_are_those_of_the_local_model_with_the_text_before_it(
    tiny_folder: Path, renderer: Renderer, asked: list[Exchange]
) -> None:
    """Not of the model with its prompt, another piece or none before it; not one token too early or too late."""
    local = plain_model(tiny_folder)
    assert sum(bool(one.answer) for one in asked) > 2
    for one in asked:
        if not one.answer:
            continue
        text = CHUNKS[one.chunk].text.strip()
        prompt = renderer.prompt_ids([Turn("user", f"{text}\n\n{ANSWER}{one.question}")])
        with torch.no_grad():
            logits = local(torch.tensor([prompt + one.tokens])).logits[0, len(prompt) - 1 : -1]
        wanted = logits.log_softmax(-1).gather(1, torch.tensor(one.top_ids))
        torch.testing.assert_close(torch.tensor(one.top_logprobs), wanted, atol=1e-4, rtol=0)
        assert wanted.shape == (len(one.tokens), 20)
        least = logits.log_softmax(-1).topk(20).values[:, -1]
        assert bool((wanted >= least[:, None] - 1e-4).all())
        if one.seed == SAID:
            assert one.answer in " ".join(text.split())
            talk = [Turn("user", one.question), Turn("assistant", one.answer)]
            learnt = taught(renderer, one).input_ids
            assert learnt == renderer.ids(talk)[: len(learnt)]
        else:
            assert [row[0] for row in one.top_ids] == one.tokens  # the likeliest, greedily


def test_a_piece_is_read_once_and_questions_differ(
    swarm: MemorySwarm, model: Any, renderer: Renderer, asked: list[Exchange]
) -> None:
    assert {one.chunk for one in asked} == {0, 1}
    assert len({one.question for one in asked}) == len(asked)
    first, second = list(SEEDS)[:2]
    assert [one.seed for one in asked] == [first, first, SAID, SAID, second]
    before = sum(swarm.counted().values())
    with Reading(swarm.model(), renderer, CHUNKS[0].text, SETTINGS) as reading:
        begun = sum(swarm.counted().values()) - before
        for number in range(3):
            reading.exchange(number, 0, number)
    ran = sum(swarm.counted().values()) - before
    text = len(renderer.prompt_ids([Turn("user", CHUNKS[0].text)]))
    most = 2 * 3 * (max(map(len, SEEDS.values())) + SETTINGS.question_tokens + 2 * SETTINGS.answer_tokens)
    assert begun >= 2 * 0.9 * text  # by two servers
    assert ran - begun < 2 * most
    assert most < 3 * 2 * text  # reading it again for each would be seen


def test_the_same_number_gives_the_same_exchange_whatever_is_asked_beside_it(
    model: Any, renderer: Renderer, asked: list[Exchange]
) -> None:
    prompt = model.prompts
    (found,) = exchanges(model, renderer, CHUNKS, SETTINGS, {0, 1, 2, 4})
    assert (found.question, found.answer) == (asked[3].question, asked[3].answer)
    assert model.prompts is prompt
    (other,) = exchanges(model, renderer, CHUNKS, replace(SETTINGS, seed=9), {0, 1, 2, 4})
    assert other.question != found.question


def test_a_line_that_goes_on_is_one_sentence_and_marks_are_none() -> None:
    text = "# The lamp\n\nIt is lit at nine, and the\nletters come by boat.  \r\n- tea at noon\n- 42 pence each\n"
    wanted = ["It is lit at nine, and the letters come by boat.", "42 pence each"]
    assert [one for one in sentences_of(text) if len(one) > 12] == wanted
    assert sentences_of("It was built between 1851 and\n1854 by Orla.") == [
        "It was built between 1851 and 1854 by Orla."
    ]
    lines = ["灯塔由奥拉看守了很多很多年。", "她每天晚上九点点灯从不缺席。"]
    assert sentences_of("\n".join(lines)) == lines


def test_a_sentence_is_asked_for_by_some_of_its_words_and_never_by_all() -> None:
    often = counted_words(
        ["The lamp was lit by Orla Holm in 1874. The lamp, the lamp, the lamp.", "灯塔很高。"]
    )
    assert telling_words("The lamp was lit by Orla in 1874", often) == ["Orla", "1874"]
    assert telling_words("灯塔, unseen", often) == ["灯", "塔"]
    question = about_sentence("The lamp was lit by Orla Holm in 1874.", often, random.Random(0))
    assert sum(word in question for word in ("Orla", "Holm", "1874")) == 2
    assert about_sentence("Then lit by Orla.", often, random.Random(0)) == "How does this go on: Then "


def test_whoever_stops_gets_no_more(model: Any, renderer: Renderer) -> None:
    found = exchanges(model, renderer, CHUNKS, replace(SETTINGS, questions=50), ())
    next(found)
    found.close()
    assert model.prompts is not None
    with Reading(model, renderer, CHUNKS[0].text, SETTINGS) as reading:
        reading.stop()
        with pytest.raises(CancelledError):
            reading.exchange(0, 0, 0)


def test_what_does_not_fit_is_refused_first(model: Any, renderer: Renderer) -> None:
    with pytest.raises(SessionLimit, match="smaller --chunk-tokens"):
        check_room(
            model.config, renderer, [Chunk("a", "One. " * 1000, 1000)], study_settings(chunk_tokens=1000)
        )
    with pytest.raises(SessionLimit, match="shorter --facts"):
        check_room(model.config, renderer, CHUNKS, study_settings(), ["Why? " * 1000])
    with pytest.raises(UsageError, match="more than --max-length 64"):
        check_room(model.config, renderer, CHUNKS, study_settings(answer_tokens=80))
    with pytest.raises(UsageError, match="nothing to study"):
        check_room(model.config, renderer, [], study_settings())
    with pytest.raises(UsageError, match="has 3 parts: give --questions 3"):
        check_room(model.config, renderer, [*CHUNKS, CHUNKS[0]], study_settings(questions=2))


# --- the file ------------------------------------------------------------------------------------------------


def test_a_file_that_a_kill_has_cut_goes_on_with_its_whole_lines(
    tmp_path: Path, asked: list[Exchange]
) -> None:
    notebook = Notebook(tmp_path / "notes")
    notebook.begin({"seed": 0}, resume=False)
    for one in asked[:3]:
        notebook.add(one)
    lines = notebook.path.read_bytes().splitlines(keepends=True)
    spoilt = lines[2].replace(b'"said": ', b'"said": 9')
    notebook.path.write_bytes(lines[0] + lines[1] + spoilt + lines[3][:-20])
    again = Notebook(tmp_path / "notes")
    again.begin({"seed": 0}, resume=True)
    assert again.exchanges == {0: asked[0]}
    again.add(asked[3])
    third = Notebook(tmp_path / "notes")
    third.begin({"seed": 0}, resume=True)
    assert third.exchanges == {0: asked[0], 3: asked[3]}
    assert third.exchanges_kept() == 2


def test_a_file_is_neither_lost_nor_mixed_up(tmp_path: Path, asked: list[Exchange]) -> None:
    notebook = Notebook(tmp_path / "notes")
    with pytest.raises(UsageError, match="There is no"):
        notebook.check(resume=True, overwrite=False)
    notebook.begin({"seed": 0}, resume=False)
    with pytest.raises(UsageError, match="holds the questions of a study"):
        notebook.check(resume=False, overwrite=False)
    notebook.check(resume=False, overwrite=True)
    with pytest.raises(UsageError, match="with another seed"):
        Notebook(tmp_path / "notes").begin({"seed": 1}, resume=True)
    notebook.path.write_bytes(b"\xff\n")
    with pytest.raises(BundleError, match="cannot be read"):
        Notebook(tmp_path / "notes").begin({"seed": 0}, resume=True)
