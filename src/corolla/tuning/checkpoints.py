"""Where an unfinished run keeps itself.

Invariant: a folder `checkpoint-…` is whole, because it is written elsewhere and renamed; a save that fails, or is
killed, leaves the earlier ones as they were. The two newest are kept.

    OUT.run/lock            held by the process that trains
    OUT.run/run.json        the settings and data that the losses depend on
    OUT.run/live.jsonl      a line for each step and evaluation, as they come; after a resumption some come again
    OUT.run/before.json     the evaluation before the first step
    OUT.run/ended.json      the `bundle.json` that the run has come to
    OUT.run/checkpoint-…    the Trainer's own, with the prompt in the place of the model
"""

from __future__ import annotations

import json
import shutil
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from corolla.errors import BundleError, UsageError
from corolla.files import publish, write_json
from corolla.json_files import load_object, parse
from corolla.tuning.bundle import BUNDLE_FILE
from corolla.tuning.evaluate import Evaluation

KEPT = 2
RUN_FILE = "run.json"
LIVE_FILE = "live.jsonl"
BEFORE_FILE = "before.json"
ENDED_FILE = "ended.json"
LOCK_FILE = "lock"
LOGS = "runs"  # where the Trainer puts TensorBoard's
CHECKPOINT = "checkpoint-"


