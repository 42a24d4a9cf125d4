"""A file that is named as an identity by mistake, or by somebody who wants it changed, is left as it was."""

from __future__ import annotations

from pathlib import Path

import pytest

from corolla.errors import UsageError
from corolla.swarm.transport.identity import Identity, prepare_identity


@pytest.mark.parametrize("content", [b"a list of friends\n", b"", b"\x08\x00\x12\x00"])
@pytest.mark.parametrize("linked", [False, True], ids=["itself", "through a link"])
def test_what_is_no_key_keeps_its_permissions(tmp_path: Path, content: bytes, linked: bool) -> None:
    path = tmp_path / "shared.txt"
    path.write_bytes(content)
    path.chmod(0o644)
    given = path
    if linked:
        given = tmp_path / "link"
        given.symlink_to(path)
    for read in (Identity.read, prepare_identity):
        with pytest.raises(UsageError, match="not a peer's identity"):
            read(given)
    assert path.stat().st_mode & 0o777 == 0o644
    assert path.read_bytes() == content
