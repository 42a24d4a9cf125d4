"""Servers that lie are found, avoided and reported; what an audit costs and whom it believes."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.client.lying import (
    CASES,
    GREEDY,
    LIES,
    WORK,
    LyingSwarm,
    audited,
    auditor_of,
    changed,
    decode,
    noisy,
    one_sign,
    settle,
    skip_a_block,
    train,
    until_found,
)
from tests.reference import random_ids
from tests.tiny_models import write_tiny

from corolla.client.audits.auditor import MOST_WAITING
from corolla.client.audits.own_blocks import OwnBlocks
from corolla.errors import LyingServer, UsageError
from corolla.models.prompts import KeyValuePrefix
from corolla.wire.messages import Gradients, Output


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny("llama", tmp_path_factory.mktemp("llama"))


@pytest.mark.parametrize(("lie", "work"), CASES)
def test_a_liar_is_found_avoided_and_reported(
    swarm_of: Callable[..., LyingSwarm], caplog: pytest.LogCaptureFixture, lie: str, work: str
) -> None:
    swarm = swarm_of()
    honest = audited(swarm, 0.0)
    expected = WORK[work](honest, 7)
    swarm.lie("a", LIES[lie][0]())
    model = audited(swarm, 0.2, own=True)
    until_found(model, WORK[work])
    # From now on everything is as it should be.
    found = model.blocks.connection.view.verdicts.condemned
    assert set(found) == {"a"}
    counted = swarm.counted("forward")["a"], swarm.counted()["a"]
    assert (WORK[work](model, 7) - expected).abs().max() < 1e-4
    assert (swarm.counted("forward")["a"], swarm.counted()["a"]) == counted
    assert (found["a"].hop.start, found["a"].hop.end) == (0, 4)
    assert found["a"].times > 1
    assert found["a"].what in {"train": {"forward", "backward"}, "decode": {"step"}}[work]
    assert sum(found["a"].sentence() in one.getMessage() for one in caplog.records) == 1


def test_a_server_that_skips_a_block_is_found(swarm_of: Callable[..., LyingSwarm]) -> None:
    swarm = swarm_of()
    skip_a_block(swarm, "a")
    for work in (decode, train):
        until_found(audited(swarm, 0.2, own=True), work)


def test_what_a_prefix_makes_of_it_is_checked_too(swarm_of: Callable[..., LyingSwarm]) -> None:
    """By another server and by the client itself, in training and in sessions."""
    swarm = swarm_of("ab")
    form = swarm.servers["a"].span.key_values
    assert form is not None
    model, ids = audited(swarm, 1.0, own=True), random_ids(2, 24)
    values = torch.randn(4, 5, form.width, generator=torch.Generator().manual_seed(1))
    model.prompts = KeyValuePrefix(values)
    model(ids, labels=ids).loss.backward()
    decode(model)
    counts = settle(model).counts
    assert counts.right >= 4
    assert not counts.wrong
    assert not counts.unclear
    swarm.lie("a", changed(Gradients, noisy(0.5))())
    model(ids, labels=ids).loss.backward()
    assert settle(model).counts.wrong == 1


def test_the_session_goes_on_after_the_lie_with_the_others(
    swarm_of: Callable[..., LyingSwarm], folder: Path
) -> None:
    """Caches that came from the liar are rebuilt; what it made the model say is taken back by the caller."""
    swarm = swarm_of("")
    swarm.add(0, 1, "first")
    for name in ("a", "b", "c"):
        swarm.add(1, 2, name, throughput={"a": 1000.0}.get(name, 1.0))
    swarm.add(2, 4, "last")
    model = audited(swarm, 1.0, own=True)
    ids = random_ids(1, 6)
    expected = audited(swarm, 0.0).generate(ids, max_new_tokens=10, **GREEDY)
    with model.inference_session(max_length=64) as session:
        model.generate(ids, max_new_tokens=4, **GREEDY)
        assert settle(model).counts.right >= 4
        said = session.position
        before = swarm.counted()["first"]
        swarm.lie("a", changed(Output, noisy(0.5))())
        model.generate(None, max_new_tokens=1, **GREEDY)
        settle(model)
        with pytest.raises(LyingServer, match=r"blocks 1:2.*last right at"):
            model.generate(None, max_new_tokens=1, **GREEDY)
        session.position = said
        rest = model.generate(None, max_new_tokens=6, **GREEDY)
        found = torch.cat([session.output_ids[:, :said], rest], 1)
        assert torch.equal(found, expected)
        # Blocks before the liar's keep their cache; "first" was asked for the new tokens only.
        assert swarm.counted()["first"] - before <= 6 + 4
        assert "a" not in {hop.peer_id for hop in session.hops}
        assert settle(model).counts.wrong == 1


def test_nobody_begins_with_what_a_liar_made(swarm_of: Callable[..., LyingSwarm]) -> None:
    swarm = swarm_of()
    model, ids = audited(swarm, 0.0), random_ids(1, 40)
    expected = model.generate(ids, max_new_tokens=6, **GREEDY)
    swarm.lie("a", changed(Output, noisy(0.3))())
    liars = audited(swarm, 1.0, own=True)
    with liars.inference_session() as session:
        liars.generate(ids, max_new_tokens=1, **GREEDY)  # kept as a beginning for others
        settle(liars)
        with liars.inference_session():
            assert torch.equal(liars.generate(ids, max_new_tokens=6, **GREEDY), expected)
        with pytest.raises(LyingServer), session:
            liars.generate(None, max_new_tokens=2, **GREEDY)


def test_two_that_disagree_are_named_and_neither_is_condemned(
    swarm_of: Callable[..., LyingSwarm], caplog: pytest.LogCaptureFixture
) -> None:
    swarm = swarm_of("ab")
    swarm.lie("b", changed(Output, noisy(0.01))())
    model = audited(swarm, 1.0)
    for seed in range(3):
        decode(model, seed)
        assert settle(model).counts.unclear
    view = model.blocks.connection.view
    assert not view.verdicts.condemned

    async def doubted() -> set[str]:
        found: set[str] = view.health.doubted()
        return found

    assert model.blocks.connection.run(doubted()) == {"a", "b"}
    assert (
        sum("a and b disagree about a step of blocks 0:4" in one.getMessage() for one in caplog.records) == 1
    )


def test_others_are_preferred_to_two_that_disagree(swarm_of: Callable[..., LyingSwarm]) -> None:
    """Also by a session that is under way."""
    swarm = swarm_of("ab")
    swarm.lie("b", changed(Output, noisy(0.01))())
    model, ids = audited(swarm, 1.0), random_ids(1, 6)
    expected = audited(swarm, 0.0).generate(ids, max_new_tokens=8, **GREEDY)
    with model.inference_session(max_length=64):
        begun = model.generate(ids, max_new_tokens=4, **GREEDY)
        assert settle(model).counts.unclear
        swarm.add(0, 4, "c", throughput=1.0)
        model.blocks.connection.run(model.blocks.connection.view.records.refresh())
        before = swarm.counted()
        rest = model.generate(None, max_new_tokens=4, **GREEDY)
        assert torch.equal(torch.cat([begun, rest], 1), expected)
        # It went on there, with all that came before, until those two disagreed about the new one as well.
        assert swarm.counted()["c"] - before["c"] >= ids.shape[1] + 4


@pytest.mark.parametrize("own", [False, True])
def test_liars_who_agree_condemn_nobody(swarm_of: Callable[..., LyingSwarm], own: bool) -> None:
    swarm = swarm_of("abc")
    for name in "bc":
        swarm.lie(name, changed(Output, lambda tensor: tensor * 1.01)())
    model = audited(swarm, 1.0, own=own)
    for seed in range(4):
        with contextlib.suppress(LyingServer):
            train(model, seed)
        with contextlib.suppress(LyingServer):
            decode(model, seed)
        settle(model)
    condemned = set(model.blocks.connection.view.verdicts.condemned)
    assert condemned == ({"b", "c"} if own else set())


@pytest.mark.parametrize("liar", ["a", "b"])
def test_the_clients_own_checkpoint_decides_between_two(
    swarm_of: Callable[..., LyingSwarm], liar: str
) -> None:
    swarm = swarm_of("ab")
    swarm.lie(liar, changed(Output, noisy(0.01))())
    model = audited(swarm, 1.0, own=True)
    train_once(model)
    assert set(model.blocks.connection.view.verdicts.condemned) == {liar}


def train_once(model: Any) -> None:
    try:
        train(model)
    except LyingServer:
        return
    finally:
        settle(model)


def test_a_lone_server_is_checked_by_the_client_itself(swarm_of: Callable[..., LyingSwarm]) -> None:
    swarm = swarm_of("a")
    model = audited(swarm, 1.0, own=True)
    train(model)
    decode(model)
    counts = settle(model).counts
    assert counts.right + counts.dropped == counts.seen
    assert not counts.wrong
    swarm.lie("a", changed(Gradients, one_sign)())
    train_once(model)
    with pytest.raises(LyingServer, match="wrong backward"):
        train(model)


def test_a_lone_server_that_nobody_can_check_is_said_once(
    swarm_of: Callable[..., LyingSwarm], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    swarm = swarm_of("a")
    model = audited(swarm, 1.0, own=True)
    monkeypatch.setattr(OwnBlocks, "fits", lambda *_: False)
    for _ in range(2):
        train(model)
    assert settle(model).counts.unanswered >= 4
    said = [one.getMessage() for one in caplog.records if "need a second server" in one.getMessage()]
    assert len(said) == 1
    assert "blocks 0:4" in said[0]


def test_one_who_slanders_is_found_instead(swarm_of: Callable[..., LyingSwarm]) -> None:
    """The answer was right; the server that was asked about it lies."""
    swarm = swarm_of()
    swarm.lie("b", changed(Output, noisy(0.01))())
    model = audited(swarm, 1.0, own=True)
    for seed in range(3):
        with contextlib.suppress(LyingServer):
            decode(model, seed)
        settle(model)
    assert set(model.blocks.connection.view.verdicts.condemned) == {"b"}


@pytest.mark.parametrize("own", [False, True])
def test_several_servers_together_check_one(swarm_of: Callable[..., LyingSwarm], own: bool) -> None:
    """Blocks 0:4 of one server by two with half of them each; where one of them is wrong, neither is condemned."""
    swarm = swarm_of("a")
    for name in ("x", "y"):
        swarm.add(0, 2, f"{name}-front", throughput=1.0)
        swarm.add(2, 4, f"{name}-back", throughput=1.0)
    model = audited(swarm, 1.0, own=own)
    for seed in range(2):
        train(model, seed)
        decode(model, seed)
        assert settle(model).counts.right
    assert not auditor_of(model).counts.wrong
    swarm.lie("x-back", changed(Gradients, noisy(0.01))())
    for seed in range(4):
        with contextlib.suppress(LyingServer):
            train(model, seed)
        settle(model)
    assert set(model.blocks.connection.view.verdicts.condemned) <= {"x-back"}


def test_the_audited_server_is_asked_nothing_more(swarm_of: Callable[..., LyingSwarm]) -> None:
    swarm = swarm_of()
    counted = []
    for share in (0.0, 1.0):
        before = {name: swarm.counted(name)["a"] for name in ("forward", "backward", "inference")}
        model = audited(swarm, share)
        train(model)
        decode(model)
        if share:
            assert settle(model).counts.right
        counted.append({name: swarm.counted(name)["a"] - before[name] for name in before})
    assert counted[0] == counted[1]


def test_audits_that_are_behind_are_dropped_and_work_goes_on(swarm_of: Callable[..., LyingSwarm]) -> None:
    swarm = swarm_of()
    model = audited(swarm, 1.0)
    for name in ("b", "c"):
        swarm.stop(name)  # whoever audits does not answer
    for seed in range(4):
        decode(model, seed)
    counts = auditor_of(model).counts
    assert counts.dropped == counts.drawn - MOST_WAITING - 1
    model.close()


def test_a_refusal_is_no_lie(swarm_of: Callable[..., LyingSwarm]) -> None:
    swarm = swarm_of()
    model = audited(swarm, 1.0)
    swarm.kill("b")
    train(model)
    counts = settle(model).counts
    assert (counts.right, counts.wrong, counts.unclear) == (2, 0, 0)


@pytest.mark.parametrize("share", [-0.1, 1.5])
def test_a_share_that_is_none(swarm_of: Callable[..., LyingSwarm], share: float) -> None:
    with pytest.raises(UsageError, match=r"share of requests to audit is .*0 to 1"):
        swarm_of("a").model(audit=share)


def test_from_pretrained_starts_audits(swarm_of: Callable[..., LyingSwarm]) -> None:
    swarm = swarm_of("ab")
    assert auditor_of(swarm.model(audit=0.05))._share == 0.05
    assert swarm.model().blocks.connection.audits is None
