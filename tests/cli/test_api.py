"""`corolla api` as people start it: real processes, a real socket, real kills."""

from __future__ import annotations

import contextlib
import re
import signal
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import pytest
from tests.api.deployed import Deployed, computed, deploy
from tests.api.talking import converse
from tests.api.world import BASE, write_bundle, write_model
from tests.e2e.processes import Process, Processes, corolla, environment, processes
from tests.e2e.warm import warm

from corolla.api.serving import listening
from corolla.cli.api import ApiOptions
from corolla.errors import UsageError
from corolla.models.checkpoints.checkpoint import open_checkpoint


@pytest.fixture
def started(tmp_path: Path) -> Iterator[Processes]:
    with processes(tmp_path) as found:
        yield found


def test_an_api_over_a_swarm_of_processes(started: Processes, tmp_path: Path) -> None:
    folder = write_model(tmp_path / BASE)
    bundles = tmp_path / "bundles"
    bundles.mkdir()
    write_bundle(bundles / "poet", folder, open_checkpoint(str(folder)).identity)
    world = deploy(started, folder, ("0:2", "2:4", "0:4"), "--bundles", str(bundles))
    with contextlib.closing(world):
        watching = Watching(world.servers[0].address, tmp_path / "watch.log")
        started.started.append(watching)
        assert [one.id for one in world.client().models.list()] == [BASE, "poet"]
        conversations_while_a_server_is_killed(world)
        talk = [{"role": "user", "content": "Tell me of the river, at length."}]
        reply = world.client().chat.completions.create(model="poet", messages=talk, max_tokens=5)
        assert reply.choices[0].message.content is not None
        figures = urlopen(f"{world.url}/metrics").read().decode()
        assert 'corolla_api_servers{state="serving"} ' in figures
        assert re.search(r"\ncorolla_api_retries_total\{.*\} [1-9]", figures), "a loss has been noticed"
        watching.see("3 servers, complete")
        watching.stop()
        check_figures(next(one for one in world.servers if one.popen.poll() is None))
        stream: Any = world.client().chat.completions.create(
            model=BASE, messages=talk, temperature=0, max_tokens=40, stream=True
        )
        assert next(iter(stream)).id
        world.api.popen.send_signal(signal.SIGINT)  # what is under way is brought to its end
        found = "".join(chunk.choices[0].delta.content or "" for chunk in stream)
        assert found == world.text(world.greedy(world.prompt(talk), 40))
    assert world.api.popen.wait(30) == 0
    assert not world.api.ready_path.exists()


def conversations_while_a_server_is_killed(world: Deployed) -> None:
    """Eight at once, every other one streamed: in the middle of it the server is lost that does the most."""
    heard = 0

    def hear() -> None:
        nonlocal heard
        heard += 1
        if heard == 30:
            busiest = max((one for one in world.servers), key=computed)
            busiest.popen.send_signal(signal.SIGKILL)

    converse(world, 8, at_once=8, streamed=lambda number: number % 2 == 0, heard=hear, replied=lambda: None)
    assert heard > 60


class Watching(Process):
    """`corolla status --watch`."""

    def __init__(self, address: str, log: Path) -> None:
        with log.open("wb") as output:
            files = {"stdin": None, "stdout": output.fileno(), "stderr": output.fileno()}
            popen = warm().start("corolla", ["status", "--watch", "--peers", address], environment(), **files)
        super().__init__(popen, log, log)

    def see(self, words: str) -> None:
        """Wait until it has shown them."""
        deadline = time.monotonic() + 60
        while words not in self.log_path.read_text():
            assert self.popen.poll() is None, self.log_path.read_text()
            assert time.monotonic() < deadline, self.log_path.read_text()
            time.sleep(0.05)

    def stop(self) -> None:
        """Ctrl-C ends it without a word."""
        self.popen.send_signal(signal.SIGINT)
        assert self.popen.wait(30) == 0
        assert "Traceback" not in self.log_path.read_text()


def check_figures(server: Process) -> None:
    """What Prometheus reads of a server."""
    found = re.search(r"http://127\.0\.0\.1:\d+/metrics", server.log_path.read_text())
    assert found is not None
    text = urlopen(found[0]).read().decode()
    assert re.search(r'corolla_server_tokens_total\{kind="inference"\} [1-9]', text), text
    assert 'corolla_server_info{blocks="' in text
    for name in ("sessions", "cache_free_tokens", "requests_waiting", "draining"):
        assert f"\ncorolla_server_{name} " in text


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"port": 70000}, "--port"),
        ({"bundles": Path("/nowhere")}, "not a folder"),
        ({"at_once": 0}, "--at-once"),
        ({"sessions": -1}, "--sessions"),
    ],
    ids=str,
)
def test_what_is_wrong_is_said_at_once(options: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        ApiOptions(**options)


def test_other_machines_need_a_key() -> None:
    done = corolla("api", "--host", "0.0.0.0")
    assert done.returncode == 2
    assert "--api-key" in done.stderr
    assert "Traceback" not in done.stderr


def test_an_address_that_is_taken_is_said() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken, pytest.raises(UsageError, match="--port"):
        listening("127.0.0.1", taken.getsockname()[1])
    with pytest.raises(UsageError, match="--host"):
        listening("192.0.2.1", 0)
