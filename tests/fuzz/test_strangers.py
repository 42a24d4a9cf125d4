"""Strangers who say anything at all, to a server that serves an honest client at the same time."""

from __future__ import annotations

import asyncio
import logging
import random
from collections import Counter
from collections.abc import Callable

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, rule, run_state_machine_as_test

from tests.fuzz.target import Target, run


@pytest.mark.parametrize("family", ["llama", pytest.param("falcon", marks=pytest.mark.nightly)])
def test_whatever_strangers_say_in_whatever_order(
    family: str, record_property: Callable[[str, object], None], caplog: pytest.LogCaptureFixture
) -> None:
    """Each answer is the one that the protocol's own rules give; nothing is left of anybody at the end."""
    stages: Counter[str] = Counter()
    codes: Counter[str] = Counter()

    class Strangers(RuleBasedStateMachine):
        def __init__(self) -> None:
            super().__init__()
            self.loop = asyncio.new_event_loop()
            self.target = Target(family)
            self.target.stages, self.target.codes = stages, codes
            self.loop.run_until_complete(self.target.start())

        @rule(rng=st.randoms(use_true_random=False), count=st.integers(1, 12))
        def talk(self, rng: random.Random, count: int) -> None:
            self.loop.run_until_complete(run(self.target, rng, count, every=6))

        @rule(seed=st.integers(0, 2**32), count=st.integers(20, 60))
        def babble(self, seed: int, count: int) -> None:
            """Many at once, which do not shrink, but are drawn quickly."""
            self.loop.run_until_complete(run(self.target, random.Random(seed), count))

        @rule()
        def serve_an_honest_client(self) -> None:
            self.loop.run_until_complete(self.target.honest_step())

        @rule(index=st.integers(0, 2))
        def vanish(self, index: int) -> None:
            if index < len(self.target.guests):
                self.loop.run_until_complete(self.target.guests[index].leave())

        def teardown(self) -> None:
            try:
                self.loop.run_until_complete(self.target.finish())
            finally:
                self.loop.run_until_complete(self.target.close())
                self.loop.close()

    checks = settings(
        max_examples=12, stateful_step_count=12, suppress_health_check=list(HealthCheck), print_blob=True
    )
    with caplog.at_level(logging.ERROR):
        run_state_machine_as_test(Strangers, settings=checks)
    assert not [record for record in caplog.records if record.levelno >= logging.ERROR]
    judge = Target.__new__(Target)
    judge.stages, judge.codes = stages, codes
    record_property("strangers", judge.report(f"stateful, on {family}"))
    judge.check_shares()


async def test_a_crowd_of_seeded_strangers(
    record_property: Callable[[str, object], None], caplog: pytest.LogCaptureFixture
) -> None:
    """Many more messages than hypothesis draws in the time."""
    target = Target("llama")
    await target.start()
    try:
        with caplog.at_level(logging.ERROR):
            await run(target, random.Random(5), 3000)
        await target.finish()
    finally:
        await target.close()
    assert not [record for record in caplog.records if record.levelno >= logging.ERROR]
    record_property("strangers", target.report("a crowd of strangers"))
    target.check_shares()
