"""Parts of a file that is elsewhere, kept on this machine in pieces.

Invariant: a piece is whole or not there, whatever ends the process, and its name tells what it holds by a sum; so
what was fetched once is used again, by the next start too, and what the disk has spoilt is fetched anew.
"""

from __future__ import annotations

import contextlib
import errno
import re
import shutil
import time
import zlib
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from corolla.errors import CheckpointError
from corolla.files import write_atomically
from corolla.models.checkpoints.shards import ReadRange

PIECE_BYTES = 2**23
FETCHERS = 4  # requests under way together
STALE_SECONDS = 3600.0  # what a killed process has left half-written may go after that
_FULL = (errno.ENOSPC, errno.EDQUOT)
_NAME = re.compile(r"(\d{6})-([0-9a-f]{8})")


class Pieces:
    """One file of `size` bytes, as far as it is here in `folder`; used by one thread."""

    def __init__(self, folder: Path, size: int, fetch: ReadRange, piece_bytes: int = PIECE_BYTES) -> None:
        """`fetch` gets a range from where the file is."""
        self._folder = folder
        self._size = size
        self._fetch = fetch
        self._piece_bytes = piece_bytes
        self._held: tuple[int, bytes] | None = None  # the piece read last: reads go from beginning to end
        self._here = dict(self._found())

    def missing(self, ranges: Iterable[tuple[int, int]]) -> list[int]:
        """The pieces of these ranges (offset, size) that are not here."""
        needed = {index for offset, size in ranges for index in self._pieces(offset, size)}
        return sorted(needed - set(self._here))

    def nbytes(self, pieces: Iterable[int]) -> int:
        """How many bytes these pieces hold."""
        return sum(size for _, size in map(self._extent, pieces))

    def bring(self, pieces: list[int], tell: Callable[[int], object]) -> None:
        """Fetch these pieces; `tell` hears of each one's size. What has come stays, whatever is raised.

        Raises `CheckpointError` for a full disk, and what `fetch` raises.
        """
        self._make_room(self.nbytes(pieces))

        def one(index: int) -> None:
            tell(len(self._take(index)))

        pool = ThreadPoolExecutor(FETCHERS)
        try:
            for _ in pool.map(one, pieces):
                pass
        finally:
            pool.shutdown(cancel_futures=True)

    def read(self, offset: int, size: int) -> bytes:
        """`size` bytes from `offset` on; what is not here, or is spoilt, is fetched."""
        parts = []
        for index in self._pieces(offset, size):
            begin, length = self._extent(index)
            content = self._piece(index)
            parts.append(content[max(offset - begin, 0) : min(offset + size - begin, length)])
        return b"".join(parts)

    def _pieces(self, offset: int, size: int) -> range:
        return range(offset // self._piece_bytes, -(-(offset + size) // self._piece_bytes))

    def _extent(self, index: int) -> tuple[int, int]:
        begin = index * self._piece_bytes
        return begin, min(self._piece_bytes, self._size - begin)

    def _piece(self, index: int) -> bytes:
        if self._held is None or self._held[0] != index:
            self._held = (index, self._stored(index) or self._take(index))
        return self._held[1]

    def _stored(self, index: int) -> bytes | None:
        """What is on the disk, if it is what was written."""
        path = self._here.get(index)
        if path is None:
            return None
        with contextlib.suppress(OSError):
            content = path.read_bytes()
            if self._name(index, content) == path.name and len(content) == self._extent(index)[1]:
                return content
        path.unlink(missing_ok=True)
        del self._here[index]
        return None

    def _take(self, index: int) -> bytes:
        content = self._fetch(*self._extent(index))
        path = self._folder / self._name(index, content)
        try:
            write_atomically(path, content)
        except OSError as error:
            if error.errno in _FULL:
                raise self._full(f"only {self._free() / 2**20:,.0f} MiB are free") from error
            raise _unwritable(self._folder, error) from error
        self._here[index] = path
        return content

    def _make_room(self, needed: int) -> None:
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            old = time.time() - STALE_SECONDS
            for left in self._folder.glob(".*"):
                if left.stat().st_mtime < old:
                    left.unlink(missing_ok=True)
        except OSError as error:
            raise _unwritable(self._folder, error) from error
        if needed > (free := self._free()):
            raise self._full(f"{needed / 2**20:,.0f} MiB more are needed and {free / 2**20:,.0f} are free")

    def _free(self) -> int:
        return shutil.disk_usage(self._folder).free

    def _full(self, why: str) -> CheckpointError:
        return CheckpointError(
            f"The disk is full where {self._folder} is ({why}): make room, or give another place with --cache-dir or "
            "COROLLA_CACHE; what has come is kept."
        )

    def _found(self) -> Iterable[tuple[int, Path]]:
        for path in self._folder.glob("*-*"):
            if match := _NAME.fullmatch(path.name):
                yield int(match[1]), path

    @staticmethod
    def _name(index: int, content: bytes) -> str:
        return f"{index:06d}-{zlib.crc32(content):08x}"


def _unwritable(folder: Path, error: OSError) -> CheckpointError:
    return CheckpointError(
        f"The cache folder {folder} cannot be written ({error.strerror or error}): give another place with "
        "--cache-dir or COROLLA_CACHE."
    )
