"""Files and folders that are there whole or not at all, whatever ends the process that writes them.

Invariant: a name that is meant for readers only ever stands for finished content: it is given by a rename,
after the content has reached the disk, and taken by a rename, before anything under it is removed.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import tempfile
from pathlib import Path
from typing import Any

_RANDOM = "[a-z0-9_]{8}"  # what `tempfile` puts behind a prefix


def write_json(path: Path, content: Any) -> None:
    """Write JSON for people to read, atomically."""
    text = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
    # What is no text, such as an odd file name, becomes JSON's own notation for it.
    write_atomically(path, text.encode(errors="backslashreplace"))


def write_atomically(path: Path, content: bytes, mode: int = 0o644) -> None:
    """Replace a file whole: temporary file, fsync, rename. What was there stays when this fails."""
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, mode)
        os.replace(temporary, path)
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


def remove_folder(path: Path) -> None:
    """Remove a folder; a kill in the middle leaves nothing under its name."""
    hidden = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}."))
    os.rename(path, hidden / path.name)
    shutil.rmtree(hidden, ignore_errors=True)


def leftovers(folder: Path, name: str) -> list[Path]:
    """What killed processes left in `folder` of the making, or the removal, of `name` by this module."""
    left = re.compile(rf"\.{re.escape(name)}\.{_RANDOM}")
    return sorted(path for path in folder.glob(".*") if left.fullmatch(path.name))
