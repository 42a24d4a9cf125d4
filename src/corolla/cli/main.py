"""The `corolla` command.

Invariant: the modules of the commands import nothing heavy at their top, so `corolla --help` is quick; a
user's mistake ends here in one sentence.
"""

from __future__ import annotations

import atexit
import os
import sys
from collections.abc import Iterator
from itertools import islice
from typing import Annotated, Any

import typer
from typer.main import get_command

from corolla.cli.api import api
from corolla.cli.bootstrap import bootstrap
from corolla.cli.chat import chat
from corolla.cli.defaults import read_defaults
from corolla.cli.demo import demo
from corolla.cli.doctor import doctor
from corolla.cli.evaluate import evaluate
from corolla.cli.invite import invite
from corolla.cli.join import join
from corolla.cli.machine import allow_open_files, unusable
from corolla.cli.revoke import revoke
from corolla.cli.serve import serve
from corolla.cli.status import status
from corolla.cli.study import study
from corolla.cli.terminal import (
    explain_in,
    flush_output,
    forget_output,
    say,
    set_up_logging,
    set_up_streams,
    show_traceback,
)
from corolla.cli.tune import tune
from corolla.errors import CorollaError
from corolla.files import exit_at_once
from corolla.shortage import exhausted
from corolla.text import get_logger
from corolla.version import __version__

log = get_logger(__name__)

VERBOSE = ("--verbose", "-v")
SPIN_COUNT = "10000"  # turns of libgomp's waiting loop, about half a millisecond; none while training

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    help="Prompt-tune a language model too large for your machine through a swarm, then chat with it.",
)
for _command in (
    bootstrap,
    serve,
    status,
    tune,
    study,
    evaluate,
    chat,
    api,
    demo,
    doctor,
    invite,
    join,
    revoke,
):
    app.command({"evaluate": "eval"}.get(_command.__name__))(_command)


def _show_version(wanted: bool) -> None:
    if wanted:
        say(f"corolla {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    context: typer.Context,
    verbose: Annotated[
        bool, typer.Option(*VERBOSE, help="Show the log and, for errors, tracebacks.")
    ] = False,
    _version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    set_up_logging(verbose)
    commands: dict[str, Any] = getattr(context.command, "commands", {})
    context.default_map = read_defaults(commands)


def _arguments() -> list[str]:
    """The command line, `-v` before the command wherever it stands as an option of its own."""
    given = sys.argv[1:]
    if not set(VERBOSE) & set(given):
        return given
    rest = list(_without_verbose(given))
    return [VERBOSE[0], *rest] if len(rest) < len(given) else given


def _without_verbose(given: list[str]) -> Iterator[str]:
    """Options' values stay, whatever they are, and so does all that stands behind `--`."""
    commands: dict[str, Any] = getattr(get_command(app), "commands", {})
    command = next((commands[one] for one in given if one in commands), None)
    words = iter(given)
    for one in words:
        if one in VERBOSE:
            continue
        yield one
        if one == "--":
            yield from words
        elif one in _flags_with_value(command):
            yield from islice(words, 1)


def _flags_with_value(command: Any) -> set[str]:
    options = [one for one in getattr(command, "params", ()) if not getattr(one, "is_flag", True)]
    return {flag for one in options for flag in one.opts}


def _is_said(error: CorollaError) -> bool:
    """Whether an error's own sentence names the system's reason."""
    reason = getattr(error.__cause__, "strerror", None)
    return reason is not None and reason in str(error)


def main() -> None:
    """The whole life of a process that is a command: `run`, and an end that nobody waits for."""
    code = 0

    def leave() -> None:
        flush_output()
        exit_at_once(code)

    # Registered first, it comes last: all that Python would still do is to take its modules apart, for a second.
    atexit.register(leave)
    try:
        run()
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
        raise
    except Exception as error:  # a mistake of ours
        code = 1
        show_traceback(error)


def run() -> None:
    """Run the command line. Raises `SystemExit` with the right exit code."""
    # Between two products of a pass, compute threads spin; when there is no work, they sleep. Waking them for every
    # product takes longer than the product; spinning for long, as they do by themselves, takes the cores from
    # servers, clients and network daemons beside them; so it is off while something
    # trains (`models/kernels/helpers.py`). Has to be set before torch is imported.
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", SPIN_COUNT)
    allow_open_files()
    set_up_streams()
    try:
        app(_arguments())
    except CorollaError as error:
        log.info("The error came from here:", exc_info=error)
        # What is about a file that cannot be opened may say so of the file, or of its peer.
        sentence = exhausted(error)
        if sentence is not None and not _is_said(error):
            explain_in(sentence)
            sys.exit(1)
        explain_in(str(error))
        sys.exit(error.exit_code)
    except BrokenPipeError:  # whoever read what we print has had enough
        forget_output()
        sys.exit(1)
    except Exception as error:
        sentence = exhausted(error) or unusable(error)
        if sentence is None:
            raise
        log.info("The error came from here:", exc_info=error)
        explain_in(sentence)
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)
