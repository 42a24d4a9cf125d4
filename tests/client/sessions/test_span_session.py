"""The history of a span against a plain tensor that is changed at once."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from corolla.client.sessions.span_session import History
from corolla.models.attention.passes import LEAST, in_groups

OPERATIONS = st.lists(
    st.one_of(
        st.tuples(st.just("append"), st.integers(1, 4)),
        st.tuples(st.just("truncate"), st.integers(0, 12)),
        st.tuples(st.just("rows"), st.lists(st.integers(0, 3), min_size=1, max_size=4)),
    ),
    max_size=14,
)


@settings(max_examples=200, deadline=None)
@given(OPERATIONS)
def test_history_equals_a_tensor_that_is_changed_at_once(operations: list[tuple[str, object]]) -> None:
    history, rows = History(), 2
    plain, counter = torch.empty(rows, 0, 1), 0
    for name, argument in operations:
        if name == "append":
            count = int(argument)  # type: ignore[call-overload]
            new = torch.arange(counter, counter + rows * count, dtype=torch.float).reshape(rows, count, 1)
            counter += rows * count
            history.append(new, None)
            plain = torch.cat([plain, new], 1)
        elif name == "truncate":
            length = min(int(argument), plain.shape[1])  # type: ignore[call-overload]
            history.truncate(length)
            plain = plain[:, :length]
        else:
            order = torch.tensor([row % rows for row in argument])  # type: ignore[attr-defined]
            history.select_rows(order)
            plain, rows = plain[order], len(order)
        assert history.length == plain.shape[1]
    inputs = history.inputs()
    if inputs is None:
        assert plain.shape[1] == 0
        return
    hidden, positions = inputs
    # An empty history forgets its rows; whatever is appended then brings its own.
    assert torch.equal(hidden, plain)
    assert torch.equal(positions, torch.arange(plain.shape[1]).expand(plain.shape[0], -1))


def test_given_positions_are_kept_through_a_cut_and_a_reorder() -> None:
    history = History()
    history.append(torch.zeros(2, 3, 1), torch.tensor([[0, 0, 1], [0, 1, 2]]))
    history.append(torch.ones(2, 1, 1), None)
    history.select_rows(torch.tensor([1, 0, 1]))
    history.truncate(2)
    inputs = history.inputs()
    assert inputs is not None
    assert inputs[1].tolist() == [[0, 1], [0, 0], [0, 1]]


def test_what_its_server_has_not_been_told_yet() -> None:
    history = History()
    history.append(torch.zeros(2, 5, 1), None)
    assert (history.held, history.order, history.epoch, history.rows) == (5, None, 0, 2)
    history.truncate(3)
    history.append(torch.zeros(2, 1, 1), None)
    assert (history.held, history.length, history.epoch) == (4, 4, 1)
    history.select_rows(torch.tensor([1, 0, 1]))
    history.select_rows(torch.tensor([2, 1]))
    assert (history.held, history.rows) == (4, 2)
    assert history.order is not None
    assert history.order.tolist() == [1, 0]
    twin = history.copy(2)
    assert twin.order is history.order
    assert (twin.length, twin.held, twin.epoch) == (2, 0, 0)
    history.append(torch.zeros(2, 1, 1), None)
    assert history.order is None
    assert history.epoch == 2


def test_what_its_server_held_before_the_first_step_is_taken_back_or_gone_on_with() -> None:
    for known, epoch in ((3, 0), (0, 1)):
        history = History()
        history.held = 3
        history.append(torch.zeros(1, 5, 1), None, known=known)
        assert (history.held, history.length, history.epoch) == (5, 5, epoch)


def test_the_passes_in_which_tokens_came() -> None:
    history = History()
    for count in (4, 1, 1):
        history.append(torch.zeros(1, count, 1), None)
    history.append(torch.zeros(1, 5, 1), None, lengths=[3, 1, 1])
    assert (history.lengths(), history.at_once) == ([4, 1, 1, 3, 1, 1], 4)
    twin = history.copy(8)
    assert twin.lengths() == [4, 1, 1, 2]
    twin.truncate(7)
    assert twin.lengths() == [4, 1, 1, 1]
    twin.append(torch.zeros(1, 3, 1), None)
    twin.append(torch.zeros(1, 3, 1), None)
    twin.truncate(11)
    assert twin.lengths() == [4, 1, 1, 1, 4]


@given(st.lists(st.integers(1, 9), min_size=1, max_size=9), st.integers(1, 12))
def test_passes_in_groups_are_cut_where_nobody_is_left_alone(lengths: list[int], most: int) -> None:
    groups = list(in_groups(lengths, most))
    assert all(sum(group) <= max(most, LEAST) for group in groups)
    pieces = iter([one for group in groups for one in group])
    for length in lengths:
        found: list[int] = []
        while sum(found) < length:
            found.append(next(pieces))
        assert sum(found) == length
        assert length == 1 or min(found) > 1
    assert next(pieces, None) is None
