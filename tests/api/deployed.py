"""`corolla api` as it is deployed: a process, over a swarm of server processes, with the local model beside it."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from urllib.request import urlopen

from tests.api.world import BASE, Served, local_of, write_model
from tests.e2e.processes import Process, Processes, processes

SPANS = ("0:2", "2:4")
TOKENS = re.compile(r'^corolla_server_tokens_total\{kind="inference"\} (\S+)', re.MULTILINE)


@dataclass
class Deployed(Served):
    """A running API, and the servers that it has."""

    api: Process
    servers: list[Process]

    def counted(self) -> int:
        """Rows × tokens that the server has computed which has computed the most."""
        return max(computed(server) for server in self.servers)


def computed(server: Process) -> int:
    """Rows × tokens of sessions that a server with `--metrics` has computed."""
    place = re.search(r"http://127\.0\.0\.1:\d+/metrics", server.log_path.read_text())
    assert place is not None
    found = TOKENS.search(urlopen(place[0]).read().decode())
    return 0 if found is None else int(float(found[1]))


@contextlib.contextmanager
def deployed(
    folder: Path, *, spans: tuple[str, ...] = SPANS, options: tuple[str, ...] = ()
) -> Iterator[Deployed]:
    """Everything is started in `folder`, and gone when the block ends; `options` are more of the API's."""
    model = write_model(folder / BASE)
    with processes(folder) as started:
        found = deploy(started, model, spans, *options)
        try:
            yield found
        finally:
            found.close()


def deploy(started: Processes, model: Path, spans: tuple[str, ...], *options: str) -> Deployed:
    """An API over a server for each of `spans`."""
    address, servers = started.swarm(model, spans, "--dtype", "float32", "--metrics", "0")
    kept = ("--conversations", str(started.folder / "conversations.sqlite3"))
    where = ("--peers", address, "--port", "0", "--dtype", "float32", *kept)
    api = started.start("api", "api", str(model), *where, *options).wait_ready()
    return Deployed(str(api.about["url"]), model, *local_of(model), api, servers)
