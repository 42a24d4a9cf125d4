"""Files of others, nested so deeply that a parser's stack would end: each is refused in one sentence."""

from __future__ import annotations

import ast
import bz2
import gzip
import json
import lzma
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pytest

import corolla.json_files
from corolla.api.access import Keys
from corolla.chat.transcript import read_chat
from corolla.cli.defaults import read_defaults
from corolla.cli.partner import find_partner
from corolla.data.render import Renderer, RenderSettings
from corolla.data.sources import load_conversations
from corolla.errors import BundleError, CorollaError, DataError, NotAdmitted, TranscriptError, UsageError
from corolla.models.checkpoints.checkpoint import open_checkpoint
from corolla.models.checkpoints.pretrained import load_generation_config, load_tokenizer
from corolla.swarm.access.invitations import read_invitation
from corolla.swarm.access.membership import PeerFile, read_certificates
from corolla.swarm.transport.identity import Identity
from corolla.tuning.bundle import load_bundle
from corolla.tuning.checkpoints import RunFolder
from tests.tiny_models import write_tiny
from tests.tuning.tiny_setup import byte_tokenizer

DEPTH = 200_000
AT_NIGHT = 10 * DEPTH


def nested(form: str, depth: int) -> str:
    lists = "[" * depth + "]" * depth
    match form:
        case "lists":
            return lists
        case "objects":
            return '{"a":' * depth + "1" + "}" * depth
        case _:
            return f'{{"format": 1, "model_type": "llama", "a": {lists}}}'


LISTS, OBJECTS = nested("lists", DEPTH), nested("objects", DEPTH)
CONTENTS = [
    pytest.param(form, depth, id=f"{form}-{depth}", marks=() if depth == DEPTH else pytest.mark.nightly)
    for form in ("lists", "objects", "inside")
    for depth in (DEPTH, AT_NIGHT)
]
PACKAGE = Path(corolla.json_files.__file__).parent


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = write_tiny("llama", tmp_path / "model")
    byte_tokenizer().save_pretrained(folder)
    return folder


def all_of(model: Path) -> None:
    checkpoint = open_checkpoint(str(model))
    tokenizer = load_tokenizer(checkpoint)
    load_generation_config(checkpoint, checkpoint.config)
    Renderer(tokenizer, RenderSettings(style="template"))


@pytest.mark.parametrize(("form", "depth"), CONTENTS)
@pytest.mark.parametrize(
    "name",
    [
        "config.json",
        "generation_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "special_tokens_map.json",
        "added_tokens.json",
        "model.safetensors.index.json",
    ],
)
def test_a_model_of_others(model: Path, name: str, form: str, depth: int) -> None:
    (model / name).write_text(nested(form, depth))
    with pytest.raises(CorollaError) as refused:
        all_of(model)
    assert "\n" not in str(refused.value)
    assert len(str(refused.value)) < 500


def test_a_header_of_weights(model: Path) -> None:
    header = OBJECTS.encode()
    (model / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header)
    with pytest.raises(CorollaError, match="header cannot be read"):
        assert open_checkpoint(str(model)).identity


@pytest.mark.parametrize(
    "template",
    ["{{ " + "(" * DEPTH + ")" * DEPTH + " }}", "{% if a %}" * 20_000 + "{% endif %}" * 20_000],
    ids=["expression", "blocks"],
)
def test_a_chat_template(model: Path, template: str) -> None:
    (model / "chat_template.jinja").write_text(template)
    with pytest.raises(UsageError, match="chat template"):
        all_of(model)


def zstd(content: bytes) -> bytes:
    return bytes(pyarrow.compress(content, codec="zstd", asbytes=True))


def as_bundle(folder: Path, name: str, content: str) -> None:
    folder.mkdir()
    (folder / "bundle.json").write_text('{"format": 1}')
    (folder / name).write_text(content)
    load_bundle(folder)


def as_prompt(folder: Path, name: str, content: str) -> None:
    folder.mkdir()
    (folder / name).write_text(content)
    find_partner(str(folder))


def as_run(folder: Path, name: str, content: str) -> None:
    run = folder.with_name(f"{folder.name}.run")
    (run / "checkpoint-1").mkdir(parents=True)
    for written, sums in (("run.json", {}), ("before.json", {"reply": {}, "marker": {}})):
        (run / written).write_text(json.dumps(sums))
    (run / "checkpoint-1" / "trainer_state.json").write_text("{}")
    (run / name).write_text(content)
    RunFolder(folder).begin({}, resume=True, overwrite=False)


def as_chat(path: Path, _name: str, content: str) -> None:
    header = {"partner": "a", "model": "b", "prompt": None, "rendering": {}, "sampling": {}, "system": None}
    begun = json.dumps({"format": 1, "max_context": 9, **header})
    path.write_text(f"{begun}\n{content}\n{{}}\n" if _name == "line" else f"{content}\n{{}}\n")
    read_chat(path)


def as_data(path: Path, name: str, content: str) -> None:
    path = path.with_name(name)
    path.write_text(content)
    load_conversations(str(path))


