"""Where peft's own class wraps ours, its losses are peft's; ours differ from them by one token a row.

peft puts -100 for each virtual token in front of the labels, so a row's first token is scored from the last
virtual one. `tuning_mode="ptune"` keeps the user's labels, as Petals does, and nothing predicts a first token.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tests.client.conftest import Pair, random_ids
from tests.client.test_ecosystem import peft_pair
from tests.reference import Prompted, relative

from corolla.errors import UsageError
from corolla.models.prompts import SoftPrompt

PairOf = Callable[..., Pair]
pytestmark = [
    pytest.mark.filterwarnings("ignore:Position ids are not supported"),
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`"),
]
ROWS, TOKENS = 3, 9


def mask_of(side: str) -> torch.Tensor | None:
    if side == "none":
        return None
    mask = torch.ones(ROWS, TOKENS, dtype=torch.long)
    mask[1, slice(6, None) if side == "right" else slice(0, 3)] = 0
    return mask


def labels_of(layout: str, ids: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    labels = ids.clone() if mask is None else ids.masked_fill(mask == 0, -100)
    if layout == "replies":
        labels[:, :4] = -100
    elif layout == "first tokens only":
        labels[:, 1:] = -100
    elif layout == "a row without":
        labels[0] = -100
    return labels


LAYOUTS = ["all", "replies", "first tokens only", "a row without"]
# There, the first token behind the padding carries loss.
FROM_PADDING = {("left", layout) for layout in ("all", "a row without")}


@pytest.mark.parametrize("side", ["none", "right", "left"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("training", [False, True])
def test_a_loss_is_the_local_one(pair_of: PairOf, side: str, layout: str, training: bool) -> None:
    models = peft_pair(pair_of("llama"))
    ids, mask = random_ids(ROWS, TOKENS), mask_of(side)
    labels = labels_of(layout, ids, mask)
    if (side, layout) in FROM_PADDING:
        with pytest.raises(UsageError, match="pad on the right"):
            models[0].train(training)(input_ids=ids, attention_mask=mask, labels=labels)
        labels[1, 3] = -100
    found = []
    for model in models:
        model.train(training)
        loss = model(input_ids=ids, attention_mask=mask, labels=labels).loss
        loss.backward()
        gradient = next(one.grad for one in model.parameters() if one.requires_grad)
        found.append((loss.item(), gradient))
    assert found[0][0] == pytest.approx(found[1][0], abs=1e-5)
    assert relative(found[0][1], found[1][1]) < 1e-4


def test_ours_leaves_out_each_rows_first_token(pair_of: PairOf) -> None:
    pair = pair_of("llama")
    _, local = peft_pair(pair)
    vectors = next(one for one in local.parameters() if one.requires_grad).detach()
    model = pair.model(tuning_mode="ptune", pre_seq_len=4)
    model.prompts = SoftPrompt(vectors)
    ids = random_ids(ROWS, TOKENS)
    with torch.no_grad():
        ours = model(ids, labels=ids).loss.item()
        theirs = local.eval()(input_ids=ids, labels=ids).loss.item()
        scores = local(input_ids=ids).logits[:, 3]  # of the last virtual token
    first = F.cross_entropy(scores.float(), ids[:, 0]).item()
    assert ours == pytest.approx(Prompted(pair.local, vectors).loss(ids, ids).item(), abs=1e-5)
    assert theirs == pytest.approx((ours * (TOKENS - 1) + first) / TOKENS, abs=1e-5)
    assert abs(theirs - ours) > 1e-3


def test_a_label_behind_padding_is_refused_without_peft_too(pair_of: PairOf) -> None:
    pair = pair_of("llama")
    ids, mask = random_ids(ROWS, TOKENS), mask_of("left")
    labels = labels_of("all", ids, mask)
    for model in (pair.model(), pair.model(tuning_mode="ptune", pre_seq_len=4)):
        with pytest.raises(UsageError, match="pad on the right"):
            model(ids, mask, labels=labels)
    labels[1, 3] = -100
    expected = pair.local(ids, attention_mask=mask, labels=labels).loss
    assert pair.model()(ids, mask, labels=labels).loss.item() == pytest.approx(expected.item(), abs=1e-5)


@pytest.mark.parametrize("prompt", [False, True])
@pytest.mark.parametrize("named", [False, True])
def test_a_row_that_ends_with_padding_is_not_gone_on_with(pair_of: PairOf, prompt: bool, named: bool) -> None:
    pair = pair_of("llama")
    model = pair.model(**({"tuning_mode": "ptune", "pre_seq_len": 4} if prompt else {}))
    ids, mask = random_ids(ROWS, TOKENS), mask_of("right")
    assert mask is not None
    given = {"attention_mask": mask} if named else {}  # which `generate` finds out by itself
    with pytest.raises(UsageError, match="pad on the left"):
        model.generate(ids * mask, max_new_tokens=3, do_sample=False, **given)


@pytest.mark.filterwarnings("ignore:`past_key_values` is deprecated")  # by peft, to transformers 5.24
@pytest.mark.parametrize("side", ["none", "left"])
@pytest.mark.parametrize("beams", [1, 3])
def test_replies_are_the_local_ones_in_a_second_call_too(pair_of: PairOf, side: str, beams: int) -> None:
    models = peft_pair(pair_of("llama"))
    for model in models:
        model.eval()
    mask = mask_of(side)
    ids, mask = random_ids(ROWS, TOKENS), torch.ones(ROWS, TOKENS, dtype=torch.long) if mask is None else mask
    for _turn in range(2):
        settings: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False, "num_beams": beams}
        remote, local = (model.generate(input_ids=ids, attention_mask=mask, **settings) for model in models)
        assert torch.equal(remote, local)
        ids = torch.cat([local, random_ids(ROWS, 3, seed=5)], dim=1)
        mask = F.pad(mask, (0, ids.shape[1] - mask.shape[1]), value=1)
