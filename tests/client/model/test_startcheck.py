"""What a client finds out before it generates: whether this transformers release does with it what it should."""

from __future__ import annotations

import re
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.tiny_models import FAMILIES, tiny_config
from transformers import AutoConfig

from corolla.client import local_blocks
from corolla.client.model import distributed, startcheck
from corolla.client.model.causal_lm import distributed_class
from corolla.client.model.startcheck import TESTED, check_generation
from corolla.errors import UnsupportedFamily
from corolla.models.attention.span_cache import SpanCache
from corolla.models.families import structure


@pytest.fixture(autouse=True)
def nothing_known(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every test finds out by itself."""
    monkeypatch.setattr(startcheck, "_passed", set())


def class_of(family: str) -> Any:
    """The client's class for a tiny model of a family."""
    return distributed_class(structure(tiny_config(family)).causal_lm.__name__)


@pytest.mark.parametrize("family", FAMILIES)
def test_families_pass(family: str) -> None:
    state = torch.random.get_rng_state()
    check_generation(tiny_config(family), class_of(family))
    assert torch.equal(torch.random.get_rng_state(), state)


@pytest.mark.parametrize(
    "around",
    [
        torch.no_grad,
        torch.inference_mode,
        lambda: torch.autocast("cpu", torch.bfloat16),
        lambda: torch.device("meta"),
    ],
    ids=["no_grad", "inference_mode", "autocast", "device"],
)
def test_it_passes_under_whatever_a_model_is_loaded(around: Callable[[], Any]) -> None:
    with around():
        check_generation(tiny_config("llama"), class_of("llama"))


def broken(family: str, **methods: Any) -> Any:
    """The client's class with some methods of another release."""
    kind = class_of(family)
    return type(kind.__name__, (kind,), {**methods, "__module__": kind.__module__})


def test_a_release_that_calls_the_cache_otherwise_is_refused() -> None:
    """As transformers 5.24 did to what knew 5.23 only: the family's own code made a cache of its own."""

    def prepare(self: Any, input_ids: Any, **arguments: Any) -> Any:
        prepared = super(kind, self).prepare_inputs_for_generation(input_ids, **arguments)
        prepared.pop(self.cache_name, None)
        return prepared

    kind = broken("llama", prepare_inputs_for_generation=prepare)
    with pytest.raises(UnsupportedFamily, match="does not generate what it should") as refusal:
        check_generation(tiny_config("llama"), kind)
    assert "\n" not in str(refusal.value)
    assert "pip install" not in str(refusal.value)


def test_a_release_that_is_not_tested_is_told_which_are(monkeypatch: pytest.MonkeyPatch) -> None:
    def generate(self: Any, *_args: Any, **_kwargs: Any) -> Any:
        raise TypeError("unexpected keyword argument 'cache'")

    monkeypatch.setattr(startcheck, "TESTED", "transformers>=99")
    with pytest.raises(UnsupportedFamily, match=re.escape("pip install 'transformers>=99'")):
        check_generation(tiny_config("llama"), broken("llama", generate=generate))


def test_a_release_that_raises_is_refused() -> None:
    def generate(self: Any, *_args: Any, **_kwargs: Any) -> Any:
        raise TypeError("unexpected keyword argument 'cache'")

    with pytest.raises(UnsupportedFamily, match="TypeError: unexpected keyword argument"):
        check_generation(tiny_config("llama"), broken("llama", generate=generate))


@pytest.mark.parametrize(("wrong", "tuples"), [("llama", True), ("gpt_neo", False)])
def test_a_client_that_misreads_its_blocks_is_refused(
    wrong: str, tuples: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """gpt_neo's blocks return tuples, llama's do not: the other form makes one row of a batch, or fails."""
    monkeypatch.setattr(distributed, "values_returned", lambda _config: int(tuples))
    right = "gpt_neo" if tuples else "llama"
    for family in (right, wrong):
        config = AutoConfig.for_model(family)
        kind = distributed_class(structure(config).causal_lm.__name__)
        with pytest.raises(UnsupportedFamily) if family == wrong else nullcontext():
            check_generation(config, kind)


@pytest.mark.parametrize(
    ("place", "difference"),
    [
        ((SpanCache, "truncate"), "session's second turn|rollback"),
        ((SpanCache, "reorder_cache"), "with its rows exchanged"),
    ],
    ids=lambda value: value if isinstance(value, str) else value[1],
)
def test_what_a_client_forgets_is_noticed(
    place: tuple[Any, str], difference: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(*place, lambda *_args: None)
    with pytest.raises(UnsupportedFamily, match=difference):
        check_generation(tiny_config("llama"), class_of("llama"))


def test_gradients_that_do_not_come_through_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    def run(self: Any, *args: Any) -> Any:
        output = own(self, *args)
        return output + (output - output.detach())  # the same numbers, twice the gradient

    own = local_blocks.LocalBlocks.run
    monkeypatch.setattr(local_blocks.LocalBlocks, "run", run)
    with pytest.raises(UnsupportedFamily, match="in gradients"):
        check_generation(tiny_config("llama"), class_of("llama"))


def test_what_is_tested_is_what_the_package_asks_for() -> None:
    project = (Path(__file__).parents[3] / "pyproject.toml").read_text()
    assert f'"{TESTED}"' in project
    oldest = re.search(r"OLDEST_RELEASE := (\S+)", (Path(__file__).parents[3] / "Makefile").read_text())
    assert oldest is not None
    assert TESTED.startswith(f"transformers>={oldest[1].removesuffix('.0')},")
    newest = re.search(r"transformers==5\.(\d+)", (Path(__file__).parents[3] / "constraints.txt").read_text())
    assert newest is not None
    assert TESTED.endswith(f"<5.{int(newest[1]) + 1}")
