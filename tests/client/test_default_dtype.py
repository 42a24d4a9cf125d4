"""In which dtype torch makes tensors where none is named is nothing to a swarm, as it is nothing to a local model."""

from __future__ import annotations

from contextlib import AbstractContextManager
from pathlib import Path

import pytest
import torch
from tests.reference import local_model, random_ids
from tests.swarm_fixture import MemorySwarm
from tests.tiny_models import write_tiny


@pytest.mark.parametrize("family", ["llama", "bloom"])  # with places turned in, and without any
def test_a_swarm_computes_in_its_own(
    family: str, tmp_path: Path, another_default: AbstractContextManager[None]
) -> None:
    folder, ids = write_tiny(family, tmp_path), random_ids(2, 9)
    local = local_model(folder)
    logits, tokens = local(ids).logits, local.generate(ids, max_new_tokens=5, do_sample=False)
    with another_default, MemorySwarm(folder, [(0, 2), (2, 4)]) as swarm:
        model = swarm.model()
        torch.testing.assert_close(model(ids).logits, logits, atol=1e-4, rtol=1e-4)
        assert torch.equal(model.generate(ids, max_new_tokens=5, do_sample=False), tokens)
        tuned = swarm.model(tuning_mode="deep_ptune", pre_seq_len=3)
        assert {one.dtype for one in tuned.prompts.parameters()} == {torch.float32}
        tuned(ids, labels=ids).loss.backward()
        assert all(bool(one.grad.any()) for one in tuned.prompts.parameters())
