"""No file of a model's repository is run, nothing is asked, and what cannot be read is a sentence."""

from __future__ import annotations

import ast
import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.chat.reference import VOCABULARY, byte_tokenizer
from tests.tiny_models import write_tiny

from corolla.errors import CheckpointError, CorollaError, UnsupportedFamily
from corolla.models.checkpoints.checkpoint import open_checkpoint
from corolla.models.checkpoints.pretrained import load_generation_config, load_tokenizer

SOURCE = Path(__file__).parents[3] / "src" / "corolla"
OWN = """
from pathlib import Path
from transformers import PreTrainedTokenizerFast
Path(__file__).with_name("RAN").write_text("")
class Own(PreTrainedTokenizerFast):
    pass
"""
DEEP = "[" * 100_000 + "]" * 100_000


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_tiny("llama", tmp_path_factory.mktemp("good"), vocab_size=VOCABULARY)
    byte_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def folder(good: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A checkpoint with a tokenizer; on stdin somebody says yes to everything."""
    monkeypatch.setattr("sys.stdin", io.StringIO("y\n" * 9))
    folder = shutil.copytree(good, tmp_path / "model")
    (folder / "own.py").write_text(OWN)
    return folder


def change(folder: Path, file: str, **values: Any) -> None:
    path = folder / file
    content = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(content | values))


def test_a_good_one_is_read(folder: Path) -> None:
    assert len(load_tokenizer(open_checkpoint(str(folder)))) == len(byte_tokenizer())


@pytest.mark.parametrize("kind", ["Own", None, "PreTrainedTokenizer"])
@pytest.mark.parametrize(
    "code", [["own.Own", None], "own.Own", [None, "own.Own"], "a/repo--own.Own"], ids=str
)
def test_a_tokenizer_of_code_is_refused_by_all(folder: Path, code: Any, kind: str | None) -> None:
    """When the checkpoint is opened, so also by a server that needs no tokenizer."""
    change(folder, "tokenizer_config.json", tokenizer_class=kind, auto_map={"AutoTokenizer": code})
    with pytest.raises(CheckpointError, match=r"^The tokenizer of .* is Python code .* never runs: [^.]*\.$"):
        open_checkpoint(str(folder))
    assert not list(folder.glob("RAN"))


def test_the_old_way_to_name_code_is_refused_too(folder: Path) -> None:
    change(folder, "tokenizer_config.json", tokenizer_class="Own", auto_map=["own.Own", None])
    with pytest.raises(CheckpointError, match="never runs"):
        open_checkpoint(str(folder))


def test_where_transformers_has_the_class_its_own_is_used(folder: Path) -> None:
    change(folder, "tokenizer_config.json", auto_map={"AutoTokenizer": [None, "own.Own"]})
    assert load_tokenizer(open_checkpoint(str(folder)))("ab").input_ids == byte_tokenizer()("ab").input_ids
    assert not list(folder.glob("RAN"))


def test_a_config_of_code(folder: Path) -> None:
    change(folder, "config.json", model_type="own", auto_map={"AutoConfig": "own.Own"})
    with pytest.raises(UnsupportedFamily, match=r"model type own\) is not one .* never run\.$"):
        open_checkpoint(str(folder))
    assert not list(folder.glob("RAN"))


def test_a_known_config_that_names_code_too(folder: Path) -> None:
    """As many older checkpoints of falcon and phi3 do; the library's own code is used."""
    named = {"AutoConfig": "own.Own", "AutoModelForCausalLM": "own.Own"}
    change(folder, "config.json", auto_map=named)
    assert open_checkpoint(str(folder)).num_blocks == 4
    (folder / "custom_generate").mkdir()
    (folder / "custom_generate" / "generate.py").write_text(OWN)
    load_generation_config(open_checkpoint(str(folder)), default=None)  # type: ignore[arg-type]
    assert not list(folder.rglob("RAN"))


@pytest.mark.parametrize("file", ["tokenizer.json", "tokenizer_config.json", "generation_config.json"])
@pytest.mark.parametrize(
    "content",
    [DEEP, "[]", "{", '{"model": {"type": "of the future"}}', '{"a": "\\ud800"}', "\udcff"],
    ids=range(6),
)
def test_files_that_cannot_be_read(folder: Path, file: str, content: str) -> None:
    """A sentence; or they are read: not everything that is odd is wrong."""
    (folder / file).write_bytes(
        content.encode(errors="surrogateescape") if "\udcff" in content else content.encode()
    )
    said = None
    try:
        checkpoint = open_checkpoint(str(folder))
        load_tokenizer(checkpoint)
        load_generation_config(checkpoint, default=None)  # type: ignore[arg-type]
    except CorollaError as error:
        said = str(error)
    if said is None:
        assert file != "tokenizer.json"
        assert content.startswith('{"')
    else:
        assert len(said) < 500
        assert "\n" not in said


@pytest.mark.parametrize(
    "content", [DEEP, "[]", '{"quantization_config": [1], "model_type": "llama"}'], ids=range(3)
)
def test_configs_that_cannot_be_read(folder: Path, content: str) -> None:
    (folder / "config.json").write_text(content)
    with pytest.raises(CorollaError, match=r"^[^\n]{1,400}$"):
        open_checkpoint(str(folder))


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen2", "gemma3_text", "opt"])
def test_a_checkpoint_without_a_tokenizer(family: str, tmp_path: Path) -> None:
    """Some families would get one that knows no word."""
    write_tiny(family, tmp_path)
    with pytest.raises(CheckpointError, match="has no tokenizer"):
        load_tokenizer(open_checkpoint(str(tmp_path)))


# --- that there is one door only ----------------------------------------------------------------------------


def calls(path: Path, named: Callable[[str], bool]) -> list[str]:
    found = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)]
    return [text for node in found if named(text := ast.unparse(node.func))]


def test_nothing_else_calls_the_librarys_loaders() -> None:
    ours = {"AutoDistributedModelForCausalLM.from_pretrained", "super().from_pretrained"}
    found = {
        f"{path.relative_to(SOURCE)}: {call}"
        for path in SOURCE.rglob("*.py")
        if path != SOURCE / "models" / "checkpoints" / "pretrained.py"
        for call in calls(path, lambda text: text.endswith(".from_pretrained"))
        if call not in ours
    }
    assert not found


def test_every_loader_is_told_to_run_nothing() -> None:
    source = (SOURCE / "models" / "checkpoints" / "pretrained.py").read_text()
    tree = ast.parse(source)
    loaders = [
        given
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and (given := ast.unparse(node)).startswith("Auto")
    ]
    loaders = [given for given in loaders if ".from_pretrained(" in given]
    assert len(loaders) == 6
    for given in loaders:
        assert "trust_remote_code=False" in given or "**arguments" in given
