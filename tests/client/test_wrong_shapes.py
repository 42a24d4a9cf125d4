"""What does not fit together is one sentence, before anything is computed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from tests.client.conftest import Pair, random_ids

from corolla.errors import UsageError

PairOf = Callable[..., Pair]


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"position_ids": torch.arange(4)[None]}, "The position ids have the shape [1, 4]"),
        ({"position_ids": torch.arange(5).expand(3, -1)}, "The position ids have the shape [3, 5]"),
        ({"position_ids": torch.arange(509, 514)[None]}, "This call needs 514 positions"),
        ({"position_ids": torch.arange(-1, 4)[None]}, "A position id is below 0"),
        ({"attention_mask": torch.ones(3, 5)}, "The attention mask has 3 rows"),
    ],
)
def test_a_call(pair_of: PairOf, options: dict[str, Any], sentence: str) -> None:
    pair = pair_of("gpt2")
    model, before = pair.model(), pair.swarm.counted("forward")
    with pytest.raises(UsageError) as refusal:
        model(input_ids=random_ids(2, 5), **options)
    assert str(refusal.value).startswith(sentence)
    assert pair.swarm.counted("forward") == before


@pytest.mark.parametrize("ids", [[[4, 5]], torch.tensor([4, 5])])
def test_generate(pair_of: PairOf, ids: Any) -> None:
    with pytest.raises(UsageError, match="generate takes token ids as a tensor"):
        pair_of("gpt2").model().generate(ids, max_new_tokens=2)


def test_a_cache_is_no_session(pair_of: PairOf) -> None:
    model = pair_of("gpt2").model()
    with pytest.raises(UsageError, match="session= takes a session"):
        model.generate(random_ids(1, 5), session=model.inference_session().cache)
