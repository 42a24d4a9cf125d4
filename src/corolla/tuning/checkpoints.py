"""Where an unfinished run keeps itself.

Invariant: a folder `step-…` under `checkpoints/` is whole, because it is written elsewhere and renamed; a save
that fails, or is killed, leaves the earlier ones as they were. The two newest are kept, so that a run goes on
from the one before when the disk has spoilt the latest.

    OUT.run/lock                  held by the process that trains
    OUT.run/run.json              the settings and data that the losses depend on
    OUT.run/before.json           the evaluation before the first step
    OUT.run/ended.json            the `bundle.json` that the run has come to
    OUT.run/checkpoints/step-…    prompt, optimizer, schedule, random state, the trainer's own state, and
                                  files.json: the SHA-256 of each of these files
    OUT.run/checkpoints/damaged-… what could not be gone on from
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from corolla.errors import BundleError, UsageError
from corolla.files import publish, remove_folder, write_json
from corolla.json_files import parse_object
from corolla.tuning.bundle import BUNDLE_FILE
from corolla.tuning.evaluate import Evaluation

KEPT = 2
RUN_FILE = "run.json"
BEFORE_FILE = "before.json"
ENDED_FILE = "ended.json"
SUMS_FILE = "files.json"
LOCK_FILE = "lock"
LOGS = "runs"  # where the Trainer puts TensorBoard's
_STEP = re.compile(r"step-(\d+)")


class RunFolder:
    """The folder of a run that will end in the bundle `out`."""

    def __init__(self, out: Path) -> None:
        self.out = out
        self.path = out.parent / f"{out.name}.run"

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keep other processes from training to the same place; the lock ends with the process.

        Raises `UsageError` when one does, `BundleError` when the folder cannot be made.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            lock = os.open(self.path / LOCK_FILE, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o644)
        except OSError as error:
            raise BundleError(f"{self.path} cannot be written: {error.strerror or error}.") from error
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            yield
        except BlockingIOError as error:
            raise UsageError(
                f"Another process is training to {self.out}: wait for it, or give another --out."
            ) from error
        finally:
            os.close(lock)

    def begin(
        self,
        decisive: dict[str, Any],
        *,
        resume: bool,
        overwrite: bool,
        notify: Callable[[str], None] = lambda line: None,
    ) -> Path | None:
        """Make the folder ready; gives the checkpoint to go on from, if any.

        `overwrite` allows `out` to be replaced at the end and, without `resume`, an unfinished run now.
        `notify` is told in a sentence of checkpoints that are damaged. Raises `UsageError` rather than destroy
        something, or continue a run with other settings.
        """
        self.check(resume=resume, overwrite=overwrite)
        try:
            if resume:
                self._check_same(decisive)
                found = self._newest_whole(notify)
                if found is not None:
                    self.before()  # a damaged one is better known now than after the last step
                return found
            if overwrite:
                self._clear()
            self._checkpoints.mkdir(parents=True, exist_ok=True)
            write_json(self.path / RUN_FILE, decisive)
        except OSError as error:
            raise BundleError(f"{self.path} cannot be written: {error.strerror or error}.") from error
        return None

    def check(self, *, resume: bool, overwrite: bool) -> None:
        """Raises `UsageError` when something is in the way, or nothing is there to continue."""
        if resume and self.out.exists() and not (self.path / RUN_FILE).is_file():
            raise UsageError(
                f"{self.out} is there, and no unfinished run beside it: there is nothing to resume."
            )
        if self.out.exists() and not overwrite and not (resume and self.has_ended()):
            raise UsageError(f"{self.out} exists already: give another --out, or --overwrite to replace it.")
        if resume and not (self.path / RUN_FILE).is_file():
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
        noted = self._read(RUN_FILE)
        for name in sorted(noted.keys() | decisive.keys()):
            if noted.get(name) == json.loads(json.dumps(decisive.get(name))):
                continue
            if name == "data":
                raise UsageError(
                    f"The run at {self.path} was started on other examples: resume it with the same data, or "
                    "start anew with --overwrite."
                )
            raise UsageError(
                f"The run at {self.path} was started with {name}={noted.get(name)}, not "
                f"{decisive.get(name)}: resume it with the same settings, or start anew with --overwrite."
            )

    def _newest_whole(self, notify: Callable[[str], None]) -> Path | None:
        """The newest checkpoint that is as it was saved; the newer ones are set aside, saves cut off removed."""
        self._checkpoints.mkdir(exist_ok=True)
        for leftover in self._checkpoints.glob(".*"):
            shutil.rmtree(leftover, ignore_errors=True)
        found = self.all()
        damaged = []
        while found and not _is_whole(found[-1]):
            damaged.append(_set_aside(found.pop()))
        if damaged:
            notify(
                f"The checkpoint{'s' if len(damaged) > 1 else ''} {', '.join(sorted(damaged))} "
                f"{'are' if len(damaged) > 1 else 'is'} damaged; going on from "
                f"{found[-1].name if found else 'the first step, since there is no other'}."
            )
        return found[-1] if found else None

    @property
    def _checkpoints(self) -> Path:
        return self.path / "checkpoints"

    def all(self) -> list[Path]:
        """The checkpoints, oldest first."""
        found = [
            (int(match[1]), path) for path in self._checkpoints.glob("step-*") if (match := _match(path))
        ]
        return [path for _, path in sorted(found)]

    def latest(self) -> Path | None:
        """The newest checkpoint."""
        return next(reversed(self.all()), None)

    @contextmanager
    def saving(self, step: int) -> Iterator[Path]:
        """A temporary folder that becomes the checkpoint of `step` when the block ends well.

        Raises `BundleError` when the disk cannot take it.
        """
        temporary: Path | None = None
        try:
            temporary = Path(tempfile.mkdtemp(dir=self._checkpoints, prefix=".step-"))
            yield temporary
            write_json(temporary / SUMS_FILE, _sums(temporary))
            target = self._checkpoints / f"step-{step:06d}"
            if target.exists():
                remove_folder(target)
            publish(temporary, target)
        except (OSError, RuntimeError, BundleError) as error:  # torch's writer raises RuntimeError
            raise BundleError(self._failure(step, error)) from error
        finally:
            if temporary is not None and temporary.exists():
                shutil.rmtree(temporary, ignore_errors=True)
        for old in self.all()[:-KEPT]:
            with suppress(OSError):  # an old one too many does no harm
                remove_folder(old)

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
        """Keep the evaluation from before the first step."""
        write_json(self.path / BEFORE_FILE, evaluation.to_dict())

    def before(self) -> Evaluation | None:
        """The evaluation from before the first step, if it was reached."""
        if not (self.path / BEFORE_FILE).is_file():
            return None
        return Evaluation.from_dict(self._read(BEFORE_FILE))

    def note_end(self, bundle: dict[str, Any]) -> None:
        """The run is about to become the bundle whose description is `bundle`."""
        write_json(self.path / ENDED_FILE, bundle)

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

    def _read(self, name: str) -> dict[str, Any]:
        try:
            return parse_object((self.path / name).read_bytes())
        except (OSError, ValueError) as error:
            raise BundleError(
                f"{self.path / name} cannot be read, so the run cannot go on: start anew with --overwrite."
            ) from error


def _match(path: Path) -> re.Match[str] | None:
    return _STEP.fullmatch(path.name)


def _sums(folder: Path) -> dict[str, str]:
    return {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.iterdir())
        if path.name != SUMS_FILE
    }


def _is_whole(checkpoint: Path) -> bool:
    """Whether its files are what was written."""
    try:
        noted = parse_object((checkpoint / SUMS_FILE).read_bytes())
        return bool(noted == _sums(checkpoint))
    except (OSError, ValueError):
        return False


def _set_aside(checkpoint: Path) -> str:
    """Take a damaged checkpoint out of the way, for whoever wants to look; gives its old name."""
    name = checkpoint.name
    aside = Path(tempfile.mkdtemp(dir=checkpoint.parent, prefix=f"damaged-{name}-"))
    checkpoint.rename(aside / name)
    return name
