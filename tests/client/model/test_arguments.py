"""What `from_pretrained` is given, before anything is opened."""

from __future__ import annotations

from typing import Any

import numpy
import pytest

from corolla.client.model.arguments import from_pretrained
from corolla.errors import UsageError


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"pre_seq_len": "16"}, "pre_seq_len is '16'; it must be a whole number"),
        ({"pre_seq_len": 16.0}, r"pre_seq_len is 16\.0; it must be a whole number"),
        ({"prompt_text": 5}, "prompt_text is 5; it must be a text or None"),
        ({"seed": "0"}, "seed is '0'; it must be a whole number"),
        ({"seed": 2**64}, f"seed is {2**64}; it must be from"),
        ({"revision": 1}, "revision is 1; it must be a text or None"),
        ({"prompts": 5}, "prompts is 5; it must be Path or None"),
        ({"initial_peers": 5}, "peers is 5; it must be a list of texts"),
        ({"patience": "60"}, "patience is '60'; it must be a number"),
    ],
)
def test_of_another_kind(given: dict[str, Any], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        from_pretrained("smollm2", **given)


@pytest.mark.parametrize("name", [None, 5, b"smollm2", ["smollm2"]])
def test_a_name_that_is_none(name: Any) -> None:
    with pytest.raises(UsageError, match="takes the name of a model"):
        from_pretrained(name)


def test_none_stands_for_what_is_left_out() -> None:
    nothing: dict[str, Any] = dict.fromkeys(("initial_peers", "pre_seq_len", "prompt_init", "seed", "dtype"))
    assert from_pretrained("smollm2", **nothing) == from_pretrained("smollm2")
    assert from_pretrained("a" * 5000).name == "a" * 5000


@pytest.mark.parametrize("token", ["hf_1", True, False, None])
def test_a_token_is_as_the_hub_takes_it(token: Any) -> None:
    assert from_pretrained("smollm2", token=token).token is token


def test_kinds_of_numbers_and_one_peer() -> None:
    found = from_pretrained(
        "smollm2", tuning_mode="ptune", pre_seq_len=numpy.int64(4), allowed_servers="peer"
    )
    assert type(found.pre_seq_len) is int
    assert found.swarm.trust == ("peer",)
