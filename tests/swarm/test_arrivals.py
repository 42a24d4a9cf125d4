"""Who is said to be due."""

from __future__ import annotations

from corolla.swarm.arrivals import LONGEST_PERIOD, ArrivalTracker


def test_whoever_comes_regularly_is_due_a_period_after_the_last_time() -> None:
    arrivals = ArrivalTracker()
    assert not arrivals.others_due(0.0, 1.0, ())
    for turn in range(4):
        arrivals.arrived("a", 0.1 * turn)
    assert not arrivals.others_due(0.31, 0.39, ())
    assert arrivals.others_due(0.31, 0.41, ())
    assert not arrivals.others_due(0.31, 0.41, ("a",))
    assert arrivals.others_due(0.45, 0.46, ())  # late
    assert not arrivals.others_due(0.51, 0.6, ())  # by a whole period
    assert abs(arrivals.shortest_period(("a", "b")) - 0.1) < 1e-9
    assert arrivals.shortest_period(("b",)) == 0.0


def test_half_of_the_latest_interval_counts() -> None:
    arrivals = ArrivalTracker()
    for moment in (0.0, 0.1, 0.3):
        arrivals.arrived("a", moment)
    assert abs(arrivals.shortest_period("a") - 0.15) < 1e-9


def test_a_pause_is_no_period_and_whoever_left_is_forgotten() -> None:
    arrivals = ArrivalTracker()
    arrivals.arrived("a", 0.0)
    arrivals.arrived("a", 0.1)
    arrivals.arrived("a", 0.1 + 2 * LONGEST_PERIOD)
    assert abs(arrivals.shortest_period("a") - 0.1) < 1e-9
    assert arrivals.others_arrived(2 * LONGEST_PERIOD, ())
    assert not arrivals.others_arrived(2 * LONGEST_PERIOD, ("a",))
    arrivals.forget("a")
    assert not arrivals.others_arrived(0.0, ())
    assert arrivals.shortest_period("a") == 0.0
