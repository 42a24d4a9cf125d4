"""The one way to put something into a folder of the cache.

Invariant: a folder in the cache is there whole or not at all, however many processes make it at once and
whichever of them is killed.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

from filelock import FileLock

from corolla.errors import CheckpointError
from corolla.models.checkpoints.durable import leftovers


def made_once(folder: Path, make: Callable[[Path], None]) -> Path:
    """`folder`, filled by `make` unless it is there already.

    `make` gets an empty folder beside it, which is renamed when it returns and removed when it raises.
    Others that want the same folder wait; the lock ends with its process. Raises `CheckpointError` when
    nothing can be written there.
    """
    if folder.is_dir():
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder.parent):
            pass
    except OSError as error:
        raise CheckpointError(
            f"The cache folder {folder.parent} cannot be written ({error.strerror or error}): give another "
            "place with --cache-dir or COROLLA_CACHE."
        ) from error
    with FileLock(folder.parent / f".{folder.name}.lock"):
        if not folder.is_dir():
            for cut_off in leftovers(folder.parent, folder.name):  # nobody else is at it: we hold the lock
                shutil.rmtree(cut_off, ignore_errors=True)
            work = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
            try:
                make(work)
                work.rename(folder)
            except BaseException:
                shutil.rmtree(work, ignore_errors=True)
                raise
    return folder
