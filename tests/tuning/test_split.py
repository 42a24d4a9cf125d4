"""Held-out conversations and subsamples."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from corolla.data.conversation import Conversation, Turn
from corolla.errors import DataError
from corolla.tuning.batches import split_conversations, subsample


def conversation(name: str, text: str = "x") -> Conversation:
    return Conversation((Turn("user", text), Turn("assistant", text)), name)


MANY = [conversation(f"c{index}") for index in range(50)]


@given(
    pieces=st.lists(st.integers(0, 9), min_size=10, max_size=60),
    held_out=st.sampled_from([0.1, 0.3, 1, 3]),
    seed=st.integers(0, 3),
)
def test_no_conversation_is_on_both_sides(pieces: list[int], held_out: float, seed: int) -> None:
    everything = [conversation(f"c{name}", text=str(row)) for row, name in enumerate([*pieces, *range(10)])]
    train, kept = split_conversations(everything, held_out=held_out, seed=seed)
    assert not {one.id for one in train} & {one.id for one in kept}
    assert sorted(one.turns[0].text for one in [*train, *kept]) == sorted(
        one.turns[0].text for one in everything
    )
    assert len({one.id for one in kept}) == (held_out if held_out >= 1 else round(held_out * 10))


def test_the_split_depends_on_the_seed_and_not_on_the_order() -> None:
    shuffled = list(MANY)
    random.Random(1).shuffle(shuffled)

    def kept(conversations: list[Conversation], seed: int) -> set[str]:
        return {one.id for one in split_conversations(conversations, held_out=10, seed=seed)[1]}

    assert kept(MANY, 0) == kept(shuffled, 0)
    assert kept(MANY, 0) != kept(MANY, 1)
    # Not all from one end.
    assert kept(MANY, 0) not in (
        {f"c{index}" for index in range(10)},
        {f"c{index}" for index in range(40, 50)},
    )


def test_more_data_keeps_most_of_who_was_held_out_by_share() -> None:
    small = {one.id for one in split_conversations(MANY[:40], held_out=0.2, seed=0)[1]}
    large = {one.id for one in split_conversations(MANY, held_out=0.2, seed=0)[1]}
    assert len(small & large) >= 6


@pytest.mark.parametrize(("count", "held_out"), [(1, 0.1), (2, 2), (3, 0.99)])
def test_too_few_conversations_are_refused(count: int, held_out: float) -> None:
    there = "is 1 conversation" if count == 1 else f"are {count} conversations"
    with pytest.raises(DataError, match=f"There {there}, too few"):
        split_conversations(MANY[:count], held_out=held_out, seed=0)


def test_rows_that_are_one_conversation_are_told_from_too_few_rows() -> None:
    with pytest.raises(
        DataError, match=r"is 1 conversation .rows that are equal, or have one id, are one., too few"
    ):
        split_conversations([MANY[0]] * 9, held_out=0.2, seed=0)


def test_a_subsample_is_drawn_without_replacement_and_repeatably() -> None:
    items = list(range(100))
    drawn = subsample(items, 20, seed=3)
    assert len(set(drawn)) == 20
    assert drawn == subsample(items, 20, seed=3) != subsample(items, 20, seed=4)
    assert drawn != sorted(drawn)
    assert sorted(subsample(items, 1000, seed=3)) == items == list(range(100))
