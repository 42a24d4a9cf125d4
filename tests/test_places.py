"""Where files lie; and that tests write to no folder of the user's."""

from __future__ import annotations

import os
import pwd
import subprocess
import sys
from pathlib import Path

import pytest

from corolla import places
from corolla.errors import UsageError

PLACES = (places.cache_root, places.data_root, places.config_file)
USUAL = (".cache/corolla", ".local/share/corolla", ".config/corolla/config.toml")


@pytest.fixture
def bare(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A home, and nothing else that says where files lie."""
    for name in [name for name in os.environ if name.startswith(("XDG_", "COROLLA_"))]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path


def found() -> list[Path]:
    return [place() for place in PLACES]


def test_the_usual_places(bare: Path) -> None:
    assert found() == [bare / path for path in USUAL]


def test_xdg_folders(bare: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("CACHE", "DATA", "CONFIG"):
        monkeypatch.setenv(f"XDG_{name}_HOME", f"/xdg/{name}")
    assert [str(path) for path in found()] == [
        "/xdg/CACHE/corolla",
        "/xdg/DATA/corolla",
        "/xdg/CONFIG/corolla/config.toml",
    ]
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    assert places.cache_root() == bare / USUAL[0]


def test_our_own_variables_come_first(bare: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("CACHE", "DATA", "CONFIG"):
        monkeypatch.setenv(f"XDG_{name}_HOME", f"/xdg/{name}")
        monkeypatch.setenv(f"COROLLA_{name}", f"~/{name}")
    assert found() == [bare / name for name in ("CACHE", "DATA", "CONFIG")]
    assert places.cache_root("elsewhere") == Path("elsewhere")


def test_nobodys_home(bare: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HOME")
    monkeypatch.setattr(pwd, "getpwuid", lambda _: (_ for _ in ()).throw(KeyError("no such user")))
    with pytest.raises(UsageError, match="set HOME or XDG_DATA_HOME"):
        places.data_root()


@pytest.mark.parametrize("name", ["CACHE", "DATA", "CONFIG"])
def test_somebody_elses_home_that_is_not_there(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(f"COROLLA_{name}", "~no-such-user/x")
    with pytest.raises(UsageError, match=f"^COROLLA_{name} is ~no-such-user/x, .* give the whole path\\.$"):
        found()


def test_no_test_sees_the_users_own_folders() -> None:
    """Neither here nor in a process that a test starts."""
    program = "from corolla.places import *\nprint(cache_root(), data_root(), config_file(), Path.home())"
    child = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=60
    )
    seen = [*found(), Path.home(), *map(Path, child.stdout.split())]
    assert len(seen) == 8
    home = Path(pwd.getpwuid(os.getuid()).pw_dir)
    own = [home / part for part in (".cache", ".local", ".config")]
    assert not [path for path in seen if path == home or any(path.is_relative_to(folder) for folder in own)]


def test_nothing_else_makes_up_a_place() -> None:
    source = Path(places.__file__).parent
    for path in source.rglob("*.py"):
        if path != Path(places.__file__):
            text = path.read_text()
            for word in ("Path.home(", "XDG_", '".cache"', '".local"'):
                assert word not in text, path
