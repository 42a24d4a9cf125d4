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
) -> None:
    lines, target = Lines(), Target("llama")
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
                if target.stages["sent"] // SAMPLE > len(memory):
                    gc.collect()
                    memory.append(psutil.Process().memory_info().rss)
        await target.finish()
    finally:
        lines.stop()
        await target.close()
    assert not caplog.records
    said = f"guided: {target.report()}; {len(guided.corpus)} scripts kept, {lines.count} lines reached"
    if growth is not None:
        late = memory[len(memory) // 3 :]
        half = len(late) // 2
        grown = sum(late[half:]) / (len(late) - half) - sum(late[:half]) / half
        said += f"; memory {grown / 2**20:+.1f} MiB from the first to the second half of {len(late)} samples"
        record_property("strangers", said)
        assert grown < growth, said
    else:
        record_property("strangers", said)
    assert len(guided.corpus) > 20
    target.check_shares()
