"""Training runs that a page starts: `corolla tune` as a process of its own, on a file that was sent.

Invariant: what a run will be trained on was read and shown before it begins. A run outlives the page and this process,
which keep nothing of it but files: beside the bundles, in `.started/NAME/`, its data, its command and what it says.
"""

from __future__ import annotations

import contextlib
import copy
import os
import signal
import subprocess
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import psutil
from pydantic import Field, StringConstraints

from corolla.api.failures import ApiFailure, wrong
from corolla.api.partners import Partner
from corolla.api.requests import WHOLE, Strict
from corolla.config import TuningMode
from corolla.data.render import Example, RenderSettings
from corolla.data.sources import load_conversations
from corolla.errors import CorollaError
from corolla.files import scratch_folder, write_atomically, write_json
from corolla.json_files import JsonError, load_object
from corolla.models.limits import check_length, check_tokens
from corolla.text import one_line, printable
from corolla.tuning.batches import prepare, stretches
from corolla.tuning.checkpoints import RunFolder
from corolla.tuning.progress import planned_steps
from corolla.tuning.settings import TuneSettings

FOLDER = ".started"
MOST_AT_ONCE = 2  # runs that were started here
SHOWN = 3
CLOCK_SECONDS = 60.0  # by which a process may seem to be born at another time, where the clock was set since
LOG_BYTES = 4000  # of what a run has said, that are looked at
KINDS = (".json", ".jsonl", ".ndjson", ".csv", ".tsv")

Name = Annotated[str, StringConstraints(pattern=r"^[0-9A-Za-z][0-9A-Za-z_-]{0,99}$")]


class NewRun(Strict):
    """What to train, on what, and how; what is not said is as `corolla tune` has it."""

    name: Name
    file: Annotated[str, StringConstraints(max_length=300)]  # its name, which says how to read it
    content: Annotated[str, StringConstraints(min_length=1)]
    mode: TuningMode = "ptune"
    prompt_tokens: Annotated[int, Field(ge=1, le=100_000), WHOLE] = 16  # of all modes but lora
    rank: Annotated[int, Field(ge=1, le=10_000), WHOLE] = 8  # of lora
    steps: Annotated[int, Field(ge=1, le=10**7), WHOLE] | None = None
    batch_size: Annotated[int, Field(ge=1, le=1024), WHOLE] = 8
    max_length: Annotated[int, Field(ge=2, le=10**6), WHOLE] = 256
    learning_rate: Annotated[float, Field(gt=0)] | None = None

    def settings(self) -> TuneSettings:
        """Raises `UsageError`."""
        return TuneSettings(
            steps=self.steps,
            batch_size=self.batch_size,
            learning_rate=self.learning_rate,
            rendering=RenderSettings(style="auto", max_length=self.max_length),
        )

    @property
    def tokens(self) -> int:
        """That stand before the texts."""
        return 0 if self.mode == "lora" else self.prompt_tokens

    def words(self) -> list[str]:
        """The same as options of the command."""
        said = {
            "--mode": self.mode,
            "--prompt-tokens": self.tokens or None,
            "--rank": self.rank if self.mode == "lora" else None,
            "--batch-size": self.batch_size,
            "--max-length": self.max_length,
            "--steps": self.steps,
            "--lr": self.learning_rate,
        }
        return [word for flag, value in said.items() if value is not None for word in (flag, str(value))]


