"""Faults at the n-th message of a peer on the in-memory network, never by the clock.

`Injector.fail_at(fault)` in the spirit of torchft's `EventInjector`. What a fault does is said by kind in `KINDS`;
the world that it is done to (`FaultTarget`) knows how servers end and come back.
"""

from __future__ import annotations

import asyncio
import random
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, Protocol

import msgspec
import torch

from corolla.errors import ProtocolError
from corolla.swarm.transport.base import Buffer
from corolla.swarm.transport.memory import MemoryNetwork
from corolla.wire import frames
from corolla.wire.frames import PREAMBLE_SIZE, Packet
from corolla.wire.messages import Closed, ServerMessage
from tests.wire.whole import decode

Bytes = bytes | bytearray


@dataclass(frozen=True)
class Fault:
    """One fault: what, to whom, when, and how long."""

    kind: str
    peer: str | None  # None: whoever is asked next after the fault before this one has hit (a replacement)
    on: Literal["request", "reply"] = "request"
    n: int = 1  # the n-th such message of the peer, counted from when the fault is armed
    returns: float | None = None  # seconds until it is undone or the server is back; None: never
    blocks: tuple[int, int] | None = None  # what a server that moved serves afterwards
    also: tuple[str, ...] = ()  # other servers to whom the same happens at the same moment
    seed: int = 0


class FaultTarget(Protocol):
    """What faults are done to. All is called on the event loop."""

    network: MemoryNetwork

    def kill(self, peer: str) -> None: ...
    def start(self, peer: str, blocks: tuple[int, int] | None = None) -> None: ...
    def stop(self, peer: str) -> None: ...
    def resume(self, peer: str) -> None: ...
    def cut(self, client: str, peers: Sequence[str]) -> None: ...
    def heal(self, client: str, peers: Sequence[str]) -> None: ...
    def drain(self, peer: str) -> None: ...
    def evict(self, peer: str) -> None: ...
    def fill(self, peer: str) -> Callable[[], None]: ...
    def slow_down(self, peer: str, factor: float) -> None: ...
    def directory_gone(self, gone: bool, how: str = "empty") -> None: ...
    def servers_up(self) -> list[str]: ...
    def is_up(self, peer: str) -> bool: ...


@dataclass
class Frame:
    """One frame on its way, as the tap sees it."""

    client: str
    peer: str
    on: str
    message: str
    pipe: int
    data: bytearray


@dataclass(frozen=True)
class Hit:
    """A fault that has happened, and what it counts as."""

    kind: str
    peer: str
    counts: tuple[str, ...]


@dataclass
class _Armed:
    fault: Fault
    seen: int = 0


@dataclass
class Injector:
    """Watches a network and makes faults happen. `clients` are the peers that ask; all others answer."""

    world: FaultTarget
    clients: frozenset[str]
    hits: Counter[str] = field(default_factory=Counter)
    log: list[Hit] = field(default_factory=list)  # in order
    watch: Callable[[Frame], object] = lambda _frame: None  # sees every message
    _armed: list[_Armed] = field(default_factory=list)
    _pipes: set[int] = field(default_factory=set)  # directions of streams that have carried anything
    _before: set[int] = field(default_factory=set)  # the same, when the newest fault hit
    _left: dict[int, int] = field(default_factory=lambda: defaultdict(int))  # bytes of the frame under way
    _held: set[int] = field(default_factory=set)  # directions of streams that are stalled for ever

    def __post_init__(self) -> None:
        self.world.network.tap = self._tap

    def fail_at(self, fault: Fault) -> None:
        """Arm a fault. One without a peer waits until all that were armed before it have hit."""
        self._armed.append(_Armed(fault))

    async def _tap(
        self, pipe: int, sender: str, receiver: str, buffers: Sequence[Buffer]
    ) -> Sequence[Buffer]:
        if pipe in self._held:
            await asyncio.Event().wait()
        self._pipes.add(pipe)
        data = bytearray(b"".join(buffers))
        begins = not self._left[pipe]
        if begins:
            sizes = frames.parse_preamble(data[:PREAMBLE_SIZE])
            self._left[pipe] = PREAMBLE_SIZE + sizes.header + sizes.payload
        self._left[pipe] -= len(data)
        if not begins:
            return [data]
        on = "request" if sender in self.clients else "reply"
        client, peer = (sender, receiver) if on == "request" else (receiver, sender)
        frame = Frame(client, peer, on, _message_type(data), pipe, data)
        self.watch(frame)
        for armed in self._due(frame):
            if self._hit(armed.fault, frame):
                self._armed.remove(armed)
            else:
                armed.seen = armed.fault.n - 1  # this message was not one that it can happen to: the next one
        return [frame.data]

    def _hit(self, fault: Fault, frame: Frame) -> bool:
        action = _KINDS[fault.kind]
        if not action(self, fault, frame):
            return False
        others = [peer for peer in fault.also if self.world.is_up(peer)]
        for peer in others:
            action(self, fault, replace(frame, peer=peer, data=bytearray(frame.data)))
        counts = [fault.kind, *(["two at once"] if others else [])]
        # A stream that was not there before is one on which the work of the fault before it is done again.
        if self.log and frame.pipe not in self._before:
            counts.append("during recovery")
        self._before = set(self._pipes)
        self.log.append(Hit(fault.kind, frame.peer, tuple(counts)))
        self.hits.update(counts)
        return True

    def _due(self, frame: Frame) -> list[_Armed]:
        due = []
        if frame.message in ("Alive", "CloseSession", "Closed"):
            return []
        waits = False  # for a fault before it
        for armed in self._armed:
            fault = armed.fault
            if fault.peer is None and waits:
                continue
            waits = True
            if fault.on != frame.on or fault.peer not in (None, frame.peer):
                continue
            if not self.world.is_up(frame.peer):
                continue
            armed.seen += 1
            if armed.seen >= fault.n:
                due.append(armed)
        return due

    def later(self, seconds: float | None, undo: Callable[[], None]) -> None:
        """Undo a fault after so many seconds; None: never."""
        if seconds is not None:
            asyncio.get_running_loop().call_later(seconds, undo)


