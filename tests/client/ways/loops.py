"""Loops of one's own, which pass caches on."""

from __future__ import annotations

from typing import Any

import torch
from tests.client.ways.table import GREEDY, OWN_CACHE, Case, Outcome, padded, way
from tests.reference import random_ids

LOOPS = "Loops of one's own"


def loop(case: Case, mode: Any, *, train: bool = False, **options: Any) -> Outcome:
    """The cache that an answer carries, passed on; peft's class puts its prompt in front again, so bare."""
    ids = random_ids(2, 9)
    case.bare.train(train)
    with mode:
        first = case.bare(input_ids=ids[:, :5], **options)
        found = [first.logits]
        past = first.past_key_values
        for at in range(5, 9):
            answer = case.bare(input_ids=ids[:, at : at + 1], past_key_values=past, **options)
            found.append(answer.logits)
            past = answer.past_key_values
    plain = case.own
    return torch.cat(found, 1).detach(), plain.logits(ids)


@way(LOOPS, "passing the answer's cache on, without gradients", every_family=True)
def _loop_no_grad(case: Case) -> Outcome:
    return loop(case, torch.no_grad())


@way(LOOPS, "with gradients enabled")
def _loop_grad(case: Case) -> Outcome:
    return loop(case, torch.enable_grad())


@way(LOOPS, "in training mode")
def _loop_train(case: Case) -> Outcome:
    return loop(case, torch.enable_grad(), train=True)


@way(LOOPS, "in inference mode")
def _loop_inference(case: Case) -> Outcome:
    return loop(case, torch.inference_mode())


@way(LOOPS, "inside `with session`, naming no cache")
def _loop_in_session(case: Case) -> Outcome:
    ids = random_ids(2, 9)
    with case.bare.inference_session(), torch.no_grad():
        parts = [case.bare(input_ids=ids[:, cut]).logits for cut in (slice(0, 5), slice(5, 6), slice(6, 9))]
    plain = case.own
    return torch.cat(parts, 1), plain.logits(ids)


@way(LOOPS, "inside `with session` with gradients, in training mode")
def _loop_in_session_training(case: Case) -> Outcome:
    ids = random_ids(2, 9)
    case.bare.train()
    with case.bare.inference_session():
        parts = [case.bare(input_ids=ids[:, cut]).logits for cut in (slice(0, 5), slice(5, 9))]
    plain = case.own
    return torch.cat(parts, 1).detach(), plain.logits(ids)


@way(LOOPS, "`use_cache=False` inside `with session`, which stays as it was")
def _apart(case: Case) -> Outcome:
    ids, other = random_ids(1, 6), random_ids(1, 5, seed=1)
    plain = case.own
    with case.bare.inference_session() as session, torch.no_grad():
        first = case.bare(input_ids=ids[:, :4]).logits
        apart = case.bare(input_ids=other, use_cache=False).logits
        assert session.position == 4
        second = case.bare(input_ids=ids[:, 4:]).logits
    return (torch.cat([first, second], 1), apart), (plain.logits(ids), plain.logits(other))


@way(LOOPS, "`copy.deepcopy` of a cache, to use a beginning several times")
def _copied(case: Case) -> Outcome:
    import copy

    begin = random_ids(1, 6)
    plain = case.own
    found, expected = [], []
    with torch.no_grad():
        past = case.bare(input_ids=begin).past_key_values
        for seed in (1, 2):
            ids = torch.cat([begin, random_ids(1, 4, seed=seed)], 1)
            found.append(
                case.bare.generate(ids, past_key_values=copy.deepcopy(past), max_new_tokens=6, **GREEDY)
            )
            expected.append(plain.greedy(ids, 6))
        tail = random_ids(1, 3, seed=9)
        found.append(case.bare(input_ids=tail, past_key_values=past).logits)
        expected.append(plain.logits(torch.cat([begin, tail], 1))[:, 6:])
    return tuple(found), tuple(expected)


@way(LOOPS, "`crop` of a cache")
def _cropped(case: Case) -> Outcome:
    ids, other = random_ids(1, 8), random_ids(1, 3, seed=1)
    plain = case.own
    with torch.no_grad():
        past = case.bare(input_ids=ids).past_key_values
        past.crop(-3)
        found = case.bare(input_ids=other, past_key_values=past).logits
    return found, plain.logits(torch.cat([ids[:, :5], other], 1))[:, 5:]


@way(LOOPS, "a cache of one's own (`DynamicCache`, `StaticCache`, …)", refused=OWN_CACHE)
def _own_cache(case: Case) -> Outcome:
    from transformers import DynamicCache

    return case.bare(input_ids=random_ids(1, 5), past_key_values=DynamicCache()), None


@way(
    LOOPS,
    "all tokens again, though the cache holds some",
    refused="This call brings 8 tokens to a session that",
)
def _again(case: Case) -> Outcome:
    ids = random_ids(1, 8)
    with torch.no_grad():
        past = case.bare(input_ids=ids[:, :5]).past_key_values
        return case.bare(input_ids=ids, past_key_values=past, attention_mask=torch.ones_like(ids)), None


@way(LOOPS, "the same by position ids", refused="The position ids begin at 0, but the session holds 5")
def _again_positions(case: Case) -> Outcome:
    ids = random_ids(1, 8)
    with torch.no_grad():
        past = case.bare(input_ids=ids[:, :5]).past_key_values
        return case.bare(input_ids=ids, past_key_values=past, position_ids=torch.arange(8)[None]), None


@way(
    LOOPS,
    "a mask that changes what was said of cached tokens",
    refused="The attention mask says of tokens in",
)
def _changed_mask(case: Case) -> Outcome:
    ids, mask = padded("left")
    with torch.no_grad():
        past = case.bare(input_ids=ids, attention_mask=mask).past_key_values
        whole = torch.ones(3, 10)
        return case.bare(input_ids=ids[:, :1], past_key_values=past, attention_mask=whole), None


@way(LOOPS, "a closed session", refused="This session is closed")
def _closed(case: Case) -> Outcome:
    with case.bare.inference_session() as session:
        case.bare.generate(random_ids(1, 5), max_new_tokens=2, **GREEDY)
    return case.bare.generate(random_ids(1, 5), session=session, max_new_tokens=2), None


@way(LOOPS, "another model's session", refused="This session belongs to another model")
def _others(case: Case) -> Outcome:
    with case.other().inference_session() as session:
        return case.bare.generate(random_ids(1, 5), session=session, max_new_tokens=2), None
