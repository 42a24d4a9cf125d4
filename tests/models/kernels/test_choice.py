"""The quickest way of multiplying is taken; whatever is wrong with the cache or the clock changes no result."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from corolla.models.kernels import narrow
from corolla.models.kernels.apply import linear_of
from corolla.models.kernels.choice import LEAST, ROUNDS, TRIED, Times, Trials, best, is_clear
from corolla.models.kernels.narrow import Narrow, as_it_is
from corolla.models.kernels.ways import BOUNDS, Way, Ways, usual

CLASSES = len(TRIED)
SHAPE = (512, 256)  # no smaller than what is tried
LONG = 600.0  # seconds, more than all rounds take on any machine


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("COROLLA_CACHE", str(tmp_path))
    return tmp_path


def weight() -> Narrow:
    assert SHAPE[0] * SHAPE[1] >= LEAST
    return as_it_is(torch.randn(SHAPE, generator=torch.Generator().manual_seed(3)))


def times(**seconds: float) -> Times:
    """The same for all numbers of rows."""
    found: Times = {way: [[one] * ROUNDS for _ in range(CLASSES + 1)] for way, one in seconds.items()}
    if "own" in found:
        found["own"][-1] = []
    return found


def all_of(way: Way, back: Way) -> Ways:
    return Ways((way,) * CLASSES, back)


def test_the_quickest_is_taken_for_each_number_of_rows() -> None:
    some = times(own=3.0, torch=2.0, onednn=4.0)
    assert best(some, usual(own=True)) == all_of("torch", "torch")
    some["own"][0] = [1.0, 9.0, 9.0]  # one undisturbed round is enough
    some["onednn"][-1] = [1.0] * ROUNDS
    assert best(some, usual(own=True)) == Ways(("own", *["torch"] * (CLASSES - 1)), "onednn")  # type: ignore[arg-type]


def test_what_is_hardly_quicker_changes_nothing() -> None:
    some = times(own=1.0, torch=0.98, onednn=0.97)
    assert best(some, usual(own=True)).forward[0] == "own"


def test_packed_weights_have_to_be_quicker_than_the_best_others() -> None:
    assert best(times(torch=2.0, onednn=1.0, packed=0.8), usual(own=False)).packed
    assert not best(times(torch=2.0, onednn=1.0, packed=0.99), usual(own=False)).packed


def test_rounds_that_differ_are_not_kept() -> None:
    some = times(own=1.0, torch=1.0)
    assert is_clear(some)
    some["torch"][2] = [1.0, 3.0, 3.0]
    assert not is_clear(some)


def test_each_class_has_its_rows() -> None:
    ways = Ways(("own", "torch", "onednn", "own", "torch"), "torch")
    assert [ways.of(rows) for rows in (0, 1, 2, *BOUNDS[1:], 10_000)] == [
        *("own", "own", "torch", "torch", "onednn", "own", "torch")
    ]


def files(cache: Path) -> list[Path]:
    return sorted(cache.glob("ways/*/*.json"))


def kept(cache: Path, content: object) -> Path:
    """What another start is told that the last one found."""
    for _ in range(20):  # until the machine is quiet enough for a clear finding
        Trials(LONG, known={}).ways(weight())
        if files(cache):
            break
    else:
        pytest.skip("this machine is too busy for a clear finding")
    (file,) = files(cache)
    file.write_text(content if isinstance(content, str) else json.dumps(content))
    return file


def test_what_was_found_is_not_tried_again(cache: Path, caplog: pytest.LogCaptureFixture) -> None:
    odd = {"forward": ["torch", "onednn", "torch", "onednn", "torch"], "backward": "onednn", "packed": False}
    kept(cache, odd)
    with caplog.at_level(logging.INFO):
        found = Trials(0.0, known={}).ways(weight())  # there would be no time to try
    assert found == Ways(("torch", "onednn", "torch", "onednn", "torch"), "onednn")
    assert "512x256-float32: torch for up to 1 rows" in caplog.text


@pytest.mark.parametrize(
    "content",
    [
        "",
        "[]",
        "{",
        {"forward": ["torch"], "backward": "torch", "packed": False},
        {"forward": ["fastest"] * CLASSES, "backward": "torch", "packed": False},
        {"forward": ["torch"] * CLASSES, "backward": "own", "packed": False},
        {"forward": ["torch"] * CLASSES, "backward": "torch", "packed": 1},
        {"forward": [["torch"]] * CLASSES, "backward": {}, "packed": False},
    ],
    ids=str,
)
def test_a_file_that_says_something_else_is_not_believed(cache: Path, content: object) -> None:
    kept(cache, content)
    assert Trials(0.0, known={}).ways(weight()) == usual(weight().has_kernel)


def test_an_old_choice_of_a_kernel_that_is_not_there_is_not_believed(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(narrow, "library", lambda: None)
    kept(cache, {"forward": ["own"] * CLASSES, "backward": "torch", "packed": False})
    assert Trials(0.0, known={}).ways(weight()) == usual(own=False)


def test_a_cache_that_cannot_be_written_does_no_harm(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (cache / "file").write_text("")
    monkeypatch.setenv("COROLLA_CACHE", str(cache / "file"))
    one, value = weight(), torch.randn(3, SHAPE[1])
    layer = linear_of(one, None, trials=Trials(LONG, known={}))
    torch.testing.assert_close(layer(value), F.linear(value, one.values), atol=1e-4, rtol=1e-4)


def test_time_is_up(cache: Path) -> None:
    assert Trials(0.0, known={}).ways(weight()) == usual(weight().has_kernel)
    assert not files(cache)


def test_a_process_never_changes_its_mind(cache: Path) -> None:
    known: dict[str, Ways] = {}
    first = Trials(LONG, known).ways(weight())
    name = next(iter(known))
    odd = all_of("torch", "onednn") if first != all_of("torch", "onednn") else all_of("onednn", "torch")
    file = cache / "ways"
    for one in file.glob("*/*.json"):
        one.write_text(json.dumps({"forward": list(odd.forward), "backward": odd.backward, "packed": False}))
    assert Trials(LONG, known).ways(weight()) is known[name]
    assert known[name] == first


def test_small_weights_are_not_tried(cache: Path) -> None:
    known: dict[str, Ways] = {}
    Trials(LONG, known).ways(as_it_is(torch.randn(64, 32)))
    assert not known


def test_without_own_kernels_packed_weights_are_tried_too(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(narrow, "library", lambda: None)
    one, value = weight(), torch.randn(5, SHAPE[1])
    for ways in (Trials(LONG, known={}).ways(one), Ways(usual(False).forward, "torch", packed=True)):
        layer = linear_of(one, None, trials=Trials(0.0, known={"512x256-float32": ways}))
        assert "own" not in ways.forward
        torch.testing.assert_close(layer(value), F.linear(value, one.values), atol=1e-4, rtol=1e-4)
