"""What crosses a cut is all that the blocks behind it need; families with more than hidden states are exact in it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.models.every_family import tiny

from corolla.models.blocks_pass import WideBlocksPass
from corolla.models.checks.forms import cuts_of
from corolla.models.checks.splitting import split_miniature
from corolla.models.cut_layout import CutLayout, PassedOn, SharedTensor, SideInput, TokenLayout
from corolla.models.span import Span

SIDE = SideInput("side", 1, TokenLayout(0, 1, (2,)), each=True)
FIRST = SideInput("first", 2, TokenLayout(0, 1, (3,)), each=False)
KEYS = SharedTensor("kind", 0, made_by=0, last_read_by=2, layout=TokenLayout(0, 2, (2, 4)))
FULL = CutLayout(TokenLayout(1, 2, (3, 5)), 4, (SIDE, FIRST), ("store", 3), (KEYS,))


def test_widths_follow_from_the_cut() -> None:
    assert [FULL.width(cut) for cut in range(5)] == [
        15 + 8 + 3,
        15 + 8 + 6 + 3,
        15 + 8 + 4 + 3,
        15 + 2 + 3,
        15,
    ]


def test_what_is_joined_is_what_was_split() -> None:
    entering = torch.randn(2, 7, FULL.width(1))
    crossed = FULL.split(entering, 1)
    assert crossed.hidden.shape == (3, 2, 7, 5)
    assert torch.equal(FULL.join(crossed, 1), entering)
    given = {side.name: value for side, value in crossed.of_block(2)}
    later = FULL.split(FULL.join(crossed, 2), 2)
    assert all(torch.equal(value, given[side.name]) for side, value in later.of_block(2))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_whole_numbers_are_the_same_in_any_arithmetic(dtype: torch.dtype) -> None:
    ids = SideInput("ids", 1, TokenLayout(0, 1, (), below=150_000), each=False)
    cuts = CutLayout(TokenLayout(0, 1, (5,)), 2, (ids,))
    given = torch.tensor([[0, 1, 255, 256], [257, 65_535, 149_998, 149_999]])
    entering = cuts.collect(torch.randn(2, 4, 5, dtype=dtype), [{"ids": given}])
    assert entering.dtype == dtype
    assert entering.shape == (2, 4, cuts.width(0)) == (2, 4, 8)
    assert torch.equal(dict(cuts.split(entering, 0).of_block(0))[ids], given)


def test_what_a_peer_sends_in_the_place_of_whole_numbers_is_in_their_range() -> None:
    layout = TokenLayout(0, 1, (), below=300)
    sent = torch.tensor([[[-5.0, 3.0], [float("nan"), 0.0], [float("inf"), 1e9], [43.0, 1.0]]])
    assert layout.shaped(sent).tolist() == [[299, 0, 299, 299]]


CHOSEN = PassedOn("chosen", 1, 1, 2, TokenLayout(0, 1, (3,), below=300))


def test_of_tokens_that_were_chosen_those_count_that_a_token_sees() -> None:
    """In any order; its own place stands for those behind it, and for what there was not to choose."""
    behind = 270
    given = torch.tensor([[[271, 2], [0, 271]]], dtype=torch.int32)
    found = CHOSEN.shaped(CHOSEN.flat(given, behind), behind)
    assert found.tolist() == [[[2, 270, 270], [0, 271, 271]]]


def test_places_that_a_peer_sends_are_those_of_tokens() -> None:
    sent = torch.full((1, 2, CHOSEN.layout.width), float("nan"))
    sent[0, 1] = 255.0
    assert CHOSEN.shaped(sent, 5).tolist() == [[[0, 0, 0], [6, 6, 6]]]


def test_streams_are_rows_to_whoever_adds_prompts() -> None:
    streams = torch.randn(3, 2, 7, 5)
    rows = FULL.hidden.as_rows(streams, 5)
    assert torch.equal(rows[4], streams[2, 0])
    assert torch.equal(FULL.hidden.of_rows(rows, 2), streams)


@pytest.mark.parametrize(
    ("family", "sides", "streams"), [("gemma4_text", 1, ()), ("gemma3n_text", 1, (4,)), ("llama", 0, ())]
)
def test_what_crosses_is_found_by_watching(family: str, sides: int, streams: tuple[int, ...]) -> None:
    config = tiny(family)
    found = cuts_of(config)
    assert len(found.sides) == sides
    assert found.hidden.size == (*streams, config.hidden_size)
    assert found.plain == (not sides)
    # Keys and values of each kind of layer that shares them, read by the last layers.
    assert {one.last_read_by for one in found.shared} <= {3, 4}
    assert len(found.shared) == (4 if sides else 0)


def test_what_blocks_return_for_the_next_one_and_token_ids_are_found_by_watching() -> None:
    zaya, zamba, deepseek = (cuts_of(tiny(family)) for family in ("zaya", "zamba", "deepseek_v4"))
    assert [(one.name, one.index) for one in zaya.passed] == [("prev_router_hidden_states", 1)]
    assert [zaya.width(cut) - zaya.width(0) for cut in (1, 4, 5)] == [zaya.passed[0].layout.width] * 2 + [0]
    assert [(one.name, one.layout.below) for one in zamba.sides] == [("original_hidden_states", 0)]
    assert zamba.counted == ("layer_idx", 2)
    assert not zaya.counted
    assert [(one.name, one.layout.below) for one in deepseek.sides] == [("input_ids", 96)]
    assert deepseek.has_whole_numbers
    assert not zamba.has_whole_numbers


def test_tokens_that_blocks_choose_for_later_ones_are_found_by_watching() -> None:
    config = tiny("hy_v4")
    config.index_topk = 40  # more than there are tokens where it is watched
    found = cuts_of(config)
    assert [(one.name, one.layout.size) for one in found.passed] == [("prev_topk_indices", (40,))]
    assert found.has_whole_numbers
    assert (found.hidden.size, found.streams) == ((4, config.hidden_size), 4)


def test_streams_side_by_side_are_not_one_stream() -> None:
    config = tiny("qwen4_exp_text")
    assert [(one.name, one.layout.below) for one in cuts_of(config).sides] == [("ple_input_ids", 96)]
    config.ple_layer_ids = []
    found = cuts_of(config)
    assert (found.sides, found.streams, found.plain) == ((), 4, False)


def chained(spans: list[Span], entering: torch.Tensor) -> torch.Tensor:
    for span in spans:
        entering = span.forward(entering)
    return entering


@pytest.fixture(scope="module")
def spans() -> Iterator[list[Span]]:
    with split_miniature(tiny("gemma4_text")) as (_, found):
        yield found


def wrong_block(one_pass: Any, index: int, *rest: Any) -> Any:
    return give(one_pass, min(index + 1, one_pass._cuts.depth - 1), *rest)


def left_out(cuts: CutLayout, cut: int) -> list[SharedTensor | PassedOn]:
    return handed_at(cuts, cut)[:0]


give = WideBlocksPass._give
handed_at = CutLayout._handed_at


def test_every_part_of_it_matters(spans: list[Span], monkeypatch: pytest.MonkeyPatch) -> None:
    """Mutants: a block is given the next one's inputs; what was handed on is another token's."""
    entering = torch.randn(1, 6, spans[0].width)
    wanted = chained(spans, entering)
    with monkeypatch.context() as mutant:
        mutant.setattr(WideBlocksPass, "_give", wrong_block)
        assert not torch.allclose(chained(spans, entering), wanted, atol=1e-3)
    first, *rest = spans
    left = first.forward(entering)
    for cut, span in ((first.end, rest[0]), (rest[0].end, rest[-1])):
        parts = span.cuts.split(left, cut)
        for one in parts.handed:
            moved = replace(parts, handed=parts.handed | {one: parts.handed[one].roll(1, 1)})
            tail = rest if cut == first.end else rest[1:]
            assert not torch.allclose(chained(tail, span.cuts.join(moved, cut)), wanted, atol=1e-3)
        left = span.forward(left) if cut == first.end else left


def test_a_dropped_stream_is_noticed(tmp_path: Path) -> None:
    with split_miniature(tiny("gemma3n_text")) as (_, found):
        entering = torch.randn(1, 5, found[0].width)
        wanted = chained(found, entering)
        streams = found[0].cuts.hidden.size[0]
        for stream in range(streams):
            size = found[0].hidden_size
            other = entering.clone()
            other[..., stream * size : (stream + 1) * size] = 0
            assert not torch.allclose(chained(found, other), wanted, atol=1e-3)