def as_certificates(path: Path, _name: str, content: str) -> None:
    path.with_name(f"{path.name}.certificates").write_text(content)
    read_certificates(path)


@pytest.mark.parametrize(("form", "depth"), CONTENTS)
@pytest.mark.parametrize(
    ("read", "name", "error"),
    [
        (as_bundle, "bundle.json", BundleError),
        (as_prompt, "prompt.json", BundleError),
        (as_run, "run.json", BundleError),
        (as_run, "before.json", BundleError),
        (as_run, "checkpoint-1/trainer_state.json", BundleError),
        (as_chat, "header", TranscriptError),
        (as_chat, "line", TranscriptError),
        (as_data, "data.json", DataError),
        (as_data, "data.jsonl", DataError),
        (as_certificates, "certificates", UsageError),
    ],
)
def test_other_files(
    read: Callable[[Path, str, str], None],
    name: str,
    error: type[CorollaError],
    form: str,
    depth: int,
    tmp_path: Path,
) -> None:
    with pytest.raises(error) as refused:
        read(tmp_path / "here", name, nested(form, depth))
    assert len(str(refused.value)) < 3000


def test_cells_and_calls(tmp_path: Path) -> None:
    path = tmp_path / "data.csv"
    path.write_text(f'prompt,response\nhi,"{LISTS}"\nhow are you,fine\n')
    conversations, report = load_conversations(str(path))
    assert (len(conversations), report.used) in ((1, 1), (2, 2)), (
        "a text that looks like a list may be a text"
    )


def test_defaults_and_invitations(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "config.toml"
    monkeypatch.setenv("COROLLA_CONFIG", str(path))
    for content in (f"a = {LISTS}", "a = " + "{a = " * DEPTH + "1" + "}" * DEPTH):
        path.write_text(content)
        with pytest.raises(UsageError):
            read_defaults({})
    for token in (LISTS, "e30." + "e" * DEPTH + ".e30"):
        with pytest.raises((UsageError, NotAdmitted)):
            read_invitation(token)


def test_a_file_without_an_end_is_not_taken_into_memory(tmp_path: Path) -> None:
    folder = tmp_path / "bundle"
    folder.mkdir()
    with (folder / "bundle.json").open("wb") as file:
        file.truncate(2**40)  # a hole: it takes no room on the disk
    with pytest.raises(BundleError, match="cannot be read"):
        load_bundle(folder)
    with (tmp_path / "chat.jsonl").open("wb") as file:
        file.truncate(2**40)
    with pytest.raises(TranscriptError, match="is larger than 64 MiB"):
        read_chat(tmp_path / "chat.jsonl")


@pytest.mark.parametrize("path", [Path("/dev/zero"), Path("/dev/full")], ids=lambda path: path.name)
def test_a_device_without_an_end_is_not_taken_into_memory(path: Path) -> None:
    peers: list[Callable[[], Any]] = [
        lambda: Identity.read(path),
        lambda: PeerFile(path),
        lambda: Keys.read([], path),
    ]
    for read in peers:
        with pytest.raises(UsageError, match="is larger than 64 MiB"):
            read()
    with pytest.raises(DataError, match="There is no file"):
        load_conversations(str(path))


@pytest.mark.parametrize(
    "pack", [gzip.compress, bz2.compress, lzma.compress, zstd], ids=lambda pack: pack.__module__
)
@pytest.mark.parametrize("size", [70 * 2**20, pytest.param(700 * 2**20, marks=pytest.mark.nightly)])
def test_a_bomb_in_the_place_of_data(pack: Callable[[bytes], bytes], size: int, tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl.gz"
    path.write_bytes(pack(b" " * size))
    with pytest.raises(DataError, match="times as large when unpacked"):
        load_conversations(str(path))


# --- one reader, in the source ------------------------------------------------------------------------------


def readers(source: str) -> list[str]:
    """Calls that parse JSON by another way than `corolla.json_files`."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
            continue
        name = ast.unparse(node.func)
        if name in {"json.load", "json.loads", "json.JSONDecoder", "msgspec.json.decode", "json.decode"}:
            found.append(name)
        if name.endswith((".raw_decode", "json.Decoder")):
            found.append(name)
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call) and ast.unparse(node.func) in {"parse", "parse_object"}:
            text = ast.unparse(node.args[0])
            if "read_bytes()" in text or "read_text(" in text:
                found.append(f"a whole file, however large: {text}")
    return found


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: path.name)
def test_json_has_one_reader(path: Path) -> None:
    # Rows of training data are read one by one, so that a bad one costs no other.
    if path.relative_to(PACKAGE).as_posix() not in {"json_files.py", "data/rows.py"}:
        assert readers(path.read_text()) == []


@pytest.mark.parametrize(
    "line",
    [
        "content = json.loads(path.read_text())",
        "with path.open() as file:\n    content = json.load(file)",
        "content = msgspec.json.decode(raw)",
        "content = parse_object(path.read_bytes())",
    ],
)
def test_the_walk_sees_other_readers(line: str) -> None:
    assert readers(line)
