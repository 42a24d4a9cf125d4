"""Ctrl-C during training: the step under way is finished and saved, a second one stops at once.

Invariant: the signal's earlier handler is back when the block ends.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments


class StopOnInterrupt(TrainerCallback):  # type: ignore[misc]
    """A callback and a context manager; `requested` is true after the first Ctrl-C inside the block."""

    def __init__(self, announce: Callable[[str], None]) -> None:
        """`announce` is told, in one line, what the first Ctrl-C does."""
        self.requested = False
        self._announce = announce
        self._earlier: Any = None
        self._training = False
        self._announcer: threading.Thread | None = None

    def __enter__(self) -> StopOnInterrupt:
        # Python allows signal handlers on the main thread only; elsewhere the caller has its own way to stop.
        if threading.current_thread() is threading.main_thread():
            self._earlier = signal.signal(signal.SIGINT, self._interrupt)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._earlier is not None:
            signal.signal(signal.SIGINT, self._earlier)
        if self._announcer is not None:
            self._announcer.join()

    def _interrupt(self, _number: int, _frame: FrameType | None) -> None:
        if self.requested or not self._training:
            raise KeyboardInterrupt
        self.requested = True
        # On a thread: the signal may have come in the middle of a line that the main thread is writing.
        line = "Stopping after this step; Ctrl-C again to stop at once without saving it."
        self._announcer = threading.Thread(target=self._announce, args=(line,))
        self._announcer.start()

    def on_step_begin(
        self, _args: TrainingArguments, _state: TrainerState, _control: TrainerControl, **_kwargs: Any
    ) -> None:
        """Only from here on is there something to finish and save."""
        self._training = True

    def on_step_end(
        self, _args: TrainingArguments, state: TrainerState, control: TrainerControl, **_kwargs: Any
    ) -> None:
        """After the last step there is nothing to stop."""
        if self.requested and state.global_step < state.max_steps:
            control.should_save = True
            control.should_training_stop = True
            control.should_evaluate = False
