"""A file that says that a process is ready, for whoever started it.

Invariant: the file is there, whole, exactly while the process is ready.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from corolla.errors import UsageError


@contextlib.contextmanager
def ready_file(path: Path | None, content: Mapping[str, Any]) -> Iterator[None]:
    """Write `content` as JSON for the duration of the block; nothing when `path` is None."""
    if path is None:
        yield
        return
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.write_text(json.dumps(content))
        temporary.replace(path)
    except OSError as error:
        raise UsageError(f"The ready file {path} cannot be written: {error.strerror}.") from error
    try:
        yield
    finally:
        path.unlink(missing_ok=True)
