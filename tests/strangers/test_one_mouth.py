"""What strangers write passes `corolla.text` before anybody reads it: no other way leads to a terminal or a log."""

from __future__ import annotations

import ast
import builtins
import io
import logging
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import corolla.errors
from corolla.cli.swarm_map import swarm_map
from corolla.cli.terminal import TerminalConsole, explain_in, say, set_up_logging
from corolla.errors import CorollaError, RemoteError, UsageError
from corolla.swarm.directory.directory import ServerRecord
from corolla.swarm.directory.summary import as_plain
from corolla.text import for_terminal, get_logger, one_line, printable

PACKAGE = Path(corolla.errors.__file__).parent
HOSTILE = (
    "\x1b[2J\x1b[1;31mType your password:\x1b[0m\r\n\x9b2J\x1b]52;c;eA==\x07\x08\x00\x7f"
    "\u202egnp\u2066x\u200b\u2060\ufeff\U000e0041[bold red]markup[/]\udc80 end"
)
HIDDEN = set("\u202e\u2066\u200b\u2060\ufeff\U000e0041\udc80\x7f\x9b")
CLEAN = {"one_line", "for_terminal", "printable"}
BUILTIN_ERRORS = {
    name for name in vars(builtins) if name.endswith(("Error", "Exception", "Exit", "Interrupt"))
}
OUR_ERRORS = {name for name, kind in vars(corolla.errors).items() if isinstance(kind, type)}


def is_clean(text: str) -> bool:
    return not HIDDEN & set(text) and all(ord(letter) >= 32 or letter in "\n\t" for letter in text)


def subclasses(kind: type[CorollaError]) -> Iterator[type[CorollaError]]:
    yield kind
    for below in kind.__subclasses__():
        yield from subclasses(below)


def name_of(kind: type[CorollaError]) -> str:
    return kind.__name__


@pytest.mark.parametrize("kind", sorted(set(subclasses(CorollaError)), key=name_of))
def test_no_error_of_ours_steers_a_terminal(kind: type[CorollaError]) -> None:
    given: dict[str, Any] = {"code": "busy"} if issubclass(kind, corolla.errors.RequestRefused) else {}
    error = kind(HOSTILE * 1000, **given)
    assert is_clean(str(error))
    assert "Type your password:" in str(error), "the text itself is kept"
    assert len(str(error)) <= 20_002
    if issubclass(kind, RemoteError):
        assert "\n" not in str(error), "a second line could pass for a message of ours"
        assert len(str(error)) <= 2048


def test_no_log_of_ours_steers_a_terminal_whoever_shows_it() -> None:
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)  # as a program's own, that knows nothing of us
    logger = get_logger("corolla.strangers")
    logger.addHandler(handler)
    try:
        logger.warning("A peer said %s", HOSTILE)
        try:
            raise ValueError(HOSTILE)
        except ValueError:
            logger.exception("It failed")
    finally:
        logger.removeHandler(handler)
    assert is_clean(stream.getvalue())
    assert stream.getvalue().splitlines()[0].startswith("A peer said [2J")
    assert "Traceback" in stream.getvalue()


@pytest.mark.parametrize("at_a_terminal", [True, False], ids=["terminal", "piped"])
def test_nothing_printed_steers_a_terminal(
    at_a_terminal: bool, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    stream = io.StringIO()
    console = TerminalConsole(file=stream, force_terminal=at_a_terminal, no_color=True, width=200)
    monkeypatch.setattr("corolla.cli.terminal.error_console", console)
    console.print(HOSTILE)
    console.out(HOSTILE)
    explain_in(HOSTILE)
    set_up_logging(verbose=True)
    logging.getLogger("of.others").warning("%s", HOSTILE)
    say(HOSTILE)
    shown = stream.getvalue()
    assert "[1;31mType your password:" in shown, (
        "the letter that begins a sequence is gone, and its rest is text"
    )
    assert is_clean(re.sub(r"\x1b\[[0-9;]*m", "", shown) if at_a_terminal else shown), (
        "styles of rich alone stay"
    )
    assert "[bold red]markup[/]" in shown, "nobody's text is read as markup"
    captured = capsys.readouterr()
    assert is_clean(captured.out + captured.err)


# --- no other way out, in the source --------------------------------------------------------------------------


def called(node: ast.expr) -> str:
    """`console.print` of a call's function; "" for what is no plain name."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute):
        return f"{called(node.value)}.{node.attr}"
    return ""


def uncleaned(node: ast.AST, names: set[str]) -> bool:
    """Whether one of `names` is mentioned outside of a call that cleans it."""
    if isinstance(node, ast.Call) and called(node.func) in CLEAN:
        return False
    if isinstance(node, ast.Name) and node.id in names:
        return True
    if isinstance(node, ast.Call) and called(node.func) == "type":
        return False
    return any(uncleaned(child, names) for child in ast.iter_child_nodes(node))


def ways_out(source: str, place: str) -> list[str]:
    """Where a module lets a text out that may be a stranger's."""
    found = []

    def look(node: ast.AST, caught: set[str]) -> None:
        if isinstance(node, ast.ExceptHandler) and node.name:
            kinds = node.type.elts if isinstance(node.type, ast.Tuple) else [node.type]
            ours = all(kind is not None and called(kind) in OUR_ERRORS for kind in kinds)
            caught = caught - {node.name} if ours else caught | {node.name}
        if isinstance(node, ast.Call):
            found.extend(f"{place}:{node.lineno} {why}" for why in _calls(node, place))
            kind = called(node.func)
            arguments = [*node.args, *(keyword.value for keyword in node.keywords)]
            is_error = kind in BUILTIN_ERRORS or kind.endswith("Error")
            if is_error and kind not in OUR_ERRORS and any(uncleaned(one, caught) for one in arguments):
                found.append(f"{place}:{node.lineno} {kind} with the text of another error")
        for child in ast.iter_child_nodes(node):
            look(child, caught)

    look(ast.parse(source), set())
    return found


def _calls(node: ast.Call, place: str) -> Iterator[str]:
    name = called(node.func)
    literal = bool(node.args) and isinstance(node.args[0], ast.Constant)
    if name in {"print", "pprint", "rich.print", "typer.echo", "typer.secho"} and place != "cli/terminal.py":
        yield name
    if name in {"sys.stdout.write", "sys.stderr.write", "os.write"} and place != "chat/transcript.py":
        yield name
    if name.endswith("getLogger") and not literal and place not in {"text.py", "cli/terminal.py"}:
        yield "a logger that does not clean"
    if name.split(".")[0] == "logging" and name.split(".")[-1] in {"warning", "info", "error", "exception"}:
        yield "a log without a logger of ours"
    if name == "Console" and not any(word.arg == "quiet" for word in node.keywords):
        yield "a console that does not clean"
    plain = any(word.arg == "markup" for word in node.keywords)
    if name.endswith(".print") and not place.startswith("cli/") and node.args and not plain:
        yield "text that is read as markup"
    if name == "warnings.warn" and not literal:
        yield "a warning"
    if name == "sys.exit" and node.args and isinstance(node.args[0], ast.JoinedStr):
        yield "last words"


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: path.name)
def test_texts_of_others_have_one_way_out(path: Path) -> None:
    assert ways_out(path.read_text(), str(path.relative_to(PACKAGE))) == []


