"""Of a GGUF file, here or on the hub, what a server or client needs is read, and is what transformers makes of it."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.gguf_models import write_gguf
from tests.hub_stand_in import REPOSITORY, Hub, serving
from torch import Tensor
from transformers import AutoModelForCausalLM
from transformers.utils.quantization_config import GgufConfig

from corolla.errors import CheckpointError, UnknownModel
from corolla.models.checkpoints import gguf, gguf_files, hub
from corolla.models.checkpoints.checkpoint import Checkpoint, open_checkpoint
from corolla.models.span import load_span

PIECE = 4096
OUTSIDE = {"model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"}


@pytest.fixture(autouse=True)
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if the models were large, and their headers long."""
    monkeypatch.setattr(gguf, "WHOLE_BYTES", 0)
    monkeypatch.setattr(gguf_files, "FIRST_BYTES", 512)


@pytest.fixture
def on_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    (tmp_path / "hub").mkdir()
    with serving(tmp_path / "hub") as found:

        def there(name: str, **more: Any) -> hub.HubRepo:
            return hub.HubRepo(name, **more, endpoint=found.endpoint, piece_bytes=PIECE)

        monkeypatch.setattr(gguf, "HubRepo", there)
        yield found


def as_transformers_reads(path: Path) -> dict[str, Tensor]:
    model = AutoModelForCausalLM.from_pretrained(
        path.parent,
        gguf_file=path.name,
        quantization_config=GgufConfig(dequantize=True),
        dtype=torch.float32,
    )
    return dict(model.state_dict())


def block(checkpoint: Checkpoint, index: int) -> dict[str, Tensor]:
    span = load_span(checkpoint, index, index + 1, dtype=torch.float32)
    return {name.partition(".")[2]: one for name, one in span.blocks.state_dict().items()}


def made(checkpoint: Checkpoint) -> list[str]:
    return sorted(path.name for path in Path(checkpoint.source.location).glob("*.safetensors"))


@pytest.mark.parametrize("experts", [False, True], ids=["dense", "experts"])
def test_blocks_are_made_when_they_are_needed(tmp_path: Path, experts: bool) -> None:
    path = write_gguf(tmp_path / "tiny.gguf", experts=experts)
    expected = as_transformers_reads(path)
    checkpoint = open_checkpoint(str(path), cache_dir=tmp_path / "cache")
    assert checkpoint.num_blocks == 3
    assert made(checkpoint) == []
    whole = sum(one.numel() for one in expected.values())
    assert checkpoint.elements(lambda _: True) == whole  # said before anything is made
    found = block(checkpoint, 1)
    assert made(checkpoint) == ["block-00001.safetensors"]
    assert found.keys() == {name.split(".", 3)[3] for name in expected if ".layers.1." in name}
    for name, one in found.items():
        assert torch.equal(one, expected[f"model.layers.1.{name}"]), name
    outside = checkpoint.tensors(OUTSIDE.__contains__)
    assert outside.keys() == OUTSIDE
    for name, one in outside.items():
        assert torch.equal(one, expected[name]), name
    assert checkpoint.elements(lambda _: True) == whole
    again = open_checkpoint(str(path), cache_dir=tmp_path / "cache")
    assert made(again) == ["block-00001.safetensors", "outside-of-blocks.safetensors"]


def test_a_small_file_becomes_a_folder_for_other_programs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gguf, "WHOLE_BYTES", 1e9)
    path = write_gguf(tmp_path / "tiny.gguf")
    checkpoint = open_checkpoint(str(path), cache_dir=tmp_path / "cache")
    model = AutoModelForCausalLM.from_pretrained(checkpoint.source.location, dtype=torch.float32)
    expected = as_transformers_reads(path)
    assert model.state_dict().keys() == expected.keys()
    assert all(torch.equal(one, expected[name]) for name, one in model.state_dict().items())


def test_where_tensors_begin_is_the_files_own_matter(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "tiny.gguf", alignment=8)
    expected = as_transformers_reads(path)
    found = open_checkpoint(str(path), cache_dir=tmp_path / "cache").tensors(lambda _: True)
    assert found.keys() == expected.keys()
    assert all(torch.equal(one, expected[name]) for name, one in found.items())


def test_a_name_in_capitals_is_a_files_too(on_the_hub: Hub, tmp_path: Path) -> None:
    path = write_gguf(on_the_hub.folder / "TINY.GGUF")
    here = open_checkpoint(str(path), cache_dir=tmp_path / "cache")
    there = open_checkpoint(f"{REPOSITORY}/TINY.GGUF", cache_dir=tmp_path / "other")
    assert here.identity == there.identity
    found = block(there, 1)
    assert all(torch.equal(one, found[name]) for name, one in block(here, 1).items())


