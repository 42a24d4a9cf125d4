"""The line to a real server, which can be cut, held, healed and damaged: a proxy on this machine.

A server that announces a link's address is reached through it by everybody. Invariant: nothing of a link is left when
the block around it ends, and what it does to the bytes it does at a count of them, never by the clock.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import Any

import psutil

CHUNK = 16 * 1024
ANYWHERE = ("to the server", "to the client")


class Link:
    """One server's line. All methods but `_…` may be called from any thread."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._target: int | None = None
        self._server: asyncio.Server | None = None
        self._open: set[asyncio.StreamWriter] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._flows = asyncio.Event()
        self._flows.set()
        self._armed: dict[
            str, tuple[int, Callable[[bytes], bytes | None]]
        ] = {}  # direction -> bytes left, what then
        self.carried = dict.fromkeys(ANYWHERE, 0)  # bytes
        self.port = self._wait(self._listen())

    def leads_to(self, daemon: psutil.Process) -> None:
        """The server is there: its daemon listens."""
        [self._target] = {
            one.laddr.port for one in daemon.net_connections("tcp") if one.status == psutil.CONN_LISTEN
        }

    # --- what happens to it -----------------------------------------------------------------------------

    def cut(self) -> None:
        """Every connection over it ends, as when a router loses them; new ones are possible."""
        self._call(self._cut)

    def hold(self) -> None:
        """Nothing passes any more, nothing ends: new connections open and stay silent."""
        self._call(self._flows.clear)

    def heal(self) -> None:
        """It carries again, also what was held."""
        self._call(self._flows.set)

    def after(self, nbytes: int, what: Callable[[], object], *, direction: str) -> None:
        """Call `what()` on a thread when so many more bytes have passed in this direction."""

        def hit(data: bytes) -> bytes:
            threading.Thread(target=what).start()
            return data

        self._call(self._arm, direction, nbytes, hit)

    def stall_after(self, nbytes: int, *, direction: str) -> None:
        """Stall when so many more bytes have passed in this direction, which may be in the middle of a tensor."""

        def hit(data: bytes) -> None:
            self._flows.clear()

        self._call(self._arm, direction, nbytes, hit)

    def damage_after(self, nbytes: int, *, direction: str) -> None:
        """Change one bit when so many more bytes have passed in this direction."""
        self._call(self._arm, direction, nbytes, lambda data: bytes([data[0] ^ 1]) + data[1:])

    def is_armed(self) -> bool:
        """Whether what was armed has not happened yet."""
        return bool(self._armed)

    def disarm(self) -> None:
        """Nothing happens any more."""
        self._call(self._armed.clear)

    def end(self) -> None:
        """Close everything."""
        self._wait(self._end())

    # --- on the loop --------------------------------------------------------------------------------------

    def _wait(self, work: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(20)

    def _call(self, what: Callable[..., object], *arguments: Any) -> None:
        async def call() -> None:
            what(*arguments)

        self._wait(call())

    def _arm(self, direction: str, nbytes: int, what: Callable[[bytes], bytes | None]) -> None:
        assert direction in ANYWHERE
        self._armed[direction] = (nbytes, what)

    async def _listen(self) -> int:
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", 0)
        port: int = self._server.sockets[0].getsockname()[1]
        return port

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        self._open.add(writer)
        try:
            await self._flows.wait()
            if self._target is None:
                return
            others_reader, others_writer = await asyncio.open_connection("127.0.0.1", self._target)
            self._open.add(others_writer)
            both = [
                asyncio.create_task(self._carry(reader, others_writer, ANYWHERE[0])),
                asyncio.create_task(self._carry(others_reader, writer, ANYWHERE[1])),
            ]
            try:
                await asyncio.wait(both, return_when=asyncio.FIRST_COMPLETED)
            finally:
                for one in both:
                    one.cancel()
                await asyncio.wait(both)
                _abort(others_writer)
                self._open.discard(others_writer)
        except (OSError, asyncio.CancelledError):
            return  # asyncio wants to hear of neither
        finally:
            _abort(writer)
            self._open.discard(writer)
            self._tasks.discard(task)

    async def _carry(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, direction: str
    ) -> None:
        with contextlib.suppress(OSError):
            while data := await reader.read(CHUNK):
                await self._flows.wait()
                passed = self._changed(data, direction)
                if passed is None:  # stalled: half of what came goes on
                    writer.write(data[: len(data) // 2])
                    await self._flows.wait()
                    passed = data[len(data) // 2 :]
                self.carried[direction] += len(data)
                writer.write(passed)
                await writer.drain()

    def _changed(self, data: bytes, direction: str) -> bytes | None:
        armed = self._armed.get(direction)
        if armed is None:
            return data
        left, what = armed
        if left > len(data):
            self._armed[direction] = (left - len(data), what)
            return data
        del self._armed[direction]
        return what(data)

    def _cut(self) -> None:
        for writer in self._open:
            _abort(writer)

    async def _end(self) -> None:
        assert self._server is not None
        self._server.close()
        for task in self._tasks:
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks)


def _abort(writer: asyncio.StreamWriter) -> None:
    writer.transport.abort()


@contextlib.contextmanager
def links() -> Iterator[Callable[[], Link]]:
    """Makes links, all on one thread, that end with the block."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, name="links", daemon=True)
    thread.start()
    made: list[Link] = []

    def make() -> Link:
        made.append(Link(loop))
        return made[-1]

    try:
        yield make
    finally:
        for link in made:
            link.end()
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()