@pytest.mark.parametrize(
    "line",
    [
        "print(f'The server said {error}')",
        "sys.stderr.write(failure.message)",
        "log = logging.getLogger(__name__)",
        "logging.warning('The server said %s', error)",
        "console = Console(stderr=True)",
        "console.print(record.model_name)",
        "warnings.warn(str(error))",
        "sys.exit(f'{error}')",
        "try:\n    f()\nexcept ValidationError as error:\n    raise ValueError(f'{error}') from error",
        "try:\n    f()\nexcept (UsageError, OSError) as error:\n    raise ValueError(str(error)) from error",
    ],
)
def test_the_walk_sees_every_way_out(line: str) -> None:
    assert ways_out(line, "client/example.py")


@pytest.mark.parametrize(
    "line",
    [
        "log.warning('The server said %s', error)",
        "console.print(one_line(record.model_name), markup=False)",
        "try:\n    f()\nexcept ValidationError as error:\n    raise ValueError(one_line(error)) from error",
        "try:\n    f()\nexcept ValidationError as error:\n    raise UsageError(f'{error}') from error",
        "try:\n    f()\nexcept UsageError as error:\n    raise ValueError(str(error)) from error",
    ],
)
def test_the_walk_lets_clean_text_out(line: str) -> None:
    assert not ways_out(line, "client/example.py")


def test_names_that_look_alike_are_alike() -> None:
    tricks = "pay\u200bpal\u2060 \u200epay\u200fpal\ufeff pay\u00adpal pay\U000e0070pal"
    for clean in (one_line, for_terminal, printable):
        assert clean(tricks) == "paypal paypal paypal paypal"
    assert UsageError(tricks).args == ("paypal paypal paypal paypal",)


def record(number: int, **fields: Any) -> ServerRecord:
    usual = {
        "model": "identity",
        "model_name": "honest",
        "num_blocks": 10,
        "start": 0,
        "end": 10,
        "dtype": "float32",
    }
    return ServerRecord(peer_id=f"peer-{number:06d}", **(usual | fields))


def drawn(records: list[ServerRecord]) -> list[str]:
    console = TerminalConsole(width=100, file=io.StringIO(), force_terminal=False)
    with console.capture() as capture:
        console.print(swarm_map(records))
    return capture.get().splitlines()


@pytest.mark.parametrize("count", [2_000, pytest.param(20_000, marks=pytest.mark.nightly)])
def test_a_map_of_many_records_can_be_read(count: int) -> None:
    records = [record(number) for number in range(count)]
    lines = drawn(records)
    assert len(lines) < 120
    assert f"{count:,} servers".replace(",", "") in lines[0].replace(",", "")
    assert any(f"and {count - 100:,} more servers" in line for line in lines)
    models = [record(number, model=f"model-{number}") for number in range(count)]
    assert len(drawn([*models, record(1), record(2)])) < 120
    assert "honest" in drawn([*models, record(1), record(2)])[0]


def test_one_record_neither_names_nor_sizes_a_model() -> None:
    evil = record(0, model_name=HOSTILE, num_blocks=65_535, end=65_535)
    lines = drawn([evil, record(1), record(2)])
    assert lines[0].startswith("honest  10 blocks, 2 servers, complete")
    (model,) = as_plain([evil, record(1), record(2)])["models"]
    assert (model["name"], model["blocks"], model["missing"]) == ("honest", 10, [])
