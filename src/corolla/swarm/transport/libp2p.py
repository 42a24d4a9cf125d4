"""Streams between peers over libp2p, by hivemind's daemon `p2pd`. Importing this module takes seconds.

Invariant: hivemind is known here and in `swarm/directory/directory_dht.py` only.
The daemon and the folder with its sockets belong to the transport and end with it; what daemon and library log
reaches our own logger at debug level and nobody's terminal.
"""

from __future__ import annotations

import asyncio
import json
import logging
import sys
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hivemind.p2p import P2P, P2PHandlerError, PeerID
from hivemind.p2p.p2p_daemon_bindings.control import P2PDaemonError
from hivemind.p2p.p2p_daemon_bindings.utils import read_pbmsg_safe, write_pbmsg
from hivemind.proto import dht_pb2, p2pd_pb2
from hivemind.utils.logging import use_hivemind_log_handler
from hivemind.utils.multiaddr import Multiaddr

from corolla.errors import (
    CorollaError,
    PeerDisconnected,
    PeerUnreachable,
    RemoteError,
    SwarmUnavailable,
    UsageError,
)
from corolla.swarm.directory.addresses import check_ports_free, is_loopback, join_multiaddr, listen_multiaddr
from corolla.swarm.transport.base import Buffer, Stream, StreamHandler, Transport
from corolla.swarm.transport.identity import Identity, prepare_identity
from corolla.swarm.transport.runtime_dir import RuntimeDir
from corolla.text import get_logger, one_line

logger = get_logger(__name__)

DEFAULT_LISTEN = ("127.0.0.1:0",)
OPEN_SECONDS = 10.0  # a dial into the void takes libp2p minutes
CLOSE_SECONDS = 1.0  # how long closing waits for a peer to take what was already written
READ_BUFFER = 512 * 1024
MAX_CALL_BYTES = 8192  # of a call's argument: the DHT's name some keys
MAX_NEAREST = 20  # peers that one answer of the DHT may name

_IN_OWN_SESSION = "import os, sys; os.setsid(); os.execv(sys.argv[1], sys.argv[1:])"


class _ToOurLogger(logging.Handler):
    """Passes hivemind's records on at debug level: none of them is a user's business."""

    def emit(self, record: logging.LogRecord) -> None:
        logger.debug("%s: %s", record.name, record.getMessage(), exc_info=record.exc_info)


def _tame_hivemind_logging() -> None:
    # On import, hivemind installs a handler that prints to stderr and renames the level WARNING.
    use_hivemind_log_handler("nowhere")
    logging.addLevelName(logging.WARNING, "WARNING")
    hivemind_logger = logging.getLogger("hivemind")
    hivemind_logger.propagate = False
    hivemind_logger.setLevel(logging.INFO)
    hivemind_logger.addHandler(_ToOurLogger())


_tame_hivemind_logging()


class NotAllowedHere(Exception):
    """What a remote call by a peer that may not make it fails with; the caller is sent its name."""


async def _nowhere(_peer_id: str) -> bool:
    return False


@dataclass
class Calls:
    """What the transport's owner decides about remote calls (the DHT's)."""

    # Whether a call with this argument, by this peer, is taken.
    takes: Callable[[str, Any], bool] = lambda _peer_id, _request: True
    # Presents us to a peer that refused a call; true when it lets us in now.
    introduce: Callable[[str], Awaitable[bool]] = _nowhere


class SmallCall:
    """Reads a call's argument as hivemind does, of the kind that is given, unless it is large."""

    def __init__(self, kind: Any) -> None:
        self._kind = kind

    def FromString(self, data: bytes) -> Any:
        """The argument. Raises `ValueError`, before anything is parsed."""
        if len(data) > MAX_CALL_BYTES:
            raise ValueError("A call's argument is too large.")
        return self._kind.FromString(data)


def _daemon_class(runtime_dir: Path, made: list[Any], calls: Calls) -> type[Any]:
    """A `P2P` whose sockets lie in `runtime_dir`, whose daemon is left alone by Ctrl-C, with checked calls.

    Its objects are noted in `made`: where `create` fails, hivemind leaves them to the garbage collector.
    """

    class Daemon(P2P):  # type: ignore[misc]
        _UNIX_SOCKET_PREFIX = f"/unix{runtime_dir}/"

        def __init__(self) -> None:
            super().__init__()
            made.append(self)

        @staticmethod
        def _make_process_args(*args: Any, **kwargs: Any) -> list[str]:
            if not kwargs["relay"]:
                # The daemon relays for whoever asks, by its own defaults, and no option takes that back; a file does.
                config = runtime_dir / "daemon.json"
                config.write_text(json.dumps({"Relay": {"Enabled": False}}))
                kwargs["f"] = str(config)
            # A terminal's Ctrl-C goes to its whole process group, and the daemon would obey it at once, before
            # its peer could say goodbye. A session of its own keeps it out of that.
            command: list[str] = P2P._make_process_args(*args, **kwargs)
            return [sys.executable, "-ISc", _IN_OWN_SESSION, *command]

        async def add_protobuf_handler(self, name: str, handler: Any, kind: Any, **kwargs: Any) -> None:
            async def checked(request: Any, context: Any) -> Any:
                if not calls.takes(context.remote_id.to_base58(), request):
                    raise NotAllowedHere
                return await handler(request, context)

            await super().add_protobuf_handler(name, checked, SmallCall(kind), **kwargs)

        async def call_protobuf_handler(self, peer_id: Any, *args: Any) -> Any:
            try:
                return only_who_is_near(await super().call_protobuf_handler(peer_id, *args))
            except P2PHandlerError as error:
                stranger = NotAllowedHere.__name__ in str(error)
                if not stranger or not await calls.introduce(peer_id.to_base58()):
                    raise
            return only_who_is_near(await super().call_protobuf_handler(peer_id, *args))

    return Daemon


