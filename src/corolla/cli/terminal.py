"""The terminal: what goes out to it and what comes in, for all commands.

Invariant: whatever is printed or logged, by whomever it was written, steers no terminal and can be encoded for
it; what comes in is text, whatever its bytes. Nothing else prints.
"""

from __future__ import annotations

import codecs
import contextlib
import logging
import os
import sys
import traceback
import unicodedata
from collections.abc import Iterable
from io import TextIOWrapper
from typing import Any, TextIO, cast

from rich.console import Console, ConsoleOptions, RenderableType
from rich.logging import RichHandler
from rich.segment import Segment
from rich.text import Text

from corolla.text import for_terminal, one_line, printable

# For terminals that have no more than ASCII; letters lose their accents, what is left becomes a question mark.
_PLAINER = {
    **dict.fromkeys(range(0x2018, 0x201C), "'"),
    **dict.fromkeys(range(0x201C, 0x2020), '"'),
    **dict.fromkeys((*range(0x2010, 0x2016), *range(0x2500, 0x2510), *range(0x2574, 0x257C)), "-"),
    **dict.fromkeys(range(0x2580, 0x2590), "#"),  # blocks of bars and maps
    0x2212: "-",
    ord("·"): ".",
}


class TerminalConsole(Console):
    """Rich's console, without what text that it is given would make a terminal do, and without markup in it."""

    def __init__(self, **options: Any) -> None:
        super().__init__(markup=False, **options)

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        """As rich's own, cleaned; what rich itself does to the terminal (bars, styles) stays."""
        for segment in super().render(renderable, options):
            if segment.control:
                yield segment
            else:
                yield Segment(printable(segment.text), segment.style)


console = TerminalConsole()
error_console = TerminalConsole(stderr=True)


def say(line: str) -> None:
    """One line for the user, whole even when stdout is a file."""
    print(printable(line), flush=True)


def say_plainly(line: str) -> None:
    """A line as it is, never folded."""
    console.print(line, highlight=False, soft_wrap=True)


def notice(text: str) -> None:
    """What is not part of a conversation."""
    console.print(for_terminal(text), style="dim", highlight=False, soft_wrap=True)


def explain_in(sentence: str) -> None:
    """Print what is wrong."""
    words = Text.assemble(("error:", "bold red"), " ", for_terminal(sentence))
    error_console.print(words, soft_wrap=True)


def show_traceback(error: BaseException) -> None:
    """For an error that nobody has foreseen."""
    error_console.out(for_terminal("".join(traceback.format_exception(error)).rstrip()), highlight=False)


def set_up_logging(verbose: bool) -> None:
    """Warnings on stderr as one line each; everything with `--verbose`."""
    handler: logging.Handler = logging.StreamHandler()
    form = "%(message)s"
    if error_console.is_terminal:
        handler = RichHandler(console=error_console, show_path=False, show_time=verbose, markup=False)
    elif verbose:
        form = "%(asctime)s %(levelname)s %(name)s: %(message)s"
    handler.setFormatter(_CleanFormatter(form))
    level = logging.INFO if verbose else logging.WARNING
    logging.basicConfig(level=level, handlers=[handler], force=True)
    if not verbose:
        for noisy in ("asyncio", "httpx", "huggingface_hub", "transformers"):
            logging.getLogger(noisy).setLevel(logging.ERROR)


class _CleanFormatter(logging.Formatter):
    """Messages as one line each, since a second one could pass for another message."""

    def formatMessage(self, record: logging.LogRecord) -> str:
        record.message = one_line(record.message, characters=2000)
        return super().formatMessage(record)

    def format(self, record: logging.LogRecord) -> str:
        return for_terminal(super().format(record))


def set_up_streams() -> None:
    """Make stdin, stdout and stderr take and give any text; a closed one is as if it were empty."""
    codecs.register_error("corolla", _plainer)
    sys.stdin = sys.stdin or _nowhere("r")
    sys.stdout = sys.stdout or _nowhere("w")
    sys.stderr = sys.stderr or _nowhere("w")
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="corolla")
    if isinstance(sys.stdin, TextIOWrapper):
        ascii_only = codecs.lookup(sys.stdin.encoding).name == "ascii"
        sys.stdin.reconfigure(encoding="utf-8" if ascii_only else None, errors="replace")


def _nowhere(mode: str) -> TextIO:
    return cast(TextIO, os.fdopen(os.open(os.devnull, os.O_RDWR), mode))


def flush_output() -> None:
    """Write what is still to be written."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()


def forget_output() -> None:
    """After nobody reads our output any more: what is still to be written goes nowhere, without a word."""
    with contextlib.suppress(OSError, ValueError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
        os.close(nowhere)


def _plainer(error: UnicodeError) -> tuple[str, int]:
    """An error handler for encoding: what the terminal does not have, in characters that every one has."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    letters = error.object[error.start : error.end]
    return "".join(map(_plain_letter, letters)), error.end


def _plain_letter(letter: str) -> str:
    apart = unicodedata.normalize("NFKD", letter).encode("ascii", "ignore").decode()
    return _PLAINER.get(ord(letter)) or apart or "?"
