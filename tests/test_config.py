"""How a client uses a swarm, checked as soon as it is said."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import numpy
import pytest

from corolla.config import SwarmConfig
from corolla.errors import UsageError


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"wire": "int4"}, "wire is 'int4'; it must be one of compute, float16, int8"),
        ({"quantization": "nf4"}, "quantization is 'nf4'; it must be one of none, bfloat16, int8"),
        ({"patience": -1.0}, "patience is -1; give seconds"),
        ({"patience": math.inf}, "patience is inf; give seconds"),
        ({"patience": math.nan}, "patience is nan; give seconds"),
        ({"local_blocks": True}, "local_blocks is True; it must be a whole number"),
        ({"local_blocks": 1.5}, "local_blocks is 1.5; it must be a whole number"),
        ({"patience": "10"}, "patience is '10'; it must be a number"),
        ({"patience": 10**400}, "patience is 1000"),
        ({"mixed": 1}, "mixed is 1; it must be True or False"),
        ({"peers": ("a", 5)}, r"peers is \('a', 5\); it must be a list of texts"),
        ({"trust": 5}, "trust is 5; it must be a list of texts or None"),
        ({"identity": b"me"}, "identity is b'me'; it must be Path or None"),
        ({"audit": 1.5}, "share of requests to audit is 1.5; give a number from 0 to 1"),
    ],
)
def test_what_cannot_be_is_refused(given: dict[str, Any], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        SwarmConfig(**given)


@pytest.mark.parametrize("count", [-1, 4])
def test_some_blocks_are_left_to_the_swarm(count: Any) -> None:
    with pytest.raises(UsageError, match=r"local_blocks is .*0 to 3 may run"):
        SwarmConfig(local_blocks=count).check_local(4)
    assert SwarmConfig(local_blocks=3).check_local(4) == 3


def test_as_people_write_it() -> None:
    found = SwarmConfig.of("/ip4/1.2.3.4", identity="me.key", trust=["a"], patience=None, wire="int8")
    assert found == SwarmConfig(("/ip4/1.2.3.4",), wire="int8", identity=Path("me.key"), trust=("a",))
    assert SwarmConfig.of(["a", "b"]).peers == ("a", "b")
    assert SwarmConfig.of(None, trust="a", blocked=iter("bc")) == SwarmConfig(
        trust=("a",), blocked=("b", "c")
    )
    assert SwarmConfig(peers=["a"], trust={"b"}) == SwarmConfig(("a",), trust=("b",))  # type: ignore[arg-type]
    with pytest.raises(dataclasses.FrozenInstanceError):
        found.wire = "compute"  # type: ignore[misc]


def test_numbers_of_other_libraries_become_python_s() -> None:
    found = SwarmConfig(patience=numpy.float32(2), local_blocks=numpy.int64(1))
    assert json.dumps([found.patience, found.local_blocks]) == "[2.0, 1]"
