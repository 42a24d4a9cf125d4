"""`corolla tune` as its user meets it: mistakes are one sentence, a run ends in a bundle or can go on."""

from __future__ import annotations

import contextlib
import json
import re
import shlex
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.cli.conftest import Refused
from tests.e2e.processes import Talking, corolla, processes
from tests.tuning.tiny_setup import byte_tokenizer, conversations, settings, write_model

from corolla.cli.tune import TuneJob
from corolla.tuning.batches import prepare
from corolla.tuning.bundle import load_bundle

OPTIONS = [
    "--steps",
    "6",
    "--batch-size",
    "3",
    "--prompt-tokens",
    "4",
    "--held-out",
    "5",
    "--delimiter",
    r"\n",
]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("cli") / "model")


@pytest.fixture(scope="module")
def talks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The conversations as a file of message lists, with one row that has no shape."""
    path = tmp_path_factory.mktemp("data") / "talks.jsonl"
    rows = [
        {"messages": [{"role": turn.role, "content": turn.text} for turn in talk.turns]}
        for talk in conversations()
    ]
    lines = [json.dumps(row) for row in [*rows, {"messages": "none"}]]
    path.write_text("\n".join(lines) + "\n")
    return path


@pytest.fixture(scope="module")
def peers(tiny: Path) -> Iterator[list[str]]:
    with processes(tiny.parent) as started:
        yield ["--peers", started.swarm(tiny, ["0:2", "2:4"])[0]]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--prompt-tokens", "0"], "--prompt-tokens is 0"),
        (["--mode", "dora"], "ptune, deep_ptune, prefix, lora"),
        (["--prompt-init", "zeros"], "vocab, text, random"),
        (["--prompt-init", "text"], "--prompt-text"),
        (["--mode", "lora", "--prompt-text", "tea"], "--mode lora has no prompt to start"),
        (["--steps", "0"], "--steps is 0"),
        (["--delimiter", "-v", "--steps", "0"], "--steps is 0"),  # a value is not the option of that name
        (["--keep", "first"], "--keep is 'first'"),
        (["--warmup", "-1"], "--warmup is -1"),
        (["--stop-after", "0"], "--stop-after is 0"),
        (["--push", "my bot"], "is no name on the hub"),
        (["--lr", "-1"], "--lr is -1"),
        (["--max-length", "2"], "--max-length is 2"),
        (["--style", "poem"], "--style"),
        (["--loss-on", "nothing"], "--loss-on"),
        (["--report-to", "pigeon"], "--report-to"),
        (["--data", "missing.jsonl"], "no file missing.jsonl"),
        (["--held-out", "0"], "--held-out is 0"),
        (["--resume", "--out", "nowhere"], "no unfinished run"),
    ],
)
def test_a_mistake_is_one_sentence(
    arguments: list[str],
    words: str,
    tiny: Path,
    tmp_path: Path,
    refused: Refused,
) -> None:
    assert words in refused("tune", str(tiny), *arguments)


def test_a_model_or_data_that_cannot_be_used_is_one_sentence(
    tiny: Path,
    talks: Path,
    tmp_path: Path,
    refused: Refused,
) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "empty.jsonl").write_text("")
    (tmp_path / "bundle").mkdir()
    data = ["--data", str(talks)]
    assert "config.json" in refused("tune", "folder", *data, "--out", "new")
    assert "empty" in refused("tune", str(tiny), "--data", "empty.jsonl", "--out", "new")
    assert "--overwrite" in refused("tune", str(tiny), *data)
    assert "--held-out" in refused("tune", str(tiny), *data, "--out", "new", "--held-out", "24")
    assert "--rank" in refused("tune", str(tiny), *data, "--out", "new", "--rank", "4")
    wrong = [str(tiny), *data, "--out", "new", "--held-out", "5", "--peers", "nonsense"]
    assert "nonsense" in refused("tune", *wrong)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bundle", "empty.jsonl", "folder"]


def test_what_a_prompt_begins_with(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("Tea at noon.")
    prepared = prepare(byte_tokenizer(), settings(), conversations())
    assert TuneJob().begins_with == "vocab"
    assert TuneJob(prompt_text="Hello").first_text(prepared, 0) == "Hello"
    assert TuneJob(prompt_text=str(tmp_path / "notes.txt")).first_text(prepared, 0) == "Tea at noon."
    job = TuneJob(mode="prefix", prompt_tokens=40)
    assert (job.begins_with, job.notes()["prompt_init"]) == ("conversations", "conversations")
    text = job.first_text(prepared, 0)
    rendered = [prepared.renderer.tokenizer.decode(one.input_ids) for one in prepared.train]
    assert any(text.startswith(one) for one in rendered)
    assert len(prepared.renderer.tokenizer(text).input_ids) >= 40
    assert text == job.first_text(prepared, 0) != job.first_text(prepared, 1)


@pytest.mark.nightly
def test_a_prefix_is_trained_into_a_bundle(tiny: Path, talks: Path, tmp_path: Path, peers: list[str]) -> None:
    out = tmp_path / "out"
    data = ["--data", str(talks), *OPTIONS, "--mode", "prefix", "--steps", "2", "--out", str(out)]
    ended = corolla("tune", str(tiny), *peers, *data)
    assert ended.returncode == 0, ended.stderr
    bundle = load_bundle(out)
    assert (bundle.mode, bundle.prompt_tokens) == ("prefix", 4)
    assert "prefix, 4 prompt tokens" in ended.stdout


@pytest.mark.nightly
def test_a_run_without_peers_starts_its_own_swarm_and_ends_in_a_bundle(
    tiny: Path, talks: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    ended = corolla(
        "tune", str(tiny), "--data", str(talks), *OPTIONS, "--mode", "deep_ptune", "--out", str(out)
    )
    assert ended.returncode == 0, ended.stderr
    assert "24 of 25" in ended.stdout
    assert ended.stdout.count("carry loss") == 3
    assert "\n6 steps of 3 examples; " in ended.stdout
    assert re.search(r"\n6 steps will take about \d+ s\.\n", ended.stdout)
    assert "paired 95 % interval" in " ".join(ended.stdout.split())
    assert f"corolla chat {out}" in ended.stdout
    bundle = load_bundle(out)
    assert (bundle.mode, bundle.prompt_tokens, bundle.rendering.delimiter) == ("deep_ptune", 4, "\n")
    assert bundle.training["data"] == str(talks)
    assert bundle.model.name == str(tiny)
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == [1, 2, 3, 4, 5, 6]


def test_ctrl_c_saves_and_prints_the_command_that_ends_the_run(
    tiny: Path, talks: Path, tmp_path: Path, peers: list[str]
) -> None:
    out = tmp_path / "out"
    arguments = [str(tiny), *peers, "--data", str(talks), *OPTIONS, "--out", str(out)]
    # Enough steps for the signal to come in time; the last of two --steps counts.
    arguments += ["--steps", "16", "--save-every", "1000"]
    with contextlib.closing(Talking("tune", *arguments, PYTHONUNBUFFERED="1")) as run:
        said = run.until("step 2/16:")
        run.popen.send_signal(signal.SIGINT)
        said += run.lines.read()
        code = run.popen.wait(timeout=60)
    assert code == 130, said
    assert re.search(r"Stopped after step \d+ of 16\.", said), said
    assert "Traceback" not in said
    assert not out.exists()
    again = shlex.split(said.rsplit("corolla ", 1)[1])
    assert again == ["tune", *arguments, "--resume"]
    ended = corolla(*again)
    assert ended.returncode == 0, ended.stderr
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == list(range(1, 17))
    assert not (tmp_path / "out.run").exists()
