"""A real model over real processes: SmolLM2-135M equals itself on one machine."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.e2e.processes import processes
from tests.reference import Prompted, local_model, relative
from transformers import AutoModelForCausalLM, AutoTokenizer

import corolla as public
from corolla.models.checkpoints.checkpoint import Checkpoint, open_checkpoint

QUESTIONS = [
    "The capital of France is",
    "Write a short poem about the sea.\n",
    "def fibonacci(n):",
    "Once upon a time, in a village far away,",
]


@pytest.fixture(scope="module")
def checkpoint() -> Checkpoint:
    return open_checkpoint("smollm2")


# SmolLM2's logits reach 33, where a float32 has steps of 4e-6; the local model itself is up to 6e-5 from float64.
ROUNDING = 2e-4


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with processes(tmp_path_factory.mktemp("swarm")) as started:
        join, _ = started.swarm("smollm2", ["0:15", "15:30"], "--threads", "1")
        yield join


@pytest.fixture(scope="module")
def local(checkpoint: Checkpoint) -> Any:
    return local_model(checkpoint.source.location)


def load(address: str, **arguments: Any) -> Any:
    return public.AutoDistributedModelForCausalLM.from_pretrained(
        "smollm2", initial_peers=[address], **arguments
    )


def test_logits_are_as_true_as_the_local_models(address: str, checkpoint: Checkpoint, local: Any) -> None:
    """Both round in float32, each in its own order: what counts is how far each is from float64."""
    tokenizer = AutoTokenizer.from_pretrained(checkpoint.source.location)
    exact = AutoModelForCausalLM.from_pretrained(checkpoint.source.location, dtype=torch.float64).eval()
    with load(address) as model, torch.no_grad():
        for question in QUESTIONS:
            ids = tokenizer(question, return_tensors="pt").input_ids
            truth = exact(ids).logits
            ours, theirs = ((one(ids).logits.double() - truth).norm() for one in (model, local))
            assert ours < 3 * theirs


def test_tokens_and_logits(address: str, checkpoint: Checkpoint, local: Any) -> None:
    tokenizer = AutoTokenizer.from_pretrained(checkpoint.source.location)
    reference = Prompted(local, torch.zeros(0, checkpoint.config.hidden_size))
    with load(address) as model, torch.no_grad():
        for question in QUESTIONS:
            ids = tokenizer(question, return_tensors="pt").input_ids
            assert (model(ids).logits - local(ids).logits).abs().max() < ROUNDING
            found = model.generate(ids, max_new_tokens=12, do_sample=False)
            reference.assert_greedy(found, ids.shape[1])
            assert len(set(found[0, ids.shape[1] :].tolist())) > 3
        batch = tokenizer(QUESTIONS, return_tensors="pt", padding=True, padding_side="left")
        found = model.generate(**batch, max_new_tokens=6, num_beams=2, do_sample=False)
        assert torch.equal(found, local.generate(**batch, max_new_tokens=6, num_beams=2, do_sample=False))


@pytest.mark.parametrize("mode", [pytest.param("ptune", marks=pytest.mark.nightly), "deep_ptune"])
def test_losses_and_gradients(address: str, checkpoint: Checkpoint, local: Any, mode: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(checkpoint.source.location)
    batch = tokenizer(QUESTIONS, return_tensors="pt", padding=True, padding_side="right")
    ids, mask = batch.input_ids, batch.attention_mask
    labels = ids.masked_fill(mask == 0, -100)
    with load(address, tuning_mode=mode, pre_seq_len=8) as model:
        reference = Prompted(local, model.prompts.input, model.prompts.deep)
        loss = model(ids, attention_mask=mask, labels=labels).loss
        loss.backward()
        expected = reference.loss(ids, labels, mask)
        expected.backward()
        assert abs(loss.item() - expected.item()) < 1e-4
        assert relative(model.prompts.input.grad, reference.vectors.grad) < 1e-4
        if reference.deep is not None:
            assert relative(model.prompts.deep.grad, reference.deep.grad) < 1e-4


def test_the_seeds_loop_of_one_token_a_call(
    address: str, checkpoint: Checkpoint, local: Any, tmp_path: Path
) -> None:
    """With prompts, as in the seed's last step: what Petals breaks at the second token."""
    tokenizer = AutoTokenizer.from_pretrained(checkpoint.source.location)
    with load(address, tuning_mode="ptune", pre_seq_len=8) as model:
        reference = Prompted(local, model.prompts.input)
        with model.inference_session(max_length=128) as session:
            for line in ("Hello, how are you?\n-----\n", "And what do you do?\n-----\n"):
                ids = tokenizer(line, return_tensors="pt").input_ids
                for _ in range(4):
                    output = model.generate(ids, max_new_tokens=1, do_sample=False, session=session)
                    ids = None
                assert output.shape == (1, 1)
        text = session.output_ids
        reference.assert_greedy(text, text.shape[1] - 4)
