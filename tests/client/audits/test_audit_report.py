"""The file of what audits have found."""

from __future__ import annotations

from pathlib import Path

import pytest

from corolla.client.audits import audit_report
from corolla.client.audits.audit_report import FILE, AuditReport
from corolla.client.audits.verdicts import Finding


def finding(peer: str, times: float = 2.0, what: str = "step", when: float = 1.0) -> Finding:
    return Finding(peer, what, 0, 4, times, lied=True, other="b", when=when)


def test_findings_of_one_kind_are_summed_up_the_newest_last(tmp_path: Path) -> None:
    report = AuditReport(tmp_path / "new")
    assert report.read() == []
    for one in (finding("x", 2.0, when=5.0), finding("y"), finding("x", float("inf"), "forward", when=9.0)):
        report.add(one, "model")
    first, second = AuditReport(tmp_path / "new").read()
    assert (first.peer_id, first.count) == ("y", 1)
    assert (second.peer_id, second.count, second.what) == ("x", 2, ["forward", "step"])
    assert (second.first, second.last, second.worst) == (5.0, 9.0, 1e9)


def test_a_line_that_was_cut_off_costs_that_line(tmp_path: Path) -> None:
    report = AuditReport(tmp_path)
    report.add(finding("x"), "model")
    whole = (tmp_path / FILE).read_bytes()
    (tmp_path / FILE).write_bytes(whole + whole[:20] + b"\n" + whole)
    [found] = report.read()
    assert found.count == 2


def test_the_file_stays_small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(audit_report, "MOST_BYTES", 2000)
    report = AuditReport(tmp_path)
    for number in range(60):
        report.add(finding(f"peer-{number}"), "model")
        assert (tmp_path / FILE).stat().st_size < 2300
    assert report.read()[-1].peer_id == "peer-59"
    assert [path.name for path in tmp_path.iterdir()] == [FILE]


def test_a_folder_that_cannot_be_written_to_is_said_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("in the way")
    report = AuditReport(tmp_path / "file")
    report.add(finding("x"), "model")
    report.add(finding("x"), "model")
    assert len([one for one in caplog.records if "could not be noted" in one.getMessage()]) == 1
