"""Who is said to be due."""

from __future__ import annotations

from corolla.swarm.rhythm import LONGEST_PERIOD, Rhythm


def test_whoever_comes_regularly_is_due_a_period_after_the_last_time() -> None:
    rhythm = Rhythm()
    assert not rhythm.others_due(0.0, 1.0, ())
    for turn in range(4):
        rhythm.came("a", 0.1 * turn)
    assert not rhythm.others_due(0.31, 0.39, ())
    assert rhythm.others_due(0.31, 0.41, ())
    assert not rhythm.others_due(0.31, 0.41, ("a",))
    assert rhythm.others_due(0.45, 0.46, ())  # late
    assert not rhythm.others_due(0.51, 0.6, ())  # by a whole period
    assert abs(rhythm.fastest(("a", "b")) - 0.1) < 1e-9
    assert rhythm.fastest(("b",)) == 0.0


def test_half_of_the_latest_interval_counts() -> None:
    rhythm = Rhythm()
    for moment in (0.0, 0.1, 0.3):
        rhythm.came("a", moment)
    assert abs(rhythm.fastest("a") - 0.15) < 1e-9


def test_a_pause_is_no_period_and_whoever_left_is_forgotten() -> None:
    rhythm = Rhythm()
    rhythm.came("a", 0.0)
    rhythm.came("a", 0.1)
    rhythm.came("a", 0.1 + 2 * LONGEST_PERIOD)
    assert abs(rhythm.fastest("a") - 0.1) < 1e-9
    assert rhythm.others_came(2 * LONGEST_PERIOD, ())
    assert not rhythm.others_came(2 * LONGEST_PERIOD, ("a",))
    rhythm.forget("a")
    assert not rhythm.others_came(0.0, ())
    assert rhythm.fastest("a") == 0.0
