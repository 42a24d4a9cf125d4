"""How the helpers of compute threads wait for their next piece of work: awake, but asleep while anything trains.

Invariant: this changes how long work takes, never its bits, and is done in processes that are commands of ours alone:
whoever uses the library finds its threads as they were. Generation is hundreds of short pieces a token, so
helpers spin between them (`GOMP_SPINCOUNT`, which libgomp reads once); a training step is long pieces, and what
spins there takes its CPU from another process that trains. libgomp lets none of its threads spin while a process
has more of them than there are CPUs. So while something trains, a thread is there that owns some and does nothing.
"""

from __future__ import annotations

import os
import threading
import time

from corolla.models.kernels.native import library

QUIET_SECONDS = 2.0  # after the last training, until helpers spin again


class Spinning:
    """Whether this process's helpers spin."""

    def __init__(self, quiet: float = QUIET_SECONDS, *, allowed: bool = False) -> None:
        """Nothing is changed unless it is `allowed`."""
        self._quiet = quiet
        self._allowed = allowed
        self._until = 0.0
        self._lock = threading.Lock()
        self._crowd: threading.Thread | None = None  # whose helpers are the ones too many

    def allow(self) -> None:
        """This process is ours."""
        self._allowed = True

    def pause(self) -> None:
        """Something trains: let no helper spin from now on, until it has been quiet for a while."""
        if not self._allowed:
            return
        with self._lock:
            self._until = time.monotonic() + self._quiet
            if self._crowd is None:
                self._crowd = threading.Thread(target=self._keep, name="corolla-crowd", daemon=True)
                self._crowd.start()

    @property
    def paused(self) -> bool:
        """Whether something has trained just now."""
        return self._crowd is not None

    def _keep(self) -> None:
        kernels = library()
        if kernels is not None:
            kernels.begin_team(os.cpu_count() or 1)  # they end with this thread
        while True:
            with self._lock:
                left = self._until - time.monotonic()
                if left <= 0:
                    self._crowd = None
                    return
            time.sleep(left)


SPINNING = Spinning()  # libgomp counts the threads of the whole process
