"""A hundred thousand messages, guided by what they reach, against one server that stays up throughout."""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable

import psutil
import pytest

from tests.fuzz.guided import Guided, Lines
from tests.fuzz.target import Target

MESSAGES = 100_000
SAMPLE = 2_000  # messages between two looks at the process's memory
GROWTH = 24 * 2**20  # bytes that the process may grow by after the first third: allocators keep some


@pytest.mark.parametrize(
    ("messages", "growth"),
    [
        pytest.param(1_500, None, id="a few"),
        pytest.param(MESSAGES, GROWTH, id="many", marks=[pytest.mark.nightly, pytest.mark.timeout(3 * 3600)]),
    ],
)
async def test_strangers_guided_by_what_they_reach(
    messages: int,
    growth: int | None,
    record_property: Callable[[str, object], None],
    caplog: pytest.LogCaptureFixture,
    scaled: Callable[[float], int],
) -> None:
    lines, target = Lines(), Target("llama")
    sample = SAMPLE
    if growth is not None:
        messages, sample = scaled(messages), scaled(SAMPLE)
    lines.watch()
    memory: list[int] = []
    try:
        await target.start()
        guided = Guided(target, lines, seed=11)
        with caplog.at_level(logging.ERROR):
            while target.stages["sent"] < messages:
                await guided.once()
                if target.stages["sent"] // 25 > target.honest_steps:
                    await target.honest_step()
                if target.stages["sent"] // sample > len(memory):
                    gc.collect()
                    memory.append(psutil.Process().memory_info().rss)
        await target.finish()
    finally:
        lines.stop()
        await target.close()
    assert not [record for record in caplog.records if record.levelno >= logging.ERROR]
    more = {"scripts kept": len(guided.corpus), "lines reached": lines.count}
    if growth is not None:
        more["bytes grown"] = grown = _grown(memory)
        assert grown < growth
    record_property("strangers", target.report("guided by coverage", **more))
    assert len(guided.corpus) > 20
    target.check_shares()


def _grown(memory: list[int]) -> int:
    """From the first to the second half of what came after the first third, on average."""
    late = memory[len(memory) // 3 :]
    half = len(late) // 2
    return round(sum(late[half:]) / (len(late) - half) - sum(late[:half]) / half)
