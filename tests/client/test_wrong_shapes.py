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
        ({"position_ids": [[0, 1, 2, 3, 4]]}, "Position ids are a tensor"),
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


@pytest.mark.parametrize("kind", [torch.uint8, torch.int16, torch.bool, torch.float32])
def test_kinds_of_ids(pair_of: PairOf, kind: torch.dtype) -> None:
    with pytest.raises(UsageError, match="Token ids are int64 or int32, not torch"):
        pair_of("gpt2").model()(input_ids=random_ids(2, 5).to(kind))


@pytest.mark.parametrize("value", [2.5, "5", torch.tensor(2.5), [5]])
def test_a_session_s_numbers(pair_of: PairOf, value: Any) -> None:
    model = pair_of("gpt2").model()
    with pytest.raises(UsageError, match="max_length is a whole number of tokens"):
        model.inference_session(max_length=value)
    session = model.inference_session(max_length=torch.tensor(9))
    with pytest.raises(UsageError, match="position is a whole number of tokens"):
        session.position = value


@pytest.mark.parametrize("ids", [[[4, 5]], torch.tensor([4, 5])])
def test_generate(pair_of: PairOf, ids: Any) -> None:
    with pytest.raises(UsageError, match="generate takes token ids as a tensor"):
        pair_of("gpt2").model().generate(ids, max_new_tokens=2)


def test_a_cache_is_no_session(pair_of: PairOf) -> None:
    model = pair_of("gpt2").model()
    with pytest.raises(UsageError, match="session= takes a session"):
        model.generate(random_ids(1, 5), session=model.inference_session().cache)


HIDDEN = torch.zeros(2, 5, 32)


@pytest.mark.parametrize(
    ("hidden", "options", "sentence"),
    [
        (HIDDEN[0], {}, "Blocks take hidden states: a tensor"),
        (HIDDEN.long(), {}, "Blocks take hidden states: a tensor"),
        (HIDDEN.tolist(), {}, "Blocks take hidden states: a tensor"),
        (HIDDEN, {"mask": torch.ones(2, 4)}, "The attention mask covers 4 tokens, but 5 were given"),
        (HIDDEN, {"mask": torch.ones(5)}, "A distributed model takes a 2-D attention mask"),
        (HIDDEN, {"positions": torch.arange(4)[None]}, "The position ids have the shape"),
        (HIDDEN, {"positions": torch.arange(5.0)[None]}, "Position ids are whole numbers"),
    ],
)
def test_blocks(pair_of: PairOf, hidden: Any, options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(UsageError) as refusal:
        pair_of("gpt2").model().blocks[0:2](hidden, **options)
    assert str(refusal.value).startswith(sentence)


def test_a_closed_session_is_not_forked(pair_of: PairOf) -> None:
    with pair_of("gpt2").model().inference_session() as session:
        pass
    with pytest.raises(UsageError, match="This session is closed"):
        session.fork()
