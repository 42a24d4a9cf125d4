"""Calls of the model itself."""

from __future__ import annotations

import torch
from tests.client.ways.loops import loop
from tests.client.ways.table import Case, Outcome, padded, real, way
from tests.reference import random_ids

FORWARD = "A call of the model"


@way(FORWARD, "without gradients")
def _plain(case: Case) -> Outcome:
    ids = random_ids(2, 9)
    with torch.no_grad():
        return case.logits(ids), case.prompted.logits(ids)


@way(FORWARD, "with gradients, in evaluation mode")
def _grad(case: Case) -> Outcome:
    ids = random_ids(2, 9)
    return case.logits(ids), case.prompted.logits(ids)


@way(FORWARD, "in training mode")
def _training(case: Case) -> Outcome:
    ids = random_ids(2, 9)
    case.model.train()
    return case.logits(ids), case.prompted.logits(ids)


@way(FORWARD, "with padding on the left")
def _left(case: Case) -> Outcome:
    ids, mask = padded("left")
    with torch.no_grad():
        found = case.logits(ids, attention_mask=mask)
    return real(found, mask), real(case.prompted.logits(ids, mask), mask)


@way(FORWARD, "with padding on the right")
def _right(case: Case) -> Outcome:
    ids, mask = padded("right")
    found = case.logits(ids, attention_mask=mask)
    return real(found, mask), real(case.prompted.logits(ids, mask), mask)


@way(FORWARD, "padding whose token has no embedding")
def _strange_padding(case: Case) -> Outcome:
    ids, mask = padded("left")
    strange = ids.masked_fill(mask == 0, 10_000)
    if case.wrapped:  # peft embeds by itself
        strange = ids
    with torch.no_grad():
        found = case.logits(strange, attention_mask=mask)
    return real(found, mask), real(case.prompted.logits(ids, mask), mask)


@way(
    FORWARD,
    "position ids that say what is so anyway",
    every_family=True,
    note="peft leaves them out, with a warning",
)
def _positions(case: Case) -> Outcome:
    ids = random_ids(2, 9)
    positions = torch.arange(9).expand(2, -1)
    more = {} if case.wrapped else {"position_ids": positions}
    with torch.no_grad():
        return case.logits(ids, **more), case.prompted.logits(ids)


@way(FORWARD, "`inputs_embeds`", every_family=True)
def _embeddings(case: Case) -> Outcome:
    ids = random_ids(2, 9)
    embeddings = case.bare.get_input_embeddings()(ids)
    found = case.users(case.model(inputs_embeds=embeddings).logits)
    return found, case.prompted.logits(ids)


@way(FORWARD, "`logits_to_keep`", note="peft's prompt counts as tokens in front")
def _keep(case: Case) -> Outcome:
    ids = random_ids(2, 9)
    with torch.no_grad():
        found = case.model(input_ids=ids, logits_to_keep=2).logits
    return found, case.prompted.logits(ids)[:, -2:]


@way(FORWARD, "`return_dict=False`")
def _tuple(case: Case) -> Outcome:
    ids = random_ids(2, 9)
    with torch.no_grad():
        found = case.model(input_ids=ids, return_dict=False)[0]
    return case.users(found), case.prompted.logits(ids)


@way(FORWARD, "`use_cache=True`, and its cache continued")
def _use_cache(case: Case) -> Outcome:
    return loop(case, torch.no_grad(), use_cache=True)


@way(FORWARD, "`use_cache=False`")
def _no_cache(case: Case) -> Outcome:
    ids = random_ids(2, 9)
    with torch.no_grad():
        answer = case.model(input_ids=ids, use_cache=False)
    assert answer.past_key_values is None
    return case.users(answer.logits), case.prompted.logits(ids)


for _option in ("output_hidden_states", "output_attentions", "output_router_logits"):

    @way(FORWARD, f"`{_option}=True`", refused=f"{_option}=True asks for")
    def _inside(case: Case, option: str = _option) -> Outcome:
        return case.model(input_ids=random_ids(1, 5), **{option: True}), None


@way(
    FORWARD,
    "an attention mask with four dimensions",
    refused={
        "": "A distributed model takes a 2-D attention mask",
        "peft prompt": "",
    },
)
def _four(case: Case) -> Outcome:
    return case.bare(input_ids=random_ids(1, 5), attention_mask=torch.ones(1, 1, 5, 5)), None


@way(FORWARD, "a mask of another length", refused="The attention mask covers")
def _short_mask(case: Case) -> Outcome:
    return case.model(input_ids=random_ids(1, 5), attention_mask=torch.ones(1, 4)), None


@way(
    FORWARD,
    "a token that has no embedding",
    refused={"": "Token 256 has no embedding", "peft prompt": ""},
    note="peft embeds by itself",
)
def _no_embedding(case: Case) -> Outcome:
    return case.bare(input_ids=torch.tensor([[5, 256]])), None


@way(FORWARD, "neither ids nor embeddings", refused="Give the model input_ids")
def _nothing(case: Case) -> Outcome:
    return case.bare(), None
