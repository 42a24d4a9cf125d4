"""Files and folders that are there whole or not at all, whatever ends the process that writes them.

Invariant: a name that is meant for readers only ever stands for finished content: it is given by a rename,
after the content has reached the disk, and taken by a rename, before anything under it is removed.
"""

from __future__ import annotations

import contextlib
import errno
import io
import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NoReturn

from filelock import FileLock

from corolla.errors import CheckpointError, UsageError

OWNER_ONLY = 0o600
MOST_BYTES = 64 * 2**20  # of a file that is read whole; an index of the largest checkpoints has a few
_RANDOM = "[a-z0-9_]{8}"  # what `tempfile` puts behind a prefix


_scratch: set[Path] = set()  # of this process, at this moment


@contextlib.contextmanager
def scratch_folder(name: str = "corolla-") -> Iterator[Path]:
    """An empty folder that is gone after the block, and when `exit_at_once` ends the process within it."""
    with tempfile.TemporaryDirectory(prefix=name) as folder:
        path = Path(folder)
        _scratch.add(path)
        try:
            yield path
        finally:
            _scratch.discard(path)


def exit_at_once(code: int) -> NoReturn:
    """End the process as `os._exit` does, whatever its threads do, and leave no scratch folder behind."""
    for path in list(_scratch):
        shutil.rmtree(path, ignore_errors=True)
    os._exit(code)


def read_bounded(path: Path) -> bytes:
    """All of a file that is not too large; a device that never ends is. Raises `OSError`."""
    with path.open("rb") as file:
        content = file.read(MOST_BYTES + 1)
    if len(content) > MOST_BYTES:
        raise OSError(errno.EFBIG, f"it is larger than {MOST_BYTES // 2**20} MiB", str(path))
    return content


def read_bounded_text(path: Path) -> str:
    """The same as text in UTF-8, its lines ended by line feeds. Raises `OSError`, `UnicodeDecodeError`."""
    return io.TextIOWrapper(io.BytesIO(read_bounded(path)), encoding="utf-8").read()


def write_json(path: Path, content: Any) -> None:
    """Write JSON for people to read, atomically."""
    text = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
    # What is no text, such as an odd file name, becomes JSON's own notation for it.
    write_atomically(path, text.encode(errors="backslashreplace"))


def write_private(path: Path, content: bytes, *, replace: bool = True) -> None:
    """The same as `write_atomically`, readable by the owner only at every moment."""
    write_atomically(path, content, OWNER_ONLY, replace=replace)


def write_atomically(path: Path, content: bytes, mode: int = 0o644, *, replace: bool = True) -> None:
    """Replace a file whole: temporary file, fsync, rename. What was there stays when this fails.

    Raises `FileExistsError` for a file that is there already, unless `replace`; `OSError`.
    """
    handle, temporary = tempfile.mkstemp(
        dir=path.parent, prefix=f".{path.name}."
    )  # readable by the owner only
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, mode)
        if replace:
            os.replace(temporary, path)
        else:
            os.link(temporary, path)  # fails where the path exists: of two that start at once, one wins
            os.unlink(temporary)
    except BaseException:
        os.unlink(temporary)
        raise
    sync(path.parent)


def sync(path: Path) -> None:
    """Bring a file's content, or a folder's names, to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def publish(temporary: Path, target: Path) -> None:
    """Give a finished folder beside `target`, where nothing is, its name."""
    for folder, _, names in os.walk(temporary, topdown=False):
        for name in names:
            sync(Path(folder, name))
        sync(Path(folder))
    os.rename(temporary, target)
    sync(target.parent)


def leftovers(folder: Path, name: str) -> list[Path]:
    """What killed processes left in `folder` of the making, or the removal, of `name` by this module."""
    left = re.compile(rf"\.{re.escape(name)}\.{_RANDOM}")
    return sorted(path for path in folder.glob(".*") if left.fullmatch(path.name))


def made_once(
    target: Path,
    make: Callable[[Path], None],
    *,
    file: bool = False,
    whole: Callable[[Path], bool] = Path.exists,
) -> Path:
    """A folder of the cache, filled by `make` unless it is there already; or a `file` of it.

    `make` gets an empty folder beside it, which becomes the target, or into which it writes a file of the target's
    name. What it leaves is renamed when it returns and removed when it raises. Others that want the same wait; the
    lock ends with its process. What is there but not `whole` is removed and made again. Raises `CheckpointError` when
    nothing can be written there.
    """
    if whole(target):
        return target
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=target.parent):
            pass
    except OSError as error:
        raise CheckpointError(
            f"The cache folder {target.parent} cannot be written ({error.strerror or error}): give another "
            "place with --cache-dir or COROLLA_CACHE."
        ) from error
    with FileLock(target.parent / f".{target.name}.lock"):
        if not whole(target):  # nobody else is at it: we hold the lock
            for cut_off in leftovers(target.parent, target.name):
                shutil.rmtree(cut_off, ignore_errors=True)
            _remove(target)
            work = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
            try:
                make(work)
                (work / target.name if file else work).rename(target)
            finally:
                shutil.rmtree(work, ignore_errors=True)
    return target


def _remove(target: Path) -> None:
    """Take the name of what is there, if anything is, before anything under it is removed."""
    if os.path.lexists(target):
        with tempfile.TemporaryDirectory(
            prefix=f".{target.name}.", dir=target.parent, ignore_cleanup_errors=True
        ) as aside:
            target.rename(Path(aside, target.name))


@contextlib.contextmanager
def ready_file(path: Path | None, content: Mapping[str, Any]) -> Iterator[None]:
    """A JSON file that is there exactly while the block runs, for whoever started this process.

    Nothing is written when `path` is None. Raises `UsageError`.
    """
    if path is None:
        yield
        return
    try:
        write_json(path, content)
    except OSError as error:
        raise UsageError(f"The ready file {path} cannot be written: {error.strerror}.") from error
    try:
        yield
    finally:
        path.unlink(missing_ok=True)
