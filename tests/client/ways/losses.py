"""Losses and gradients."""

from __future__ import annotations

import torch
from tests.client.ways.table import GREEDY, Case, Outcome, padded, way
from tests.reference import random_ids
from torch import Tensor

LOSS = "Losses and gradients"


def _losses(case: Case, found: Tensor, expected: Tensor) -> Outcome:
    found.backward()
    expected.backward()
    parts = [(found, expected)]
    if case.column in ("ptune", "deep_ptune"):
        parts.append((case.bare.prompts.input.grad, case.prompted.vectors.grad))
    if case.column == "prefix":
        frozen = case.bare.prompts.frozen.shape[1]
        parts.append((case.bare.prompts.trained.grad, case.prompted.values.grad[:, frozen:]))
    if case.column == "deep_ptune":
        parts.append((case.bare.prompts.deep.grad, case.prompted.deep.grad))
    return tuple(one for one, _ in parts), tuple(other for _, other in parts)


@way(
    LOSS,
    "`labels`",
    every_family=True,
    note="peft's own model class scores the first token from the prompt's last one",
)
def _labels(case: Case) -> Outcome:
    ids, mask = padded("right")
    labels = ids.masked_fill(mask == 0, -100)
    if case.column == "none":
        case.bare.get_input_embeddings().weight.requires_grad_()
    found = case.model(input_ids=ids, attention_mask=mask, labels=labels).loss
    if case.wrapped:
        expected = case.local(input_ids=ids, attention_mask=mask, labels=labels).loss
        return found, expected
    return _losses(case, found, case.prompted.loss(ids, labels, mask))


@way(LOSS, "`labels` inside a session, which stays as it was")
def _labels_in_session(case: Case) -> Outcome:
    ids, other = random_ids(1, 7), random_ids(1, 6, seed=1)
    with case.bare.inference_session() as session:
        said = case.bare.generate(ids, max_new_tokens=4, **GREEDY)
        before = session.position
        loss = case.bare(input_ids=other, labels=other).loss
        assert session.position == before
        more = case.bare.generate(None, max_new_tokens=4, **GREEDY)
    plain = case.own
    tokens = torch.cat([said, more], 1)
    return (loss, tokens), (plain.loss(other, other), plain.greedy(ids, 8))


@way(LOSS, "`labels` that are no tokens", refused="The label 999 is no token of this model")
def _wrong_label(case: Case) -> Outcome:
    ids = random_ids(1, 5)
    return case.model(input_ids=ids, labels=torch.full_like(ids, 999)).loss, None


def flat_batch() -> tuple[Tensor, Tensor, list[Tensor]]:
    """One row of three sequences, its position ids, and the sequences."""
    parts = [random_ids(1, length, seed=length) for length in (5, 3, 6)]
    positions = torch.cat([torch.arange(part.shape[1]) for part in parts])[None]
    return torch.cat(parts, 1), positions, parts


@way(
    LOSS,
    "batches without padding (`position_ids` that start anew, `use_cache=False`)",
    every_family=True,
    refused={"peft prompt": ""},
    note="a prompt stands in front of each sequence; peft leaves position ids out, with a warning",
)
def _flat(case: Case) -> Outcome:
    ids, positions, parts = flat_batch()
    labels = ids.masked_fill(positions == 0, -100)
    found = case.bare(input_ids=ids, position_ids=positions, labels=labels, use_cache=False)
    plain = case.unprompted
    alone = case.whole(input_ids=ids, position_ids=positions, use_cache=False).logits
    apart = torch.cat([plain.logits(part) for part in parts], 1)
    if (alone - apart).abs().max() < 1e-4:
        expected = torch.cat([case.prompted.logits(part) for part in parts], 1)
    else:  # a family without position ids (bloom) takes them for one sequence
        assert (alone - plain.logits(ids)).abs().max() < 1e-4
        expected = case.prompted.logits(ids)
    loss = torch.nn.functional.cross_entropy(expected[0, :-1], labels[0, 1:])
    return (found.logits, found.loss), (expected, loss)


@way(LOSS, "the same where a cache may be wanted", refused="Position ids start anew inside a row")
def _flat_cached(case: Case) -> Outcome:
    ids, positions, _ = flat_batch()
    return case.bare(input_ids=ids, position_ids=positions, labels=ids), None


@way(LOSS, "gradients through a session", refused="Gradients do not go through a session's caches")
def _through(case: Case) -> Outcome:
    ids = random_ids(1, 6)
    embeddings = case.bare.get_input_embeddings()(ids).detach().requires_grad_()
    with torch.no_grad():
        past = case.bare(input_ids=ids, use_cache=True).past_key_values
    return case.bare(inputs_embeds=embeddings, past_key_values=past).logits.sum().backward(), None
