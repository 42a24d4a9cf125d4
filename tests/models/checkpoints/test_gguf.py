"""The embedded model, and GGUF files in general."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

from corolla.errors import CheckpointError, CorollaError, UnknownModel
from corolla.files import made_once
from corolla.models.checkpoints.checkpoint import open_checkpoint
from corolla.models.checkpoints.gguf import embedded_gguf, gguf_identity
from corolla.models.span import load_span

OPEN_EMBEDDED = """
import torch
torch.set_num_threads(1)
from corolla.models.checkpoints.checkpoint import open_checkpoint
checkpoint = open_checkpoint("smollm2")
print(checkpoint.identity, checkpoint.num_blocks, checkpoint.source.location)
"""


@pytest.mark.nightly
def test_two_processes_convert_the_embedded_model_at_once(tmp_path: Path) -> None:
    environment = {**os.environ, "COROLLA_CACHE": str(tmp_path), "PYTHONPATH": os.pathsep.join(sys.path)}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", OPEN_EMBEDDED], env=environment, stdout=subprocess.PIPE, text=True
        )
        for _ in range(2)
    ]
    outputs = [process.communicate(timeout=240)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0]
    assert outputs[0] == outputs[1]
    identity, blocks, folder = outputs[0].split()
    assert blocks == "30"
    assert [path.name for path in (tmp_path / "gguf").iterdir() if path.is_dir()] == [Path(folder).name]

    checkpoint = open_checkpoint("smollm2", cache_dir=tmp_path)  # a third one finds it done
    assert (
        checkpoint.identity == identity == open_checkpoint(str(embedded_gguf()), cache_dir=tmp_path).identity
    )
    span = load_span(checkpoint, 29, 30, dtype=torch.float32)
    assert span.nbytes() < 20_000_000
    tokenizer = AutoTokenizer.from_pretrained(checkpoint.source.location)
    assert tokenizer.decode(tokenizer("Hello there\n-----\n").input_ids) == "Hello there\n-----\n"
    assert "<|im_start|>user" in tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hello"}], tokenize=False
    )


def test_a_conversion_that_fails_leaves_nothing_behind(tmp_path: Path) -> None:
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(embedded_gguf().read_bytes()[:200_000])
    with pytest.raises(CheckpointError) as error:
        open_checkpoint(str(broken), cache_dir=tmp_path / "cache")
    assert str(error.value) == f"{broken.name} cannot be read as a GGUF model; it may be truncated."
    assert not [path for path in (tmp_path / "cache" / "gguf").iterdir() if path.is_dir()]


def test_what_is_no_gguf_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UnknownModel, match="There is no file"):
        open_checkpoint(str(tmp_path / "nothing.gguf"))
    (tmp_path / "text.gguf").write_bytes(b"text" * 100_000)
    with pytest.raises(CheckpointError, match="is not a GGUF file"):
        open_checkpoint(str(tmp_path / "text.gguf"))


def test_identity_follows_the_content(tmp_path: Path) -> None:
    content = bytearray(embedded_gguf().read_bytes())
    copy = tmp_path / "copy.gguf"
    copy.write_bytes(content)
    assert gguf_identity(copy) == gguf_identity(embedded_gguf())
    content[-3] ^= 1
    copy.write_bytes(content)
    assert gguf_identity(copy) != gguf_identity(embedded_gguf())


def test_made_once_is_whole_or_not_at_all(tmp_path: Path) -> None:
    def fail(work: Path) -> None:
        (work / "half").touch()
        raise CorollaError("stopped in the middle")

    calls = []

    def fill(work: Path) -> None:
        calls.append(work)
        (work / "file").write_text("whole")

    folder = tmp_path / "deep" / "folder"
    with pytest.raises(CorollaError):
        made_once(folder, fail)
    assert not folder.exists()
    for _ in range(2):
        assert (made_once(folder, fill) / "file").read_text() == "whole"
    assert len(calls) == 1
    assert [path.name for path in folder.parent.iterdir() if path.is_dir()] == ["folder"]