@pytest.mark.parametrize("file", [gguf.METADATA, gguf.CONTENTS])
def test_a_damaged_copy_is_to_be_deleted(tmp_path: Path, file: str) -> None:
    path = write_gguf(tmp_path / "tiny.gguf")
    folder = Path(open_checkpoint(str(path), cache_dir=tmp_path / "cache").source.location)
    (folder / file).write_text("{}")
    with pytest.raises(CheckpointError, match=rf"is damaged: delete {folder}, which is then made again"):
        block(open_checkpoint(str(path), cache_dir=tmp_path / "cache"), 1)


def test_nothing_is_made_of_a_file_that_took_anothers_name(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "tiny.gguf")
    checkpoint = open_checkpoint(str(path), cache_dir=tmp_path / "cache")
    write_gguf(tmp_path / "new.gguf", seed=1).rename(path)
    with pytest.raises(CheckpointError, match=r"tiny\.gguf has been replaced by another file"):
        block(checkpoint, 1)
    assert made(checkpoint) == []


def test_of_a_file_on_the_hub_the_blocks_bytes_are_fetched(on_the_hub: Hub, tmp_path: Path) -> None:
    path = write_gguf(on_the_hub.folder / "tiny.gguf", layers=6)
    size = path.stat().st_size
    local = open_checkpoint(str(path), cache_dir=tmp_path / "local")
    name = f"{REPOSITORY}/tiny.gguf"
    remote = open_checkpoint(name, cache_dir=tmp_path / "cache")
    assert remote.identity == local.identity
    on_the_hub.ranges.clear()
    expected, found = block(local, 2), block(remote, 2)
    assert found.keys() == expected.keys()
    assert all(torch.equal(one, expected[name]) for name, one in found.items())
    assert on_the_hub.whole == []
    assert sum(end - begin for begin, end in on_the_hub.ranges) < size / 4
    # What has come serves the next start too, also where there is no network.
    on_the_hub.gone = True
    with pytest.MonkeyPatch.context() as away:
        away.setattr(hub, "hub_answers", lambda _endpoint: False)
        offline = open_checkpoint(name, cache_dir=tmp_path / "cache")
        assert offline.identity == local.identity
        assert all(torch.equal(one, expected[name]) for name, one in block(offline, 2).items())
        with pytest.raises(UnknownModel, match="the hub cannot be reached"):
            block(offline, 3)


def test_what_cannot_be_read_is_one_sentence(on_the_hub: Hub, tmp_path: Path) -> None:
    def refused(name: str | Path) -> str:
        with pytest.raises((CheckpointError, UnknownModel)) as error:
            block(open_checkpoint(str(name), cache_dir=tmp_path / "cache"), 1)
        assert "\n" not in str(error.value)
        return str(error.value)

    lacking = write_gguf(tmp_path / "lacking.gguf", lacking="blk.1.attn_q.weight")
    assert refused(lacking).startswith(
        "lacking.gguf lacks what model.layers.1.self_attn.q_proj.weight is made of"
    )
    path = write_gguf(on_the_hub.folder / "tiny.gguf")
    cut = tmp_path / "cut.gguf"
    cut.write_bytes(path.read_bytes()[:-100])
    assert refused(cut) == "cut.gguf cannot be read as a GGUF model; it may be truncated."
    empty = tmp_path / "empty.gguf"
    empty.write_bytes(b"GGUF\x03" + bytes(2**16))
    assert refused(empty) == "empty.gguf cannot be read as a GGUF model; it may be truncated."
    assert "llama-gguf-split --merge" in refused(tmp_path / "model-00001-of-00003.gguf")
    assert refused(f"{REPOSITORY}/other.gguf") == f"{REPOSITORY} has no file other.gguf."
    with pytest.raises(
        UnknownModel, match=rf"by itself: name one of its files, as {REPOSITORY}/tiny\.gguf\."
    ):
        hub.HubRepo(REPOSITORY, revision=None, token=None, cache_dir=tmp_path, endpoint=on_the_hub.endpoint)


def test_a_full_disk_is_said_before_anything_is_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_gguf(tmp_path / "tiny.gguf")
    checkpoint = open_checkpoint(str(path), cache_dir=tmp_path / "cache")
    full = type("usage", (), {"free": 1000})
    monkeypatch.setattr(shutil, "disk_usage", lambda _: full)
    with pytest.raises(CheckpointError, match="MiB more are needed and 0 are free"):
        block(checkpoint, 0)
    assert made(checkpoint) == []
