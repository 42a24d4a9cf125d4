"""Prompts on disk: read back as they were, refused for another model, never half written."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig

from corolla.errors import BundleError
from corolla.models.checkpoints.prompt_files import load_prompt, save_prompt
from corolla.models.prompts import SoftPrompt

CONFIG = LlamaConfig(hidden_size=8, num_attention_heads=2, num_hidden_layers=3)


def saved(folder: Path, blocks: int = 0) -> SoftPrompt:
    prompt = SoftPrompt(torch.randn(4, 8), blocks)
    if prompt.deep is not None:
        prompt.deep.data.normal_()
    save_prompt(folder, prompt, config=CONFIG, model_name="some/model", identity="a" * 32)
    return prompt


@pytest.mark.parametrize("blocks", [0, 3])
def test_a_prompt_comes_back_as_it_was(tmp_path: Path, blocks: int) -> None:
    prompt = saved(tmp_path, blocks)
    loaded = load_prompt(tmp_path, model_name="some/model", identity="a" * 32)
    assert loaded.mode == prompt.mode
    for before, after in zip(prompt.parameters(), loaded.parameters(), strict=True):
        assert torch.equal(before, after)


def test_another_models_prompt_is_refused_with_both_names(tmp_path: Path) -> None:
    saved(tmp_path)
    with pytest.raises(BundleError, match=r"some/model.*other/model"):
        load_prompt(tmp_path, model_name="other/model", identity="b" * 32)


def test_a_truncated_file_is_one_sentence(tmp_path: Path) -> None:
    saved(tmp_path)
    weights = tmp_path / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-8])
    with pytest.raises(BundleError, match="missing or truncated"):
        load_prompt(tmp_path, model_name="m", identity="a" * 32)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"format": 99}'])
def test_a_wrong_description_is_one_sentence(tmp_path: Path, text: str) -> None:
    saved(tmp_path)
    (tmp_path / "prompt.json").write_text(text)
    with pytest.raises(BundleError, match=r"prompt\.json"):
        load_prompt(tmp_path, model_name="m", identity="a" * 32)


def test_a_description_that_the_tensors_deny_is_refused(tmp_path: Path) -> None:
    saved(tmp_path)
    about = json.loads((tmp_path / "prompt.json").read_text())
    (tmp_path / "prompt.json").write_text(json.dumps(about | {"prompt_tokens": 5}))
    with pytest.raises(BundleError, match="not what its"):
        load_prompt(tmp_path, model_name="m", identity="a" * 32)


def test_a_full_disk_leaves_the_last_good_prompt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prompt = saved(tmp_path)

    def full(_handle: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(BundleError, match="No space left"):
        saved(tmp_path)
    monkeypatch.undo()
    loaded = load_prompt(tmp_path, model_name="m", identity="a" * 32)
    assert torch.equal(loaded.input, prompt.input)
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]
