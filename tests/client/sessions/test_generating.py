"""Rows of a batch that end before the others, calls that break off, calls within a call: the next turn is right."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from tests.client.conftest import Pair, random_ids
from torch import Tensor
from transformers import StoppingCriteria

from corolla.errors import UsageError

PairOf = Callable[..., Pair]
GREEDY: dict[str, Any] = {"do_sample": False, "max_new_tokens": 6}
MANY_ENDS = list(range(3, 250, 7))


def said(local: Any, ids: Tensor, **options: Any) -> Tensor:
    """What the local model answers, int64 [n], to one conversation without padding."""
    whole = local.generate(ids, attention_mask=torch.ones_like(ids), **GREEDY, **options)
    answer: Tensor = whole[0, ids.shape[1] :]
    return answer


@pytest.mark.parametrize("rows", [1, 3])
def test_rows_of_beams_that_end_early_turn_after_turn(pair_of: PairOf, rows: int) -> None:
    pair = pair_of("llama")
    model, lengths = pair.model(), set()
    options: dict[str, Any] = {"eos_token_id": MANY_ENDS, "pad_token_id": 0, "num_beams": 3}
    texts = [torch.empty(1, 0, dtype=torch.long) for _ in range(rows)]
    with model.inference_session():
        for turn in range(4):
            new = torch.cat([random_ids(1, 5, seed=10 * turn + row) for row in range(rows)])
            found = model.generate(new, **GREEDY, **options)
            for row in range(rows):
                text = torch.cat([texts[row], new[row : row + 1]], 1)
                right = said(pair.local, text, **options)
                assert torch.equal(found[row, 5 : 5 + len(right)], right), (turn, row)
                texts[row] = torch.cat([text, right[None]], 1)
                lengths.add(len(right))
    assert len(lengths) > 1


def test_a_model_that_drafts_for_itself_ends_no_row(pair_of: PairOf) -> None:
    pair = pair_of("llama")
    model, text = pair.model(), torch.empty(1, 0, dtype=torch.long)
    with model.inference_session():
        for turn in range(3):
            new = random_ids(1, 6, seed=turn)
            found = model.generate(new, assistant_early_exit=2, **GREEDY)
            text = torch.cat([text, new], 1)
            right = said(pair.local, text)
            assert torch.equal(found[0, 6:], right), turn
            text = torch.cat([text, right[None]], 1)


class _Breaking(StoppingCriteria):  # type: ignore[misc]
    """Breaks off at the third token, as Ctrl-C does."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, input_ids: Tensor, scores: Any, **_kwargs: Any) -> Any:
        self.calls += 1
        if self.calls == 3:
            raise KeyboardInterrupt
        return torch.zeros(input_ids.shape[0], dtype=torch.bool)


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"do_sample": True, "num_return_sequences": 2}])
@pytest.mark.parametrize("first", [True, False], ids=["first turn", "later turn"])
def test_a_session_goes_on_after_a_call_that_broke_off(
    pair_of: PairOf, options: dict[str, Any], first: bool
) -> None:
    pair = pair_of("llama")
    model, new = pair.model(), random_ids(1, 5, seed=1)
    with model.inference_session() as session:
        if not first:
            model.generate(random_ids(1, 9), **GREEDY)
        with pytest.raises(KeyboardInterrupt):
            model.generate(new, stopping_criteria=[_Breaking()], **{**GREEDY, **options})
        before = new[:, :0] if session.output_ids is None else session.output_ids
        found = model.generate(new, **GREEDY)
    assert torch.equal(found[0, 5:], said(pair.local, torch.cat([before, new], 1)))


def test_speculation_over_embeddings_is_refused_in_a_sentence(pair_of: PairOf) -> None:
    model = pair_of("llama").model()
    with model.inference_session():
        model.generate(inputs_embeds=model.get_input_embeddings()(random_ids(1, 5)), **GREEDY)
        with pytest.raises(UsageError, match="Speculation cannot go on"):
            model.generate(random_ids(1, 5), prompt_lookup_num_tokens=3, **GREEDY)
