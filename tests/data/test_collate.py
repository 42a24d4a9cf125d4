"""Examples in one batch."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from corolla.data.collate import Collator
from corolla.data.render import NO_LOSS, Example

PAD = 9


def example(length: int, *, start: int = 0) -> Example:
    ids = [start + index for index in range(length)]
    return Example(ids, [NO_LOSS, *ids[1:]], ["context", *["reply"] * (length - 1)], "c")


def test_padding_is_on_the_right_masked_and_without_loss() -> None:
    batch = Collator(PAD)([example(2), example(4, start=8)])
    assert batch["input_ids"].tolist() == [[0, 1, PAD, PAD], [8, 9, 10, 11]]
    assert batch["attention_mask"].tolist() == [[1, 1, 0, 0], [1, 1, 1, 1]]
    # 9 is a label where somebody said it, though it is also the padding.
    assert batch["labels"].tolist() == [[NO_LOSS, 1, NO_LOSS, NO_LOSS], [NO_LOSS, 9, 10, 11]]
    assert batch.pop("logits_to_keep").tolist() == [[True, False, False, False], [True, True, True, False]]
    assert {tensor.dtype for tensor in batch.values()} == {torch.int64}


@given(lengths=st.lists(st.integers(1, 12), min_size=1, max_size=5))
def test_every_example_comes_back_out(lengths: list[int]) -> None:
    examples = [example(length, start=20 * row) for row, length in enumerate(lengths)]
    batch = Collator(PAD)(examples)
    assert batch["input_ids"].shape == (len(lengths), max(lengths))
    for row, wanted in enumerate(examples):
        mask = batch["attention_mask"][row].bool()
        assert batch["input_ids"][row][mask].tolist() == wanted.input_ids
        assert batch["labels"][row][mask].tolist() == wanted.labels
        assert (batch["labels"][row][~mask] == NO_LOSS).all()
