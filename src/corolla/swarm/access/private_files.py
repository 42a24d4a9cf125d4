"""Small files that only their owner may read, written whole or not at all, and reread when they change.

Invariant: at no moment does a file that we write hold half of its content or can others read it.
"""

from __future__ import annotations

import contextlib
import logging
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Generic, TypeVar

from corolla.errors import UsageError

T = TypeVar("T")

log = logging.getLogger(__name__)


def write_private(path: Path, data: bytes, *, replace: bool = True) -> None:
    """Write `data` to `path`, readable by the owner only, through a temporary file beside it.

    Raises `FileExistsError` for a file that is there already, unless `replace`; `OSError`.
    """
    descriptor, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)  # mode 0600
    try:
        with os.fdopen(descriptor, "wb") as out:
            out.write(data)
            out.flush()
            os.fsync(out.fileno())
        if replace:
            os.replace(name, path)
        else:
            os.link(name, path)  # fails where the path exists: of two that start at once, one wins
        _sync_folder(path.parent)
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(name)


def tighten(path: Path) -> None:
    """Make sure that only the owner can read `path`; says so when it was otherwise. Raises `UsageError`."""
    try:
        mode = path.stat().st_mode & 0o777
        if not mode & 0o077:
            return
        path.chmod(0o600)
    except OSError as error:
        raise UsageError(
            f"Others can read {path} and its permissions cannot be changed ({error.strerror}); run "
            f"`chmod 600 {path}` as its owner, or give another file."
        ) from error
    log.warning(
        "Others could read %s (mode %o); it is now yours alone (600). If somebody may have copied it, delete it "
        "and have a new one made.",
        path,
        mode,
    )


class WatchedFile(Generic[T]):
    """The parsed content of a file, reread when the file changes.

    A first reading that fails raises the parser's `UsageError`; a later one is logged and the content stays as
    it was, so that a slip of an editor neither ends a server nor opens it. With `optional` a file that is not
    there at first reads as empty.
    """

    def __init__(self, path: Path, parse: Callable[[str, Path], T], *, optional: bool = False) -> None:
        self.path = path
        self._parse = parse
        self._optional = optional
        self._seen = self._stamp()
        self._content = self._read()

    @property
    def content(self) -> T:
        """What the file says now."""
        stamp = self._stamp()
        if stamp != self._seen:
            self._seen = stamp
            try:
                self._content = self._read()
                log.info("Read %s again", self.path)
            except UsageError as error:
                log.warning("%s What was read before stays in force.", error)
            self._optional = False  # once it was there, its disappearance is a slip
        return self._content

    def _stamp(self) -> tuple[int, ...]:
        try:
            found = self.path.stat()
        except OSError:
            return ()
        return found.st_mtime_ns, found.st_size, found.st_ino

    def _read(self) -> T:
        try:
            text = self.path.read_text(encoding="utf-8")
        except FileNotFoundError:
            if not self._optional:
                raise UsageError(f"The file {self.path} does not exist.") from None
            text = ""
        except (OSError, UnicodeDecodeError) as error:
            reason = error.strerror if isinstance(error, OSError) else "it is not text"
            raise UsageError(f"The file {self.path} cannot be read: {reason}.") from error
        return self._parse(text, self.path)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
