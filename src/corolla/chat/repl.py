"""The chat at a terminal, or with lines from a pipe.

Invariant: what is printed reads as a dialogue either way. At a terminal, Ctrl-C ends a reply, never the program and
never the conversation, Ctrl-D ends both, and an error is told in a sentence and the chat goes on. None of them waits
for a server.
"""

from __future__ import annotations

import fcntl
import select
import sys
import termios
from array import array
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TextIO

from rich.console import Console

from corolla.chat.engine import ChatEngine
from corolla.errors import CorollaError, UsageError
from corolla.text import for_terminal, printable, well_formed

YOU = "You: "
REPLY = "Bot: "
HELP = """\
/undo        forget the last exchange
/reset       forget the whole conversation
/save FILE   write the conversation as JSON
/help        this list
/quit        end the chat (as Ctrl-D does)
Ctrl-C stops a reply and keeps what was said of it."""


class Repl:
    """Reads lines, answers them, carries out commands."""

    def __init__(self, engine: ChatEngine, console: Console) -> None:
        self._engine = engine
        self._console = console
        self._enough: Callable[[], bool] | None = (
            None  # a reply ends with it; None: only with Ctrl-C, and the chat too
        )
        self._commands: dict[str, Callable[[str], None]] = {
            "/undo": self._undo,
            "/reset": self._reset,
            "/save": self._save,
            "/help": self._help,
        }

    def run(self, lines: Iterable[str] | None = None) -> None:
        """Chat until the lines end or say `/quit`; without `lines`, those of stdin.

        At a terminal errors are printed; from a pipe or with `lines` they are raised, so that a script learns
        of them.
        """
        if lines is None and sys.stdin.isatty():
            self._at_terminal()
            return
        for line in read_lines(sys.stdin) if lines is None else lines:
            self._console.out(printable(f"{YOU}{line}"), highlight=False)
            if not self._answer(line):
                return

    def _at_terminal(self) -> None:
        import readline  # noqa: F401  (imported, it gives `input` a history and editing)

        self._enough = _end_was_typed
        while True:
            try:
                line = well_formed(input(YOU))
                if not self._answer(line):
                    return
            except EOFError:
                self._console.print()
                return
            except KeyboardInterrupt:
                self._notice("\n/quit or Ctrl-D ends the chat.")
            except CorollaError as error:
                self._notice(str(error))

    def _answer(self, line: str) -> bool:
        """Deal with one line; False when it ends the chat."""
        line = line.strip()
        command, _, argument = line.partition(" ")
        if command in ("/quit", "/exit"):
            return False
        if not line.startswith("/"):
            if line:
                self._reply(line)
        elif command in self._commands:
            self._commands[command](argument.strip())
        else:
            self._notice(f"There is no command {command}; /help lists them.")
        return True

    def _reply(self, said: str) -> None:
        pieces = self._engine.reply(said, enough=self._enough or (lambda: False))
        begun = False
        try:
            for piece in pieces:
                if not begun:  # the label waits for this, since a notice may come before it
                    self._show(REPLY + printable(piece).lstrip())
                    begun = True
                else:
                    self._show(printable(piece))
        except KeyboardInterrupt:
            pieces.close()
            self._notice(" (stopped)" if begun else "(stopped)")
            if self._enough is None:
                raise  # nobody is there who would go on
            return
        except CorollaError:
            if begun:  # its sentence is for a line of its own
                self._console.out("\n")
            raise
        if not begun:
            self._notice("(nothing was said)")
        else:
            self._console.out("\n")

    def _show(self, text: str) -> None:
        self._console.out(text, end="", highlight=False)

    def _notice(self, text: str) -> None:
        """Print what is not part of the conversation."""
        self._console.print(for_terminal(text), style="dim", markup=False, highlight=False, soft_wrap=True)

    # --- commands ----------------------------------------------------------------------------------------

    def _undo(self, _argument: str) -> None:
        said = self._engine.undo()
        self._notice("There is nothing to undo." if said is None else f"Forgotten: {said}")

    def _reset(self, _argument: str) -> None:
        self._engine.reset()
        self._notice("The conversation begins anew.")

    def _save(self, argument: str) -> None:
        if not argument:
            self._notice("Say where to: /save FILE")
            return
        path = Path(argument).expanduser()
        try:
            self._engine.save(path)
        except UsageError as error:  # the chat itself is all right, also for a script
            self._notice(str(error))
            return
        self._notice(f"Saved to {path}")

    def _help(self, _argument: str) -> None:
        self._notice(HELP)


def _end_was_typed() -> bool:
    """Whether Ctrl-D waits at the terminal, with nothing before it."""
    try:
        if not select.select([sys.stdin], [], [], 0)[0]:
            return False
        waiting = array("i", [0])
        fcntl.ioctl(sys.stdin, termios.FIONREAD, waiting)
    except (OSError, ValueError):  # no terminal, such as a test's
        return False
    return waiting[0] == 0


def read_lines(stream: TextIO) -> Iterator[str]:
    """The stream's lines without their ends, each as soon as it is there."""
    while line := stream.readline():
        yield well_formed(line.rstrip("\r\n"))
