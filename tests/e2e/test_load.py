"""64 chats and two tuning clients at once, while servers are killed: all correct, nobody sees an error."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.e2e.load import Crowd, Seen
from tests.e2e.processes import processes
from tests.tiny_models import write_tiny

CHATS = 64
CLIENTS = [[str(CHATS // 2)], [str(CHATS // 2)], ["0", "ptune", "deep_ptune"]]
LEAST_PAUSE = 12  # seconds between two kills: whoever was killed has to come back
CACHE_TOKENS = 4096  # less than all chats hold at once: some are evicted and replayed


Note = Callable[[str, Any], None]


def run(folder: Path, note: Note, *, seconds: float, kill_every: float, slope_seconds: float) -> Seen:
    model = write_tiny("llama", folder / "model")
    with processes(folder) as started:
        crowd = Crowd(started, model, cache_tokens=CACHE_TOKENS)
        seen = crowd.run(seconds=seconds, clients=CLIENTS, kill_every=kill_every, slope_seconds=slope_seconds)
    assert not seen.errors, "\n".join(seen.errors)
    note("crowd", seen.as_dict())
    assert len(seen.tokens) == CHATS
    assert min(seen.steps.values()) > 0
    assert seen.slowest_share >= 0.5
    return seen


@pytest.mark.timeout(240)
@pytest.mark.nightly
def test_a_crowd_notices_nothing_when_servers_are_killed(tmp_path: Path, record_property: Note) -> None:
    seen = run(tmp_path, record_property, seconds=60, kill_every=LEAST_PAUSE, slope_seconds=30)
    assert seen.kills >= 2


@pytest.mark.nightly
@pytest.mark.timeout(1500)
def test_a_quarter_of_an_hour_with_a_server_killed_every_minute(
    tmp_path: Path, record_property: Note, scaled: Callable[[float], int]
) -> None:
    seconds, kill_every = scaled(900), max(scaled(60), LEAST_PAUSE)
    seen = run(tmp_path, record_property, seconds=seconds, kill_every=kill_every, slope_seconds=scaled(90))
    assert seen.kills >= 0.8 * seconds / kill_every
    lasting = [slope for name, slope in seen.slopes.items() if name.startswith("client")]
    assert max(lasting) < 1.0  # MB a minute
