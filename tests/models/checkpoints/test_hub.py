"""Names on the hub, against a small server on this machine that speaks the hub's protocol.

The hub's address is read when its client is imported, hence the processes of their own.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from tests.hub_stand_in import REPOSITORY, serving
from tests.tiny_models import write_tiny

from corolla.errors import UnknownModel
from corolla.models.checkpoints.checkpoint import open_checkpoint
from corolla.models.checkpoints.hub import original_name
from corolla.models.checkpoints.source import INDEX_FILE

USE = """
import json, sys, torch
torch.set_num_threads(1)
from corolla.errors import CorollaError
from corolla.errors import UnknownModel
from corolla.models.checkpoints.checkpoint import open_checkpoint
from corolla.models.span import load_span
def use(name):
    try:
        checkpoint = open_checkpoint(name, cache_dir=sys.argv[1])
        span = load_span(checkpoint, 1, 2, dtype=torch.float32)
        total = sum(float(one.double().sum()) for one in span.blocks.parameters())
        return {"identity": checkpoint.identity, "total": total}
    except CorollaError as error:
        return {"error": type(error).__name__, "text": str(error)}
print(json.dumps([use(name) for name in sys.argv[2:]]))
"""


def use(endpoint: str, cache: Path, *names: str) -> list[dict[str, object]]:
    """What a process of its own finds under each name."""
    environment = {
        **os.environ,
        "HF_ENDPOINT": endpoint,
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "PYTHONPATH": os.pathsep.join(sys.path),
    }
    done = subprocess.run(
        [sys.executable, "-c", USE, str(cache), *names],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    answers: list[dict[str, object]] = json.loads(done.stdout.splitlines()[-1])
    return answers


@pytest.mark.parametrize("shards", [pytest.param(1, marks=pytest.mark.nightly), 5])
def test_only_what_is_needed_is_fetched_and_a_local_copy_is_the_same_model(
    tmp_path: Path, shards: int
) -> None:
    folder = write_tiny("llama", tmp_path / "model", shards=shards)
    with serving(folder) as hub:
        endpoint = f"http://127.0.0.1:{hub.server_port}"
        local, remote = use(endpoint, tmp_path / "cache", str(folder), f"{REPOSITORY}-petals")
    assert remote == local
    weights = {file for file in hub.whole if file.endswith(".safetensors")}
    if shards > 1:
        weight_map = json.loads((folder / INDEX_FILE).read_text())["weight_map"]
        assert weights == {file for key, file in weight_map.items() if ".layers.1." in key}
        assert set(hub.parts) >= set(weight_map.values()) - weights  # sampled where they are
    # Without a network, what was fetched and noted is enough for the same work.
    again, offline = use(endpoint, tmp_path / "cache", REPOSITORY, "someone/else")
    assert again == local
    assert offline["error"] == "UnknownModel"
    assert "the hub cannot be reached" in str(offline["text"])


def test_what_is_not_there_is_one_sentence(tmp_path: Path) -> None:
    folder = write_tiny("llama", tmp_path / "model")
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with serving(folder) as hub:
        endpoint = f"http://127.0.0.1:{hub.server_port}"
        unknown, pickled = use(endpoint, tmp_path / "cache", "someone/else", REPOSITORY)
    assert unknown["error"] == "UnknownModel"
    assert "There is no model someone/else" in str(unknown["text"])
    assert pickled["error"] == "CheckpointError"
    assert "only pickled weights" in str(pickled["text"])


def test_petals_names_mean_the_originals() -> None:
    assert original_name("bigscience/bloom-7b1-petals") == "bigscience/bloom-7b1"
    assert original_name("bigscience/bloom-7b1") == "bigscience/bloom-7b1"


def test_a_name_that_cannot_be_one(tmp_path: Path) -> None:
    with pytest.raises(UnknownModel, match="nor a name that the hub allows"):
        open_checkpoint("no such model", cache_dir=tmp_path)
