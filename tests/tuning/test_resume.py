"""A run that was killed, stopped or that met a full disk goes on as if nothing had happened."""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.swarm_fixture import MemorySwarm
from tests.tuning.tiny_setup import ABOUT, conversations, local_model, prompt_for, settings, write_model
from transformers import TrainerCallback

from corolla.errors import BundleError, UsageError
from corolla.tuning.batches import prepare
from corolla.tuning.checkpoints import RunFolder
from corolla.tuning.settings import TuneSettings
from corolla.tuning.tune import TuneResult, TuneStopped, tune


class Killed(Exception):
    pass


class At(TrainerCallback):
    """Does something once a step has ended."""

    def __init__(self, step: int, action: Any) -> None:
        self.step, self.action = step, action

    def on_step_end(self, _args: Any, state: Any, _control: Any, **_kwargs: Any) -> None:
        if state.global_step == self.step:
            self.action()


def die() -> None:
    raise Killed


def interrupt() -> None:
    os.kill(os.getpid(), signal.SIGINT)


def finished(
    model: Any, chosen: TuneSettings, tokenizer: Any, out: Path, **options: Any
) -> tuple[TuneResult, torch.Tensor]:
    result = tune(model, chosen, prepare(tokenizer, chosen, conversations()), out, ABOUT, **options)
    assert isinstance(result, TuneResult)
    return result, torch.cat([one.flatten() for one in model.prompts.state_dict().values()])


# Steps 2, 4 and 6 are saved. A run killed during step 6 does step 5 again; two epochs have ended by then.
@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_killed_run_resumes_with_the_same_losses_to_the_bit(
    tiny_folder: Path, tokenizer: Any, tmp_path: Path, accumulate: int
) -> None:
    chosen = settings(steps=8, samples=9, accumulate=accumulate)
    whole, whole_prompt = finished(local_model(tiny_folder), chosen, tokenizer, tmp_path / "whole")
    prepared = prepare(tokenizer, chosen, conversations())
    with pytest.raises(Killed):
        tune(local_model(tiny_folder), chosen, prepared, tmp_path / "out", ABOUT, callbacks=[At(5, die)])
    assert not (tmp_path / "out").exists()
    model = local_model(tiny_folder)
    with torch.no_grad():
        model.prompts.input.zero_()  # nothing of a fresh model's prompt may remain
    resumed, resumed_prompt = finished(model, chosen, tokenizer, tmp_path / "out", resume=True)
    assert resumed.losses == whole.losses
    assert len(set(whole.losses)) == 8
    assert torch.equal(resumed_prompt, whole_prompt)
    assert resumed.before == whole.before
    assert resumed.after == whole.after
    assert not (tmp_path / "out.run").exists()


@pytest.mark.parametrize("count", [2, pytest.param(0, marks=pytest.mark.nightly)])
def test_a_run_killed_in_the_middle_of_its_saves_resumes_to_the_same_bundle(
    tiny_folder: Path, tmp_path: Path, count: int
) -> None:
    """See `killed_runs.py`; as many of the points of a run, or all."""
    shutil.copytree(tiny_folder, tmp_path / "model")
    ended = subprocess.run(
        [sys.executable, "-m", "tests.tuning.killed_runs", str(tmp_path), str(count), "0"],
        capture_output=True,
        text=True,
        timeout=1200,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        check=False,
    )
    assert ended.returncode == 0, ended.stderr
    total, wrong = ended.stdout.splitlines()[-2:]
    assert json.loads(wrong) == [], ended.stderr
    assert int(total) > 60  # two checkpoints and a bundle, each of several files


def test_random_numbers_go_on_where_they_were(tokenizer: Any, tmp_path: Path) -> None:
    folder = write_model(tmp_path / "model", family="gpt2")  # it drops out a tenth of the activations
    chosen = settings()
    whole, whole_prompt = finished(local_model(folder), chosen, tokenizer, tmp_path / "whole")
    prepared = prepare(tokenizer, chosen, conversations())
    with pytest.raises(Killed):
        tune(local_model(folder), chosen, prepared, tmp_path / "out", ABOUT, callbacks=[At(3, die)])
    torch.manual_seed(99)
    resumed, resumed_prompt = finished(local_model(folder), chosen, tokenizer, tmp_path / "out", resume=True)
    assert resumed.losses == whole.losses
    assert torch.equal(resumed_prompt, whole_prompt)


@pytest.mark.parametrize(
    ("mode", "end"), [("prefix", interrupt), pytest.param("deep_ptune", die, marks=pytest.mark.nightly)]
)
def test_a_run_through_a_swarm_resumes_with_the_same_losses(
    tiny_folder: Path, tokenizer: Any, tmp_path: Path, mode: str, end: Callable[[], None]
) -> None:
    chosen = settings()
    with MemorySwarm(tiny_folder, [(0, 2), (2, 4)]) as swarm:

        def model() -> Any:
            loaded = swarm.model(tuning_mode=mode, pre_seq_len=4)
            if mode == "deep_ptune":
                loaded.prompts = prompt_for(loaded, mode)
            return loaded

        whole, whole_prompt = finished(model(), chosen, tokenizer, tmp_path / "whole")
        prepared = prepare(tokenizer, chosen, conversations())
        with suppress(Killed):
            stopped = tune(model(), chosen, prepared, tmp_path / "out", ABOUT, callbacks=[At(3, end)])
            assert isinstance(stopped, TuneStopped)
        resumed, resumed_prompt = finished(model(), chosen, tokenizer, tmp_path / "out", resume=True)
    assert resumed.losses == pytest.approx(whole.losses, abs=1e-5)
    torch.testing.assert_close(resumed_prompt, whole_prompt, atol=1e-4, rtol=0)


