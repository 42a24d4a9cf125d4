"""Held-out losses equal a plain computation, and their difference is a paired one."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.tuning.tiny_setup import conversations, local_model, plain_model, prompt_for, settings

from corolla.data.render import Example
from corolla.tuning.batches import prepare
from corolla.tuning.evaluate import Evaluation, compare, evaluate


def reference_losses(folder: Path, examples: list[Example]) -> dict[str, dict[str, list[float]]]:
    """Token by token on the plain model, one example at a time, the prompt put in front by hand."""
    model = plain_model(folder)
    prompt = prompt_for(model).input.detach()
    losses: dict[str, dict[str, list[float]]] = {"reply": {}, "marker": {}}
    for example in examples:
        embedded = model.get_input_embeddings()(torch.tensor([example.input_ids]))
        with torch.no_grad():
            logits = model(inputs_embeds=torch.cat([prompt[None], embedded], dim=1)).logits[0, 4:]
        for position in range(1, len(example.input_ids)):
            if example.labels[position] == -100:
                continue
            probability = logits[position - 1].double().softmax(-1)[example.labels[position]]
            mine = losses[example.kinds[position]].setdefault(example.conversation, [])
            mine.append(-math.log(float(probability)))
    return losses


def test_losses_by_kind_and_conversation_equal_a_plain_computation(tiny_folder: Path, tokenizer: Any) -> None:
    prepared = prepare(tokenizer, settings(), conversations())
    model = local_model(tiny_folder)
    result = evaluate(model, prepared.held_out, prepared.batches, batch_size=4)
    expected = reference_losses(tiny_folder, prepared.held_out)
    for kind in ("reply", "marker"):
        assert result.sums[kind].keys() == expected[kind].keys()
        for name, values in expected[kind].items():
            total, count = result.sums[kind][name]
            assert count == len(values)
            assert total == pytest.approx(sum(values), abs=1e-3)
    everything = [value for values in expected["reply"].values() for value in values]
    assert result.reply_loss == pytest.approx(sum(everything) / len(everything), abs=1e-4)
    assert result.perplexity == pytest.approx(math.exp(result.reply_loss))


@pytest.mark.parametrize("training", [True, False])
def test_evaluation_leaves_the_model_in_its_mode(tiny_folder: Path, tokenizer: Any, training: bool) -> None:
    prepared = prepare(tokenizer, settings(), conversations())
    model = local_model(tiny_folder).train(training)
    evaluate(model, prepared.held_out[:1], prepared.batches, batch_size=4)
    assert model.training is training


def test_a_batch_of_another_size_gives_the_same_losses(tiny_folder: Path, tokenizer: Any) -> None:
    prepared = prepare(tokenizer, settings(), conversations())
    model = local_model(tiny_folder)
    results = [evaluate(model, prepared.held_out, prepared.batches, batch_size=size) for size in (1, 5)]
    assert results[0].reply_loss == pytest.approx(results[1].reply_loss, abs=1e-5)
    assert Evaluation.from_dict(json.loads(json.dumps(results[0].sums))) == results[0]


def made_up(losses: list[float]) -> Evaluation:
    sums = {str(index): (loss * 10, 10) for index, loss in enumerate(losses)}
    return Evaluation({"reply": sums, "marker": dict.fromkeys(sums, (1.0, 1))})


def test_the_interval_is_of_pairs_so_differences_between_conversations_do_not_widen_it() -> None:
    before = made_up([1.0, 2.0, 3.0, 4.0, 5.0, 6.0])
    after = made_up([0.9, 1.9, 2.9, 3.9, 4.9, 5.9])
    change = compare(before, after)
    assert change.mean == pytest.approx(-0.1)
    assert change.low == pytest.approx(-0.1)
    assert change.high == pytest.approx(-0.1)


def test_the_interval_covers_zero_when_conversations_disagree() -> None:
    before = made_up([3.0] * 8)
    change = compare(before, made_up([2.5, 3.5] * 4))
    assert change.low is not None
    assert change.high is not None
    assert change.low < 0 < change.high


def test_one_conversation_has_no_interval() -> None:
    change = compare(made_up([3.0]), made_up([2.0]))
    assert change.mean == pytest.approx(-1.0)
    assert change.low is None
    assert change.high is None
