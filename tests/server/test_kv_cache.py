"""The budget's arithmetic and a session's cache, under whatever clients may do."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from tests.server.world import BLOCKS, HIDDEN, assert_same, noise, span_of
from torch import Tensor

from corolla.errors import RequestRefused
from corolla.server.kv_cache import CacheBudget, CachedSession, bytes_per_block_token, default_capacity

CAPACITY = 100


@dataclass
class Expected:
    """What one session should hold."""

    session: CachedSession
    rows: int
    tokens: int

    @property
    def amount(self) -> int:
        return self.rows * self.tokens * BLOCKS


class BudgetMachine(RuleBasedStateMachine):
    """Random openings, growths and closings beside a simple account of them."""

    def __init__(self) -> None:
        super().__init__()
        self.budget = CacheBudget(CAPACITY)
        self.open: list[Expected] = []
        self.closed: list[CachedSession] = []

    def judge(self, error: RequestRefused | None, wanted: int, held: int, field: str) -> bool:
        """Whether there was room, which decides whether there must have been an error, and which."""
        others = sum(one.amount for one in self.open) - held
        if wanted > CAPACITY:
            assert error is not None
            assert (error.code, error.field, error.retry_after) == ("too_large", field, None)
        elif others + wanted > CAPACITY:
            assert error is not None
            assert (error.code, error.field) == ("busy", field)
            assert error.retry_after
        else:
            assert error is None
            return True
        return False

    @rule(rows=st.integers(1, 4), tokens=st.integers(1, 30))
    def open_session(self, rows: int, tokens: int) -> None:
        error, session = None, None
        try:
            session = CachedSession(span_of("llama"), self.budget, rows=rows, max_tokens=tokens, prompts=None)
        except RequestRefused as refused:
            error = refused
        if self.judge(error, rows * tokens * BLOCKS, 0, "max_tokens"):
            assert session is not None
            self.open.append(Expected(session, rows, tokens))

    @precondition(lambda self: self.open)
    @rule(data=st.data(), rows=st.integers(1, 4), tokens=st.integers(1, 30))
    def reserve(self, data: st.DataObject, rows: int, tokens: int) -> None:
        """A step with that many rows; room for tokens is never given back, that for dropped rows is."""
        one = data.draw(st.sampled_from(self.open))
        grown = max(tokens, one.tokens)
        error = None
        try:
            one.session.reserve(rows, tokens)
        except RequestRefused as refused:
            error = refused
        if self.judge(error, rows * grown * BLOCKS, one.amount, "reserve"):
            one.rows, one.tokens = rows, grown

    @precondition(lambda self: self.open)
    @rule(data=st.data())
    def close_session(self, data: st.DataObject) -> None:
        one = data.draw(st.sampled_from(self.open))
        self.open.remove(one)
        one.session.close()
        self.closed.append(one.session)

    @precondition(lambda self: self.closed)
    @rule(data=st.data())
    def close_again(self, data: st.DataObject) -> None:
        data.draw(st.sampled_from(self.closed)).close()

    @invariant()
    def the_account_is_right(self) -> None:
        assert self.budget.reserved == sum(one.amount for one in self.open) <= CAPACITY
        assert self.budget.free == CAPACITY - self.budget.reserved


TestBudget = BudgetMachine.TestCase
TestBudget.settings = settings(max_examples=60, stateful_step_count=30)


@st.composite
def steps(draw: st.DrawFn) -> list[dict[str, Any]]:
    """Steps as a client may send them: onward, back to anywhere, with rows reordered, repeated, dropped."""
    length, rows, made = 0, draw(st.integers(1, 3)), []
    for seed in range(draw(st.integers(1, 6))):
        order = None
        if length and draw(st.booleans()):
            order = draw(st.lists(st.integers(0, rows - 1), min_size=1, max_size=4))
            rows = len(order)
        # Going back is common in tests so that it is tried, and onward so that there is somewhere to go back from.
        position = draw(st.one_of(st.just(length), st.integers(0, length)))
        count = draw(st.integers(1, 4))
        made.append({"position": position, "order": order, "hidden": noise(rows, count, HIDDEN, seed=seed)})
        length = position + count
    return made


@pytest.mark.parametrize("family", ["llama", "bloom"])
@given(made=steps(), with_prompts=st.booleans())
@settings(max_examples=60)
def test_a_cache_is_what_its_history_says(
    family: str, made: list[dict[str, Any]], with_prompts: bool
) -> None:
    """Every output equals that of the whole history, computed without a cache."""
    span = span_of(family)
    prompts = noise(BLOCKS, 3, HIDDEN, seed=99) if with_prompts else None
    session = CachedSession(span, CacheBudget(10_000), rows=3, max_tokens=30, prompts=prompts)
    history: Tensor | None = None
    for one in made:
        order = None if one["order"] is None else torch.tensor(one["order"])
        output = session.step(one["hidden"], position=one["position"], rows=order, mask=None, positions=None)
        history = continued(history, one["position"], order, one["hidden"])
        assert_same(output, span.forward(history, prompts=prompts)[:, one["position"] :])
        assert (session.rows, session.length) == history.shape[:2]


def continued(history: Tensor | None, position: int, order: Tensor | None, hidden: Tensor) -> Tensor:
    if history is None or position == 0:
        return hidden
    kept = history if order is None else history[order]
    return torch.cat([kept[:, :position], hidden], 1)


@pytest.mark.parametrize(("family", "heads"), [("llama", 2), ("bloom", 4)])
def test_a_tokens_room_is_measured_on_the_span(family: str, heads: int) -> None:
    span = span_of(family)
    size = 2 * heads * (HIDDEN // 4) * 8  # keys and values, four query heads, float64
    assert bytes_per_block_token(span) == size
    assert default_capacity(span, 1000 * size) == 500  # half of the free memory
    assert default_capacity(span, 1) == 1