Action = Callable[[Injector, Fault, Frame], bool]


def _kill(injector: Injector, fault: Fault, frame: Frame) -> bool:
    """SIGKILL. A reply is lost whole."""
    injector.world.kill(frame.peer)
    injector.later(fault.returns, lambda: injector.world.start(frame.peer))
    return True


def _kill_halfway(injector: Injector, fault: Fault, frame: Frame) -> bool:
    """SIGKILL in the middle of a reply's bytes: the first half arrives, then the stream ends."""
    if frame.on != "reply" or len(frame.data) < 200:
        return False
    frame.data = frame.data[: len(frame.data) // 2]
    asyncio.get_running_loop().call_soon(lambda: _kill_if_up(injector, fault, frame))
    injector._held.add(frame.pipe)
    return True


def _kill_if_up(injector: Injector, fault: Fault, frame: Frame) -> None:
    if injector.world.is_up(frame.peer):
        _kill(injector, fault, frame)


def _hang(injector: Injector, fault: Fault, frame: Frame) -> bool:
    """SIGSTOP, and SIGCONT after `returns`."""
    injector.world.stop(frame.peer)
    injector.later(fault.returns, lambda: injector.world.resume(frame.peer))
    return True


def _drain(injector: Injector, fault: Fault, frame: Frame) -> bool:
    """SIGTERM: nothing new is taken; the process ends after a while."""
    injector.world.drain(frame.peer)

    def ends() -> None:
        if injector.world.is_up(frame.peer):
            injector.world.kill(frame.peer)
            injector.later(fault.returns, lambda: injector.world.start(frame.peer))

    injector.later(random.Random(fault.seed).uniform(0, 30), ends)
    return True


def _cut(injector: Injector, fault: Fault, frame: Frame) -> bool:
    """No byte passes between this client and this server until it heals."""
    injector.world.cut(frame.client, [frame.peer])
    injector.later(fault.returns, lambda: injector.world.heal(frame.client, [frame.peer]))
    return True


def _partition(injector: Injector, fault: Fault, frame: Frame) -> bool:
    """As a cut, from half of the servers or from all, the asked one among them; it heals."""
    others = [peer for peer in injector.world.servers_up() if peer != frame.peer]
    lost = [frame.peer, *others[: random.Random(fault.seed).randint(1, max(1, len(others)))]]
    injector.world.cut(frame.client, lost)
    injector.later(fault.returns or 20.0, lambda: injector.world.heal(frame.client, lost))
    return True


def _stall(injector: Injector, _fault: Fault, frame: Frame) -> bool:
    """The stream stops for ever in the middle of a tensor; the peer's other streams go on."""
    if len(frame.data) < 200:
        return False
    frame.data = frame.data[: -(len(frame.data) // 4)]
    injector._held.add(frame.pipe)
    return True


def _slow(injector: Injector, _fault: Fault, frame: Frame) -> bool:
    """From now on a hundred times slower than announced."""
    injector.world.slow_down(frame.peer, 100.0)
    return True


def _corrupt(_injector: Injector, fault: Fault, frame: Frame) -> bool:
    """Random bytes over the preamble or the header, in such a way that it is no legal reply any more."""
    if frame.on != "reply":
        return False
    draw = random.Random(fault.seed)
    end = len(frame.data) - frames.parse_preamble(frame.data[:PREAMBLE_SIZE]).payload
    while True:
        data = bytearray(frame.data)
        begin = draw.randrange(0, end - 4)
        data[begin : begin + 4] = draw.randbytes(4)
        if not _is_legal(data):
            frame.data = data
            return True


def _wrong_shape(_injector: Injector, fault: Fault, frame: Frame) -> bool:
    """A well-formed reply that is not the one that is due."""
    if frame.message not in ("Output", "Outputs", "Gradients"):
        return False
    reply = decode(frame.data, ServerMessage)
    name = "grad" if frame.message == "Gradients" else "hidden"
    found = reply.tensors[name]
    draw = random.Random(fault.seed)
    wrong = [
        torch.cat([found, found[:, :1]], 1),
        found[..., :-1].contiguous(),
        found.to(torch.float32),
        torch.cat([found, found], 0),
    ][draw.randrange(4)]
    odd = draw.random() < 0.2
    packet = Packet(Closed(), {}) if odd else Packet(reply.message, {**reply.tensors, name: wrong})
    frame.data = bytearray(b"".join(frames.encode(packet)))
    return True


def _evict(injector: Injector, _fault: Fault, frame: Frame) -> bool:
    """Sessions and kept graphs of the server are gone, the server is well."""
    if frame.on != "request" or frame.message not in ("Step", "Steps", "Backward"):
        return False
    injector.world.evict(frame.peer)
    return True


def _full(injector: Injector, fault: Fault, frame: Frame) -> bool:
    """Somebody else takes all the room that is left for caches, for a while."""
    if frame.on != "request" or frame.message not in ("OpenSession", "Step", "Steps"):
        return False
    injector.later(fault.returns or 40.0, injector.world.fill(frame.peer))
    return True


def _restart(injector: Injector, _fault: Fault, frame: Frame) -> bool:
    """Killed, and at once there again under the same id."""
    injector.world.kill(frame.peer)
    injector.world.start(frame.peer)
    return True


def _moved(injector: Injector, fault: Fault, frame: Frame) -> bool:
    """Killed, and there again under the same id with other blocks."""
    injector.world.kill(frame.peer)
    injector.later(fault.returns or 0.0, lambda: injector.world.start(frame.peer, fault.blocks))
    return True


def _directory(injector: Injector, fault: Fault, frame: Frame) -> bool:
    """The directory is gone for a while, and the server that is asked is killed."""
    how = ("empty", "error", "slow")[fault.seed % 3]
    injector.world.directory_gone(True, how)
    injector.later(fault.returns or 60.0, lambda: injector.world.directory_gone(False))
    return _kill(injector, fault, frame)


_KINDS: dict[str, Action] = {
    "kill": _kill,
    "kill halfway": _kill_halfway,
    "hang": _hang,
    "drain": _drain,
    "cut": _cut,
    "partition": _partition,
    "stall": _stall,
    "slow": _slow,
    "corrupt": _corrupt,
    "wrong shape": _wrong_shape,
    "evict": _evict,
    "full": _full,
    "restart": _restart,
    "moved": _moved,
    "directory": _directory,
}
KINDS = tuple(_KINDS)
REPLY_ONLY = frozenset({"kill halfway", "corrupt", "wrong shape"})
REQUEST_ONLY = frozenset({"evict", "full"})


def _message_type(data: Bytes) -> str:
    sizes = frames.parse_preamble(data[:PREAMBLE_SIZE])
    header = msgspec.msgpack.decode(bytes(data[PREAMBLE_SIZE : PREAMBLE_SIZE + sizes.header]))
    name: str = header["message"]["type"]
    return name


def _is_legal(data: Bytes) -> bool:
    try:
        decode(data, ServerMessage)
    except ProtocolError:
        return False
    except Exception:  # pragma: no cover - a decoder that fails otherwise is a finding of its own
        raise
    return True


def describe(faults: Sequence[Any]) -> str:
    """Faults as a person reads them."""
    return "; ".join(
        f"{one.kind} of {one.peer or 'the next'} at {one.on} {one.n}"
        + ("" if one.returns is None else f", back after {one.returns:.0f} s")
        for one in faults
    )
