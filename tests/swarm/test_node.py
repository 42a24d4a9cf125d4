"""A peer's life as a process: joining, wrong addresses, identities, signals, what it leaves behind."""

from __future__ import annotations

import asyncio
import fcntl
import logging
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import psutil
import pytest
from tests.swarm.directory.test_directory import record

from corolla.errors import SwarmUnavailable, UsageError
from corolla.swarm.directory.addresses import peer_of
from corolla.swarm.node import Node
from corolla.swarm.transport.runtime_dir import RuntimeDir, remove_abandoned

ROOT = Path(__file__).parents[2]
DEAD_PEER = "/ip4/127.0.0.1/tcp/1/p2p/12D3KooWHHcuvioMQumpjayJRYA6bZce9ic3yadLDrZRCncNKGZq"


def folders() -> set[str]:
    return {path.name for path in Path(tempfile.gettempdir()).glob(f"corolla-{os.getpid()}-*")}


async def test_a_wrong_join_address_is_one_sentence() -> None:
    before = folders()
    with pytest.raises(SwarmUnavailable) as error:
        await Node.create(initial_peers=[DEAD_PEER])
    assert DEAD_PEER in str(error.value)
    assert "\n" not in str(error.value)
    with pytest.raises(UsageError, match="'junk' is not a join address"):
        await Node.create(initial_peers=["junk"])
    assert folders() == before


async def test_a_start_that_is_cut_off_lets_go_of_its_daemon() -> None:
    await (await Node.create()).close()  # whatever is only started once has been
    before, children = folders(), set(psutil.Process().children())
    starting = asyncio.create_task(Node.create())
    async with asyncio.timeout(20):
        while not list(Path(tempfile.gettempdir()).glob(f"corolla-{os.getpid()}-*/p2pd-*.sock")):
            await asyncio.sleep(0)
    starting.cancel()
    await asyncio.wait([starting])
    assert starting.cancelled()
    assert set(psutil.Process().children()) <= children
    assert folders() == before


async def test_one_of_several_join_addresses_is_enough() -> None:
    first = await Node.create()
    second = await Node.create(initial_peers=[DEAD_PEER, *(await first.join_addresses())])
    announced = record(first.peer_id)
    await first.directory.announce(announced, 60.0)
    async with asyncio.timeout(20):
        while await second.directory.servers(announced.model) != [announced]:
            await asyncio.sleep(0)
    await second.close()
    await first.close()


async def test_another_peer_s_port_is_not_shared() -> None:
    first = await Node.create()
    port = (await first.join_addresses())[0].split("/")[4]
    with pytest.raises(UsageError, match=f"127.0.0.1:{port}"):
        await Node.create(listen=[f"127.0.0.1:{port}"])
    await first.close()


async def test_an_identity_is_kept(tmp_path: Path) -> None:
    identity = tmp_path / "identity"
    first = await Node.create(identity=identity)
    assert identity.stat().st_mode & 0o777 == 0o600
    again_while_used = Node.create(identity=identity, initial_peers=await first.join_addresses())
    with pytest.raises(UsageError, match="identity file"):
        await again_while_used
    await first.close()
    second = await Node.create(identity=identity)
    assert second.peer_id == first.peer_id
    assert all(peer_of(address) == first.peer_id for address in await second.join_addresses())
    await second.close()


async def test_a_file_that_is_no_identity_is_left_alone(tmp_path: Path) -> None:
    wrong = tmp_path / "notes.txt"
    wrong.write_text("not a key")
    with pytest.raises(UsageError, match=r"notes\.txt"):
        await Node.create(identity=wrong)
    assert wrong.read_text() == "not a key"
    with pytest.raises(UsageError, match="No such file"):
        await Node.create(identity=tmp_path / "missing" / "identity")


async def test_closing_leaves_nothing() -> None:
    before, children = folders(), psutil.Process().children()
    node = await Node.create()
    assert len(folders() - before) == 1
    await node.close()
    await node.close()
    assert folders() == before
    assert set(psutil.Process().children()) <= set(children)


PEER = """
import asyncio, sys
from corolla.swarm.node import Node

async def main():
    node = await Node.create(initial_peers=sys.argv[1:])
    print((await node.join_addresses())[0], flush=True)
    try:
        await asyncio.Event().wait()
    finally:
        # The daemon must still be there: this is when a server takes its announcement back.
        print(len(await node.directory.all_servers()), await node.transport.addresses() != [], flush=True)
        await node.close()

try:
    asyncio.run(main())
except KeyboardInterrupt:
    print("ended", flush=True)
"""