def only_who_is_near(answer: Any) -> Any:
    """A peer's answer to a call, as far as it is wanted: who is near a key. What it says is stored there would be
    decoded by hivemind, whatever it is."""
    if isinstance(answer, dht_pb2.FindResponse):
        for result in answer.results:
            result.type, result.value = dht_pb2.NOT_FOUND, b""
            del result.nearest_node_ids[MAX_NEAREST:], result.nearest_peer_ids[MAX_NEAREST:]
    return answer


class Libp2pStream(Stream):
    """A stream, as the daemon hands it over: a local socket."""

    def __init__(self, peer_id: str, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.peer_id = peer_id
        self._reader = reader
        self._writer = writer

    async def write(self, buffers: Sequence[Buffer]) -> None:
        if self._writer.is_closing():
            raise self._ended()
        try:
            # Joined, since a call to the system for each would cost more than copying small ones.
            self._writer.writelines(buffers)
            await self._writer.drain()
        except OSError as error:
            raise self._ended() from error

    async def read(self, size: int) -> bytearray:
        if self._writer.is_closing():
            raise self._ended()
        try:
            return bytearray(await self._reader.readexactly(size))
        except (OSError, asyncio.IncompleteReadError) as error:
            raise self._ended() from error

    async def close(self) -> None:
        self._writer.close()
        try:
            # Shielded, since asyncio's waiter is one for all: cancelled by this limit, it would tell whoever
            # closes the stream again that they are cancelled.
            async with asyncio.timeout(CLOSE_SECONDS):
                await asyncio.shield(self._writer.wait_closed())
        except (OSError, TimeoutError):
            pass
        finally:
            self._writer.transport.abort()
            # Whoever reads here at this moment learns of it too.
            self._reader.feed_eof()

    def _ended(self) -> PeerDisconnected:
        return PeerDisconnected(f"The stream to peer {self.peer_id} has ended.", peer_id=self.peer_id)


class Libp2pTransport(Transport):
    """One peer, with a daemon of its own. Made by `create`."""

    def __init__(self, p2p: Any, runtime_dir: RuntimeDir, calls: Calls, identity: Identity | None) -> None:
        self.p2p = p2p
        self.calls = calls
        self.identity = identity  # None: of a client that nobody knows, its daemon's secret
        self.peer_id: str = p2p.peer_id.to_base58()
        self._control = p2p._daemon_listen_maddr["unix"]
        self._runtime_dir = runtime_dir
        self._server: asyncio.Server | None = None
        self._handlers: dict[str, StreamHandler] = {}
        self._tasks: set[asyncio.Task[Any]] = set()
        self._closed = False

    @classmethod
    async def create(
        cls,
        *,
        initial_peers: Sequence[str] = (),
        listen: Sequence[str] | None = None,
        announce: Sequence[str] | None = None,
        identity: Path | None = None,
        client_only: bool = False,
        relays: bool = True,
    ) -> Libp2pTransport:
        """Start a daemon and connect it; the arguments are `Node.create`'s, and so are the errors.

        With `relays` it passes traffic on for peers that cannot be reached otherwise, strangers included, and
        can be reached through such peers.
        """
        peers = [join_multiaddr(address) for address in initial_peers]
        hosts = [listen_multiaddr(address) for address in (listen or DEFAULT_LISTEN)]
        announced = [listen_multiaddr(address) for address in announce] if announce else None
        check_ports_free(hosts)
        runtime_dir = RuntimeDir()
        made: list[Any] = []
        calls = Calls()
        try:
            if identity is None and not client_only:
                identity = runtime_dir.path / "identity"  # for this run; a server signs its records
            known = None if identity is None else await asyncio.to_thread(prepare_identity, identity)
            p2p = await _daemon_class(runtime_dir.path, made, calls).create(
                initial_peers=peers or None,
                host_maddrs=hosts,
                announce_maddrs=announced,
                identity_path=None if identity is None else str(identity),
                dht_mode="client" if client_only else "server",
                nat_port_map=not is_loopback(hosts),
                use_relay=relays,
                # Two commands of one user may be clients of one identity at the same time.
                check_if_identity_free=not client_only,
            )
        except BaseException as error:
            await _end(made)
            runtime_dir.close()
            if isinstance(error, P2PDaemonError):
                raise _explain(error, initial_peers, hosts) from error
            raise
        return cls(p2p, runtime_dir, calls, known)

    async def addresses(self) -> list[str]:
        return [str(address) for address in await self.p2p.get_visible_maddrs(latest=True)]

    async def open(self, peer_id: str, protocol: str) -> Stream:
        if self._closed:
            raise PeerUnreachable("This peer has left the network.", peer_id=peer_id)
        try:
            peer = PeerID.from_base58(peer_id).to_bytes()
        except ValueError as error:
            raise PeerUnreachable(f"{peer_id!r} is not a peer id.", peer_id=peer_id) from error
        opening = p2pd_pb2.StreamOpenRequest(peer=peer, proto=[protocol])
        request = p2pd_pb2.Request(type=p2pd_pb2.Request.STREAM_OPEN, streamOpen=opening)
        try:
            async with asyncio.timeout(OPEN_SECONDS):
                reader, writer = await self._ask_daemon(request)
        except (P2PDaemonError, TimeoutError) as error:
            logger.debug("No stream to %s: %s", peer_id, error)
            raise PeerUnreachable(f"Peer {peer_id} cannot be reached.", peer_id=peer_id) from error
        return Libp2pStream(peer_id, reader, writer)

    async def serve(self, protocol: str, handler: StreamHandler) -> None:
        path = self._runtime_dir.path / "streams.sock"
        if self._server is None:
            self._server = await asyncio.start_unix_server(self._accept, path, limit=READ_BUFFER)
        self._handlers[protocol] = handler
        address = Multiaddr(f"/unix{path}").to_bytes()
        serving = p2pd_pb2.StreamHandlerRequest(addr=address, proto=[protocol], balanced=False)
        request = p2pd_pb2.Request(type=p2pd_pb2.Request.STREAM_HANDLER, streamHandler=serving)
        _, writer = await self._ask_daemon(request)
        writer.close()
        await writer.wait_closed()

    async def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        try:
            await self._end_handlers()
            await self.p2p.shutdown()
            # A stream that came in meanwhile takes the loop four turns (poll, accept, connect, start) to become
            # a task of ours. Were the server closed in between, asyncio would lose the socket.
            for _ in range(5):
                await asyncio.sleep(0)
            await self._end_handlers()
            if self._server is not None:
                self._server.close()
        finally:
            self._runtime_dir.close()

    # hivemind's own functions for the two things below leave a socket open when they fail.

    async def _ask_daemon(self, request: Any) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """A connection to the daemon on which it has agreed to `request`. Raises `P2PDaemonError`."""
        try:
            reader, writer = await asyncio.open_unix_connection(self._control, limit=READ_BUFFER)
        except OSError as error:
            raise SwarmUnavailable("The network process of this peer has ended; start it again.") from error
        try:
            await write_pbmsg(writer, request)
            response = p2pd_pb2.Response()
            await read_pbmsg_safe(reader, response)
            if response.type == p2pd_pb2.Response.ERROR:
                raise P2PDaemonError(response.error.msg)
        except BaseException as error:
            writer.transport.abort()
            if isinstance(error, OSError | EOFError):
                raise P2PDaemonError("The daemon hung up.") from error
            raise
        return reader, writer

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Run the handler for a stream that the daemon hands over."""
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        stream = Libp2pStream("", reader, writer)
        try:
            info = p2pd_pb2.StreamInfo()
            await read_pbmsg_safe(reader, info)
            stream.peer_id = PeerID(info.peer).to_base58()
            await self._handlers[info.proto](stream)
        except (RemoteError, EOFError, OSError) as error:
            logger.debug("A stream from peer %s: %s", stream.peer_id, error)
        except Exception:
            logger.exception("The handler of a stream from peer %s failed", stream.peer_id)
        except (
            asyncio.CancelledError
        ):  # by `close`; of a task that is cancelled, asyncio would print a traceback
            return
        finally:
            await stream.close()
            self._tasks.discard(task)

    async def _end_handlers(self) -> None:
        current = asyncio.current_task()
        tasks = [task for task in self._tasks if task is not current]
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)


async def _end(made: Sequence[Any]) -> None:
    for p2p in made:
        if p2p._child is not None:
            await p2p.shutdown()


def _explain(error: Exception, initial_peers: Sequence[str], hosts: Sequence[str]) -> CorollaError:
    """The daemon's last words as one sentence of ours."""
    text = str(error)
    if "bootstrap peers" in text or ("failed to start in" in text and initial_peers):
        return SwarmUnavailable(
            f"Nobody answers at {', '.join(initial_peers)}; check the join address and that its peer is running."
        )
    if "failed to listen" in text:
        return UsageError(f"Cannot listen on {', '.join(hosts)}; choose another address or port.")
    if "already taken" in text:
        return UsageError(
            "Another running peer uses this identity file; give each peer its own with --identity."
        )
    return SwarmUnavailable(f"The network process of this peer did not start: {one_line(text)}.")
