"""Sessions: several calls, one token a call, positions set back, limits, what a turn costs."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tests.client.conftest import Pair, random_ids
from tests.covering import covering
from tests.reference import Prompted
from transformers import MaxLengthCriteria, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

from corolla.errors import SessionLimit, UsageError

PairOf = Callable[..., Pair]
MODES = pytest.mark.parametrize("mode", [None, "ptune", "deep_ptune"])
GREEDY: dict[str, Any] = {"do_sample": False}


def prepared(pair: Pair, mode: str | None) -> tuple[Any, Prompted]:
    """A distributed model in that mode and its local twin."""
    model = pair.model(tuning_mode=mode, pre_seq_len=3)
    if mode is None:
        width = pair.local.get_input_embeddings().embedding_dim
        return model, Prompted(pair.local, torch.zeros(0, width))
    if model.prompts.deep is not None:
        model.prompts.deep.data.normal_(0, 0.3, generator=torch.Generator().manual_seed(1))
    return model, Prompted(pair.local, model.prompts.input, model.prompts.deep)


@pytest.mark.parametrize(
    ("family", "mode"),
    covering(
        ["llama", "bloom", "gemma2", "qwen3_moe", "opt"],
        {"none": None, "ptune": "ptune", "deep_ptune": "deep_ptune"},
        together=1,
    ),
)
def test_a_chat_costs_its_own_tokens_and_equals_recomputing_everything(
    pair_of: PairOf, family: str, mode: str | None
) -> None:
    pair = pair_of(family)
    model, local = prepared(pair, mode)
    text = torch.empty(1, 0, dtype=torch.long)
    prompt = 0 if mode is None else 3
    with model.inference_session(max_length=200) as session:
        for turn in range(6):
            new = random_ids(1, 4 + turn, seed=turn)
            before = pair.swarm.counted()
            found = model.generate(new, max_new_tokens=5, session=session, **GREEDY)
            text = torch.cat([text, found], 1)
            assert torch.equal(found[:, : new.shape[1]], new)
            local.assert_greedy(text, text.shape[1] - 5)
            # A turn runs its own tokens, the last of the turn before, and not its own last one.
            own = new.shape[1] + 5 - 1 + (1 if turn else prompt)
            after = pair.swarm.counted()
            assert {after[peer] - before[peer] for peer in after} == {own}
        assert torch.equal(session.output_ids, text)


@MODES
def test_one_token_a_call_with_no_inputs(pair_of: PairOf, mode: str | None) -> None:
    model, local = prepared(pair_of("llama"), mode)
    ids = random_ids(1, 5)
    with model.inference_session(max_length=32) as session:
        found, inputs = [], ids
        for _ in range(8):
            output = model.generate(inputs, max_new_tokens=1, session=session, **GREEDY)
            found.append(int(output[0, -1]))
            inputs = None
    assert found == local.greedy(ids, 8)[0, 5:].tolist()


@MODES
def test_position_set_back(pair_of: PairOf, mode: str | None) -> None:
    model, local = prepared(pair_of("llama"), mode)
    ids, other = random_ids(2, 6), random_ids(2, 3, seed=9)
    with model.inference_session(max_length=64) as session:
        model.generate(ids, max_new_tokens=6, **GREEDY)
        assert session.position == 12
        session.position = 8
        begun = local.greedy(ids, 6)[:, :8]
        found = model.generate(other, max_new_tokens=4, **GREEDY)
        expected = local.greedy(torch.cat([begun, other], 1), 4)
        assert torch.equal(found, expected[:, 8:])
        session.position = 8
        assert torch.equal(model.generate(None, max_new_tokens=3, **GREEDY), local.greedy(begun, 3)[:, 8:])
        session.position = 0
        assert torch.equal(model.generate(other, max_new_tokens=3, **GREEDY), local.greedy(other, 3))
        with pytest.raises(UsageError, match="cannot be set to position"):
            session.position = 99


def test_going_on_after_beam_search_and_prompt_lookup(pair_of: PairOf) -> None:
    pair = pair_of("llama")
    model, local = prepared(pair, None)
    ids, more = random_ids(1, 6), random_ids(1, 2, seed=4)
    for settings in ({"num_beams": 4}, {"prompt_lookup_num_tokens": 3}):
        with model.inference_session(max_length=64):
            first = model.generate(ids, max_new_tokens=9, **GREEDY, **settings)
            assert torch.equal(first, pair.local.generate(ids, max_new_tokens=9, **GREEDY, **settings))
            second = model.generate(more, max_new_tokens=5, **GREEDY)
        expected = local.greedy(torch.cat([first, more], 1), 5)
        assert torch.equal(second, expected[:, first.shape[1] :])


def test_a_padded_batch_goes_on_with_its_padding_masked(pair_of: PairOf) -> None:
    pair = pair_of("llama")
    model = pair.model()
    ids, more = random_ids(2, 6), random_ids(2, 3, seed=3)
    mask = torch.ones_like(ids)
    mask[0, :2] = 0
    with model.inference_session(max_length=64):
        first = model.generate(ids, attention_mask=mask, max_new_tokens=4, **GREEDY)
        second = model.generate(more, max_new_tokens=4, **GREEDY)
    alone = random_ids(2, 6)[:1, 2:]
    text = pair.local.generate(alone, max_new_tokens=4, **GREEDY)
    assert torch.equal(first[:1, 2:], text)
    text = pair.local.generate(torch.cat([text, more[:1]], 1), max_new_tokens=4, **GREEDY)
    assert torch.equal(second[:1], text[:, 8:])


def test_past_its_limit_a_session_refuses_before_anything_is_computed(pair_of: PairOf) -> None:
    pair = pair_of("llama")
    model, _ = prepared(pair, "ptune")
    with model.inference_session(max_length=12) as session:
        before = pair.swarm.counted()
        with pytest.raises(SessionLimit, match="max_length=12"):
            model.generate(random_ids(1, 8), max_new_tokens=6, session=session, **GREEDY)
        assert pair.swarm.counted() == before
        # Prompts come on top: exactly max_length of the user's tokens fit.
        model.generate(random_ids(1, 8), max_new_tokens=4, session=session, **GREEDY)
        with pytest.raises(SessionLimit):
            model.generate(random_ids(1, 3), max_new_tokens=1, session=session, **GREEDY)


def test_the_active_session_serves_calls_that_name_none(pair_of: PairOf) -> None:
    pair = pair_of("llama")
    model, ids = pair.model(), random_ids(1, 8)
    expected = pair.local(ids).logits
    with torch.no_grad(), model.inference_session(max_length=32) as session:
        assert model.active_session is session
        pieces = [model(piece).logits for piece in ids.split((3, 1, 4), dim=1)]
        assert session.position == 8
    assert model.active_session is None
    assert (torch.cat(pieces, 1) - expected).abs().max() < 1e-4


def test_a_cache_of_ones_own_goes_on_and_is_freed(pair_of: PairOf) -> None:
    pair = pair_of("llama")
    model, ids = pair.model(), random_ids(1, 8)
    with torch.no_grad():
        first = model(ids[:, :5], use_cache=True)
        second = model(ids[:, 5:], past_key_values=first.past_key_values)
    assert (second.logits - pair.local(ids).logits[:, 5:]).abs().max() < 1e-4
    assert first.past_key_values.get_seq_length() == 8
    del first, second
    gc.collect()
    pair.swarm.loop.run(until(lambda: not any(pair.swarm.reserved())))


async def until(condition: Callable[[], bool]) -> None:
    """Wait for something that happens on this loop; the test's own time limit is the bound."""
    while not condition():
        await asyncio.sleep(0.01)