class RunFolder:
    """The folder of a run that will end in the bundle `out`."""

    def __init__(self, out: Path) -> None:
        self.out = out
        self.path = out.parent / f"{out.name}.run"
        self.live = self.path / LIVE_FILE

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keep other processes from training to the same place; the lock ends with the process.

        Raises `UsageError` when one does, `BundleError` when the folder cannot be made.
        """
        lock = FileLock(self.path / LOCK_FILE)
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            lock.acquire(timeout=0)
        except Timeout as error:
            raise UsageError(
                f"Another process is training to {self.out}: wait for it, or give another --out."
            ) from error
        except OSError as error:
            raise BundleError(f"{self.path} cannot be written: {error.strerror or error}.") from error
        try:
            yield
        finally:
            lock.release()

    def begin(self, decisive: dict[str, Any], *, resume: bool, overwrite: bool) -> Path | None:
        """Make the folder ready; gives the checkpoint to go on from, if any.

        `overwrite` allows `out` to be replaced at the end and, without `resume`, an unfinished run now. Raises
        `UsageError` rather than destroy something, or continue a run with other settings; `BundleError`.
        """
        self.check(resume=resume, overwrite=overwrite)
        if resume:
            self._check_same(decisive)
            last = self.latest()
            if last is not None:
                _check_whole(last)
                self.before()  # a damaged one is better known now than after the last step
            return last
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            if overwrite:
                self._clear()
            write_json(self.path / RUN_FILE, decisive)
        except OSError as error:
            raise BundleError(f"{self.path} cannot be written: {error.strerror or error}.") from error
        return None

    def has_begun(self) -> bool:
        """Whether there is a run here to go on with."""
        return (self.path / RUN_FILE).is_file()

    def check(self, *, resume: bool, overwrite: bool) -> None:
        """Raises `UsageError` when something is in the way, or nothing is there to continue."""
        if resume and self.out.exists() and not self.has_begun():
            raise UsageError(
                f"{self.out} is there, and no unfinished run beside it: there is nothing to resume."
            )
        if self.out.exists() and not overwrite and not (resume and self.has_ended()):
            raise UsageError(f"{self.out} exists already: give another --out, or --overwrite to replace it.")
        if resume and not self.has_begun():
            raise UsageError(f"There is no unfinished run at {self.path}; start one without --resume.")
        if not resume and not overwrite and self.latest() is not None:
            raise UsageError(
                f"{self.path} holds an unfinished run: continue it with --resume, or drop it with --overwrite."
            )

    def _clear(self) -> None:
        """Drop an earlier run, its `run.json` first: without it, there is nothing to continue."""
        (self.path / RUN_FILE).unlink(missing_ok=True)
        for path in self.path.iterdir():
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            elif path.name != LOCK_FILE:
                path.unlink(missing_ok=True)

    def _check_same(self, decisive: dict[str, Any]) -> None:
        noted = self.noted()
        for name in sorted(noted.keys() | decisive.keys()):
            if noted.get(name) == parse(json.dumps(decisive.get(name))):
                continue
            if name not in noted or name not in decisive:
                raise UsageError(
                    f"The run at {self.path} was started by a version of Corolla with other settings ({name}): end "
                    "it with that version, or start anew with --overwrite."
                )
            if name == "data":
                raise UsageError(
                    f"The run at {self.path} was started on other examples: resume it with the same data, or "
                    "start anew with --overwrite."
                )
            raise UsageError(
                f"The run at {self.path} was started with {name}={noted.get(name)}, not "
                f"{decisive.get(name)}: resume it with the same settings, or start anew with --overwrite."
            )

    def noted(self) -> dict[str, Any]:
        """The settings of the run that is there. Raises `BundleError`."""
        return self._read(RUN_FILE)

    def all(self) -> list[Path]:
        """The checkpoints, oldest first."""
        steps = {path.name.removeprefix(CHECKPOINT): path for path in self.path.glob(f"{CHECKPOINT}*")}
        return [steps[step] for step in sorted(filter(str.isdecimal, steps), key=int)]

    def latest(self) -> Path | None:
        """The newest checkpoint."""
        return next(reversed(self.all()), None)

    @contextmanager
    def saving(self, step: int) -> Iterator[Path]:
        """A folder in which the block makes the checkpoint of `step`, to be renamed when it is whole.

        Raises `BundleError` when the disk cannot take it.
        """
        temporary, name = self.path / ".saving", f"{CHECKPOINT}{step}"
        try:
            shutil.rmtree(temporary, ignore_errors=True)  # what a kill left
            yield temporary
            publish(temporary / name, self.path / name)
        except (OSError, RuntimeError, BundleError) as error:  # torch's writer raises RuntimeError
            raise BundleError(self._failure(step, error)) from error
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
        for old in self.all()[:-KEPT]:
            shutil.rmtree(old, ignore_errors=True)  # one too many does no harm

    def _failure(self, step: int, error: Exception) -> str:
        last = self.latest()
        kept = (
            "nothing is saved yet"
            if last is None
            else f"{last} is still good, continue from it with --resume"
        )
        reason = getattr(error, "strerror", None) or str(error).split("\n", 1)[0]
        return (
            f"The checkpoint of step {step} could not be saved to {self.path} ({reason.rstrip('.')}); {kept}."
        )

    def note_before(self, evaluation: Evaluation) -> None:
        """Keep the evaluation from before the first step. Raises `BundleError`."""
        self._write(BEFORE_FILE, evaluation.sums)

    def before(self) -> Evaluation | None:
        """The evaluation from before the first step, if it was reached."""
        if not (self.path / BEFORE_FILE).is_file():
            return None
        return Evaluation.from_dict(self._read(BEFORE_FILE))

    def note_end(self, bundle: dict[str, Any]) -> None:
        """The run is about to become the bundle whose description is `bundle`. Raises `BundleError`."""
        self._write(ENDED_FILE, bundle)

    def has_ended(self) -> bool:
        """Whether `out` is the bundle that this run has come to, killed before it could remove its folder."""
        try:
            ended, bundle = (path.read_bytes() for path in (self.path / ENDED_FILE, self.out / BUNDLE_FILE))
        except OSError:
            return False
        return ended == bundle

    def finish(self) -> None:
        """The run has ended in a bundle; TensorBoard's log goes along."""
        if (self.path / LOGS).is_dir():
            shutil.move(self.path / LOGS, self.out / LOGS)
        self._clear()
        shutil.rmtree(self.path, ignore_errors=True)

    def _write(self, name: str, content: dict[str, Any]) -> None:
        try:
            write_json(self.path / name, content)
        except OSError as error:
            raise BundleError(f"{self.path} cannot be written: {error.strerror or error}.") from error

    def _read(self, name: str) -> dict[str, Any]:
        try:
            return load_object(self.path / name)
        except (OSError, ValueError) as error:
            raise BundleError(
                f"{self.path / name} cannot be read, so the run cannot go on: start anew with --overwrite."
            ) from error


def _check_whole(checkpoint: Path) -> None:
    """Raises `BundleError` where the disk has spoilt a file; what torch writes is a zip with checksums."""
    try:
        load_object(checkpoint / "trainer_state.json")
        spoilt = [path for path in checkpoint.glob("*.pt*") if zipfile.ZipFile(path).testzip() is not None]
    except (OSError, ValueError, zipfile.BadZipFile):
        spoilt = [checkpoint]
    if spoilt:
        raise BundleError(
            f"The checkpoint {checkpoint} is damaged: remove that folder, and --resume goes on from the one before."
        )
