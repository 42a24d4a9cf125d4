"""The HTTP server around the application: uvicorn, with an end to connections that say nothing.

Invariant: when `serve` returns, every request that was begun has had its answer, or its client was told that there
will be none, and nothing goes on. Whoever is not answered any more is cut off, which ends a request as if its client
had gone: that is the one way in which requests end before their time.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import h11
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from corolla.api.failures import wrong
from corolla.errors import UsageError

HEADER_SECONDS = 30.0  # for a new connection's first request
SEND_SECONDS = 60.0  # for a client to read something of its answer
DRAIN_SECONDS = 60.0  # for requests that are under way when the server is told to end
LET_GO_SECONDS = 10.0  # for what goes on when nobody is answered any more
LOOK_SECONDS = 0.05
BACKLOG = 2048


class PatientProtocol(H11Protocol):
    """As uvicorn's, but that a connection which asks for nothing is closed after a while, as is one whose client reads
    nothing, and that what is no HTTP is refused in the form of all refusals."""

    def __init__(self, *args: Any, send_seconds: float = SEND_SECONDS, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._send_seconds = send_seconds
        self._unread: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        asyncio.get_running_loop().call_later(HEADER_SECONDS, self._close_if_silent)

    def connection_lost(self, exc: Exception | None) -> None:
        self._is_read()
        super().connection_lost(exc)

    def pause_writing(self) -> None:
        super().pause_writing()
        self._is_read()
        self._unread = asyncio.get_running_loop().call_later(self._send_seconds, self.transport.abort)

    def resume_writing(self) -> None:
        self._is_read()
        super().resume_writing()

    def _is_read(self) -> None:
        if self._unread is not None:
            self._unread.cancel()
            self._unread = None

    def _close_if_silent(self) -> None:
        silent = getattr(self, "cycle", None) is None
        if silent and not self.transport.is_closing():
            self.transport.close()

    def send_400_response(self, msg: str) -> None:
        """Refuse what cannot be read as a request."""
        content = json.dumps(wrong("This is no HTTP request that can be read.").body()).encode()
        headers = [
            (b"content-type", b"application/json"),
            (b"content-length", str(len(content)).encode()),
            (b"connection", b"close"),
        ]
        for event in (
            h11.Response(status_code=400, headers=headers),
            h11.Data(data=content),
            h11.EndOfMessage(),
        ):
            self.transport.write(self.conn.send(event) or b"")
        self.transport.close()


class _Server(uvicorn.Server):
    """Leaves signals to others, and says when it is there."""

    def __init__(self, config: uvicorn.Config, ready: Callable[[], None]) -> None:
        super().__init__(config)
        self._ready = ready

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self._ready()


def listening(host: str, port: int) -> socket.socket:
    """A socket at that address; port 0 for one that is free. Raises `UsageError`."""
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        family, _, _, _, address = found[0]
        made = socket.create_server(address[:2], family=family, backlog=BACKLOG)
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or "it is no port"
        raise UsageError(
            f"Nothing can be served at {host}, port {port} ({reason}): give another --host or --port."
        ) from error
    made.setblocking(False)
    return made


def url_of(listener: socket.socket) -> str:
    """What to point a client at."""
    host, port = listener.getsockname()[:2]
    shown = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(host, f"[{host}]" if ":" in host else host)
    return f"http://{shown}:{port}"


async def serve(
    app: Any,
    listener: socket.socket,
    stop: asyncio.Event,
    *,
    ready: Callable[[], None] = lambda: None,
    stopping: Callable[[], None] = lambda: None,
    send_seconds: float = SEND_SECONDS,
) -> None:
    """Serve until `stop` is set, and then what is under way; `stopping` is called when nothing more is begun.

    A client that reads nothing of its answer for `send_seconds` is cut off, and when this is cancelled all are.
    """
    config = uvicorn.Config(
        app,
        http=partial(PatientProtocol, send_seconds=send_seconds),  # type: ignore[arg-type]
        ws="none",
        lifespan="on",
        log_config=None,
        log_level="error",  # what strangers send is no news: their connections' answers say it
        access_log=False,
        server_header=False,
        backlog=BACKLOG,
    )
    server = _Server(config, ready)
    serving = asyncio.ensure_future(server.serve(sockets=[listener]))
    ending = asyncio.ensure_future(stop.wait())
    try:
        await asyncio.wait([serving, ending], return_when=asyncio.FIRST_COMPLETED)
        stopping()
        server.should_exit = True
        await asyncio.wait([serving], timeout=DRAIN_SECONDS)
    finally:
        ending.cancel()
        await _let_go(server, serving)


async def _let_go(server: uvicorn.Server, serving: asyncio.Task[None]) -> None:
    """Cut off all clients that are still there, and wait for the end."""
    server.should_exit = True
    until = asyncio.get_running_loop().time() + LET_GO_SECONDS
    while not serving.done():
        for connection in list(server.server_state.connections):
            connection.transport.abort()
        if asyncio.get_running_loop().time() > until:
            serving.cancel()
        await asyncio.wait([serving], timeout=LOOK_SECONDS)
    if not serving.cancelled():
        serving.result()
