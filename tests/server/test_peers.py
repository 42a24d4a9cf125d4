"""What a server's log says of its visitors."""

from __future__ import annotations

import logging

import pytest

from corolla.server.peers import UsageLog


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_who_came_what_for_and_how_fast(caplog: pytest.LogCaptureFixture) -> None:
    clock = Clock()
    usage = UsageLog(clock)
    peer = "12D3KooW" + "abcd1234"
    with caplog.at_level(logging.INFO):
        with usage.stream(peer), usage.stream(peer):
            for what, tokens in (("sessions", 3), ("sessions", 5), ("training", 1000)):
                with usage.work(peer, what, tokens):
                    clock.now += 2.0
            usage.tell()
            usage.tell()
            with pytest.raises(ValueError, match="failed"), usage.work(peer, "training", 9):
                raise ValueError("failed")
            with usage.work("another\x1b[2J", "sessions", 1):
                pass
        with usage.stream("evil\x1b[2J"):
            pass
    assert [record.getMessage() for record in caplog.records] == [
        "Peer …abcd1234 came",
        "Peer …abcd1234: 8 tokens of sessions (2 tokens/s), 1,000 tokens of training (500 tokens/s)",
        "Peer …abcd1234 left; nothing more was done",
        "Peer …evil[2J came",
        "Peer …evil[2J left; nothing more was done",
    ]
    assert not usage._visits
