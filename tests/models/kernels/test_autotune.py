"""The quickest backend of multiplying is taken; whatever is wrong with the cache or the clock changes no result."""

from __future__ import annotations

import json
import logging
from contextlib import AbstractContextManager
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from corolla.models.kernels import narrow
from corolla.models.kernels.apply import linear_of
from corolla.models.kernels.autotune import LEAST, ROUNDS, TRIED, Autotuner, Times, best, is_clear
from corolla.models.kernels.linear import BOUNDS, Backend, Backends, default_backends
from corolla.models.kernels.narrow import Narrow, as_it_is

CLASSES = len(TRIED)
SHAPE = (512, 256)  # no smaller than what is tried
LONG = 600.0  # seconds, more than all rounds take on any machine


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("COROLLA_CACHE", str(tmp_path))
    return tmp_path


def weight() -> Narrow:
    assert SHAPE[0] * SHAPE[1] >= LEAST
    return as_it_is(torch.randn(SHAPE, generator=torch.Generator().manual_seed(3), dtype=torch.float32))


def times(**seconds: float) -> Times:
    """The same for all numbers of rows."""
    found: Times = {backend: [[one] * ROUNDS for _ in range(CLASSES + 1)] for backend, one in seconds.items()}
    if "own" in found:
        found["own"][-1] = []
    return found


def all_of(backend: Backend, back: Backend) -> Backends:
    return Backends((backend,) * CLASSES, back)


@pytest.mark.usefixtures("cache")
def test_others_are_tried_in_float32_whatever_torch_makes_tensors_in(
    another_default: AbstractContextManager[None],
) -> None:
    """What is made for them in another dtype would have no room for what the kernels write."""
    with another_default:
        found = Autotuner(seconds=LONG, known={}).backends(weight())
    assert len(found.forward) == CLASSES


def test_the_quickest_is_taken_for_each_number_of_rows() -> None:
    some = times(own=3.0, torch=2.0, onednn=4.0)
    assert best(some, default_backends(own=True)) == all_of("torch", "torch")
    some["own"][0] = [1.0, 9.0, 9.0]  # one undisturbed round is enough
    some["onednn"][-1] = [1.0] * ROUNDS
    assert best(some, default_backends(own=True)) == Backends(("own", *["torch"] * (CLASSES - 1)), "onednn")  # type: ignore[arg-type]


def test_what_is_hardly_quicker_changes_nothing() -> None:
    some = times(own=1.0, torch=0.98, onednn=0.97)
    assert best(some, default_backends(own=True)).forward[0] == "own"


def test_packed_weights_have_to_be_quicker_than_the_best_others() -> None:
    assert best(times(torch=2.0, onednn=1.0, packed=0.8), default_backends(own=False)).packed
    assert not best(times(torch=2.0, onednn=1.0, packed=0.99), default_backends(own=False)).packed


def test_rounds_that_differ_are_not_kept() -> None:
    some = times(own=1.0, torch=1.0)
    assert is_clear(some)
    some["torch"][2] = [1.0, 3.0, 3.0]
    assert not is_clear(some)


def test_each_class_has_its_rows() -> None:
    backends = Backends(("own", "torch", "onednn", "own", "torch"), "torch")
    assert [backends.of(rows) for rows in (0, 1, 2, *BOUNDS[1:], 10_000)] == [
        *("own", "own", "torch", "torch", "onednn", "own", "torch")
    ]


def files(cache: Path) -> list[Path]:
    return sorted(cache.glob("autotune/*/*.json"))


def kept(cache: Path, content: object) -> Path:
    """What another start is told that the last one found."""
    for _ in range(20):  # until the machine is quiet enough for a clear finding
        Autotuner(LONG, known={}).backends(weight())
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
        found = Autotuner(0.0, known={}).backends(weight())  # there would be no time to try
    assert found == Backends(("torch", "onednn", "torch", "onednn", "torch"), "onednn")
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
    assert Autotuner(0.0, known={}).backends(weight()) == default_backends(weight().has_kernel)


def test_an_old_choice_of_a_kernel_that_is_not_there_is_not_believed(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(narrow, "library", lambda: None)
    kept(cache, {"forward": ["own"] * CLASSES, "backward": "torch", "packed": False})
    assert Autotuner(0.0, known={}).backends(weight()) == default_backends(own=False)


def test_a_cache_that_cannot_be_written_does_no_harm(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (cache / "file").write_text("")
    monkeypatch.setenv("COROLLA_CACHE", str(cache / "file"))
    one, value = weight(), torch.randn(3, SHAPE[1])
    layer = linear_of(one, None, autotuner=Autotuner(LONG, known={}))
    torch.testing.assert_close(layer(value), F.linear(value, one.values), atol=1e-4, rtol=1e-4)


def test_time_is_up(cache: Path) -> None:
    assert Autotuner(0.0, known={}).backends(weight()) == default_backends(weight().has_kernel)
    assert not files(cache)


def test_a_process_never_changes_its_mind(cache: Path) -> None:
    known: dict[str, Backends] = {}
    first = Autotuner(LONG, known).backends(weight())
    name = next(iter(known))
    odd = all_of("torch", "onednn") if first != all_of("torch", "onednn") else all_of("onednn", "torch")
    file = cache / "autotune"
    for one in file.glob("*/*.json"):
        one.write_text(json.dumps({"forward": list(odd.forward), "backward": odd.backward, "packed": False}))
    assert Autotuner(LONG, known).backends(weight()) is known[name]
    assert known[name] == first


def test_small_weights_are_not_tried(cache: Path) -> None:
    known: dict[str, Backends] = {}
    Autotuner(LONG, known).backends(as_it_is(torch.randn(64, 32)))
    assert not known


def test_without_own_kernels_packed_weights_are_tried_too(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(narrow, "library", lambda: None)
    one, value = weight(), torch.randn(5, SHAPE[1])
    for backends in (
        Autotuner(LONG, known={}).backends(one),
        Backends(default_backends(False).forward, "torch", packed=True),
    ):
        layer = linear_of(one, None, autotuner=Autotuner(0.0, known={"512x256-float32": backends}))
        assert "own" not in backends.forward
        torch.testing.assert_close(layer(value), F.linear(value, one.values), atol=1e-4, rtol=1e-4)
