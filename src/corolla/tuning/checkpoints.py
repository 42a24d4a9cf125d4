"""Where an unfinished run keeps itself.

Invariant: a folder `step-…` under `checkpoints/` is whole, because it is written elsewhere and renamed; a save
that fails leaves the earlier ones as they were. The two newest are kept.

    OUT.run/run.json              the settings and data that the losses depend on
    OUT.run/before.json           the evaluation before the first step
    OUT.run/checkpoints/step-…    prompt, optimizer, schedule, random state, the trainer's own state
"""

from __future__ import annotations

import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from corolla.errors import BundleError, UsageError
from corolla.models.prompt_files import write_json
from corolla.tuning.evaluate import Evaluation

KEPT = 2
RUN_FILE = "run.json"
BEFORE_FILE = "before.json"
LOGS = "runs"  # where the Trainer puts TensorBoard's
_STEP = re.compile(r"step-(\d+)")


class RunFolder:
    """The folder of a run that will end in the bundle `out`."""

    def __init__(self, out: Path) -> None:
        self.out = out
        self.path = out.parent / f"{out.name}.run"

    def begin(self, decisive: dict[str, Any], *, resume: bool, overwrite: bool) -> Path | None:
        """Make the folder ready; gives the checkpoint to go on from, if any.

        `overwrite` allows `out` to be replaced at the end and, without `resume`, an unfinished run now.
        Raises `UsageError` rather than destroy something, or continue a run with other settings.
        """
        self.check(resume=resume, overwrite=overwrite)
        if resume:
            return self._continue(decisive)
        if overwrite:
            shutil.rmtree(self.path, ignore_errors=True)
        try:
            self._checkpoints.mkdir(parents=True, exist_ok=True)
            write_json(self.path / RUN_FILE, decisive)
        except OSError as error:
            raise BundleError(f"{self.path} cannot be written: {error.strerror or error}.") from error
        return None

    def check(self, *, resume: bool, overwrite: bool) -> None:
        """Raises `UsageError` when something is in the way, or nothing is there to continue."""
        if self.out.exists() and not overwrite:
            raise UsageError(f"{self.out} exists already: give another --out, or --overwrite to replace it.")
        if resume and not (self.path / RUN_FILE).is_file():
            raise UsageError(f"There is no unfinished run at {self.path}; start one without --resume.")
        if not resume and not overwrite and self.latest() is not None:
            raise UsageError(
                f"{self.path} holds an unfinished run: continue it with --resume, or drop it with --overwrite."
            )

    def _continue(self, decisive: dict[str, Any]) -> Path | None:
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
        for leftover in self._checkpoints.glob(".*"):
            shutil.rmtree(leftover, ignore_errors=True)
        return self.latest()

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
            _sync(temporary)
            target = self._checkpoints / f"step-{step:06d}"
            shutil.rmtree(target, ignore_errors=True)
            temporary.rename(target)
        except (OSError, RuntimeError, BundleError) as error:  # torch's writer raises RuntimeError
            raise BundleError(self._failure(step, error)) from error
        finally:
            if temporary is not None and temporary.exists():
                shutil.rmtree(temporary, ignore_errors=True)
        for old in self.all()[:-KEPT]:
            shutil.rmtree(old, ignore_errors=True)

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

    def finish(self) -> None:
        """The run has ended in a bundle; TensorBoard's log goes along."""
        if (self.path / LOGS).is_dir():
            shutil.move(self.path / LOGS, self.out / LOGS)
        shutil.rmtree(self.path, ignore_errors=True)

    def _read(self, name: str) -> dict[str, Any]:
        try:
            content: dict[str, Any] = json.loads((self.path / name).read_text(encoding="utf-8"))
            return content
        except (OSError, ValueError) as error:
            raise BundleError(
                f"{self.path / name} cannot be read, so the run cannot go on: start anew with --overwrite."
            ) from error


def _match(path: Path) -> re.Match[str] | None:
    return _STEP.fullmatch(path.name)


def _sync(folder: Path) -> None:
    """Bring a folder's files to the disk, so that the rename does not outrun them."""
    for path in folder.iterdir():
        with path.open("rb") as file:
            os.fsync(file.fileno())
