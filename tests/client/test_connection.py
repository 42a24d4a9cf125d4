"""A connection's end, whichever thread asks for it."""

from __future__ import annotations

import threading

import pytest

from corolla.client.connection import SwarmConnection
from corolla.errors import UsageError
from corolla.swarm.directory.directory_memory import Board, MemoryDirectory
from corolla.swarm.loop import EventLoopThread
from corolla.swarm.node import Node
from corolla.swarm.transport.memory import MemoryNetwork

SOON = 20.0


def connected() -> SwarmConnection:
    """A client of an empty swarm, on a loop of its own."""
    loop = EventLoopThread()

    async def node() -> Node:
        return Node(MemoryNetwork().transport(), MemoryDirectory(Board()))

    return SwarmConnection(loop, loop.run(node()), model="m", model_name="m", num_blocks=1)


def test_a_finalizer_may_run_on_the_loop_s_own_thread() -> None:
    """Where the collector finds a model that nobody closed is not ours to say."""
    connection = connected()

    async def collected() -> None:
        connection.close()

    connection.run(collected())
    [closing] = [thread for thread in threading.enumerate() if thread.name == "corolla-close"] or [None]
    if closing is not None:
        closing.join(SOON)
    assert not connection.is_open
    with pytest.raises(UsageError, match="closed"):
        connection.check_complete()
    connection.close()


def test_a_finalizer_may_run_while_work_is_handed_over() -> None:
    """On the same thread, in the middle of it."""
    connection, ran = connected(), threading.Event()

    async def work() -> None:
        ran.set()

    def hand_over() -> None:
        with connection._loop._lock:
            connection.run_soon(work())

    thread = threading.Thread(target=hand_over, daemon=True)
    thread.start()
    assert ran.wait(SOON)
    thread.join(SOON)
    connection.close()
