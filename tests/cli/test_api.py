"""`corolla api` as people start it: real processes, a real socket, real kills."""

from __future__ import annotations

import re
import signal
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import pytest
import torch
from openai import OpenAI
from tests.api.world import write_bundle, write_model
from tests.e2e.processes import Process, Processes, corolla, environment, processes
from tests.e2e.warm import warm
from transformers import AutoModelForCausalLM, AutoTokenizer

from corolla.api.serving import listening
from corolla.cli.api import ApiOptions
from corolla.errors import UsageError
from corolla.models.checkpoints.checkpoint import open_checkpoint


@pytest.fixture
def started(tmp_path: Path) -> Iterator[Processes]:
    with processes(tmp_path) as found:
        yield found


def test_an_api_over_a_swarm_of_processes(started: Processes, tmp_path: Path) -> None:
    folder = write_model(tmp_path / "model")
    bundles = tmp_path / "bundles"
    bundles.mkdir()
    write_bundle(bundles / "poet", folder, open_checkpoint(str(folder)).identity)
    address, servers = started.swarm(folder, ["0:2", "2:4", "0:4"], "--dtype", "float32", "--metrics", "0")
    watching = Watching(address, tmp_path / "watch.log")
    started.started.append(watching)
    arguments = ("api", "--peers", address, "--port", "0", "--bundles", str(bundles), "--dtype", "float32")
    server = started.start("api", *arguments, str(folder)).wait_ready()
    local = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    talk = [{"role": "user", "content": "Tell me of the river, at length."}]
    text = tokenizer.apply_chat_template(talk, tokenize=False, add_generation_prompt=True)
    ids = torch.tensor([tokenizer(text, add_special_tokens=False).input_ids])
    said = local.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=40, do_sample=False)
    expected = tokenizer.decode(said[0, ids.shape[1] :], skip_special_tokens=True)
    with OpenAI(base_url=f"{server.about['url']}/v1", api_key="none", max_retries=0) as client:
        assert [one.id for one in client.models.list()] == ["model", "poet"]
        stream = client.chat.completions.create(
            model="model", messages=talk, temperature=0, max_tokens=40, stream=True
        )
        found = ""
        for number, chunk in enumerate(stream):
            found += chunk.choices[0].delta.content or ""
            if number == 3:
                servers[0].popen.send_signal(signal.SIGKILL)
        assert found == expected
        reply = client.chat.completions.create(model="poet", messages=talk, max_tokens=5)
        assert reply.choices[0].message.content is not None
        figures = urlopen(f"{server.about['url']}/metrics").read().decode()
        long = client.chat.completions.create(
            model="model", messages=talk, temperature=0, max_tokens=40, stream=True
        )
        first = next(iter(long))
        assert first.id
        stop(server)  # what is under way is brought to its end
        assert "".join(chunk.choices[0].delta.content or "" for chunk in long) == expected
    assert 'corolla_api_servers{state="serving"} ' in figures
    assert "corolla_api_retries_total " in figures
    watching.see("3 servers, complete")
    watching.stop()
    check_figures(servers[2])
    assert server.popen.wait(30) == 0
    assert not server.ready_path.exists()


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
    assert 'corolla_server_info{blocks="0:4"' in text
    for name in ("sessions", "cache_free_tokens", "requests_waiting", "draining"):
        assert f"\ncorolla_server_{name} " in text


def stop(server: Process) -> None:
    server.popen.send_signal(signal.SIGINT)


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
