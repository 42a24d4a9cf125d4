"""Conversations that go on: what is known is not computed again, and never changes a reply."""

from __future__ import annotations

from typing import Any

import torch
from tests.api.world import BASE, World, Worlds, write_bundle

from corolla.api.sessions import SessionPool

LONG = "The harbour lies in the rain, and nobody is there but the lamp. " * 4


def ask(world: World, talk: list[Any], **how: Any) -> tuple[str, int, int]:
    """A reply, the tokens that were computed for it, and those that were known."""
    before = world.counted()
    reply = world.client().chat.completions.create(
        model=how.pop("model", BASE), messages=talk, temperature=0, max_tokens=6, **how
    )
    assert reply.usage is not None
    assert reply.usage.prompt_tokens_details is not None
    known = reply.usage.prompt_tokens_details.cached_tokens or 0
    return reply.choices[0].message.content or "", world.counted() - before, known


def right(world: World, talk: list[Any]) -> str:
    return world.text(world.greedy(world.prompt(talk), 6))


def test_a_continued_conversation_costs_what_is_new(worlds: Worlds) -> None:
    world = worlds.make("continued")
    talk: list[Any] = [{"role": "user", "content": LONG}]
    text, cost, known = ask(world, talk)
    assert text == right(world, talk)
    assert known == 0
    assert cost > len(LONG)
    for turn in range(3):
        # What the model says is replaced by what can be told apart from no other tokens.
        talk += [
            {"role": "assistant", "content": f"Reply {turn}."},
            {"role": "user", "content": f"And {turn}?"},
        ]
        text, cost, known = ask(world, talk)
        assert text == right(world, talk)
        assert known > len(LONG)
        assert cost < 60
    # An earlier turn is edited: a fork, nothing before it is computed again; and the old branch goes on.
    edited = [*talk[:2], {"role": "user", "content": "No: what else?"}]
    text, cost, known = ask(world, edited)
    assert text == right(world, edited)
    assert (cost < 50, known > len(LONG)) == (True, True)
    talk += [{"role": "assistant", "content": "So."}, {"role": "user", "content": "Well?"}]
    text, cost, _ = ask(world, talk)
    assert text == right(world, talk)
    assert cost < 50
    # The same again.
    text, cost, _ = ask(world, talk)
    assert text == right(world, talk)
    assert cost < 20


def test_what_is_over_the_budget_is_rebuilt(worlds: Worlds) -> None:
    world = worlds.make("budget", most=1)
    talks = [[{"role": "user", "content": f"{number} {LONG[:60]}"}] for number in range(3)]
    for _ in range(2):
        for talk in talks:
            assert ask(world, talk)[0] == right(world, talk)
    assert world.api.generator.pool.count == 1
    none = worlds.make("nothing", most=0)
    for _ in range(2):
        assert ask(none, talks[0])[0] == right(none, talks[0])
    assert none.api.generator.pool.count == 0


def test_bundles_and_users_have_sessions_of_their_own(worlds: Worlds) -> None:
    world = worlds.make("own")
    write_bundle(world.bundles / "poet", world.folder, world.swarm.checkpoint.identity)
    talk = [{"role": "user", "content": LONG[:50]}]
    ask(world, talk)
    _, _, known = ask(world, talk, model="poet")
    assert known == 0
    pool, base = SessionPool(most=9, most_bytes=2**28), world.api.partners.base
    session = pool.take("ann", base, [5, 6, 7, 8])
    base.model.generate(torch.tensor([[5, 6, 7, 8]]), session=session, max_new_tokens=2, do_sample=False)
    pool.give("ann", base, session)
    other = pool.take("bob", base, [5, 6, 7, 8, 9])
    assert other is not session
    assert other.position == 0
    mine = pool.take("ann", base, [5, 6, 7, 8])
    assert mine.position == 0, "fewer tokens than a fork is worth"
    long = list(range(5, 30))
    session = pool.take("ann", base, long)
    base.model.generate(torch.tensor([long]), session=session, max_new_tokens=2, do_sample=False)
    pool.give("ann", base, session)
    forked = pool.take("ann", base, [*long[:20], 3])
    assert (forked.position, forked is session) == (20, False)
    again = pool.take("ann", base, [*session.output_ids[0].tolist(), 9])
    assert again is session
    pool.give("ann", base, again)
    assert pool.count
    pool.forget(base)
    pool.give("ann", base, forked)
    assert pool.count == 0, "a request has ended whose model is gone"
    for one in (other, mine):
        one.close()
    pool.close()
    assert pool.count == 0


def test_a_server_dies_in_the_middle(worlds: Worlds) -> None:
    world = worlds.make("dying", spans=((0, 2), (2, 4), (0, 2)))
    talk = [{"role": "user", "content": "Tell me of the river, at length."}]
    stream = world.client().chat.completions.create(
        model=BASE, messages=talk, temperature=0, max_tokens=40, stream=True
    )
    text, killed = "", False
    for chunk in stream:
        text += chunk.choices[0].delta.content or ""
        if not killed and len(text) > 3:
            used = max(
                world.swarm.counted(), key=lambda peer: world.swarm.counted()[peer] * (peer in first(world))
            )
            world.swarm.kill(used)
            killed = True
    assert killed
    assert text == world.text(world.greedy(world.prompt(talk), 40))
    more = [*talk, {"role": "assistant", "content": "It flows."}, {"role": "user", "content": "And?"}]
    assert ask(world, more)[0] == right(world, more)


def first(world: World) -> set[str]:
    """The servers of the first blocks, of which there are two."""
    return {peer for peer, server in world.swarm.servers.items() if server.span.start == 0}
