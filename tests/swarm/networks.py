"""One face for both networks, so that one suite runs on either, faults included."""

from __future__ import annotations

import asyncio
import json
import signal
from abc import ABC, abstractmethod

from tests.e2e.processes import Talking
from tests.swarm.behaviours import serve_all

from corolla.swarm.transport.base import Transport
from corolla.swarm.transport.memory import MemoryNetwork


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

    remote: Talking

    async def start(self) -> None:
        from corolla.swarm.transport.libp2p import Libp2pTransport

        self.local = await Libp2pTransport.create()
        addresses = await self.local.addresses()
        self.remote = await asyncio.to_thread(Talking, *addresses, module="tests.swarm.peer_process")
        said = await asyncio.to_thread(self.remote.until, "{")
        self.remote_id = json.loads(said.splitlines()[-1])["peer_id"]

    async def kill(self) -> None:
        self.remote.popen.kill()
        await asyncio.to_thread(self.remote.popen.wait)

    def stop(self) -> None:
        self.remote.popen.send_signal(signal.SIGSTOP)

    def resume(self) -> None:
        self.remote.popen.send_signal(signal.SIGCONT)

    async def leave(self) -> None:
        self.remote.hang_up()
        await asyncio.to_thread(self.remote.popen.wait)

    async def close(self) -> None:
        if self.remote.popen.poll() is None:
            self.resume()
            await self.leave()
        self.remote.close()
        await self.local.close()


NETWORKS = {"memory": InMemory, "libp2p": OverLibp2p}
FAULTY_NETWORKS = {"memory": InMemory, "libp2p": AcrossProcesses}
