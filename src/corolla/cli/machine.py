"""What a command asks of the machine, and what it says where it has no place to write.

Invariant: the sentence says what is wrong and what to do; the error may come from anywhere, also from a
library that has wrapped it.
"""

from __future__ import annotations

import os
import resource

from corolla.shortage import chain

ENOUGH_FILES = 65536


def allow_open_files() -> None:
    """Use what the system allows this process: a server has a socket or more for each of its peers."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = ENOUGH_FILES if hard == resource.RLIM_INFINITY else min(hard, ENOUGH_FILES)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def unusable(error: BaseException) -> str | None:
    """The sentence for a file or folder that cannot be read or written; None when there was none."""
    for link in chain(error):
        if isinstance(link, OSError) and link.filename is not None and link.strerror:
            return (
                f"{os.fsdecode(link.filename)} cannot be used ({link.strerror}): make it accessible, or give "
                "another place (--cache-dir or COROLLA_CACHE, HF_HOME, TMPDIR, --out)."
            )
    return None
