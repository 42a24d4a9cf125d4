"""What is said when the machine has run out of room or of open files.

Invariant: the error may come from anywhere, also from a library that has wrapped it or kept no more of it than
its text.
"""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Iterator

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_NO_FILES = (errno.EMFILE, errno.ENFILE)
# Libraries written in other languages give the number or the words.
_IN_TEXT = re.compile(
    r"os error (\d+)|code: (\d+), kind|" + "|".join(os.strerror(n) for n in _FULL + _NO_FILES)
)


def exhausted(error: BaseException) -> str | None:
    """The sentence for a full disk or for no more open files; None when neither was the cause."""
    for link in chain(error):
        number = _number(link)
        if number in _FULL:
            return f"The disk is full{_place(link)} ({os.strerror(number)}): make room, then run the command again."
        if number in _NO_FILES:
            return (
                f"No more files can be opened ({os.strerror(number)}): raise the limit, such as with "
                "ulimit -n 4096, or end other programs, then run the command again."
            )
    return None


def chain(error: BaseException) -> Iterator[BaseException]:
    """The error and what led to it."""
    seen: set[int] = set()
    link: BaseException | None = error
    while link is not None and id(link) not in seen:
        seen.add(id(link))
        yield link
        link = link.__cause__ or link.__context__


def _number(error: BaseException) -> int:
    """The system's number of an error; 0 when it has none."""
    if isinstance(error, OSError) and error.errno:
        return error.errno
    found = _IN_TEXT.search(str(error))
    if found is None:
        return 0
    if found[1] or found[2]:
        return int(found[1] or found[2])
    return next(number for number in _FULL + _NO_FILES if os.strerror(number) == found[0])


def _place(error: BaseException) -> str:
    name = getattr(error, "filename", None)
    return "" if name is None else f" where {os.fsdecode(name)} should go"
