"""A machine that has run out of room or of open files is recognised, whoever says so."""

from __future__ import annotations

import errno

import pytest

from corolla.shortage import exhausted


def caused(error: Exception, cause: Exception) -> Exception:
    error.__cause__ = cause
    return error


FULL = [
    OSError(errno.ENOSPC, "No space left on device", "/big/file"),
    OSError(errno.EFBIG, "File too large"),
    RuntimeError("Error while serializing: I/O error: File too large (os error 27)"),
    RuntimeError("Os { code: 28, kind: StorageFull }"),
    RuntimeError("[enforce fail at inline_container.cc] No space left on device"),
    caused(ValueError("odd"), OSError(errno.ENOSPC, "No space left on device")),
]


@pytest.mark.parametrize("error", FULL, ids=str)
def test_a_full_disk_is_recognised_however_it_is_told(error: Exception) -> None:
    assert "The disk is full" in str(exhausted(error))


def test_open_files_that_ran_out_are_recognised() -> None:
    assert "ulimit -n" in str(exhausted(OSError(errno.EMFILE, "Too many open files")))
    assert "ulimit -n" in str(exhausted(ImportError("libx.so: cannot open: Too many open files")))


@pytest.mark.parametrize(
    "error", [ValueError("no"), OSError("no"), KeyError("code: 3"), OSError(2, "x", "y")]
)
def test_other_errors_are_not_taken_for_it(error: Exception) -> None:
    assert exhausted(error) is None
