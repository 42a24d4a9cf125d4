"""`corolla eval`: a bundle beside its base model, on what its training held out or on other data."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tests.cli.conftest import Refused
from tests.swarm_fixture import MemorySwarm
from tests.tuning.tiny_setup import byte_tokenizer, conversations, settings, write_model

from corolla.cli.evaluate import EvalJob, chosen_data, evaluate_and_report, prepare_evaluated
from corolla.errors import BundleError, UsageError
from corolla.tuning.batches import prepare
from corolla.tuning.bundle import ModelInfo, load_bundle
from corolla.tuning.evaluate import evaluate
from corolla.tuning.report import check_place
from corolla.tuning.tune import TuneResult, tune


def write_talks(path: Path, first: int = 0, count: int = 24) -> Path:
    talks = conversations(first + count)[first:]
    rows = [
        {"messages": [{"role": turn.role, "content": turn.text} for turn in talk.turns]} for talk in talks
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_a_bundle_is_evaluated_as_its_training_did(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from corolla.data.sources import load_conversations

    folder = write_model(tmp_path / "model")
    talks = str(write_talks(tmp_path / "talks.jsonl"))
    chosen = settings(steps=3, held_out_samples=7)
    prepared = prepare(byte_tokenizer(), chosen, load_conversations(talks)[0])
    with MemorySwarm(folder, [(0, 4)]) as swarm:
        model = swarm.model(tuning_mode="ptune", pre_seq_len=4)
        about = ModelInfo(str(folder), swarm.checkpoint.identity)
        made = tune(model, chosen, prepared, tmp_path / "out", about, notes={"data": talks})
        assert isinstance(made, TuneResult)
        bundle = load_bundle(made.bundle)
        loaded = swarm.model(prompts=made.bundle)

        def evaluated(job: EvalJob) -> Any:
            found, held_out_only = chosen_data(bundle, job)
            to_evaluate = prepare_evaluated(bundle, found, None, None, held_out_only=held_out_only)
            evaluate_and_report(loaded, bundle, to_evaluate, found, made.bundle)
            return to_evaluate

        page = tmp_path / "page.html"
        again = evaluated(EvalJob(examples=7, batch_size=3, out=page))
        assert [one.input_ids for one in again.held_out] == [one.input_ids for one in prepared.held_out]
        said = capsys.readouterr().out
        base = swarm.model()
        found = evaluate(base, prepared.held_out, prepared.batches, 3)
        assert f"{found.reply_loss:.3f}" in said  # without any prompt, which is not where training began
        assert f"{made.after.reply_loss:.3f}" in said
        assert "that the training held out" in said
        text = page.read_text()
        assert f"{made.after.reply_loss:.3f}" in text
        assert "<svg" in text  # the run's curve
        assert loaded.prompts is not None
        other = str(write_talks(tmp_path / "other.jsonl", first=24, count=6))
        elsewhere = evaluated(EvalJob(data=other, out=tmp_path / "other.html"))
        assert len({one.conversation for one in elsewhere.held_out}) == 6
        assert "other.jsonl" in (tmp_path / "other.html").read_text()
        # Named by its own name it is the same data, most of which was learnt.
        _, held_out_only = chosen_data(bundle, EvalJob(data=talks, out=tmp_path / "third.html"))
        assert held_out_only
        shared = replace(bundle, training=dict(bundle.training, data="talks.jsonl"))  # as on the hub
        data, held_out_only = chosen_data(shared, EvalJob(data=talks, out=tmp_path / "third.html"))
        assert (data.data, held_out_only) == (talks, True)
        # Another split of it was never seen.
        elsewhere = EvalJob(split="test", out=tmp_path / "fourth.html")
        data, held_out_only = chosen_data(bundle, elsewhere)
        assert (data.data, data.split, held_out_only) == (talks, "test", False)
        assert chosen_data(bundle, EvalJob(split="train", out=tmp_path / "fourth.html"))[1]
        for part in ("train[10%:]", "test+train", "all"):
            with pytest.raises(UsageError, match="was trained on parts of"):
                chosen_data(bundle, EvalJob(split=part, out=tmp_path / "fourth.html"))
        with pytest.raises(UsageError, match="without this --persona"):
            chosen_data(bundle, EvalJob(persona=True, out=tmp_path / "fourth.html"))


def test_a_mistake_is_one_sentence(tmp_path: Path, refused: Refused) -> None:
    (tmp_path / "there.html").write_text("mine")
    assert "is no folder and no bundle on the hub" in refused("eval", "nowhere")
    assert "--examples is 0" in refused("eval", "nowhere", "--examples", "0")
    assert "--overwrite" in refused("eval", "nowhere", "--out", str(tmp_path / "there.html"))
    assert (tmp_path / "there.html").read_text() == "mine"
    with pytest.raises(UsageError, match="batch-size is 0"):
        EvalJob(batch_size=0, out=tmp_path / "new.html")


def test_a_page_that_could_not_be_written_is_refused_before_anything_is_evaluated(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for place in (tmp_path / "file" / "page.html", tmp_path / ("x" * 300)):
        with pytest.raises(BundleError, match="could not be saved"):
            check_place(place)
    check_place(tmp_path / "new" / "page.html")
    assert [*(tmp_path / "new").iterdir()] == []
    with pytest.raises(UsageError, match="is a folder"):
        EvalJob(out=tmp_path / "new", overwrite=True)
