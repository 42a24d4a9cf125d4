"""Checkpoints in folders: only what is needed is read, and what is wrong is one sentence."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from tests.tiny_models import tiny_config, tiny_model, write_tiny

from corolla.errors import CheckpointError, UnknownModel, UnsupportedFamily
from corolla.models.checkpoints.checkpoint import Checkpoint, open_checkpoint
from corolla.models.checkpoints.shards import local_reader, read_entries
from corolla.models.checkpoints.source import INDEX_FILE, LocalFolder
from corolla.models.span import load_span


class Counting(LocalFolder):
    """A folder that notes which files it hands out."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.fetched: list[str] = []

    def fetch(self, file: str) -> Path:
        self.fetched.append(file)
        return super().fetch(file)


def index_of(folder: Path) -> dict[str, str]:
    weight_map: dict[str, str] = json.loads((folder / INDEX_FILE).read_text())["weight_map"]
    return weight_map


def test_what_a_checkpoint_says_of_itself(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(str(write_tiny("llama", tmp_path, dtype=torch.bfloat16)), revision="v1")
    assert checkpoint.num_blocks == 4
    assert checkpoint.architecture == "LlamaForCausalLM"
    assert checkpoint.revision == "v1"
    assert checkpoint.dtype == torch.bfloat16
    assert checkpoint.source.location == str(tmp_path)


def test_only_the_shards_that_are_needed_are_fetched(tmp_path: Path) -> None:
    folder = write_tiny("llama", tmp_path, layers=6, shards=6)
    weight_map = index_of(folder)
    needed = {file for key, file in weight_map.items() if key.startswith("model.layers.2.")}
    assert len(needed) < len(set(weight_map.values()))
    source = Counting(folder)
    load_span(Checkpoint("tiny", None, source), 2, 3, dtype=torch.float32)
    assert set(source.fetched) == needed
    for file in set(weight_map.values()) - needed:  # and it works without the others
        (folder / file).unlink()
    load_span(Checkpoint("tiny", None, LocalFolder(folder)), 2, 3, dtype=torch.float32)


@pytest.mark.parametrize("shards", [1, 4])
def test_tensors_are_read_as_safetensors_reads_them(tmp_path: Path, shards: int) -> None:
    folder = write_tiny("qwen3_moe", tmp_path, shards=shards, dtype=torch.bfloat16)
    tensors = open_checkpoint(str(folder)).tensors(lambda key: ".mlp." in key)
    count = 0
    for file in folder.glob("*.safetensors"):
        with safe_open(file, "pt") as reader:
            for key in reader.keys():  # noqa: SIM118, it is not a dict
                if ".mlp." in key:
                    count += 1
                    assert torch.equal(tensors[key], reader.get_tensor(key))
    assert count == len(tensors) > 0
    widened = open_checkpoint(str(folder)).tensors(lambda key: key in tensors, widen_to=torch.float32)
    assert {tensor.dtype for tensor in widened.values()} == {torch.float32}
    assert all(torch.equal(widened[key], tensors[key].float()) for key in tensors)


# --- identity -------------------------------------------------------------------------------------------


def test_two_fine_tunes_differ_though_their_headers_are_equal(tmp_path: Path) -> None:
    config = tiny_config("llama")
    model = tiny_model(config)
    model.save_pretrained(tmp_path / "one", max_shard_size=60_000)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.001)
    model.save_pretrained(tmp_path / "two", max_shard_size=60_000)
    assert (tmp_path / "one" / INDEX_FILE).read_bytes() == (tmp_path / "two" / INDEX_FILE).read_bytes()
    one, two = (open_checkpoint(str(tmp_path / name)).identity for name in ("one", "two"))
    assert one != two
    assert len(one) == 32


def test_a_fine_tune_of_one_projection_differs(tmp_path: Path) -> None:
    model = tiny_model(tiny_config("llama"))
    model.save_pretrained(tmp_path / "one")
    with torch.no_grad():
        model.model.layers[3].self_attn.q_proj.weight.mul_(1.001)
    model.save_pretrained(tmp_path / "two")
    one, two = (open_checkpoint(str(tmp_path / name)).identity for name in ("one", "two"))
    assert one != two


def test_partial_readers_of_any_sharding_agree(tmp_path: Path) -> None:
    """A client and two servers, each reading its own part, of copies that are cut up differently."""
    copies = [
        open_checkpoint(str(write_tiny("mixtral", tmp_path / str(shards), shards=shards)))
        for shards in (1, 3, 5)
    ]
    copies[0].tensors(lambda key: ".layers." not in key)
    load_span(copies[1], 0, 2, dtype=torch.float32)
    load_span(copies[2], 2, 4, dtype=torch.float32)
    assert len({checkpoint.identity for checkpoint in copies}) == 1


