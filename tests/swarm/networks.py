"""One face for both networks, so that one suite runs on either, faults included."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
from abc import ABC, abstractmethod
from asyncio.subprocess import PIPE, Process
from pathlib import Path

from tests.swarm.behaviours import serve_all

from corolla.swarm.transport.base import Transport
from corolla.swarm.transport.memory import MemoryNetwork

ROOT = Path(__file__).parents[2]


class Network(ABC):
    """A local peer, and a remote one that can be hurt."""

    local: Transport
    remote_id: str

    @abstractmethod
    async def start(self) -> None: ...

    @abstractmethod
    async def kill(self) -> None:
        """The remote peer dies as by SIGKILL."""

    @abstractmethod
    def stop(self) -> None:
        """The remote peer freezes as by SIGSTOP."""

    @abstractmethod
    def resume(self) -> None: ...

    @abstractmethod
    async def leave(self) -> None:
        """The remote peer closes its transport in order."""

    @abstractmethod
    async def close(self) -> None: ...


class InMemory(Network):
    async def start(self) -> None:
        self.network = MemoryNetwork()
        self.local = self.network.transport()
        self.remote = self.network.transport()
        self.remote_id = self.remote.peer_id
        await serve_all(self.remote)

    async def kill(self) -> None:
        self.network.kill(self.remote_id)

    def stop(self) -> None:
        self.network.stop(self.remote_id)

    def resume(self) -> None:
        self.network.resume(self.remote_id)

    async def leave(self) -> None:
        await self.remote.close()

    async def close(self) -> None:
        await self.remote.close()
        await self.local.close()


class OverLibp2p(Network):
    """Both peers in this process: quick to start, but not to be hurt."""

    async def start(self) -> None:
        from corolla.swarm.transport.libp2p import Libp2pTransport

        self.local = await Libp2pTransport.create()
        self.remote = await Libp2pTransport.create(initial_peers=await self.local.addresses())
        self.remote_id = self.remote.peer_id
        await serve_all(self.remote)

    async def kill(self) -> None:
        raise NotImplementedError

    def stop(self) -> None:
        raise NotImplementedError

    def resume(self) -> None:
        raise NotImplementedError

    async def leave(self) -> None:
        await self.remote.close()

    async def close(self) -> None:
        await self.remote.close()
        await self.local.close()


class AcrossProcesses(Network):
    """The remote peer is a real process, and so are its faults."""

    process: Process

    async def start(self) -> None:
        from corolla.swarm.transport.libp2p import Libp2pTransport

        self.local = await Libp2pTransport.create()
        self.process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            "tests.swarm.peer_process",
            *(await self.local.addresses()),
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": str(ROOT / "src")},
            stdin=PIPE,
            stdout=PIPE,
        )
        assert self.process.stdout is not None
        self.remote_id = json.loads(await self.process.stdout.readline())["peer_id"]

    async def kill(self) -> None:
        self.process.kill()
        await self.process.wait()

    def stop(self) -> None:
        self.process.send_signal(signal.SIGSTOP)

    def resume(self) -> None:
        self.process.send_signal(signal.SIGCONT)

    async def leave(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        await self.process.wait()

    async def close(self) -> None:
        if self.process.returncode is None:
            self.resume()
            await self.leave()
        await self.local.close()


NETWORKS = {"memory": InMemory, "libp2p": OverLibp2p}
FAULTY_NETWORKS = {"memory": InMemory, "libp2p": AcrossProcesses}