def test_ctrl_c_finishes_the_step_saves_and_the_run_goes_on(
    tiny_folder: Path, tokenizer: Any, tmp_path: Path
) -> None:
    chosen = settings(save_every=50)
    whole, _ = finished(local_model(tiny_folder), chosen, tokenizer, tmp_path / "whole")
    handler = signal.getsignal(signal.SIGINT)
    prepared = prepare(tokenizer, chosen, conversations())
    stopped = tune(
        local_model(tiny_folder), chosen, prepared, tmp_path / "out", ABOUT, callbacks=[At(2, interrupt)]
    )
    assert signal.getsignal(signal.SIGINT) is handler
    assert isinstance(stopped, TuneStopped)
    # The signal comes after our own callback has been asked at step 2, so the step under way is the third.
    assert (stopped.step, stopped.total) == (3, 6)
    resumed, _ = finished(local_model(tiny_folder), chosen, tokenizer, tmp_path / "out", resume=True)
    assert resumed.losses == whole.losses


def test_a_second_ctrl_c_stops_at_once(tiny_folder: Path, tokenizer: Any, tmp_path: Path) -> None:
    def twice() -> None:
        interrupt()
        interrupt()

    prepared = prepare(tokenizer, settings(), conversations())
    with pytest.raises(KeyboardInterrupt):
        tune(
            local_model(tiny_folder), settings(), prepared, tmp_path / "out", ABOUT, callbacks=[At(2, twice)]
        )


def test_a_run_killed_after_its_last_step_only_writes_its_bundle(
    tiny_folder: Path, tokenizer: Any, tmp_path: Path
) -> None:
    chosen = settings()
    out = tmp_path / "out"

    class DiesAtTheEnd(TrainerCallback):
        def on_train_end(self, *_args: Any, **_kwargs: Any) -> None:
            raise Killed

    prepared = prepare(tokenizer, chosen, conversations())
    with pytest.raises(Killed):
        tune(local_model(tiny_folder), chosen, prepared, out, ABOUT, callbacks=[DiesAtTheEnd()])
    resumed, _ = finished(local_model(tiny_folder), chosen, tokenizer, out, resume=True)
    assert len(resumed.losses) == resumed.steps == 6
    assert resumed.after != resumed.before


def test_a_run_is_not_continued_with_other_settings_or_data(
    tiny_folder: Path, tokenizer: Any, tmp_path: Path
) -> None:
    prepared = prepare(tokenizer, settings(), conversations())
    out = tmp_path / "out"
    with pytest.raises(Killed):
        tune(local_model(tiny_folder), settings(), prepared, out, ABOUT, callbacks=[At(3, die)])
    with pytest.raises(UsageError, match=r"learning_rate=0\.01, not 0\.02"):
        finished(local_model(tiny_folder), settings(learning_rate=0.02), tokenizer, out, resume=True)
    other = prepare(tokenizer, settings(), conversations(20))
    with pytest.raises(UsageError, match="other examples"):
        tune(local_model(tiny_folder), settings(), other, out, ABOUT, resume=True)
    with pytest.raises(UsageError, match="--resume"):
        tune(local_model(tiny_folder), settings(), prepared, out, ABOUT)
    with pytest.raises(UsageError, match="no unfinished run"):
        finished(local_model(tiny_folder), settings(), tokenizer, tmp_path / "elsewhere", resume=True)


# --- the run folder ----------------------------------------------------------------------------------------


def run_folder(path: Path) -> RunFolder:
    folder = RunFolder(path / "out")
    folder.begin({"seed": 0}, resume=False, overwrite=False)
    return folder


def save(folder: RunFolder, step: int, size: int = 100) -> None:
    with folder.saving(step) as temporary:
        checkpoint = temporary / f"checkpoint-{step}"
        checkpoint.mkdir(parents=True)
        (checkpoint / "trainer_state.json").write_text("{}")
        (checkpoint / "content").write_bytes(b"x" * size)


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    """A disk that takes no more than `size` bytes a file: the same error that a full one gives."""
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))


def test_the_two_newest_checkpoints_are_kept(tmp_path: Path) -> None:
    folder = run_folder(tmp_path)
    for step in (8, 9, 10, 100):
        save(folder, step)
    assert [path.name for path in folder.all()] == ["checkpoint-10", "checkpoint-100"]


