"""Memory that computations have freed goes back to the system.

Invariant: nothing is ever computed differently for it. The C library keeps freed memory for later, several
hundred megabytes after a training step, and others on the machine cannot use it.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import lru_cache


@lru_cache(maxsize=1)
def _trim() -> Callable[[int], int] | None:
    """glibc's `malloc_trim`, where the C library has it."""
    try:
        found: Callable[[int], int] = ctypes.CDLL(None).malloc_trim
    except (OSError, AttributeError):
        return None
    return found


def return_freed_memory() -> None:
    """Give back what the C library holds and nobody uses; takes milliseconds."""
    trim = _trim()
    if trim is not None:
        trim(0)
