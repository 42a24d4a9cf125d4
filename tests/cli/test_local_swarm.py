"""A swarm for the duration of a block: it says what comes up, and fails with its processes' own words."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
from tests.tiny_models import write_tiny

from corolla.cli.local_swarm import LocalSwarm, local_swarm
from corolla.errors import UnknownModel, UsageError


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_tiny("llama", tmp_path_factory.mktemp("model")))


LeftBehind = Callable[[], tuple[set[psutil.Process], set[Path]]]


def present() -> tuple[set[psutil.Process], set[Path]]:
    """Our children, and the folders in which their sockets and ready files are."""
    folders = Path(tempfile.gettempdir()).glob("corolla-*")
    children = psutil.Process().children(recursive=True)
    return {one for one in children if "tests.e2e.warm" not in one.cmdline()}, set(folders)


@pytest.fixture
def left_behind() -> LeftBehind:
    """What is there beside what stood before the test: other tests of this process may share a swarm."""
    before = present()
    return lambda: (present()[0] - before[0], present()[1] - before[1])


@contextlib.contextmanager
def swarm_of_two(tiny: str, said: list[str], left_behind: LeftBehind) -> Iterator[LocalSwarm]:
    """Looks at a swarm that is up, then fails."""
    with local_swarm(tiny, options=["--cache-tokens", "64"], say=said.append) as swarm:
        yield swarm
        assert len(swarm.peers) == 1
        assert [child.process.poll() for child in swarm.servers] == [None] * 2
        children, folders = left_behind()
        assert len(children) == 6  # a bootstrap peer and two servers, a daemon each
        assert folders
        assert all(os.stat(folder).st_mode & 0o077 == 0 for folder in folders)
        raise ZeroDivisionError


def test_it_comes_up_and_goes(tiny: str, left_behind: LeftBehind) -> None:
    said: list[str] = []
    found: list[LocalSwarm] = []
    with pytest.raises(ZeroDivisionError), contextlib.ExitStack() as stack:  # an error inside ends it as well
        found.append(stack.enter_context(swarm_of_two(tiny, said, left_behind)))
    (swarm,) = found
    assert [child.process.returncode for child in swarm.servers] == [0, 0]
    assert left_behind() == (set(), set())
    assert "bootstrap" in said[0]
    assert sorted(line.split(" is ready")[0] for line in said[1:]) == [
        "The server of blocks 0:2",
        "The server of blocks 2:4",
    ]


def test_a_server_that_does_not_start_ends_the_others_and_is_quoted(
    tiny: str, left_behind: LeftBehind
) -> None:
    with (
        pytest.raises(UsageError, match="float7"),
        local_swarm(tiny, servers=1, options=["--dtype", "float7"]),
    ):
        pytest.fail("the swarm came up")
    assert left_behind() == (set(), set())


def test_a_wrong_name_is_found_before_anything_starts(tmp_path: Path) -> None:
    said: list[str] = []
    with pytest.raises(UnknownModel), local_swarm(str(tmp_path / "nothing"), say=said.append):
        pytest.fail("the swarm came up")
    assert not said
