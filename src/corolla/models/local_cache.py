"""Corolla's own folder on this machine, and the one way to put something into it.

Invariant: a folder in the cache is there whole or not at all, however many processes make it at once and
whichever of them is killed.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

from filelock import FileLock


def cache_root(cache_dir: str | Path | None = None) -> Path:
    """The folder for converted models: `cache_dir`, else `$COROLLA_CACHE`, else `~/.cache/corolla`."""
    if cache_dir is not None:
        return Path(cache_dir)
    return Path(os.environ.get("COROLLA_CACHE") or Path.home() / ".cache" / "corolla")


def made_once(folder: Path, make: Callable[[Path], None]) -> Path:
    """`folder`, filled by `make` unless it is there already.

    `make` gets an empty folder beside it, which is renamed when it returns and removed when it raises.
    Others that want the same folder wait; the lock ends with its process.
    """
    if folder.is_dir():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.parent / f".{folder.name}.lock"):
        if not folder.is_dir():
            work = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
            try:
                make(work)
                work.rename(folder)
            except BaseException:
                shutil.rmtree(work, ignore_errors=True)
                raise
    return folder