def test_a_save_that_fails_leaves_the_last_good_checkpoint_and_says_so(tmp_path: Path) -> None:
    folder = run_folder(tmp_path)
    save(folder, 1)
    save(folder, 2)
    said = r"step 3 could not be saved.*checkpoint-2 is still good"
    with largest_file(10_000), pytest.raises(BundleError, match=said) as caught:
        save(folder, 3, size=20_000)
    assert "\n" not in str(caught.value)
    assert [path.name for path in folder.all()] == ["checkpoint-1", "checkpoint-2"]
    assert (folder.all()[-1] / "content").read_bytes() == b"x" * 100
    assert sorted(path.name for path in folder.path.iterdir()) == ["checkpoint-1", "checkpoint-2", "run.json"]


def test_notes_that_a_disk_does_not_take_are_one_sentence(tmp_path: Path) -> None:
    folder = run_folder(tmp_path)
    with largest_file(300), pytest.raises(BundleError, match=r"out\.run cannot be written: File too large\."):
        folder.note_end({"notes": "x" * 1000})
    assert not folder.has_ended()


def test_a_disk_that_fills_up_in_the_middle_of_a_run_costs_only_the_steps_since_the_last_save(
    tiny_folder: Path, tokenizer: Any, tmp_path: Path
) -> None:
    chosen = settings()
    whole, _ = finished(local_model(tiny_folder), chosen, tokenizer, tmp_path / "whole")
    prepared = prepare(tokenizer, chosen, conversations())
    model = local_model(tiny_folder)
    said = r"step 4 could not be saved.*checkpoint-2 is still good"
    with ExitStack() as disk:
        fills_up = At(3, lambda: disk.enter_context(largest_file(300)))
        with pytest.raises(BundleError, match=said):
            tune(model, chosen, prepared, tmp_path / "out", ABOUT, callbacks=[fills_up])
    resumed, _ = finished(local_model(tiny_folder), chosen, tokenizer, tmp_path / "out", resume=True)
    assert resumed.losses == whole.losses


@pytest.mark.parametrize("harm", ["truncated", "flipped", "no state"])
def test_a_damaged_checkpoint_is_refused_and_the_one_before_comes_to_the_same_end(
    tiny_folder: Path, tokenizer: Any, tmp_path: Path, harm: str
) -> None:
    chosen = settings()
    whole, whole_prompt = finished(local_model(tiny_folder), chosen, tokenizer, tmp_path / "whole")
    prepared = prepare(tokenizer, chosen, conversations())
    with pytest.raises(Killed):
        tune(local_model(tiny_folder), chosen, prepared, tmp_path / "out", ABOUT, callbacks=[At(5, die)])
    last = RunFolder(tmp_path / "out").all()[-1]
    optimizer = (last / "optimizer.pt").read_bytes()
    middle = len(optimizer) // 2
    if harm == "truncated":
        (last / "optimizer.pt").write_bytes(optimizer[:-1])
    elif harm == "flipped":
        flipped = bytes([optimizer[middle] ^ 1])
        (last / "optimizer.pt").write_bytes(optimizer[:middle] + flipped + optimizer[middle + 1 :])
    else:
        (last / "trainer_state.json").unlink()
    with pytest.raises(BundleError, match=f"{last} is damaged: remove that folder"):
        finished(local_model(tiny_folder), chosen, tokenizer, tmp_path / "out", resume=True)
    shutil.rmtree(last)
    resumed, prompt = finished(local_model(tiny_folder), chosen, tokenizer, tmp_path / "out", resume=True)
    assert resumed.losses == whole.losses
    assert torch.equal(prompt, whole_prompt)


def test_two_processes_do_not_train_to_one_place(tiny_folder: Path, tokenizer: Any, tmp_path: Path) -> None:
    with (
        RunFolder(tmp_path / "out").locked(),
        pytest.raises(UsageError, match="Another process is training"),
    ):
        finished(local_model(tiny_folder), settings(), tokenizer, tmp_path / "out")


def test_a_reporters_log_outlives_the_run_folder(tmp_path: Path) -> None:
    folder = run_folder(tmp_path)
    (folder.path / "runs").mkdir()
    (folder.path / "runs" / "events").write_text("figures")
    folder.out.mkdir()
    folder.finish()
    assert (folder.out / "runs" / "events").read_text() == "figures"
    assert not folder.path.exists()


def test_what_a_kill_left_half_written_is_removed_and_not_resumed_from(tmp_path: Path) -> None:
    folder = run_folder(tmp_path)
    save(folder, 2)
    (folder.path / ".saving" / "checkpoint-4").mkdir(parents=True)
    again = RunFolder(tmp_path / "out")
    assert again.begin({"seed": 0}, resume=True, overwrite=False) == folder.all()[0] == folder.latest()
    save(again, 4)
    assert [path.name for path in again.all()] == ["checkpoint-2", "checkpoint-4"]
    assert not (folder.path / ".saving").exists()


def test_a_run_of_a_version_with_other_settings_is_not_gone_on_with(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "out")
    with folder.locked():
        folder.begin({"seed": 0}, resume=False, overwrite=False)
    with pytest.raises(
        UsageError, match=r"a version of Corolla with other settings \(warmup\): end it with that"
    ):
        folder.begin({"seed": 0, "warmup": 0.05}, resume=True, overwrite=False)
