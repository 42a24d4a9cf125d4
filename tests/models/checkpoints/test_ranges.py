"""Of one large file on the hub a server brings the bytes of its blocks, and goes on where it was cut off."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from tests.hub_stand_in import REPOSITORY, Hub, serving
from tests.stored_models import write_stored
from tests.tiny_models import write_tiny

from corolla.errors import CheckpointError, CorollaError, UnknownModel
from corolla.models.checkpoints import remote
from corolla.models.checkpoints.checkpoint import Checkpoint, open_checkpoint
from corolla.models.checkpoints.hub import HubRepo
from corolla.models.checkpoints.pieces import Pieces
from corolla.models.checkpoints.shards import local_reader, read_entries
from corolla.models.span import load_span

PIECE = 4096
FILE = "model.safetensors"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_tiny("llama", tmp_path / "model", layers=6)


@pytest.fixture
def hub(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    monkeypatch.setattr(remote, "TRIES", 3)
    monkeypatch.setattr(remote, "FIRST_WAIT", 0.0)
    with serving(folder) as found:
        yield found


@pytest.fixture
def opened(hub: Hub, tmp_path: Path) -> Callable[[], Checkpoint]:
    def again() -> Checkpoint:
        source = HubRepo(
            REPOSITORY,
            revision=None,
            token=None,
            cache_dir=tmp_path / "cache",
            endpoint=hub.endpoint,
            piece_bytes=PIECE,
        )
        return Checkpoint(REPOSITORY, None, source)

    return again


def weights(checkpoint: Checkpoint, block: int = 2) -> dict[str, torch.Tensor]:
    span = load_span(checkpoint, block, block + 1, dtype=torch.float32)
    return dict(span.blocks.state_dict())


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def test_only_a_blocks_bytes_are_brought(
    hub: Hub, opened: Callable[[], Checkpoint], folder: Path, tmp_path: Path
) -> None:
    expected = weights(open_checkpoint(str(folder)))
    assert same(weights(opened()), expected)
    entries = read_entries(local_reader(folder / FILE), FILE)
    own = [one for key, one in entries.items() if ".layers.2." in key]
    first, last = min(one.offset for one in own), max(one.offset + one.size for one in own)
    brought = [(begin, end) for begin, end in hub.ranges if end - begin > 16 and begin != 8]
    assert brought
    assert min(begin for begin, _ in brought) > first - PIECE
    assert max(end for _, end in brought) < last + PIECE
    assert hub.whole == ["config.json"]
    kept = sum(path.stat().st_size for path in (tmp_path / "cache" / "pieces").rglob("0*-*"))
    assert kept <= last - first + 2 * PIECE < (folder / FILE).stat().st_size / 3
    # The next start asks for nothing but what it does not have.
    del hub.ranges[:]
    assert same(weights(opened()), expected)
    assert not hub.ranges
    weights(opened(), 3)
    assert all(end > last - 2 * PIECE for begin, end in hub.ranges)


def test_without_a_network_what_has_come_is_enough(
    hub: Hub, opened: Callable[[], Checkpoint], monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = weights(opened())
    monkeypatch.setattr("corolla.models.checkpoints.hub.hub_answers", lambda _endpoint: False)
    assert same(weights(opened()), expected)
    with pytest.raises(UnknownModel, match="the hub cannot be reached"):
        weights(opened(), 4)


def test_a_quantized_one_in_two_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stored, _ = write_stored("gptq", tmp_path, layers=4, files=2)
    expected = weights(open_checkpoint(str(stored)))
    with serving(stored) as hub:
        source = HubRepo(
            REPOSITORY,
            revision=None,
            token=None,
            cache_dir=tmp_path / "c",
            endpoint=hub.endpoint,
            piece_bytes=512,
        )
        checkpoint = Checkpoint(REPOSITORY, None, source)
        assert same(weights(checkpoint), expected)
        assert checkpoint.identity == open_checkpoint(str(stored)).identity
        assert set(hub.whole) == {"config.json", "model.safetensors.index.json"}


@pytest.mark.parametrize("fault", ["cuts", "refuses"])
def test_a_line_that_breaks_now_and_then(
    hub: Hub, opened: Callable[[], Checkpoint], folder: Path, fault: str
) -> None:
    checkpoint = opened()
    setattr(hub, fault, 2)
    assert same(weights(checkpoint), weights(open_checkpoint(str(folder))))
    assert getattr(hub, fault) <= 0


def test_a_server_goes_on_where_it_was_cut_off(
    hub: Hub, opened: Callable[[], Checkpoint], folder: Path
) -> None:
    checkpoint = opened()
    hub.cuts_after = 24_000
    with pytest.raises(UnknownModel, match="run the command again; what has come is kept"):
        weights(checkpoint)
    done = {piece for piece in hub.ranges if hub.ranges.count(piece) == 1 and piece[1] - piece[0] == PIECE}
    assert done
    hub.cuts_after = 1 << 60
    del hub.ranges[:]
    assert same(weights(opened()), weights(open_checkpoint(str(folder))))
    assert hub.ranges
    assert not done & set(hub.ranges)


def test_a_server_that_sends_whole_files_only(
    hub: Hub, opened: Callable[[], Checkpoint], folder: Path
) -> None:
    hub.ignores_ranges = True
    assert same(weights(opened()), weights(open_checkpoint(str(folder))))
    assert hub.whole.count(FILE) == 2  # the first request was for a part
    assert not hub.parts


@pytest.mark.parametrize("change", ["longer", "other"])
def test_a_file_that_changes_midway(
    hub: Hub, opened: Callable[[], Checkpoint], folder: Path, change: str
) -> None:
    checkpoint = opened()
    checkpoint.elements(lambda name: ".layers.2." in name)
    content = (folder / FILE).read_bytes()
    changed = content + b"more" if change == "longer" else content[:-4] + b"else"
    (folder / FILE).write_bytes(changed)
    with pytest.raises(CheckpointError, match="no longer the file on the hub that it was"):
        weights(checkpoint)


def test_a_commit_that_is_gone(hub: Hub, opened: Callable[[], Checkpoint]) -> None:
    checkpoint = opened()
    checkpoint.elements(lambda name: ".layers.2." in name)
    hub.gone = True
    with pytest.raises(CheckpointError, match="is not there, or no longer"):
        weights(checkpoint)


@pytest.mark.parametrize("spoil", [lambda content: content[:-1], lambda content: b"\xff" + content[1:]])
def test_what_the_disk_has_spoilt_is_brought_anew(
    opened: Callable[[], Checkpoint], tmp_path: Path, folder: Path, spoil: Callable[[bytes], bytes]
) -> None:
    weights(opened())
    pieces = sorted((tmp_path / "cache" / "pieces").rglob("0*-*"))
    for path in pieces[1:3]:
        path.write_bytes(spoil(path.read_bytes()))
    assert same(weights(opened()), weights(open_checkpoint(str(folder))))


def test_too_little_room_is_said_before_anything_is_brought(
    hub: Hub, opened: Callable[[], Checkpoint], monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = opened()
    checkpoint.elements(lambda name: ".layers.2." in name)
    monkeypatch.setattr(shutil, "disk_usage", lambda _path: type("Usage", (), {"free": 5})())
    before = len(hub.ranges)
    with pytest.raises(CheckpointError, match=r"The disk is full where .* MiB more are needed"):
        weights(checkpoint)
    assert len(hub.ranges) == before


def test_a_disk_that_fills_meanwhile(
    opened: Callable[[], Checkpoint], monkeypatch: pytest.MonkeyPatch, folder: Path
) -> None:
    checkpoint = opened()
    checkpoint.elements(lambda name: ".layers.2." in name)
    write, count = os.fsync, [0]

    def full(handle: int) -> None:
        count[0] += 1
        if count[0] > 6:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write(handle)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(CheckpointError, match="The disk is full where"):
        weights(checkpoint)
    monkeypatch.undo()
    assert same(weights(opened()), weights(open_checkpoint(str(folder))))


def test_pieces_cover_any_range(tmp_path: Path) -> None:
    content = bytes(range(256)) * 4
    asked: list[tuple[int, int]] = []

    def fetch(offset: int, size: int) -> bytes:
        asked.append((offset, size))
        return content[offset : offset + size]

    pieces = Pieces(tmp_path / "file", len(content), fetch, 100)
    told: list[int] = []
    missing = pieces.missing([(95, 10), (1000, 24)])
    assert missing == [0, 1, 10]
    assert pieces.nbytes(missing) == 224
    pieces.bring(missing, told.append)
    assert sorted(told) == [24, 100, 100]
    assert sorted(asked) == [(0, 100), (100, 100), (1000, 24)]
    again = Pieces(tmp_path / "file", len(content), fetch, 100)
    for offset, size in [(95, 10), (0, 200), (1000, 24), (1, 1)]:
        assert again.read(offset, size) == content[offset : offset + size]
    assert len(asked) == 3
    assert again.read(150, 333) == content[150:483]


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    pieces = Pieces(tmp_path / "file" / "deeper", 10, lambda _offset, size: b"x" * size)
    with pytest.raises(CorollaError, match="cannot be written"):
        pieces.bring([0], lambda _size: None)