class Starter:
    """For any thread."""

    def __init__(
        self, folder: Path | None, command: Sequence[str], base: Partner, *, environment: Mapping[str, str]
    ) -> None:
        """`folder` is where bundles go; `command` is `corolla tune MODEL` with all that the swarm needs; runs have
        `environment` as theirs."""
        self._folder, self._command, self._base = folder, list(command), base
        self._environment = dict(environment)
        self._lock = threading.Lock()
        self._reading = threading.Lock()
        self._tokenizer: Any = None  # of our own: they are not made for several threads at once
        self._children: dict[str, subprocess.Popen[bytes]] = {}

    # --- before a run ---------------------------------------------------------------------------------------

    def preview(self, asked: NewRun) -> dict[str, Any]:
        """What a run would be trained on. Raises `ApiFailure`, `CorollaError`."""
        self._check_name(asked.name)
        name = self._base.name
        with self._reading, scratch_folder() as scratch:
            if self._tokenizer is None:
                self._tokenizer = copy.deepcopy(self._base.tokenizer)
            config, settings = self._base.model.config, asked.settings()
            check_length(config, asked.tokens, asked.max_length, name)
            path = scratch / f"data{_kind(asked.file)}"
            path.write_bytes(asked.content.encode(errors="surrogatepass"))
            try:
                conversations, report = load_conversations(str(path))
                prepared = prepare(self._tokenizer, settings, conversations)
            except CorollaError as error:
                raise wrong(str(error).replace(str(path), one_line(asked.file)), "content") from error
            examples = [*prepared.train, *prepared.held_out]
            rendered = (index for example in examples for index in example.input_ids)
            check_tokens(rendered, self._tokenizer, config, name)
            shown = [self._shown(example) for example in prepared.train[:SHOWN]]
        about = [
            *report.lines(),
            *prepared.notes,
            f"{len(prepared.train):,} examples to train on; {len(prepared.held_out):,} held out",
            f"Turns are joined by {prepared.renderer.about_style}",
        ]
        return {
            "notes": [one_line(line, characters=500) for line in about],
            "steps": planned_steps(settings, len(prepared.train)),
            "examples": shown,
        }

    def _shown(self, example: Example) -> list[dict[str, Any]]:
        pieces = stretches(example, self._tokenizer)
        return [{"text": printable(text), "learnt": learnt} for text, learnt in pieces]

    def _check_name(self, name: str) -> Path:
        if self._folder is None:
            raise wrong("This server has no folder for bundles: start it with --bundles FOLDER.", "name")
        if name == self._base.name or any(
            path.exists() for path in (self._folder / name, RunFolder(self._folder / name).path)
        ):
            raise wrong(f"There is something called {name} already: give another name.", "name")
        return self._folder / FOLDER / name

    # --- a run ----------------------------------------------------------------------------------------------

    def start(self, asked: NewRun, user: str = "") -> dict[str, Any]:
        """Begin to train, for that user. Raises `ApiFailure`, `CorollaError`, also for data that could not be trained
        on."""
        self.preview(asked)
        with self._lock:
            kept = self._check_name(asked.name)
            if self.running(asked.name) or self.owner(asked.name) not in (None, user):
                raise wrong(f"{asked.name} has begun already: give another name.", "name")
            self._check_room()
            try:
                kept.mkdir(parents=True, exist_ok=True, mode=0o700)
                data = kept.resolve() / f"data{_kind(asked.file)}"
                write_atomically(data, asked.content.encode(errors="surrogatepass"))
            except OSError as error:
                raise ApiFailure(503, f"The data cannot be kept here: {error.strerror}.") from error
            out = str(kept.resolve().parents[1] / asked.name)
            command = [*self._command, "--data", str(data), "--out", out, *asked.words()]
            self._begin(asked.name, command, user)
        return {"name": asked.name, "state": "starting"}

    def resume(self, name: str) -> dict[str, Any]:
        """Go on with a run that was started here and has stopped. Raises `ApiFailure`."""
        with self._lock:
            about = self._about(name)
            command = about.get("command")
            if not isinstance(command, list) or self._folder is None or self.running(name):
                raise ApiFailure(404, "No run of that name was started here and has stopped.", param="name")
            self._check_room()
            again = RunFolder(self._folder / name).has_begun()
            self._begin(name, [*map(str, command)], about.get("user"), ["--resume"] if again else [])
        return {"name": name, "state": "starting"}

    def _check_room(self) -> None:
        if sum(self.running(name) for name in self.names()) >= MOST_AT_ONCE:
            raise ApiFailure(
                429, f"{MOST_AT_ONCE} runs are under way: wait for one, or stop one.", code="too_many_runs"
            )

    def _begin(self, name: str, command: list[str], user: Any, more: Sequence[str] = ()) -> None:
        assert self._folder is not None
        kept = self._folder / FOLDER / name
        child = None
        try:
            with (kept / "log.txt").open("wb") as log:
                child = subprocess.Popen(
                    [*command, *more],
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    env=self._environment,
                    start_new_session=True,  # Ctrl-C is for us, and the run goes on
                )
            born = psutil.Process(child.pid).create_time()
            about = {"pid": child.pid, "born": born, "command": command, "user": user}
            write_json(kept / "process.json", about)
        except OSError as error:
            if child is not None:  # nobody would know of it
                child.kill()
                child.wait()
            raise ApiFailure(503, f"The run cannot begin here: {error.strerror or error}.") from error
        self._children[name] = child

    def stop(self, name: str) -> dict[str, Any]:
        """As Ctrl-C: the step under way is finished and saved. Raises `ApiFailure`."""
        with self._lock:
            if not self.running(name):
                raise ApiFailure(404, "No run of that name was started here and goes on.", param="name")
            with contextlib.suppress(ProcessLookupError):  # it ends just now
                os.kill(int(self._about(name)["pid"]), signal.SIGINT)
        return {"name": name, "state": "stopping"}

    # --- what is known of them -------------------------------------------------------------------------------

    def names(self) -> list[str]:
        """Of the runs that were started here."""
        try:
            return [] if self._folder is None else sorted(os.listdir(self._folder / FOLDER))
        except OSError:
            return []

    def running(self, name: str) -> bool:
        """Whether its process is there."""
        child = self._children.get(name)
        if child is not None:
            if child.poll() is None:
                return True
            self._children.pop(name, None)  # another thread may have seen it, too
        about = self._about(name)
        try:
            process = psutil.Process(int(about["pid"]))
            same = abs(process.create_time() - float(about["born"])) < CLOCK_SECONDS
            return same and bool(process.status() != psutil.STATUS_ZOMBIE)
        except (psutil.Error, KeyError, TypeError, ValueError, OverflowError):
            return False

    def owner(self, name: str) -> str | None:
        """Who has started it; None where no run of that name was started here."""
        user = self._about(name).get("user")
        return user if isinstance(user, str) else None

    def last_words(self, name: str) -> str:
        """The last line that it has said, but for those that only frame others."""
        assert self._folder is not None
        try:
            with (self._folder / FOLDER / name / "log.txt").open("rb") as file:
                file.seek(max(0, os.fstat(file.fileno()).st_size - LOG_BYTES))
                lines = file.read().decode(errors="replace").strip().splitlines()
        except OSError:
            return ""
        said = [line for line in lines if any(sign.isalnum() for sign in line)]
        return one_line(said[-1], characters=500) if said else ""

    def _about(self, name: str) -> dict[str, Any]:
        if self._folder is None or name not in self.names():
            return {}
        try:
            return load_object(self._folder / FOLDER / name / "process.json")
        except (OSError, JsonError):
            return {}


def _kind(file: str) -> str:
    found = Path(file).suffix.lower()
    if found not in KINDS:
        raise wrong(f"A file to tune on is one of {', '.join(KINDS)}.", "file")
    return found
