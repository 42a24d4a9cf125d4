"""What audits have found, in a file that outlives the client: `corolla status` shows it.

Invariant: a line is written whole or not at all, whoever writes at the same time, and a folder that cannot
be written to costs the report and nothing else; the file stays small.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from pathlib import Path

import msgspec

from corolla.client.audits.verdicts import Finding
from corolla.places import data_root

log = logging.getLogger(__name__)

FILE = "audits.jsonl"
MOST_BYTES = 256 * 1024  # about a thousand findings; then the older half is forgotten


class Reported(msgspec.Struct, frozen=True):
    """All findings of one kind about one peer."""

    peer_id: str
    model: str
    start: int
    end: int
    lied: bool  # False: two disagreed, and nobody could decide
    other: str  # who said otherwise, in the newest
    what: list[str]  # forward, backward, step
    worst: float  # in tolerances
    first: float  # seconds since 1970
    last: float
    count: int


class _Line(msgspec.Struct, frozen=True):
    peer_id: str
    what: str
    start: int
    end: int
    times: float
    lied: bool
    other: str
    when: float
    model: str


class AuditReport:
    """The report in `folder`, by default Corolla's own in the user's data folder."""

    def __init__(self, folder: Path | None = None) -> None:
        self.path = (folder or data_root()) / FILE
        self._failed = False

    def add(self, finding: Finding, model: str) -> None:
        """Append a line."""
        line = _Line(
            peer_id=finding.peer_id,
            what=finding.what,
            start=finding.start,
            end=finding.end,
            times=min(finding.times, 1e9),
            lied=finding.lied,
            other=finding.other,
            when=finding.when,
            model=model,
        )
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._shorten()
            with self.path.open("ab", buffering=0) as file:
                file.write(msgspec.json.encode(line) + b"\n")
        except OSError as error:
            if not self._failed:
                self._failed = True
                log.warning("What an audit found could not be noted in %s: %s", self.path, error.strerror)

    def _shorten(self) -> None:
        if not self.path.exists() or self.path.stat().st_size < MOST_BYTES:
            return
        lines = self.path.read_bytes().splitlines(keepends=True)
        fresh = self.path.with_suffix(f".{os.getpid()}")
        fresh.write_bytes(b"".join(lines[len(lines) // 2 :]))
        fresh.replace(self.path)

    def read(self) -> list[Reported]:
        """One entry for each peer, model, blocks and verdict, the newest last."""
        groups: dict[tuple[object, ...], list[_Line]] = {}
        for line in self._lines():
            groups.setdefault((line.peer_id, line.model, line.start, line.end, line.lied), []).append(line)
        return sorted((_summed(group) for group in groups.values()), key=lambda one: one.last)

    def _lines(self) -> Iterator[_Line]:
        try:
            raw = self.path.read_bytes()
        except OSError:
            return
        for line in raw.splitlines():
            try:
                yield msgspec.json.decode(line, type=_Line)
            except msgspec.MsgspecError:
                continue  # cut off by a crash, or of another version


def _summed(lines: list[_Line]) -> Reported:
    newest = max(lines, key=lambda line: line.when)
    return Reported(
        peer_id=newest.peer_id,
        model=newest.model,
        start=newest.start,
        end=newest.end,
        lied=newest.lied,
        other=newest.other,
        what=sorted({line.what for line in lines}),
        worst=max(line.times for line in lines),
        first=min(line.when for line in lines),
        last=newest.when,
        count=len(lines),
    )
