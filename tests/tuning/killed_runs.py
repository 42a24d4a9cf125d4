"""Training runs that kill themselves, and are resumed: `python -m tests.tuning.killed_runs FOLDER COUNT SEED`.

A run kills itself with SIGKILL just before its n-th operation on the files under its folder: an open for
writing, an fsync, a rename, a removal. Each run is a fork of this process, which has imported everything and
computed nothing. COUNT points are drawn by SEED, or all for COUNT 0; prints a JSON list of what went wrong,
after the number of points there were.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib.pyplot  # noqa: F401  (imported once, here)
import torch
from tests.tuning.tiny_setup import ABOUT, byte_tokenizer, conversations, local_model, settings

from corolla.errors import UsageError
from corolla.models.checkpoints.prompt_files import load_prompt
from corolla.tuning.batches import prepare
from corolla.tuning.bundle import load_bundle
from corolla.tuning.checkpoints import RunFolder
from corolla.tuning.tune import TuneResult, tune

CHANGES = ("os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.chmod")


class Fuse:
    """Counts operations on files under a folder; SIGKILL before the one with number `blows_at`."""

    def __init__(self, folder: Path, blows_at: int | None) -> None:
        self.count = 0
        self._folder = str(folder)
        self._blows_at = blows_at
        sys.addaudithook(self._audit)
        fsync = os.fsync

        def counted(handle: Any) -> None:
            self._operation()
            fsync(handle)

        os.fsync = counted

    def _audit(self, event: str, arguments: tuple[Any, ...]) -> None:
        written = event == "open" and arguments[2] & (os.O_WRONLY | os.O_RDWR)
        if (written or event in CHANGES) and str(arguments[0]).startswith(self._folder):
            self._operation()

    def _operation(self) -> None:
        if self.count == self._blows_at:
            os.kill(os.getpid(), signal.SIGKILL)
        self.count += 1


def run(model_folder: Path, out: Path, *, resume: bool = False) -> None:
    """A run of four steps, saved at the second and the last."""
    torch.set_num_threads(1)
    chosen = settings(steps=4, held_out=2)
    prepared = prepare(byte_tokenizer(), chosen, conversations(12))
    model = local_model(model_folder)
    if resume and RunFolder(out).latest() is not None:
        with torch.no_grad():
            model.prompts.input.zero_()  # nothing of a fresh model's prompt may remain
    result = tune(model, chosen, prepared, out, ABOUT, resume=resume)
    assert isinstance(result, TuneResult)
    assert len(result.losses) == 4


def resumed(model_folder: Path, out: Path) -> None:
    """Go on as the sentences of the errors say."""
    try:
        run(model_folder, out, resume=True)
    except UsageError as error:
        if "nothing to resume" in str(error):  # killed when all was done
            return
        if "no unfinished run" not in str(error):
            raise
        run(model_folder, out)  # killed before there was anything to go on from


def forked(work: Callable[[], None]) -> int:
    """Do it in a fork; gives the wait status."""
    child = os.fork()
    if child == 0:
        try:
            work()
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    return os.waitpid(child, 0)[1]


def outcome(out: Path) -> tuple[Any, ...]:
    """What a run has come to: its prompt, its figures, and what lies beside it."""
    bundle = load_bundle(out)
    prompt = load_prompt(out, model_name=ABOUT.name, identity=ABOUT.identity)
    lines = (out / "metrics.jsonl").read_text()
    left = sorted(path.name for path in out.parent.iterdir() if path.name != f"{out.name}.run")
    return prompt.input.tolist(), lines, bundle.metrics, left


def main(folder: Path, count: int, seed: int) -> None:
    model = folder / "model"
    counted = folder / "counted"

    def reference() -> None:
        (folder / "whole").mkdir()
        fuse = Fuse(folder / "whole", None)
        run(model, folder / "whole" / "out")
        counted.write_text(str(fuse.count))

    assert forked(reference) == 0
    expected = outcome(folder / "whole" / "out")
    total = int(counted.read_text())
    points = sorted(random.Random(seed).sample(range(total), count)) if count else list(range(total))
    wrong = []
    for point in points:
        place = folder / f"at-{point}"
        place.mkdir()

        def killed(place: Path = place, point: int = point) -> None:
            Fuse(place, point)
            run(model, place / "out")

        status = forked(killed)
        if not (os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL):
            wrong.append(f"{point}: was not killed")
        elif forked(lambda place=place: resumed(model, place / "out")) != 0:  # type: ignore[misc]
            wrong.append(f"{point}: could not be resumed")
        elif outcome(place / "out") != expected:
            wrong.append(f"{point}: came to something else")
    print(total)
    print(json.dumps(wrong))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
