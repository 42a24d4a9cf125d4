"""What people give by mistake, or strangers on purpose: one sentence, before anything is started."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest
from tests.chat.reference import VOCABULARY, byte_tokenizer
from tests.cli.conftest import Refused
from tests.e2e.processes import COROLLA, environment, processes
from tests.tiny_models import write_tiny
from tests.tuning.tiny_setup import conversations

DEEP = "[" * 100_000 + "]" * 100_000
CODE = """
from pathlib import Path
Path(__file__).with_name("RAN").write_text("")
"""


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_tiny("llama", tmp_path_factory.mktemp("odd") / "model", vocab_size=VOCABULARY)
    byte_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def model(good: Path, tmp_path: Path) -> Path:
    return shutil.copytree(good, tmp_path / "model")


@pytest.fixture
def talks(tmp_path: Path) -> Path:
    path = tmp_path / "talks.jsonl"
    rows = [
        {"messages": [{"role": turn.role, "content": turn.text} for turn in talk.turns]}
        for talk in conversations()
    ]
    path.write_text("\n".join(json.dumps(row) for row in rows))
    return path


@pytest.mark.parametrize("command", ["chat", "tune", "serve"])
def test_a_tokenizer_of_code_is_never_run(model: Path, refused: Refused, command: str) -> None:
    (model / "own.py").write_text(CODE)
    named = {"tokenizer_class": "Own", "auto_map": {"AutoTokenizer": ["own.Own", None]}}
    (model / "tokenizer_config.json").write_text(json.dumps(named))
    assert "never runs" in refused(command, model)
    assert not list(model.rglob("RAN"))


@pytest.mark.parametrize("command", ["chat", "tune"])
@pytest.mark.parametrize("content", [DEEP, "{}", '{"model": {"type": "New"}}', "\x00"], ids=range(4))
def test_a_tokenizer_that_cannot_be_read(
    model: Path, talks: Path, refused: Refused, command: str, content: str
) -> None:
    (model / "tokenizer.json").write_text(content)
    data = ["--data", talks] if command == "tune" else []
    assert "no tokenizer that can be read" in refused(command, model, *data)


@pytest.mark.parametrize("command", ["chat", "tune", "serve"])
def test_a_config_nested_too_deeply(model: Path, refused: Refused, command: str) -> None:
    (model / "config.json").write_text(DEEP)
    assert "nested too deeply" in refused(command, model)


@pytest.mark.parametrize("file", ["bundle.json", "prompt.json"])
def test_bundles_and_prompts_nested_too_deeply(tmp_path: Path, refused: Refused, file: str) -> None:
    folder = tmp_path / "bot"
    folder.mkdir()
    (folder / file).write_text(DEEP)
    assert f"{file} cannot be read" in refused("chat", folder)


@pytest.mark.parametrize(
    "line", [DEEP, '{"format": 1}', "", '{"format": 1, "partner": ' + DEEP + "}"], ids=range(4)
)
def test_chats_that_cannot_be_read(tmp_path: Path, refused: Refused, line: str) -> None:
    path = tmp_path / "chat.jsonl"
    path.write_text(line + "\n")
    assert str(path) in refused("chat", "--continue", "--transcript", path)


def test_tokens_without_a_row(good: Path, tmp_path: Path, talks: Path, refused: Refused) -> None:
    """ChatML's tokens were added to the tokenizer, and the embedding was not resized."""
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens(
        {"additional_special_tokens": ["<|im_start|>", "<|im_end|>"], "pad_token": "[PAD]"}
    )
    tokenizer.chat_template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    model = shutil.copytree(good, tmp_path / "chatml")
    tokenizer.save_pretrained(model)
    for command in (["chat", model], ["tune", model, "--data", talks, "--style", "template"]):
        assert "the token '<|im_start|>'" in refused(*command)


def test_examples_longer_than_the_model(tmp_path: Path, talks: Path, refused: Refused) -> None:
    model = write_tiny("gpt2", tmp_path / "short", vocab_size=VOCABULARY, max_position_embeddings=64)
    byte_tokenizer().save_pretrained(model)
    tune = ("tune", model, "--data", talks, "--prompt-tokens", "8")
    assert "give --max-length 56 or less" in refused(*tune, "--max-length", "57")
    assert "give fewer with --prompt-tokens" in refused(*tune, "--prompt-tokens", "60")


def test_words_that_are_no_text(model: Path, talks: Path, refused: Refused) -> None:
    """What stands behind the options is cleaned; the rest of the command fails for another reason."""
    odd = os.fsdecode(b"a\xffb")
    assert "There is no model" in refused("chat", odd)
    tune = ("tune", model, "--data", talks, "--delimiter", odd, "--peers", "nonsense")
    assert "nonsense" in refused(*tune, "--prompt-init", "text", "--prompt-text", odd)
    assert "nonsense" in refused("chat", model, "--system", odd, "--peers", "nonsense")


@pytest.mark.nightly
def test_a_chat_with_bytes_that_are_no_text(model: Path, tmp_path: Path) -> None:
    """They come from stdin, and the terminal knows ASCII only; a model of random weights says anything."""
    with processes(tmp_path) as started:
        address, _ = started.swarm(model, ["0:4"])
        done = subprocess.run(
            [
                *COROLLA,
                "chat",
                str(model),
                "--peers",
                address,
                "--max-new-tokens",
                "30",
                "--system",
                b"\xfe!",
            ],
            input=b"h\xffi \xed\xa0\x80\n\x1b[2J\xe2\x80\xae\nthere\n",
            capture_output=True,
            timeout=120,
            env=environment() | {"PYTHONIOENCODING": "ascii"},
        )
    assert done.returncode == 0, done.stderr.decode()
    assert done.stderr == b""
    assert done.stdout.count(b"You: ") == 3
    assert done.stdout.isascii()
    assert b"\x1b" not in done.stdout
