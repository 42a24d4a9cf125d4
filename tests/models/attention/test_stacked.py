"""Steps of sequences whose blocks keep states, computed as a batch of the family's code."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.models.every_family import tiny
from tests.mutants import Mistakes
from torch import Tensor

from corolla.models.attention import stacked
from corolla.models.attention.snapshots import copied
from corolla.models.attention.stacked import StackedCaches
from corolla.models.checkpoints.checkpoint import open_checkpoint
from corolla.models.checks import selfcheck, together
from corolla.models.checks.miniature import random_model
from corolla.models.checks.selfcheck import check_family, steps_stack
from corolla.models.families import structure
from corolla.models.span import Span, load_span

# Recurrences beside attention in turns, within one block, over latents, and convolutions without a recurrence.
STACKED = ("falcon_h1", "granitemoehybrid", "kimi_linear", "lfm2", "nemotron_h", "qwen3_5_text")


@pytest.mark.parametrize("family", STACKED)
def test_families_whose_states_are_stacked(family: str) -> None:
    assert not check_family(tiny(family))
    assert steps_stack(tiny(family))


@pytest.mark.parametrize("family", ["llama", "falcon", "deepseek_v32", "llama4_text"])
def test_others_are_packed_or_come_alone(family: str) -> None:
    """Attention code that asks nobody, layers of another kind, a reach that is told by the mask alone."""
    assert not steps_stack(tiny(family))


def of_another(own: Any) -> Any:
    return lambda states: own(states[::-1])


def one_token_old(own: Any) -> Any:
    def commit(self: StackedCaches, *given: Any) -> Any:
        caches = self._caches
        before = [copied(one._states()) for one in caches]
        found = own(self, *given)
        for cache, states in zip(caches, before, strict=True):
            for values, now in zip(states, cache._holders(), strict=True):
                now.update(values)
        return found

    return commit


def without_what_was(_own: Any) -> Any:
    return lambda _past, new: new


def with_padding(own: Any) -> Any:
    return lambda past, new: own(torch.cat([torch.zeros_like(new), past], dim=-2), new)


@pytest.mark.parametrize("family", ["falcon_h1", "qwen3_5_text"])
@pytest.mark.parametrize(
    ("place", "mistake"),
    [
        ((stacked, "_joined"), of_another),
        ((StackedCaches, "commit"), one_token_old),
        ((stacked, "_behind"), without_what_was),
        ((stacked, "_behind"), with_padding),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_family_that_stacks_wrongly_comes_alone(
    family: str,
    place: tuple[Any, str],
    mistake: Any,
    monkeypatch: pytest.MonkeyPatch,
    mistakes: Mistakes,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO, logger=together.log.name)
    monkeypatch.setattr(selfcheck, "_passed", {})
    mistakes.setattr(*place, mistake(getattr(*place)))
    assert not steps_stack(tiny(family))
    assert "Stacked steps are not" not in caplog.text  # it has run, and given something else


def span_of(family: str, folder: Path) -> Span:
    config = tiny(family)
    torch.manual_seed(0)
    random_model(structure(config).causal_lm, config).save_pretrained(folder)
    return load_span(open_checkpoint(str(folder)), 0, 5, dtype=torch.float32, stackable=True)


@pytest.mark.parametrize("compiled", [True, False])
def test_a_pass_that_fails_changes_no_cache(
    compiled: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    span = span_of("falcon_h1", tmp_path)
    monkeypatch.setattr(span, "_compiled", None if compiled else (None,))
    assert (span.compile() is not None) == compiled
    hidden = [torch.randn(1, length, span.width) for length in (7, 4)]
    caches = [span.new_cache() for _ in hidden]

    def fail(*_given: Any) -> None:
        raise MemoryError

    def step(cache: Any, own: Tensor, at: int) -> Tensor:
        return span.forward(own[:, at : at + 1], cache=cache)

    with torch.inference_mode():
        for own, cache in zip(hidden, caches, strict=True):
            span.forward(own[:, :3], cache=cache)
        twins = [cache.fork() for cache in caches]
        monkeypatch.setattr(stacked, "attend_one", fail)
        with pytest.raises(MemoryError):
            span.forward_stacked([one[:, 3:4] for one in hidden], caches, [torch.tensor([[3]])] * 2)
        monkeypatch.undo()
        for own, cache, twin in zip(hidden, caches, twins, strict=True):
            assert cache.tokens == 3
            assert torch.equal(step(cache, own, 3), step(twin, own, 3))


def test_a_step_that_went_in_company_is_taken_back(tmp_path: Path) -> None:
    """Snapshots remember what went through a batch, and nothing of the others in it."""
    span = span_of("qwen3_5_text", tmp_path)
    hidden = [torch.randn(1, 9, span.width) for _ in range(2)]
    caches = [span.new_cache() for _ in hidden]
    with torch.inference_mode():
        for own, cache in zip(hidden, caches, strict=True):
            span.forward(own[:, :4], cache=cache)
            cache.remember(turn=True)
        for at in (4, 5, 6):
            span.forward_stacked([one[:, at : at + 1] for one in hidden], caches, [torch.tensor([[at]])] * 2)
        span.go_back(caches[0], 6)
        found = span.forward(hidden[0][:, 7:8], cache=caches[0], positions=torch.tensor([[6]]))
        whole = torch.cat([hidden[0][:, :6], hidden[0][:, 7:8]], 1)
        torch.testing.assert_close(found, span.forward(whole)[:, -1:], rtol=0, atol=1e-4)
        beside = span.forward(hidden[1][:, 7:8], cache=caches[1])
        torch.testing.assert_close(beside, span.forward(hidden[1][:, :8])[:, -1:], rtol=0, atol=1e-4)


def test_caches_of_other_kinds_are_refused(tmp_path: Path) -> None:
    span = span_of("deepseek_v32", tmp_path)
    with pytest.raises(TypeError, match="of a kind that cannot"):
        StackedCaches([span.new_cache()], frozenset())
