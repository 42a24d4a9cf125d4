"""The file that keeps a peer's key, and with it the peer's id.

Invariant: a key file that we write can be read by its owner only, at every moment; one that exists is never
changed.
"""

from __future__ import annotations

import os
from pathlib import Path

from hivemind.p2p import P2P, PeerID

from corolla.errors import UsageError


def prepare_identity(path: Path, scratch: Path) -> None:
    """Make sure that `path` holds a key; a new one is made in the private folder `scratch` first.

    Raises `UsageError` when the file cannot be written or read, or holds something else.
    """
    try:
        if not path.exists():
            _write_new(path, scratch)
        data = path.read_bytes()
    except OSError as error:
        raise UsageError(f"The identity file {path} cannot be used: {error.strerror}.") from error
    try:
        PeerID.from_identity(data)
    except Exception as error:  # any of several parsers' errors
        raise UsageError(
            f"The file {path} is not a peer's identity; give a path that does not exist yet to have one made."
        ) from error


def _write_new(path: Path, scratch: Path) -> None:
    made = scratch / "identity"
    P2P.generate_identity(str(made))
    # O_EXCL: of two processes that start at once, one writes and the other fails instead of sharing an id.
    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(file, "wb") as out:
        out.write(made.read_bytes())
    made.unlink()
