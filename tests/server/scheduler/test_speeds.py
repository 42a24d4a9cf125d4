"""What the last work says about the next."""

from __future__ import annotations

from corolla.server.scheduler.speeds import Speed


def test_an_estimate_is_what_work_took_at_best() -> None:
    speed = Speed()
    for seconds in [9.0, 1.0] * 10:
        speed.took(1000, seconds)
        speed.took(1, seconds)  # says little
    assert speed.seconds_of(5000) == 5.0