def test_sessions_are_freed_at_the_servers(pair_of: PairOf) -> None:
    pair = pair_of("llama")
    model = pair.model()
    with model.inference_session(max_length=32):
        model.generate(random_ids(1, 4), max_new_tokens=2, **GREEDY)
        assert all(pair.swarm.reserved())
    model.generate(random_ids(1, 4), max_new_tokens=2, **GREEDY)
    assert pair.swarm.reserved() == [0, 0]


class Collected(BaseStreamer):
    """Keeps what a streamer is given."""

    def __init__(self) -> None:
        self.tokens: list[int] = []
        self.ended = False

    def put(self, value: torch.Tensor) -> None:
        self.tokens += value.flatten().tolist()

    def end(self) -> None:
        self.ended = True


def test_streamers_and_stopping_criteria(pair_of: PairOf) -> None:
    pair = pair_of("llama")
    model, ids, streamer = pair.model(), random_ids(1, 5), Collected()
    criteria = StoppingCriteriaList([MaxLengthCriteria(max_length=9)])
    found = model.generate(ids, max_new_tokens=20, streamer=streamer, stopping_criteria=criteria, **GREEDY)
    assert found.shape[1] == 9
    assert streamer.tokens == found[0].tolist()
    assert streamer.ended


def test_a_batch_of_another_size_cannot_continue(pair_of: PairOf) -> None:
    model = pair_of("llama").model()
    with model.inference_session(max_length=32):
        model.generate(random_ids(2, 4), max_new_tokens=2, **GREEDY)
        with pytest.raises(UsageError, match="2 sequences"):
            model.generate(random_ids(3, 4), max_new_tokens=2, **GREEDY)


def test_samples_of_one_prompt_go_on_together(pair_of: PairOf) -> None:
    pair = pair_of("llama")
    model, ids = pair.model(), random_ids(1, 5)
    with model.inference_session(max_length=32):
        torch.manual_seed(3)
        first = model.generate(ids, max_new_tokens=4, do_sample=True, num_return_sequences=3)
        second = model.generate(None, max_new_tokens=4, **GREEDY)
    assert len({tuple(row) for row in first.tolist()}) > 1
    assert torch.equal(second, pair.local.generate(first, max_new_tokens=4, **GREEDY)[:, 9:])
