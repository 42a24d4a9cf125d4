"""What several commands share: options, stopping in order, the life of a child process.

Invariant: a user's mistake ends in one sentence on stderr and a non-zero exit, never in a traceback.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import threading
import time
import warnings
from collections.abc import Callable, Coroutine, Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

from corolla.files import exit_at_once

ORPHAN_SECONDS = 5.0  # for leaving the swarm in order once the parent was killed

PeersOption = Annotated[
    list[str] | None,
    typer.Option("--peers", envvar="COROLLA_PEERS", help="Address to join through; may be repeated."),
]
# For those that may well begin a swarm: what the environment says is for those who join one.
OwnPeersOption = Annotated[
    list[str] | None, typer.Option("--peers", help="Address to join through; may be repeated.")
]
RevisionOption = Annotated[str | None, typer.Option(help="Revision of a hub model.")]
TokenOption = Annotated[str | None, typer.Option(envvar="HF_TOKEN", help="Token for the hub.")]
DtypeOption = Annotated[str, typer.Option(help="Of the client's part: auto, float32, bfloat16 …")]
DieWithParentOption = Annotated[bool, typer.Option("--die-with-parent", hidden=True)]
CacheDirOption = Annotated[Path | None, typer.Option(help="Folder for downloaded and converted files.")]


def typed(context: typer.Context | None, name: str) -> bool:
    """Whether a command's parameter was given on the command line."""
    source = None if context is None else context.get_parameter_source(name)
    return source is not None and source.name == "COMMANDLINE"


LOOP_FILES = 16  # more than a new event loop opens


@contextlib.contextmanager
def ended_by_signals(*, die_with_parent: bool = False) -> Iterator[None]:
    """For the imports at a command's beginning: Ctrl-C, SIGTERM or the parent's end end the process at once.

    A library whose import is interrupted is left half made and fails in ways of its own, which would be all
    that the user saw; and there is nothing yet to put in order.
    """
    before = signal.signal(signal.SIGINT, lambda *_: exit_at_once(130))
    # This one stays until `run_until_stopped` has its own: there is no moment without one.
    signal.signal(signal.SIGTERM, lambda *_: exit_at_once(0))
    if die_with_parent:
        _parent.watch()
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def run_until_stopped(
    work: Callable[[asyncio.Event], Coroutine[Any, Any, None]], *, die_with_parent: bool = False
) -> None:
    """Run `work(stop)`; SIGTERM, Ctrl-C or the parent's end set `stop`, a second Ctrl-C cancels it."""
    with asyncio.Runner(loop_factory=_quick_loop) as runner:
        runner.run(_until_stopped(work, die_with_parent))


def _quick_loop() -> asyncio.AbstractEventLoop:
    """uvloop's, where there is one: a message takes several turns of the loop.

    Not for clients: their processes fork (DataLoader's workers), and beside a thread that runs uvloop that hangs.
    """
    try:
        import uvloop
    except ImportError:  # Windows has none
        return asyncio.new_event_loop()
    # Where no file can be opened, uvloop would end the process without a word.
    with contextlib.ExitStack() as files:
        for _ in range(LOOP_FILES):
            files.callback(os.close, os.open(os.devnull, os.O_RDONLY))
    return uvloop.new_event_loop()


async def _until_stopped(
    work: Callable[[asyncio.Event], Coroutine[Any, Any, None]], die_with_parent: bool
) -> None:
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    task = asyncio.ensure_future(work(stop))

    def ask_to_stop() -> None:
        if stop.is_set():
            task.cancel()
        stop.set()

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, ask_to_stop)
    if die_with_parent:
        _parent.watch()
        _parent.tell(lambda: loop.call_soon_threadsafe(ask_to_stop))
    with contextlib.suppress(asyncio.CancelledError):
        await task


class _Parent:
    """Notices the end of stdin, a pipe that the parent holds: also after the parent's SIGKILL."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None
        self._has_ended = False
        self._ended: Callable[[], object] = lambda: exit_at_once(0)  # nothing is there yet to put in order

    def watch(self) -> None:
        """Begin to watch, once."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._wait, daemon=True, name="watch-parent")
            self._thread.start()

    def tell(self, ended: Callable[[], object]) -> None:
        """From here on, call `ended`; at once when the parent has closed the pipe already."""
        with self._lock:
            self._ended = ended
            if self._has_ended:
                self._call()

    def _wait(self) -> None:
        parent = os.getppid()
        with contextlib.suppress(OSError):
            while os.read(0, 1024):
                pass
        with self._lock:
            self._has_ended = True
            self._call()
        time.sleep(ORPHAN_SECONDS)
        if os.getppid() != parent:  # nobody is left who would end us, and the swarm may be gone with it
            exit_at_once(1)

    def _call(self) -> None:
        with contextlib.suppress(RuntimeError):  # the loop has ended already
            self._ended()


_parent = _Parent()


def set_up_libraries() -> None:
    """No progress bars and advice of libraries between our own lines; call before a model is loaded.

    Their threads may be told how to wait: the process is a command, and so ours alone.
    """
    from transformers.utils import logging as transformers_logging

    from corolla.models.kernels.helpers import SPINNING

    SPINNING.allow()
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    # transformers' own modules call it, and a user can do nothing about that.
    warnings.filterwarnings("ignore", r"`torch\.jit\.script` is deprecated", FutureWarning)
