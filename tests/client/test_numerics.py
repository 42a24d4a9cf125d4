"""What is begun in one arithmetic goes on in it, unless the user allows otherwise."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tests.client.conftest import random_ids
from tests.reference import local_model
from tests.swarm_fixture import MemorySwarm
from tests.tiny_models import write_tiny

from corolla.errors import MissingBlocks, SwarmUnavailable
from corolla.models.kernels.apply import supported

pytestmark = pytest.mark.skipif(
    not supported("cpu", torch.float32, "int8"), reason="this machine has no int8 kernel"
)


def test_plain_servers_are_taken_before_quantized_ones(tmp_path: Path) -> None:
    folder = write_tiny("llama", tmp_path)
    with MemorySwarm(folder, [(0, 2), (2, 4)]) as swarm:
        swarm.add(0, 4, throughput=1e6, quantization="int8")
        ids = random_ids(1, 8)
        assert (swarm.model()(ids).logits - local_model(folder)(ids).logits).abs().max() < 1e-4


def test_quantized_servers_alone_are_close(tmp_path: Path) -> None:
    folder = write_tiny("llama", tmp_path)
    with MemorySwarm(folder, []) as swarm:
        swarm.add(0, 2, quantization="int8")
        swarm.add(2, 4, quantization="int8")
        ids = random_ids(1, 8)
        expected = local_model(folder)(ids).logits
        difference = (swarm.model()(ids).logits - expected).abs().max()
        assert 1e-4 < difference < 0.2 * expected.abs().max()


def test_a_session_does_not_change_to_quantized_servers(tmp_path: Path) -> None:
    with MemorySwarm(write_tiny("llama", tmp_path), [(0, 2), (2, 4)]) as swarm:
        swarm.add(2, 4, "int8", quantization="int8")
        strict, lax = swarm.model(patience=0.5), swarm.model(mixed=True)
        sessions = [model.inference_session() for model in (strict, lax)]
        ids = random_ids(1, 6)
        for model, session in zip((strict, lax), sessions, strict=True):
            model.generation_config.eos_token_id = None
            model.generate(ids, max_new_tokens=4, do_sample=False, session=session)
        for peer in [
            peer for peer in swarm.servers if swarm.servers[peer].span.start == 2 and peer != "int8"
        ]:
            swarm.kill(peer)
        assert lax.generate(None, max_new_tokens=4, do_sample=False, session=sessions[1]).shape == (1, 4)
        with pytest.raises(SwarmUnavailable):
            strict.generate(None, max_new_tokens=4, do_sample=False, session=sessions[0])


def test_a_mixture_is_only_used_when_it_is_wanted(tmp_path: Path) -> None:
    folder = write_tiny("llama", tmp_path)
    with MemorySwarm(folder, [(0, 2)]) as swarm:
        swarm.add(2, 4, quantization="int8")
        with pytest.raises(MissingBlocks, match=r"int8.*mixed=True"):
            swarm.model()
        ids = random_ids(1, 8)
        expected = local_model(folder)(ids).logits
        assert (swarm.model(mixed=True)(ids).logits - expected).abs().max() < 0.2 * expected.abs().max()
