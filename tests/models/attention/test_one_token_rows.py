"""One call for many sequences with one new token each, against each by itself."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from corolla.models.attention import packing
from corolla.models.attention.one_sequence import TableSegment, attend_one
from corolla.models.attention.one_token_rows import OneTokenRows, Rules, can_attend
from corolla.models.attention.packing import PackedBatch, segments_of
from corolla.models.attention.pages import PAGE, CachedSequence, PagePool
from corolla.models.kernels.native import library

pytestmark = [
    pytest.mark.skipif(library() is None, reason="no C compiler"),
    pytest.mark.usefixtures("lanes"),
]

HEADS, KV_HEADS, DIM = 6, 2, 32
LENGTHS = (1, 2, PAGE, PAGE + 1, 5 * PAGE + 3, 40)  # with the new token

RULES = {
    "plain": Rules(),
    "scale": Rules(scale=0.3),
    "window": Rules(window=7),
    "a window as long as a row": Rules(window=PAGE),
    "softcap": Rules(softcap=2.0),
    "sinks": Rules(sinks=torch.linspace(-2, 2, HEADS)),
    "alibi": Rules(slopes=torch.linspace(0.01, 0.5, HEADS)),
    "window and sinks": Rules(window=5, sinks=torch.linspace(2, -2, HEADS)),
}


def noise(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def cached_rows(
    pool: PagePool, kv_heads: int = KV_HEADS, dim: int = DIM, width: int | None = None
) -> list[CachedSequence]:
    """Rows one token short of `LENGTHS`, taken in turns, so that their pages do not follow each other."""
    rows = [CachedSequence(pool) for _ in LENGTHS]
    store = pool.store(0, noise(1, kv_heads, 1, dim, seed=0), noise(1, kv_heads, 1, width or dim, seed=0))
    for turn in range(max(LENGTHS)):
        for row, length in zip(rows, LENGTHS, strict=True):
            if row.length < length - 1:
                row.length += 1
                slots = row.tables[0].grow(1)
                for index, side in enumerate(store):
                    side[slots] = noise(1, *side.shape[1:], seed=1000 * turn + 10 * length + index)
    return rows


def parts_of(batch: PackedBatch) -> list[TableSegment]:
    """Of rows that have one table each."""
    return [part for segment in batch.segments for part in segment.parts]


def attended(
    rules: Rules,
    threads: int = 1,
    shape: tuple[int, int, int] = (HEADS, KV_HEADS, DIM),
    width: int | None = None,
) -> tuple[Tensor, Tensor]:
    """What the kernel gives, and what each row gives by itself; values as wide as keys, or `width`."""
    heads, kv_heads, dim = shape
    pool = PagePool(64, dtype=torch.float32, device=torch.device("cpu"))
    rows = cached_rows(pool, kv_heads, dim, width)
    count = len(rows)
    # As projections give them: heads and tokens in strides of their own.
    query = noise(1, count, heads, dim, seed=1).transpose(1, 2)
    key = noise(1, count, kv_heads, dim, seed=2).transpose(1, 2)
    value = noise(1, count, kv_heads, width or dim, seed=3).transpose(1, 2)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        batch = PackedBatch(segments_of([1] * count, rows), pool)
        together = batch.attend(0, query, key, value, rules)
    finally:
        torch.set_num_threads(before)
    cache = [side.transpose(0, 1).unsqueeze(0) for side in pool.store(0, key, value)]
    alone = [
        attend_one(query[:, :, one.begin : one.end], one.cached(cache[0]), one.cached(cache[1]), one, rules)
        for one in parts_of(batch)
    ]
    return together, torch.cat(alone, dim=2).transpose(1, 2)


@pytest.mark.parametrize("name", RULES)
def test_all_rows_together_are_as_each_alone(name: str) -> None:
    together, alone = attended(RULES[name])
    torch.testing.assert_close(together, alone, atol=2e-6, rtol=1e-5)


# Heads that share keys are taken several at a time, by their width: full groups, what is left of them, one alone.
SHAPES = [
    *((heads, 1, 64) for heads in range(1, 10)),
    *((heads, 1, 128) for heads in range(1, 6)),
    (9, 3, 64),
    (8, 2, 16),
    (7, 1, 32),
    (3, 3, 80),
    (5, 1, 256),
    (2, 1, 512),
]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_heads_of_every_number_and_width(shape: tuple[int, int, int]) -> None:
    together, alone = attended(Rules(window=30), shape=shape)
    torch.testing.assert_close(together, alone, atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize(("dim", "width"), [(48, 32), (16, 80), (192, 128)])
def test_values_that_are_not_as_wide_as_keys(dim: int, width: int) -> None:
    together, alone = attended(RULES["window and sinks"], shape=(HEADS, KV_HEADS, dim), width=width)
    assert together.shape[-1] == width
    torch.testing.assert_close(together, alone, atol=2e-6, rtol=1e-5)


def test_threads_change_no_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("corolla.models.attention.one_token_rows.THREADED", 0)
    results = [attended(Rules(window=30), threads)[0] for threads in (1, 2, 3)]
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


def test_sequences_with_more_tokens_beside_them() -> None:
    pool = PagePool(64, dtype=torch.float32, device=torch.device("cpu"))
    rows = cached_rows(pool)[2:5]
    lengths = [1, 4, 1]
    query = noise(1, HEADS, 6, DIM, seed=4)
    key, value = noise(1, KV_HEADS, 6, DIM, seed=5), noise(1, KV_HEADS, 6, DIM, seed=6)
    rules = Rules()
    batch = PackedBatch(segments_of(lengths, rows), pool)
    mixed = batch.attend(0, query, key, value, rules)
    cache = [side.transpose(0, 1).unsqueeze(0) for side in pool.store(0, key, value)]
    for one in parts_of(batch):
        wanted = attend_one(
            query[:, :, one.begin : one.end], one.cached(cache[0]), one.cached(cache[1]), one, rules
        )
        torch.testing.assert_close(
            mixed[:, one.begin : one.end], wanted.transpose(1, 2), atol=2e-6, rtol=1e-5
        )


def test_large_scores_do_not_overflow() -> None:
    together, alone = attended(Rules(scale=200.0))
    assert bool(together.isfinite().all())
    # Scores of thousands are rounded to a few ten-thousandths, on either side, and weights are their exponentials.
    torch.testing.assert_close(together, alone, atol=2e-3, rtol=1e-3)


@pytest.mark.parametrize(
    ("dtype", "dim", "width"),
    [
        (torch.float64, DIM, DIM),
        (torch.bfloat16, DIM, DIM),
        (torch.float32, 24, DIM),
        (torch.float32, DIM, 24),
    ],
)
def test_what_it_does_not_compute_is_left_to_torch(dtype: torch.dtype, dim: int, width: int) -> None:
    query = torch.zeros(1, HEADS, 1, dim, dtype=dtype)
    keys, values = (torch.zeros(16, KV_HEADS, one, dtype=dtype) for one in (dim, width))
    assert not can_attend(query, (keys, values))


def test_a_row_that_does_not_look_at_its_pages_is_seen() -> None:
    """The comparison above can fail: other pages give another result."""
    pool = PagePool(64, dtype=torch.float32, device=torch.device("cpu"))
    tables = [row.tables[0] for row in cached_rows(pool)]
    store = pool.store(0, torch.zeros(1, KV_HEADS, 1, DIM), torch.zeros(1, KV_HEADS, 1, DIM))
    query = noise(1, HEADS, len(tables), DIM, seed=1)
    right = OneTokenRows(tables[1:]).attend(query[:, :, 1:], store, Rules(), None)
    tables[4].pages.reverse()
    wrong = OneTokenRows(tables[1:]).attend(query[:, :, 1:], store, Rules(), None)
    assert torch.equal(right[:, :3], wrong[:, :3])
    assert not torch.allclose(right[:, 3], wrong[:, 3], atol=1e-3)


# --- several tokens of one sequence ------------------------------------------------------------------------


def went_on(
    rules: Rules, past: int, count: int, shape: tuple[int, int, int], width: int, threads: int = 1
) -> tuple[Tensor, Tensor]:
    """What the kernel gives for `count` tokens behind `past`, on pages apart, and what torch does."""
    heads, kv_heads, dim = shape
    pool = PagePool(128, dtype=torch.float32, device=torch.device("cpu"))
    rows = [CachedSequence(pool) for _ in range(2)]
    store = pool.store(0, noise(1, kv_heads, 1, dim, seed=0), noise(1, kv_heads, 1, width, seed=0))
    for side in store:
        side.fill_(float("nan"))  # what nobody has written is not read
    for turn in range(0, past, PAGE):
        for row in rows:
            new = min(PAGE, past - turn)
            row.length += new
            slots = row.tables[0].grow(new)
            for index, side in enumerate(store):
                side[slots] = noise(new, *side.shape[1:], seed=10 * turn + index)
    query = noise(1, 64, heads, dim, seed=1)[:, :count].transpose(1, 2)
    key = noise(1, 64, kv_heads, dim, seed=2)[:, :count].transpose(1, 2)
    value = noise(1, 64, kv_heads, width, seed=3)[:, :count].transpose(1, 2)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        batch = PackedBatch(segments_of([count], rows[:1]), pool)
        found = batch.attend(0, query, key, value, rules)
    finally:
        torch.set_num_threads(before)
    cache = [side.transpose(0, 1).unsqueeze(0) for side in store]
    (one,) = parts_of(batch)
    alone = attend_one(query, one.cached(cache[0]), one.cached(cache[1]), one, rules)
    return found, alone.transpose(1, 2)


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize(("past", "count"), [(5, 6), (48, 7), (95, 40), (200, 17)])
def test_tokens_that_go_on_behind_others(name: str, past: int, count: int) -> None:
    found, alone = went_on(RULES[name], past, count, (HEADS, KV_HEADS, DIM), DIM)
    # With slopes scores are of the order of 100, and rounded so.
    torch.testing.assert_close(found, alone, atol=3e-5 if name == "alibi" else 2e-6, rtol=1e-5)


@pytest.mark.parametrize(
    ("shape", "width"),
    [
        ((9, 3, 64), 64),
        ((4, 4, 16), 16),
        ((7, 1, 128), 128),
        ((3, 3, 80), 80),
        ((5, 1, 256), 256),
        ((6, 2, 48), 32),
    ],
    ids=str,
)
def test_tokens_that_go_on_with_heads_of_every_kind(shape: tuple[int, int, int], width: int) -> None:
    found, alone = went_on(Rules(), 131, 30, shape, width)
    assert 30 * shape[0] // shape[1] >= packing.FEWEST_ROWS, "the kernel is asked"
    torch.testing.assert_close(found, alone, atol=2e-6, rtol=1e-5)
    again, _ = went_on(Rules(), 131, 30, shape, width, threads=2)
    assert torch.equal(found, again)


def test_how_a_prompt_is_cut_changes_no_bit() -> None:
    """A token's numbers do not depend on those that are computed with it."""
    for rules in (Rules(), RULES["window and sinks"]):
        whole, _ = went_on(rules, 100, 60, (HEADS, KV_HEADS, DIM), DIM)
        first, _ = went_on(rules, 100, 7, (HEADS, KV_HEADS, DIM), DIM)
        assert torch.equal(whole[:, :7], first)


