"""Conversations in sessions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import torch
import transformers
from packaging.version import Version
from tests.client.ways.table import GREEDY, PEFT_CUTS, PEFT_SESSION, Case, Outcome, padded, rows_alone, way
from tests.reference import random_ids
from torch import Tensor

SESSIONS = "Sessions"
SECOND = {"peft prompt": PEFT_SESSION}


def _turns(
    case: Case, turns: Sequence[Tensor], *, last: Mapping[str, Any] | None = None, **options: Any
) -> Outcome:
    """Each turn answered with five tokens in one session, and the whole computed anew."""
    whole = turns[0][:, :0]
    said = []
    with case.bare.inference_session() as session:
        for index, ids in enumerate(turns):
            more = last if last is not None and index == len(turns) - 1 else options
            said.append(
                case.model.generate(input_ids=ids, session=session, max_new_tokens=5, **{**GREEDY, **more})
            )
    for ids in turns:
        whole = case.prompted.greedy(torch.cat([whole, ids], 1), 5)
    return torch.cat(said, 1), whole


@way(SESSIONS, "a first turn")
def _first_turn(case: Case) -> Outcome:
    return _turns(case, [random_ids(2, 7)])


@way(SESSIONS, "later turns", every_family=True, refused=SECOND)
def _later_turns(case: Case) -> Outcome:
    return _turns(case, [random_ids(2, 7), random_ids(2, 4, seed=1), random_ids(2, 3, seed=2)])


@way(SESSIONS, "later turns by speculation from the prompt", every_family=True, refused=SECOND)
def _later_lookup(case: Case) -> Outcome:
    turns = [random_ids(1, 5).repeat(1, 3), random_ids(1, 5).repeat(1, 2), random_ids(1, 5).repeat(1, 3)]
    return _turns(case, turns, prompt_lookup_num_tokens=4)


@way(SESSIONS, "later turns by speculation with a smaller model", refused=PEFT_CUTS)
def _later_assisted(case: Case) -> Outcome:
    turns = [random_ids(1, 7), random_ids(1, 5, seed=1)]
    return _turns(case, turns, assistant_model=case.assistant())


@way(SESSIONS, "later turns in chunks", refused=PEFT_CUTS)
def _later_chunks(case: Case) -> Outcome:
    if Version(transformers.__version__) < Version("5.23"):
        pytest.skip("this release begins chunks of later turns at position 0, which is refused")
    return _turns(case, [random_ids(1, 7), random_ids(1, 9, seed=1)], prefill_chunk_size=3)


@way(SESSIONS, "`use_cache=False` in the checkpoint's settings", refused=SECOND)
def _unwilling(case: Case) -> Outcome:
    case.bare.generation_config.use_cache = False
    try:
        return _turns(case, [random_ids(2, 7), random_ids(2, 4, seed=1)])
    finally:
        case.bare.generation_config.use_cache = True


@way(SESSIONS, "`use_cache=False` with a session, whose conversation goes on")
def _without(case: Case) -> Outcome:
    return _turns(
        case, [random_ids(2, 7), random_ids(2, 4, seed=1), random_ids(2, 4, seed=2)], use_cache=False
    )


@way(SESSIONS, "a later turn with `use_cache=False`, and one after it", refused=SECOND)
def _mixed(case: Case) -> Outcome:
    return _turns(case, [random_ids(2, 7), random_ids(2, 4, seed=1)], last={"use_cache": False})


@way(SESSIONS, "going on without new tokens (`inputs=None`)", refused=SECOND)
def _going_on(case: Case) -> Outcome:
    ids = random_ids(2, 7)
    with case.bare.inference_session() as session:
        first = case.model.generate(input_ids=ids, session=session, max_new_tokens=4, **GREEDY)
        rest = case.bare.generate(None, session=session, max_new_tokens=5, **GREEDY)
    return torch.cat([first, rest], 1), case.prompted.greedy(ids, 9)


@way(SESSIONS, "a later turn by beam search, and one after it", refused=SECOND)
def _later_beams(case: Case) -> Outcome:
    ids, more = random_ids(1, 7), random_ids(1, 4, seed=1)
    beams = {**GREEDY, "num_beams": 3}
    with case.bare.inference_session() as session:
        first = case.model.generate(input_ids=ids, session=session, max_new_tokens=5, **GREEDY)
        second = case.model.generate(input_ids=more, session=session, max_new_tokens=5, **beams)
        third = case.model.generate(input_ids=more, session=session, max_new_tokens=5, **GREEDY)
    whole = torch.cat([case.prompted.greedy(ids, 5), more], 1)
    whole = case.expected(whole, max_new_tokens=5, **beams)
    whole = case.prompted.greedy(torch.cat([whole, more], 1), 5)
    return torch.cat([first, second, third], 1), whole


@way(SESSIONS, "a batch with padding, later turns", every_family=True, refused=SECOND)
def _later_padded(case: Case) -> Outcome:
    ids, mask = padded("left")
    more = random_ids(3, 4, seed=1)
    with case.bare.inference_session() as session:
        first = case.model.generate(
            input_ids=ids, attention_mask=mask, session=session, max_new_tokens=5, **GREEDY
        )
        second = case.model.generate(input_ids=more, session=session, max_new_tokens=5, **GREEDY)
    rows = [
        one[keep.bool()][None]
        for one, keep in zip(first, torch.nn.functional.pad(mask, (0, 5), value=1), strict=True)
    ]
    alone = rows_alone(case, [torch.cat([row, one[None]], 1) for row, one in zip(rows, more, strict=True)], 5)
    return second[:, 4:], torch.cat(alone)


@way(SESSIONS, "a batch of which one row ended early, later turns", refused=SECOND)
def _later_ended(case: Case) -> Outcome:
    ids, more = random_ids(2, 7), random_ids(2, 4, seed=1)
    end = int(case.prompted.greedy(ids, 3)[0, 8])
    with case.bare.inference_session() as session:
        first = case.model.generate(
            input_ids=ids, session=session, max_new_tokens=8, eos_token_id=end, pad_token_id=0, **GREEDY
        )
        second = case.model.generate(input_ids=more, session=session, max_new_tokens=5, **GREEDY)
    ends = [(one[7:] == end).nonzero() for one in first]  # the other row may say it, too
    rows = [
        one[None, : 8 + int(at[0])] if len(at) else one[None] for one, at in zip(first, ends, strict=True)
    ]
    assert not first[0, rows[0].shape[1] :].any(), "the first row should have ended"
    alone = rows_alone(case, [torch.cat([row, one[None]], 1) for row, one in zip(rows, more, strict=True)], 5)
    return second[:, 4:], torch.cat(alone)


@way(SESSIONS, "a position set back", refused=SECOND)
def _back(case: Case) -> Outcome:
    ids, more = random_ids(1, 7), random_ids(1, 4, seed=1)
    with case.bare.inference_session() as session:
        first = case.model.generate(input_ids=ids, session=session, max_new_tokens=6, **GREEDY)
        session.position = 9
        second = case.model.generate(input_ids=more, session=session, max_new_tokens=5, **GREEDY)
    whole = torch.cat([first[:, :9], more], 1)
    return second[:, 4:], case.prompted.greedy(whole, 5)[:, 13:]


@way(SESSIONS, "`inputs_embeds` first, then ids", refused={"peft prompt": ""}, note="peft takes ids")
def _embeds_then_ids(case: Case) -> Outcome:
    ids, more = random_ids(2, 7), random_ids(2, 4, seed=1)
    embeddings = case.bare.get_input_embeddings()(ids)
    with case.bare.inference_session() as session:
        first = case.bare.generate(inputs_embeds=embeddings, session=session, max_new_tokens=5, **GREEDY)
        second = case.bare.generate(more, session=session, max_new_tokens=5, **GREEDY)
        third = case.bare.generate(None, session=session, max_new_tokens=3, **GREEDY)
    whole = case.prompted.greedy(ids, 5)
    whole = case.prompted.greedy(torch.cat([whole, more], 1), 8)
    return torch.cat([first, second, third], 1), whole[:, 7:]


@way(SESSIONS, "`inputs_embeds` twice", refused={"peft prompt": ""}, note="peft takes ids")
def _embeds_twice(case: Case) -> Outcome:
    ids, more = random_ids(2, 7), random_ids(2, 4, seed=1)
    embed = case.bare.get_input_embeddings()
    with case.bare.inference_session() as session:
        first = case.bare.generate(inputs_embeds=embed(ids), session=session, max_new_tokens=5, **GREEDY)
        second = case.bare.generate(inputs_embeds=embed(more), session=session, max_new_tokens=5, **GREEDY)
    whole = case.prompted.greedy(ids, 5)
    expected = case.prompted.greedy(torch.cat([whole, more], 1), 5)
    return torch.cat([first, second], 1), torch.cat([whole[:, 7:], expected[:, 16:]], 1)


@way(SESSIONS, "ids first, then `inputs_embeds`", refused={"peft prompt": ""}, note="peft takes ids")
def _ids_then_embeds(case: Case) -> Outcome:
    ids, more = random_ids(2, 7), random_ids(2, 4, seed=1)
    embed = case.bare.get_input_embeddings()
    with case.bare.inference_session() as session:
        first = case.bare.generate(ids, session=session, max_new_tokens=5, **GREEDY)
        second = case.bare.generate(inputs_embeds=embed(more), session=session, max_new_tokens=5, **GREEDY)
    whole = case.prompted.greedy(ids, 5)
    expected = case.prompted.greedy(torch.cat([whole, more], 1), 5)
    return torch.cat([first, second], 1), torch.cat([whole, expected[:, 16:]], 1)


@way(SESSIONS, "the same long prompt a second time, by speculation (its beginning is shared)")
def _shared(case: Case) -> Outcome:
    ids = random_ids(1, 12).repeat(1, 7)
    more = {} if case.wrapped else {"prompt_lookup_num_tokens": 4}
    found = [case.generate(ids, max_new_tokens=8, **more, **GREEDY) for _ in range(2)]
    return torch.cat(found), case.prompted.greedy(ids, 8).repeat(2, 1)


@way(SESSIONS, "the same long prompt with and without what stands around the model")
def _shared_bare(case: Case) -> Outcome:
    ids = random_ids(1, 80)
    bare, wrapped = (
        one.generate(input_ids=ids, max_new_tokens=6, **GREEDY) for one in (case.bare, case.model)
    )
    return (bare, wrapped), (case.own.greedy(ids, 6), case.prompted.greedy(ids, 6))


@way(SESSIONS, "the same long prompt after the embeddings were changed")
def _shared_changed(case: Case) -> Outcome:
    ids = random_ids(1, 80)
    weights = [one.get_input_embeddings().weight for one in (case.bare, case.whole)]
    before = weights[0].detach().clone()
    case.generate(ids, max_new_tokens=2, **GREEDY)
    try:
        for weight in weights:
            weight.data.copy_(before.flip(0))
        return case.generate(ids, max_new_tokens=8, **GREEDY), case.prompted.greedy(ids, 8)
    finally:
        for weight in weights:
            weight.data.copy_(before)


@way(SESSIONS, "a fork of a session", refused=SECOND)
def _forked(case: Case) -> Outcome:
    ids, more = random_ids(1, 7), random_ids(1, 4, seed=1)
    with case.bare.inference_session() as session:
        first = case.model.generate(input_ids=ids, session=session, max_new_tokens=5, **GREEDY)
        with session.fork() as twin:
            other = case.model.generate(input_ids=more, session=twin, max_new_tokens=5, **GREEDY)
        rest = case.model.generate(session=session, max_new_tokens=5, **GREEDY)
    whole = case.prompted.greedy(ids, 10)
    branch = case.prompted.greedy(torch.cat([whole[:, :12], more], 1), 5)
    return (torch.cat([first, rest], 1), other), (whole, branch[:, 12:])


@way(
    SESSIONS,
    "more tokens than the session was opened for",
    refused="This call needs 13 tokens, but its session",
)
def _too_many(case: Case) -> Outcome:
    with case.bare.inference_session(max_length=12) as session:
        return case.bare.generate(random_ids(1, 8), session=session, max_new_tokens=6, **GREEDY), None
