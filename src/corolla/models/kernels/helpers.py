"""The threads that compute: whether they have helpers, who else runs, and how they wait for their next piece of work.

Invariant: nothing above the kernels knows which library these threads are of. They change how long work takes, never
its bits. How they wait is changed in processes that are commands of ours alone: whoever uses the library finds
its threads as they were. Generation is hundreds of short pieces a token, so
helpers spin between them (`GOMP_SPINCOUNT`, which libgomp reads once); a training step is long pieces, and what
spins there takes its CPU from another process that trains. libgomp lets none of its threads spin while a process
has more of them than there are CPUs. So while something trains, a thread is there that owns some and does nothing.
"""

from __future__ import annotations

import os
import threading
import time

import torch

from corolla.models.kernels.native import library

QUIET_SECONDS = 2.0  # after the last training, until helpers spin again
AWAKE_SECONDS = 0.001  # after a piece of work its helpers have gone to sleep for sure (`GOMP_SPINCOUNT`)


def give_up_helpers() -> int:
    """The calling thread computes alone from now on; gives how many threads it had.

    Each thread that calls parallel code gets helpers of its own, and where there are more of them than CPUs,
    libgomp lets none of them wait awake for its next piece of work: then a pass of short pieces gains nothing.
    """
    count, kernels = torch.get_num_threads(), library()
    if kernels is not None:
        kernels.end_team()
    torch.set_num_threads(1)
    return count


def flush_denormals() -> None:
    """The calling thread, and the helpers that it will have, take numbers nearer to 0 than 1.2e-38 for 0.

    To be called before it has any. What decays again and again, as a recurrence's states and the weights of tokens far
    behind, gets there, and arithmetic on such numbers takes a hundred times as long.
    """
    torch.set_flush_denormal(True)


def others_running() -> int:
    """How many threads of the whole machine run or could, beside the caller; 0 where the system does not say."""
    try:
        with open("/proc/loadavg", encoding="ascii") as file:
            return int(file.read().split()[3].split("/")[0]) - 1
    except (OSError, ValueError, IndexError):
        return 0


class Spinning:
    """Whether this process's helpers spin."""

    def __init__(self, quiet: float = QUIET_SECONDS, *, allowed: bool = False) -> None:
        """Nothing is changed unless it is `allowed`."""
        self._quiet = quiet
        self._allowed = allowed
        self._until = 0.0
        self._lock = threading.Lock()
        self._owner: threading.Thread | None = None  # whose helpers are the ones too many

    def allow(self) -> None:
        """This process is ours."""
        self._allowed = True

    def pause(self) -> None:
        """Something trains: let no helper spin from now on, until it has been quiet for a while."""
        if not self._allowed:
            return
        with self._lock:
            self._until = time.monotonic() + self._quiet
            if self._owner is None:
                self._owner = threading.Thread(target=self._keep, name="corolla-idle-helpers", daemon=True)
                self._owner.start()

    @property
    def paused(self) -> bool:
        """Whether something has trained just now."""
        return self._owner is not None

    def _keep(self) -> None:
        kernels = library()
        if kernels is not None:
            kernels.begin_team(os.cpu_count() or 1)  # they end with this thread
        while True:
            with self._lock:
                left = self._until - time.monotonic()
                if left <= 0:
                    self._owner = None
                    return
            time.sleep(left)


SPINNING = Spinning()  # libgomp counts the threads of the whole process