@pytest.mark.parametrize("name", ["plain", "window and sinks"])
def test_a_prompt_has_the_same_bits_in_one_pass_in_two_and_without_a_cache(name: str) -> None:
    """With nothing behind its first tokens, too: a bundle's, which nobody caches, is what a session's would be."""
    pool = PagePool(128, dtype=torch.float32, device=torch.device("cpu"))
    count, rules = packing.AT_ONCE + 44, RULES[name]
    sides = [noise(1, heads, count, DIM, seed=heads) for heads in (HEADS, KV_HEADS, KV_HEADS)]
    rows = [CachedSequence(pool) for _ in range(2)]

    def attended(begin: int, end: int, row: CachedSequence | None) -> Tensor:
        segments = segments_of([end - begin], None if row is None else [row])
        batch = PackedBatch(segments, None if row is None else pool)
        query, key, value = (side[:, :, begin:end] for side in sides)
        return batch.attend(0, query, key, value, rules)

    with torch.no_grad():
        whole, apart = attended(0, count, rows[0]), attended(0, count, None)
        parts = [attended(0, 90, rows[1]), attended(90, count, rows[1])]
    assert torch.equal(whole, torch.cat(parts, 1))
    assert torch.equal(whole, apart)
    with torch.enable_grad():  # by torch, which has a gradient
        torch.testing.assert_close(whole, attended(0, count, None), atol=2e-6, rtol=1e-5)
