"""What reaches a terminal or a log, and what comes from stdin."""

from __future__ import annotations

import ast
import io
import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
from rich.progress import Progress
from rich.table import Table
from rich.text import Text

from corolla.cli.terminal import TerminalConsole, error_console, explain_in, set_up_logging
from corolla.errors import RemoteError, UsageError

EVIL = "a\x1b[2J\x1b]52;c;eA==\x07b\r\x9b1mc\u202ed\ud800"
HARMLESS = "a[2J]52;c;eA==b1mcd\ufffd"
SOURCE = Path(__file__).parents[2] / "src" / "corolla"


def shown(*things: object, terminal: bool = False, **options: object) -> str:
    output = io.StringIO()
    console = TerminalConsole(file=output, width=80, force_terminal=terminal, color_system=None)
    for thing in things:
        console.print(thing, **options)  # type: ignore[arg-type]
    return output.getvalue()


def test_text_of_others_steers_no_terminal() -> None:
    table = Table(EVIL, title=EVIL)
    table.add_row(EVIL, Text(EVIL))
    for thing in (EVIL, Text(EVIL), table):
        for terminal in (False, True):
            text = shown(thing, terminal=terminal, markup=False)
            assert not set(text) & set("\x1b\x9b\x07\r\u202e\ud800")
            assert "52;c;eA==b" in text


def test_what_the_console_itself_does_to_a_terminal_stays() -> None:
    output = io.StringIO()
    console = TerminalConsole(file=output, width=80, force_terminal=True, color_system="standard")
    with Progress(console=console, auto_refresh=False) as bar:
        bar.add_task(EVIL, total=3)
        bar.refresh()
    assert "\x1b[?25l" in output.getvalue()
    assert "\x1b[2J" not in output.getvalue()


@pytest.mark.parametrize("verbose", [False, True])
def test_logs(verbose: bool, capsys: pytest.CaptureFixture[str]) -> None:
    """One line for each message, with whatever a peer has written in it."""
    before = logging.getLogger().handlers[:], logging.getLogger().level
    try:
        set_up_logging(verbose)
        logging.getLogger("corolla.x").warning("Peer %s said: %s", EVIL, "x\nWARNING forged: y")
    finally:
        logging.getLogger().handlers[:] = before[0]
        logging.getLogger().setLevel(before[1])
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert HARMLESS in said
    assert "x WARNING forged: y" in said


def test_errors() -> None:
    for error in (RemoteError(f"[red]{EVIL}\\[/red]"), UsageError("\\[x] [/]")):
        with error_console.capture() as output:
            explain_in(str(error))
        assert output.get() == f"error: {str(error).replace(EVIL, HARMLESS)}\n"


ECHO = """
import sys
from corolla.cli.terminal import console, say, say_plainly, set_up_streams
set_up_streams()
for line in sys.stdin:
    say(line.rstrip())
    say_plainly(line.rstrip())
print("error", line, file=sys.stderr)
"""


@pytest.mark.parametrize(
    ("coding", "given", "said"),
    [
        ("ascii", "“é” … 日 █·".encode(), b'"e" ... ? #.'),
        ("ascii:strict", b"a\xffb", b"a?b"),
        ("latin-1", "é“\n".encode("latin-1", "replace"), "é?".encode("latin-1")),
        ("utf-8", b"a\xff\xed\xa0\x80b", "a\ufffd\ufffd\ufffd\ufffdb".encode()),
        ("", b"a\xffb", "a\ufffdb".encode()),
    ],
)
def test_any_bytes_come_in_and_any_terminal_takes_what_goes_out(
    coding: str, given: bytes, said: bytes
) -> None:
    done = subprocess.run(
        [sys.executable, "-c", ECHO],
        input=given,
        capture_output=True,
        timeout=60,
        env=os.environ | {"PYTHONIOENCODING": coding},
    )
    assert done.returncode == 0, done.stderr.decode()
    assert done.stdout.splitlines() == [said, said]


def test_streams_that_are_closed() -> None:
    shell = f"exec {sys.executable} -m corolla --version <&- >&- 2>&-"
    assert subprocess.run(["/bin/sh", "-c", shell], timeout=60).returncode == 0


def test_nobody_reads_what_is_printed() -> None:
    """No traceback, and no word at the interpreter's end."""
    reading, writing = os.pipe()
    os.close(reading)
    command = [sys.executable, "-m", "corolla", "--version"]
    done = subprocess.run(command, stdout=writing, stderr=subprocess.PIPE, timeout=60)
    os.close(writing)
    assert (done.returncode, done.stderr) == (1, b"")


def test_nothing_else_prints() -> None:
    """All that goes out passes by the one console, `say`, or a console that a caller gave."""
    allowed = {
        "cli/terminal.py": {"print", "TerminalConsole"},
        "tuning/tune.py": {"Console"},
        "tuning/study.py": {"Console"},
    }
    for path in SOURCE.rglob("*.py"):
        found = {
            ast.unparse(node.func)
            for node in ast.walk(ast.parse(path.read_text()))
            if isinstance(node, ast.Call)
        }
        writing = {"typer.echo", "sys.stdout.write", "sys.stderr.write"}
        printing = found & {"print", "Console", "TerminalConsole", *writing}
        name = str(path.relative_to(SOURCE))
        assert printing <= allowed.get(name, set()), name
