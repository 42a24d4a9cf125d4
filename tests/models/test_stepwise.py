"""Blocks that are read a few at a time are the span that is read at once."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tests.models.every_family import tiny
from tests.stored_models import write_stored
from tests.tiny_models import write_tiny
from torch import nn

from corolla.models.attention.packing import PackedBatch, segments_of
from corolla.models.checkpoints.checkpoint import open_checkpoint
from corolla.models.checks.miniature import random_model
from corolla.models.families import structure
from corolla.models.kernels.apply import use_kernels
from corolla.models.span import Span, load_span
from corolla.models.stepwise import load_prepared

CPU = torch.device("cpu")


def both(
    folder: Path, start: int, end: int, *, packable: bool, step_bytes: int = 1
) -> tuple[Span, Span, list[int]]:
    """Read at once, read stepwise, and how many blocks each step had."""
    checkpoint = open_checkpoint(str(folder))
    steps: list[int] = []

    def prepare(model: nn.Module) -> None:
        steps.append(len(getattr(model, structure(checkpoint.config).blocks)))
        use_kernels(model, "none", CPU)

    whole = load_span(checkpoint, start, end, dtype=torch.float32, packable=packable)
    use_kernels(whole.model, "none", CPU)
    found = load_prepared(
        checkpoint, start, end, dtype=torch.float32, packable=packable, prepare=prepare, step_bytes=step_bytes
    )
    return whole, found, steps


@pytest.mark.parametrize(
    "family", ["llama", "gemma3_text", "gpt_neox", "bloom", "qwen3_moe", "smollm3", "phi3"]
)
def test_it_computes_the_same(tmp_path: Path, family: str) -> None:
    folder = write_tiny(family, tmp_path, layers=5)
    whole, found, steps = both(folder, 1, 5, packable=True)
    assert steps == [1, 1, 1, 1]
    assert found.config.to_dict() == whole.config.to_dict()
    assert found.nbytes() == whole.nbytes()
    hidden = torch.randn(2, 9, whole.width)
    with torch.inference_mode():
        assert torch.equal(found.forward(hidden), whole.forward(hidden))
        one, other = whole.new_cache(), found.new_cache()
        for part in (hidden[:, :5], hidden[:, 5:6], hidden[:, 6:]):
            assert torch.equal(found.forward(part, cache=other), whole.forward(part, cache=one))
        assert torch.equal(found.view(2, 4).forward(hidden), whole.view(2, 4).forward(hidden))
        batch = PackedBatch(segments_of([9, 9]), None)
        places = torch.arange(9).repeat(2)
        flat = hidden.reshape(18, -1)
        packed = found.run_packed(flat, batch, positions=places)
        torch.testing.assert_close(packed, whole.run_packed(flat, batch, positions=places))
        torch.testing.assert_close(packed.view_as(hidden), whole.forward(hidden), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", ["gemma3n_text", "lfm2"])
def test_families_whose_blocks_need_more(tmp_path: Path, family: str) -> None:
    config = tiny(family)
    random_model(structure(config).causal_lm, config).save_pretrained(tmp_path)
    whole, found, _ = both(tmp_path, 1, 4, packable=False)
    hidden = torch.randn(1, 6, whole.width)
    with torch.inference_mode():
        assert torch.equal(found.forward(hidden), whole.forward(hidden))


def test_steps_are_as_large_as_they_may_be(tmp_path: Path) -> None:
    folder = write_tiny("llama", tmp_path, layers=5)
    checkpoint = open_checkpoint(str(folder))
    block = 4 * checkpoint.elements(lambda name: ".layers.0." in name)
    for step, expected in [(1, [1] * 5), (2 * block, [2, 2, 1]), (4 * block, [4, 1]), (6 * block, [5])]:
        assert both(folder, 0, 5, packable=True, step_bytes=step)[2] == expected


def test_never_more_than_a_step_is_wide(tmp_path: Path) -> None:
    """When a step begins, what the steps before it have read is kept narrow already."""
    folder, _ = write_stored("gptq", tmp_path, layers=4)
    checkpoint = open_checkpoint(str(folder))
    seen: list[nn.Module] = []

    def prepare(model: nn.Module) -> None:
        assert not any(type(one) is nn.Linear for before in seen for one in before.modules())
        use_kernels(model, "none", CPU)
        seen.append(model)

    load_prepared(checkpoint, 0, 4, dtype=torch.float32, prepare=prepare, step_bytes=1)
    assert len(seen) == 4