def test_the_configs_meaning_counts_and_its_provenance_does_not(tmp_path: Path) -> None:
    folder = write_tiny("llama", tmp_path)
    before = open_checkpoint(str(folder)).identity
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(
        json.dumps({**config, "transformers_version": "0.0", "use_cache": False})
    )
    assert open_checkpoint(str(folder)).identity == before
    (folder / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 1e-3}))
    assert open_checkpoint(str(folder)).identity != before


# --- what is wrong is one sentence ----------------------------------------------------------------------


def assert_sentence(error: pytest.ExceptionInfo[Exception], *parts: str) -> None:
    text = str(error.value)
    assert "\n" not in text
    assert text.endswith(".")
    for part in parts:
        assert part in text


@pytest.mark.parametrize("length", [4, 100, -1000])
def test_a_truncated_file(tmp_path: Path, length: int) -> None:
    folder = write_tiny("llama", tmp_path)
    file = folder / "model.safetensors"
    content = file.read_bytes()
    file.write_bytes(content[:length])
    with pytest.raises(CheckpointError) as error:
        load_span(open_checkpoint(str(folder)), 0, 4, dtype=torch.float32)
    assert_sentence(error, "model.safetensors", "truncated")


def test_a_missing_shard(tmp_path: Path) -> None:
    folder = write_tiny("llama", tmp_path, shards=4)
    gone = index_of(folder)["model.layers.3.mlp.up_proj.weight"]
    (folder / gone).unlink()
    with pytest.raises(CheckpointError) as error:
        load_span(open_checkpoint(str(folder)), 3, 4, dtype=torch.float32)
    assert_sentence(error, gone, "missing")


def test_a_missing_tensor(tmp_path: Path) -> None:
    folder = write_tiny("llama", tmp_path, shards=4)
    index = json.loads((folder / INDEX_FILE).read_text())
    del index["weight_map"]["model.layers.2.mlp.up_proj.weight"]
    (folder / INDEX_FILE).write_text(json.dumps(index))
    load_span(open_checkpoint(str(folder)), 3, 4, dtype=torch.float32)
    with pytest.raises(CheckpointError) as error:
        load_span(open_checkpoint(str(folder)), 1, 3, dtype=torch.float32)
    assert_sentence(error, "lacks tensors of blocks 1:3", "mlp.up_proj.weight")


def test_an_index_that_promises_too_much(tmp_path: Path) -> None:
    folder = write_tiny("llama", tmp_path, shards=4)
    index = json.loads((folder / INDEX_FILE).read_text())
    files = sorted(set(index["weight_map"].values()))
    index["weight_map"]["model.layers.2.mlp.up_proj.weight"] = files[0]
    (folder / INDEX_FILE).write_text(json.dumps(index))
    with pytest.raises(CheckpointError) as error:
        load_span(open_checkpoint(str(folder)), 2, 3, dtype=torch.float32)
    assert_sentence(error, files[0], "model.layers.2.mlp.up_proj.weight")


@pytest.mark.parametrize("name", ["../secret.safetensors", "model.bin", 5])
def test_an_index_that_leads_elsewhere(tmp_path: Path, name: object) -> None:
    folder = write_tiny("llama", tmp_path, shards=4)
    (folder / INDEX_FILE).write_text(json.dumps({"weight_map": {"model.norm.weight": name}}))
    with pytest.raises(CheckpointError) as error:
        open_checkpoint(str(folder)).tensors(lambda _key: True)
    assert_sentence(error, repr(name))


def test_pickled_weights_are_refused(tmp_path: Path) -> None:
    folder = write_tiny("llama", tmp_path)
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(CheckpointError) as error:
        _ = open_checkpoint(str(folder)).identity
    assert_sentence(error, "pickled", "safetensors")


@pytest.mark.parametrize(
    "header",
    [b"not json", b"[]", b'{"a": 5}', b'{"a": {"dtype": "F32", "shape": [2], "data_offsets": [8, 0]}}'],
)
def test_a_file_that_is_no_safetensors(tmp_path: Path, header: bytes) -> None:
    file = tmp_path / "x.safetensors"
    file.write_bytes(struct.pack("<Q", len(header)) + header)
    with pytest.raises(CheckpointError) as error:
        read_entries(local_reader(file), str(file))
    assert_sentence(error, "x.safetensors")
    file.write_bytes(b"\xff" * 64)
    with pytest.raises(CheckpointError, match="not a safetensors file"):
        read_entries(local_reader(file), str(file))


def test_folders_that_are_no_models(tmp_path: Path) -> None:
    with pytest.raises(UnknownModel) as error:
        open_checkpoint(str(tmp_path))
    assert_sentence(error, "config.json")
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(CheckpointError) as broken:
        open_checkpoint(str(tmp_path))
    assert_sentence(broken, "config.json")
    (tmp_path / "config.json").write_text('{"model_type": "never-heard-of"}')
    with pytest.raises(UnsupportedFamily) as strange:
        open_checkpoint(str(tmp_path))
    assert_sentence(strange, "never-heard-of")