async def test_hivemind_talks_to_our_logger_only(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    seen: list[tuple[str, str]] = []
    handler = logging.Handler()  # pytest's own listens to loggers that do not propagate as well
    handler.emit = lambda record: seen.append((record.name, record.levelname))  # type: ignore[method-assign]
    node = await Node.create()
    logging.getLogger().addHandler(handler)
    try:
        logging.getLogger("hivemind.p2p").error("boom")
    finally:
        logging.getLogger().removeHandler(handler)
        await node.close()
    assert seen == [("corolla.swarm.transport.libp2p", "DEBUG")]
    assert logging.getLevelName(logging.WARNING) == "WARNING"


def start_peer() -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", PEER],
        env={**os.environ, "PYTHONPATH": str(ROOT / "src")},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def test_ctrl_c_leaves_time_to_say_goodbye_and_the_terminal_clean() -> None:
    """As in a terminal, SIGINT goes to the whole process group, daemon included."""
    peer = start_peer()
    assert peer.stdout is not None
    assert "/p2p/" in peer.stdout.readline()
    daemons = psutil.Process(peer.pid).children(recursive=True)
    assert [os.getpgid(daemon.pid) == peer.pid for daemon in daemons] == [False]
    os.killpg(peer.pid, signal.SIGINT)
    out, err = peer.communicate(timeout=60)
    assert out == "0 True\nended\n"
    assert err == ""


def test_a_killed_peer_s_daemon_ends_and_its_folder_is_removed_by_the_next() -> None:
    peer = start_peer()
    assert peer.stdout is not None
    assert peer.stdout.readline()
    daemons = psutil.Process(peer.pid).children(recursive=True)
    assert daemons
    left = list(Path(tempfile.gettempdir()).glob(f"corolla-{peer.pid}-*"))
    assert len(left) == 1
    remove_abandoned()
    assert left[0].exists(), "a living peer's folder was removed"
    peer.kill()
    peer.communicate(timeout=60)
    _, alive = psutil.wait_procs(daemons, timeout=20)
    assert not alive
    remove_abandoned()
    assert not left[0].exists()


def test_only_folders_of_the_dead_are_removed() -> None:
    base = Path(tempfile.gettempdir())
    dead = subprocess.Popen(["true"])
    dead.wait()
    ours = RuntimeDir()
    assert ours.path.stat().st_mode & 0o777 == 0o700
    # Held by a process of another container, whose pid means nothing here: its lock speaks for it.
    elsewhere = _folder(base / f"corolla-{dead.pid}-elsewhere")
    lock = os.open(elsewhere / "lock", os.O_RDWR)
    fcntl.flock(lock, fcntl.LOCK_EX)
    # Just made, and not locked yet: its pid speaks for it.
    young = _folder(base / f"corolla-{os.getpid()}-young")
    link = base / f"corolla-{dead.pid}-link"
    link.symlink_to(young)
    unrelated = _folder(base / "corolla-notes-x")
    abandoned = _folder(base / f"corolla-{dead.pid}-abandoned")
    remove_abandoned()
    assert [path.exists() for path in (ours.path, elsewhere, young, link, unrelated)] == [True] * 5
    assert not abandoned.exists()
    os.close(lock)
    remove_abandoned()
    assert not elsewhere.exists()
    link.unlink()
    shutil.rmtree(young)
    shutil.rmtree(unrelated)
    ours.close()
    ours.close()
    assert not ours.path.exists()


def _folder(path: Path) -> Path:
    path.mkdir()
    (path / "lock").touch()
    return path


def test_a_long_temporary_path_does_not_break_the_sockets(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    deep = tmp_path / ("x" * 80)
    deep.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(deep))
    asyncio.run(_create_and_close())


async def _create_and_close() -> None:
    node = await Node.create()
    await node.close()


def test_the_engine_does_not_decide_how_the_user_s_tensors_are_shared() -> None:
    """hivemind would, on import; a model that is then shared starts a process that outlives it."""
    code = (
        "import torch.multiprocessing as shared; before = shared.get_sharing_strategy(); "
        "import corolla.swarm.transport.libp2p; assert shared.get_sharing_strategy() == before"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
