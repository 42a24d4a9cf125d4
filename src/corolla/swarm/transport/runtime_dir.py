"""A private folder for the sockets of one transport, and the removal of those that dead processes left.

Invariant: a folder belongs to one live process, which holds a lock on a file in it; only a folder of this
user's, whose process is gone and whose lock is free, is ever removed by somebody else.
"""

from __future__ import annotations

import fcntl
import os
import re
import shutil
import stat
import tempfile
from contextlib import suppress
from pathlib import Path

_NAME = re.compile(r"corolla-(\d+)-.+")
_MAX_SOCKET_PATH = 100  # the kernel's limit is 104 to 108 bytes
_LONGEST_NAME = len("/p2pclient-") + 11 + len(".sock")


class RuntimeDir:
    """The folder; mode 0700, removed by `close()`."""

    def __init__(self) -> None:
        base = _base()
        remove_abandoned()
        self.path = Path(tempfile.mkdtemp(prefix=f"corolla-{os.getpid()}-", dir=base))
        self._lock = os.open(self.path / "lock", os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
        fcntl.flock(self._lock, fcntl.LOCK_EX)

    def close(self) -> None:
        """Remove the folder; safe to call twice."""
        if self._lock >= 0:
            shutil.rmtree(self.path, ignore_errors=True)
            os.close(self._lock)
            self._lock = -1


def _base() -> Path:
    base = Path(tempfile.gettempdir())
    needed = len(os.fsencode(base)) + len("/corolla-4194304-xxxxxxxx") + _LONGEST_NAME
    return base if needed <= _MAX_SOCKET_PATH else Path("/tmp")


def remove_abandoned() -> None:
    """Remove the folders of processes that died without doing so; never raises."""
    for path in _base().glob("corolla-*-*"):
        match = _NAME.fullmatch(path.name)
        with suppress(OSError):
            status = path.lstat()
            if match and stat.S_ISDIR(status.st_mode) and status.st_uid == os.getuid():
                _remove_if_abandoned(path, int(match[1]))


def _remove_if_abandoned(path: Path, pid: int) -> None:
    if _is_alive(pid):
        return
    # The process may also live in another container that shares the temporary folder: its lock tells.
    lock = os.open(path / "lock", os.O_RDWR | os.O_CLOEXEC)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        shutil.rmtree(path, ignore_errors=True)
    finally:
        os.close(lock)


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
