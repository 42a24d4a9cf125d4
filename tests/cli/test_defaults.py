"""The config file, and what goes before it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from typer.main import get_command

from corolla.cli.defaults import read_defaults
from corolla.cli.main import app
from corolla.cli.main import run as main
from corolla.errors import UsageError

COMMANDS = get_command(app).commands  # type: ignore[attr-defined]


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):  # type: ignore[no-untyped-def]
    path = tmp_path / "config.toml"
    monkeypatch.setenv("COROLLA_CONFIG", str(path))
    return lambda text: path.write_bytes(text.encode(errors="surrogateescape"))


def test_for_all_and_for_one(write) -> None:  # type: ignore[no-untyped-def]
    write(
        'peers = "/ip4/a"\naudit = 0.05\n[chat]\ntemperature = 0\nmax-length = 99\nsave = false\naudit = 0.5\n'
    )
    found = read_defaults(COMMANDS)
    assert found["chat"] == {
        "peers": ["/ip4/a"],
        "audit": 0.5,
        "temperature": 0,
        "max_length": 99,
        "save": False,
    }
    assert found["tune"] == {"peers": ["/ip4/a"], "audit": 0.05}
    assert found["status"] == found["serve"] == {"peers": ["/ip4/a"]}
    assert found["bootstrap"] == found["invite"] == {}, "they begin a swarm"
    write('[bootstrap]\npeers = ["/ip4/b"]\n')
    assert read_defaults(COMMANDS)["bootstrap"] == {"peers": ["/ip4/b"]}


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("peerz = 1", "sets peerz, which is no option of any command"),
        ("[chat]\nblocks = '0:1'", "sets blocks for chat, which has no such option"),
        ("[talk]\n", "there is no such command"),
        ("[chat]\ntemperature = [1]", "it must be a value"),
        ("[chat]\ntemperature = true", "it must be a value"),
        ("[chat]\nsave = 'no'", "it must be true or false"),
        ("peers = [1]", "it must be texts in brackets"),
        ("peers = ", "is not TOML"),
        ("a = " + "[" * 100_000, "is not TOML"),
        ("# \udcff", "is not TOML"),
        ('"\\u001b[2J" = 1', r"sets \[2J, which"),
    ],
    ids=range(11),
)
def test_mistakes(write, text: str, words: str) -> None:  # type: ignore[no-untyped-def]
    write(text)
    with pytest.raises(UsageError, match=words) as caught:
        read_defaults(COMMANDS)
    assert str(caught.value).isprintable()


def test_no_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert not any(read_defaults(COMMANDS).values())
    monkeypatch.setenv("COROLLA_CONFIG", str(tmp_path / "none.toml"))
    with pytest.raises(UsageError, match="There is no file"):
        read_defaults(COMMANDS)


def said(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    monkeypatch.setattr(sys, "argv", ["corolla", *arguments])
    with pytest.raises(SystemExit):
        main()
    return capsys.readouterr().err


def test_which_goes_first(write, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:  # type: ignore[no-untyped-def]
    """The command line before the environment before the file; each is seen in the address that is refused."""
    write("peers = 'filed'")
    assert "'filed'" in said(monkeypatch, capsys, "status")
    monkeypatch.setenv("COROLLA_PEERS", "environed another")
    assert "'environed'" in said(monkeypatch, capsys, "status")
    assert "'typed'" in said(monkeypatch, capsys, "status", "--peers", "typed")


def test_without_any_it_says_where_one_could_be(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "COROLLA_PEERS" in said(monkeypatch, capsys, "status")


def test_a_damaged_file_is_one_sentence(write, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    write("peers = ")
    done = subprocess.run(
        [sys.executable, "-m", "corolla", "status"], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1
