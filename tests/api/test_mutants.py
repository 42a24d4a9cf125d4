"""Planted mistakes of the API, each noticed by the check that is meant for it, which passes on the code as it is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from tests.api.world import BASE, World, Worlds
from tests.mutants import Mistakes, Plant, passes

from corolla.api import reading, sampling, scoring, sessions, wishes
from corolla.api.access import Keys, User
from corolla.api.generation import Run
from corolla.api.sessions import SessionPool
from corolla.client.sessions.prefix_cache import common_length

HELLO = [{"role": "user", "content": "What of the moon, and what of the rain?"}]


@pytest.fixture(scope="module")
def guarded(worlds: Worlds) -> World:
    return worlds.make("mutants", keys=Keys({"a": User("ann"), "b": User("bob")}))


def reply(world: World, key: str = "a", talk: Any = HELLO, **how: Any) -> Any:
    asked = {"model": BASE, "messages": talk, "temperature": 0, "max_tokens": 12, **how}
    return world.client(key).chat.completions.create(**asked)


def nothing_is_shared(world: World) -> bool:
    talk = [{"role": "user", "content": "Something that only Ann says, and nobody else does."}]
    reply(world, "a", talk)
    return bool(reply(world, "b", talk).usage.prompt_tokens_details.cached_tokens == 0)


def penalties_count(world: World) -> bool:
    ids, said = world.prompt(HELLO), list[int]()
    first = world.greedy(ids, 1)[0]
    for _ in range(12):
        with torch.no_grad():
            scores = world.local(torch.tensor([[*ids, *said]])).logits[0, -1].clone()
        for token in set(said):
            scores[token] -= 1.5 * said.count(token) + 2
        scores[first] += 9
        said.append(int(scores.argmax()))
    found = reply(world, logit_bias={str(first): 9}, frequency_penalty=1.5, presence_penalty=2)
    return bool(found.choices[0].message.content == world.text(said))


def branches_are_right(world: World) -> bool:
    for end in ("moon", "mood", "moss"):
        talk = [{"role": "user", "content": f"Of all that there is, tell me of the {end}"}]
        if reply(world, talk=talk).choices[0].message.content != world.text(
            world.greedy(world.prompt(talk), 12)
        ):
            return False
    return True


def stops_end_replies(world: World) -> bool:
    said = world.text(world.greedy(world.prompt(HELLO), 12))
    return bool(reply(world, stop=said[4:7]).choices[0].message.content == said[: said.index(said[4:7])])


def probabilities_are_local(world: World) -> bool:
    ids, said = world.prompt(HELLO), world.greedy(world.prompt(HELLO), 12)
    with torch.no_grad():
        rows = world.local(torch.tensor([[*ids, *said]])).logits[0].log_softmax(-1)
    found = reply(world, logprobs=True).choices[0].logprobs.content
    local = [float(rows[len(ids) - 1 + place, token]) for place, token in enumerate(said[: len(found)])]
    return bool(abs(torch.tensor(local) - torch.tensor([one.logprob for one in found])).max() < 1e-3)


def echoes_are_local(world: World) -> bool:
    ids = world.prompt(HELLO)
    with torch.no_grad():
        rows = world.local(torch.tensor([ids])).logits[0].log_softmax(-1)
    asked = {"model": BASE, "prompt": ids, "max_tokens": 0, "echo": True, "logprobs": 0}
    found = world.client("a").completions.create(**asked).choices[0].logprobs.token_logprobs
    local = rows[:-1].gather(1, torch.tensor(ids[1:])[:, None])[:, 0]
    return found[0] is None and bool(abs(torch.tensor(found[1:]) - local).max() < 1e-3)


def draws_are_of_their_seeds(world: World) -> bool:
    several = reply(world, temperature=1, seed=7, n=2).choices[1].message.content
    return bool(several == reply(world, temperature=1, seed=8).choices[0].message.content)


def counts_are_exact(world: World) -> bool:
    usage = reply(world).usage
    ids = world.prompt(HELLO)
    return (usage.prompt_tokens, usage.completion_tokens) == (len(ids), len(world.greedy(ids, 12)))


def session_of_another_key(patch: Mistakes) -> None:
    give, take = SessionPool.give, SessionPool.take
    patch.setattr(SessionPool, "give", lambda self, _user, *rest: give(self, "", *rest))
    patch.setattr(SessionPool, "take", lambda self, _user, *rest: take(self, "", *rest))


def penalty_ignored(patch: Mistakes) -> None:
    found = wishes.sampling_of
    patch.setattr(
        wishes,
        "sampling_of",
        lambda *given: replace(found(*given), frequency_penalty=0.0, presence_penalty=0.0),
    )


def bias_ignored(patch: Mistakes) -> None:
    found = wishes.sampling_of
    patch.setattr(wishes, "sampling_of", lambda *given: replace(found(*given), logit_bias={}))


def prefix_off_by_one(patch: Mistakes) -> None:
    common = common_length
    patch.setattr(
        sessions, "common_length", lambda one, other: min(common(one, other) + 1, len(one), len(other))
    )


def stop_missed_across_tokens(patch: Mistakes) -> None:
    patch.setattr(reading, "_begun", lambda _text, _stop: 0)


def probabilities_of_the_wrong_place(patch: Mistakes) -> None:
    """The scores one place before."""
    for module in (sampling, scoring):
        of, before = module.probability_of, list[Any]()

        def shifted(row: Any, token: int, top: int, of: Any = of, before: list[Any] = before) -> Any:
            before.append(row)
            return of(before[max(0, len(before) - 2)], token, top)

        patch.setattr(module, "probability_of", shifted)


def one_seed_for_all(patch: Mistakes) -> None:
    reply = Run._reply
    patch.setattr(
        Run, "_reply", lambda self, wish, index, session, _number: reply(self, wish, index, session, 0)
    )


def token_counted_twice(patch: Mistakes) -> None:
    note = Run._note_token

    def twice(self: Run, latest: list[float]) -> None:
        if not latest:
            note(self, latest)
        note(self, latest)

    patch.setattr(Run, "_note_token", twice)


CHECKS = (
    nothing_is_shared,
    penalties_count,
    branches_are_right,
    stops_end_replies,
    probabilities_are_local,
    echoes_are_local,
    draws_are_of_their_seeds,
    counts_are_exact,
)
PLANTED = [
    (session_of_another_key, nothing_is_shared),
    (penalty_ignored, penalties_count),
    (bias_ignored, penalties_count),
    (prefix_off_by_one, branches_are_right),
    (stop_missed_across_tokens, stops_end_replies),
    (probabilities_of_the_wrong_place, probabilities_are_local),
    (probabilities_of_the_wrong_place, echoes_are_local),
    (one_seed_for_all, draws_are_of_their_seeds),
    (token_counted_twice, counts_are_exact),
]


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_without_a_mistake(guarded: World, check: Callable[[World], bool]) -> None:
    assert check(guarded)


@pytest.mark.parametrize(("plant", "check"), PLANTED, ids=lambda one: one.__name__)
def test_a_mistake_is_noticed(
    guarded: World, mistakes: Mistakes, plant: Plant, check: Callable[[World], bool]
) -> None:
    # Its own sessions: one that holds the whole request already may hide a mistake, and what a mistake has left there
    # is nobody else's.
    own = SessionPool(most=8, most_bytes=2**28)
    mistakes.setattr(guarded.api.generator, "pool", own)
    plant(mistakes)
    noticed = not passes(lambda: check(guarded))
    own.close()
    assert noticed
