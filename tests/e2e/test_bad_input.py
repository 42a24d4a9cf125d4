"""A user's mistake gets one sentence that says what to do, and a non-zero exit; never a traceback."""

from __future__ import annotations

import json
import socket
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tests.client.sessions.test_named_prompt import write_bundle
from tests.e2e.processes import corolla
from tests.tiny_models import tiny_config, write_tiny

from corolla.cli.main import run as main
from corolla.models.checkpoints.prompt_files import read_prompt_info, save_prompt
from corolla.models.prompts import SoftPrompt

Run = Callable[..., str]


@pytest.fixture
def refused(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Run a command line that must be refused; gives the sentence."""

    def run(*arguments: str, code: int = 2) -> str:
        monkeypatch.setattr(sys, "argv", ["corolla", *arguments])
        with pytest.raises(SystemExit) as ended:
            main()
        said = capsys.readouterr().err
        assert ended.value.code == code, said
        assert "Traceback" not in said
        return said

    return run


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    return write_tiny("llama", tmp_path / "tiny")


@pytest.fixture(autouse=True)
def _offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


def test_unknown_model(refused: Run, tmp_path: Path) -> None:
    assert "nobody/nothing" in refused("serve", "nobody/nothing")
    assert "config.json" in refused("serve", str(tmp_path))


@pytest.mark.parametrize("blocks", ["3", "4:2", "a:b", "0:0", "-1:3"])
def test_blocks_that_make_no_sense(refused: Run, tiny: Path, blocks: str) -> None:
    assert "such as 0:15" in refused("serve", str(tiny), f"--blocks={blocks}")


@pytest.mark.parametrize(
    ("command", "option", "value", "known"),
    [
        ("serve", "--quantization", "int3", "none, int8, nf4"),
        ("serve", "--lease-bytes", "-1", "give 0 to keep no graphs"),
        ("serve", "--cache-tokens", "0", "at least one"),
        ("chat", "--quantization", "int3", "none, bfloat16, int8"),
        ("chat", "--wire", "int4", "compute, float16, int8"),
        ("tune", "--wire", "int4", "compute, float16, int8"),
    ],
)
def test_ways_of_computing_that_do_not_exist(
    refused: Run, tiny: Path, command: str, option: str, value: str, known: str
) -> None:
    assert known in refused(command, str(tiny), f"{option}={value}")


def test_a_quantization_that_this_machine_cannot_do(refused: Run, tiny: Path) -> None:
    assert "CUDA" in refused("serve", str(tiny), "--quantization", "nf4")
    assert "float32" in refused("serve", str(tiny), "--quantization", "int8", "--dtype", "float64")


def test_blocks_that_the_model_does_not_have(refused: Run, tiny: Path) -> None:
    assert "has blocks 0:4" in refused("serve", str(tiny), "--blocks", "2:9")


def test_a_family_that_cannot_be_split(refused: Run, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert", "hidden_size": 8}))
    assert "bert" in refused("serve", str(tmp_path))


def test_a_truncated_checkpoint(refused: Run, tiny: Path) -> None:
    weights = tiny / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    assert "model.safetensors" in refused("serve", str(tiny))


def test_no_such_device_or_dtype(refused: Run, tiny: Path) -> None:
    assert "cuda:7" in refused("serve", str(tiny), "--device", "cuda:7")
    assert "float7" in refused("serve", str(tiny), "--dtype", "float7")
    assert "--threads" in refused("serve", str(tiny), "--threads", "0")


def test_a_malformed_join_address(refused: Run, tiny: Path) -> None:
    assert "nonsense" in refused("serve", str(tiny), "--peers", "nonsense")
    assert "nonsense" in refused("status", "--peers", "nonsense")
    assert "--peers" in refused("status")


def test_a_join_address_where_nobody_answers(refused: Run) -> None:
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))  # bound but not listening: nothing else can answer there
        port = held.getsockname()[1]
        address = f"/ip4/127.0.0.1/tcp/{port}/p2p/12D3KooWJ174AZPjEsMEW14VammQjwUUQMxnRzJw963fn4XuMypr"
        assert address in refused("status", "--peers", address, code=1)


def test_a_port_in_use(refused: Run) -> None:
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        held.listen()
        port = held.getsockname()[1]
        assert str(port) in refused("bootstrap", "--listen", f"127.0.0.1:{port}")


def test_a_ready_file_that_cannot_be_written(refused: Run, tmp_path: Path) -> None:
    said = refused("bootstrap", "--ready-file", str(tmp_path / "missing" / "ready.json"))
    assert "ready.json" in said


def test_an_identity_file_that_is_no_key(refused: Run, tmp_path: Path) -> None:
    identity = tmp_path / "identity"
    identity.write_text("not a key")
    assert str(identity) in refused("bootstrap", "--identity", str(identity))


def test_tuning_that_cannot_begin(refused: Run, tiny: Path, tmp_path: Path) -> None:
    out = ("--out", str(tmp_path / "out"))
    empty = tmp_path / "empty.jsonl"
    empty.write_text("")
    wrong = tmp_path / "wrong.jsonl"
    wrong.write_text('{"text": "no conversation"}\n')
    assert "--prompt-tokens" in refused("tune", str(tiny), "--prompt-tokens", "0", *out)
    assert "--mode" in refused("tune", str(tiny), "--mode", "dora", *out)
    assert "empty" in refused("tune", str(tiny), "--data", str(empty), *out)
    said = refused("tune", str(tiny), "--data", str(wrong), *out)
    assert "no conversation" in said
    assert "messages" in said
    assert "missing.json" in refused("tune", str(tiny), "--data", str(tmp_path / "missing.json"), *out)
    assert not (tmp_path / "out").exists()


def test_a_bundle_that_is_none(refused: Run, tmp_path: Path) -> None:
    (tmp_path / "prompt.json").write_text("{}")
    assert "prompt.json" in refused("chat", str(tmp_path))


@pytest.fixture
def bundle(tiny: Path, tmp_path: Path) -> Path:
    return write_bundle(tmp_path / "bundle", tiny, "deep_ptune", length=4)


def test_serving_a_bundle_that_is_none(refused: Run, tiny: Path, bundle: Path, tmp_path: Path) -> None:
    assert "prompt.json" in refused("serve", str(tiny), "--bundle", str(tmp_path))
    weights = bundle / "prompts.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-9])
    assert "truncated" in refused("serve", str(tiny), "--bundle", str(bundle))
    weights.write_bytes(whole)
    assert "--cache-tokens" in refused(
        "serve", str(tiny), "--bundle", str(bundle), "--cache-tokens", "16", "--listen", "127.0.0.1:0"
    )


def test_serving_a_bundle_of_another_model(refused: Run, bundle: Path, tmp_path: Path) -> None:
    other = write_tiny("llama", tmp_path / "other", seed=1)
    assert "was trained for" in refused("serve", str(other), "--bundle", str(bundle))


@pytest.mark.parametrize(("length", "width", "blocks"), [(4, 31, 4), (4, 32, 3), (600, 32, 4)])
def test_serving_a_bundle_of_another_shape(
    refused: Run, tiny: Path, bundle: Path, length: int, width: int, blocks: int
) -> None:
    """One that says it is for this model, and holds something else."""
    prompt = SoftPrompt(torch.zeros(length, width), blocks)
    about = read_prompt_info(bundle)
    config = tiny_config("llama")
    save_prompt(bundle, prompt, config=config, model_name="tiny", identity=about["identity"])
    assert "shape" in refused("serve", str(tiny), "--bundle", str(bundle))


def test_serving_a_bundle_of_a_family_that_shares_nothing(refused: Run, tmp_path: Path) -> None:
    falcon = write_tiny("falcon", tmp_path / "falcon")
    bundle = write_bundle(tmp_path / "bundle", falcon, "ptune")
    assert "falcon" in refused("serve", str(falcon), "--bundle", str(bundle))


def test_the_real_command_says_one_line(tiny: Path) -> None:
    ended = corolla("serve", str(tiny), "--blocks", "2:9")
    assert ended.returncode == 2
    assert ended.stderr.startswith("error: ")
    assert ended.stderr.count("\n") == 1
    assert ended.stdout.count("\n") <= 1


def test_help_imports_nothing_heavy() -> None:
    program = (
        "import sys; from corolla.cli.main import app\n"
        "heavy = {'torch', 'transformers', 'hivemind', 'datasets', 'peft'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    import subprocess

    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)
