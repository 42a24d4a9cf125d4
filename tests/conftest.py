"""What every test relies on: small thread pools, deterministic examples, and nothing left behind.

`nothing_left_behind` fails a run in which a process or a socket folder that the tests caused outlives them.
"""

from __future__ import annotations

import gc
import os
import shutil
import sys
import tempfile
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import hypothesis
import psutil
import pytest

from corolla.swarm.transport.runtime_dir import remove_abandoned
from tests import covered
from tests.e2e.warm import close_warm
from tests.mutants import Mistakes

hypothesis.settings.register_profile("corolla", derandomize=True, deadline=None)
hypothesis.settings.register_profile(
    "every time", hypothesis.settings.get_profile("corolla"), max_examples=50
)
hypothesis.settings.load_profile("corolla")

MARKER = "COROLLA_TEST_RUN"
# What is slow to make (the converted model, compiled kernels) is kept here from run to run, for all workers.
CACHE = Path(__file__).parents[1] / ".test-cache"
FULL_COLLECTION = 50  # in place of 10: once in so many collections of the middle generation
MANY_MODULES = 100
GRACE_SECONDS = 15.0  # a daemon notices within seconds that its killed parent is gone

_modules = 0  # were imported when all that was there was set aside


@pytest.fixture(scope="session", autouse=True)
def nothing_left_behind() -> Iterator[None]:
    """Gives this worker's processes a mark and a temporary folder of their own; checks both at the end."""
    run = uuid.uuid4().hex
    # Short, because socket paths are.
    scratch = Path(tempfile.mkdtemp(prefix="ct-", dir="/tmp"))
    saved = {name: os.environ.get(name) for name in (MARKER, "TMPDIR")}
    os.environ.update({MARKER: run, "TMPDIR": str(scratch)})
    tempfile.tempdir = None
    yield
    try:
        close_warm()
        _, alive = psutil.wait_procs(_processes_of(run), timeout=GRACE_SECONDS)
        names = [_describe(process) for process in alive]
        for process in alive:
            process.kill()
        assert not names, f"processes outlived the tests: {names}"
        remove_abandoned()  # what a killed peer leaves is removed by the next one that starts
        folders = sorted(path.name for path in scratch.glob("corolla-*"))
        assert not folders, f"socket folders outlived the tests: {folders}"
    finally:
        _restore(saved)
        tempfile.tempdir = None
        shutil.rmtree(scratch, ignore_errors=True)


@pytest.fixture(params=["bfloat16", "float16", "float64"])
def another_default(request: pytest.FixtureRequest) -> AbstractContextManager[None]:
    """Within the block torch makes tensors in another dtype where none is named, as some users have it."""
    return made_in(request.param)


@contextmanager
def made_in(name: str) -> Iterator[None]:
    import torch

    before = torch.get_default_dtype()
    torch.set_default_dtype(getattr(torch, name))
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def _processes_of(run: str) -> list[psutil.Process]:
    """Everything this worker started, orphans included, which are recognised by their environment."""
    found = {process.pid: process for process in psutil.Process().children(recursive=True)}
    for process in psutil.process_iter():
        try:
            if process.environ().get(MARKER) == run:
                found[process.pid] = process
        except psutil.Error:
            continue
    found.pop(os.getpid(), None)
    return [process for process in found.values() if "resource_tracker" not in _describe(process)]


def _describe(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline()) or process.name()
    except psutil.Error:
        return f"process {process.pid}"


def pytest_configure(config: pytest.Config) -> None:
    """No test, and no process that one starts, sees the user's own folders: nothing of ours is written there."""
    if config.option.markexpr == "not nightly":
        hypothesis.settings.load_profile("every time")
    home = tempfile.TemporaryDirectory(prefix="ct-home-")
    config.add_cleanup(home.cleanup)
    own = {
        "HOME": home.name,
        "XDG_CACHE_HOME": str(CACHE),
        "XDG_DATA_HOME": f"{home.name}/data",
        "XDG_CONFIG_HOME": f"{home.name}/config",
        "XDG_STATE_HOME": f"{home.name}/state",
        "HF_HOME": f"{home.name}/hf",
        "COROLLA_CACHE": os.environ.get("COROLLA_CACHE") or str(CACHE / "corolla"),
    }
    outside = {"COROLLA_DATA", "COROLLA_CONFIG", "COROLLA_PEERS", "HF_TOKEN"}
    saved = {name: os.environ.get(name) for name in own.keys() | outside}
    config.add_cleanup(lambda: _restore(saved))
    for name in outside:
        os.environ.pop(name, None)
    os.environ.update(own)


def _restore(saved: Mapping[str, str | None]) -> None:
    for name, value in saved.items():
        os.environ.pop(name, None)
        if value is not None:
            os.environ[name] = value


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Iterator[None]:
    """Nearly all that is made while modules are imported stays to the end: nobody looks for garbage among it."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.enable()


def pytest_collection_finish() -> None:
    """Only those that run tests come here: the process that hands them out need not wait for torch.

    What libraries made on import a full collection, as Trainer does many, need not walk; nor is a tenth of all time
    spent on collections of what later imports and kept models made.
    """
    import torch

    torch.set_num_threads(1)
    _set_aside()
    young, middle, _ = gc.get_threshold()
    gc.set_threshold(young, middle, FULL_COLLECTION)


def pytest_runtest_logfinish() -> None:
    """Families and trainers are imported by the first test that uses them."""
    if len(sys.modules) > _modules + MANY_MODULES:
        _set_aside()


def _set_aside() -> None:
    global _modules
    gc.collect()
    gc.freeze()
    _modules = len(sys.modules)


def pytest_addoption(parser: pytest.Parser) -> None:
    """See `tests/covered.py`."""
    covered.add_options(parser)


def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, exitstatus: int, config: pytest.Config
) -> None:
    """How much the suites covered, in whatever processes they ran; said by the one that knows all."""
    if hasattr(config, "workerinput"):
        return
    covered.show(terminalreporter)
    if (file := config.getoption("--record")) is not None:
        passed = exitstatus == pytest.ExitCode.OK
        covered.record(terminalreporter, file, scale=config.getoption("--scale"), passed=passed)


@pytest.fixture
def mistakes(caplog: pytest.LogCaptureFixture) -> Iterator[Mistakes]:
    """To plant mistakes with; none of them may only raise."""
    with pytest.MonkeyPatch.context() as patch:
        planted = Mistakes(patch)
        yield planted
    planted.assert_none_raised(caplog.get_records("call"))


@pytest.fixture
def scaled(request: pytest.FixtureRequest) -> Callable[[float], int]:
    """A nightly test's size at the scale of this run."""
    scale = request.config.getoption("--scale")
    return lambda size: max(1, round(size * scale))
