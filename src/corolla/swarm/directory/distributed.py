"""How records get to the peers that keep the directory, and from them to those who look for servers.

A stream carries requests and answers in turn. A server puts its own record, and no other's. A reader asks for the
names of the records that a peer keeps, and then for those that it has not read before, in pages: what a peer answers
is small, however many servers there are, and of many peers that keep the same only one sends it.

Invariant: what is read was signed by the server that it is about, is not expired and not taken back; no peer is waited
for longer than `REQUEST_SECONDS` at a time and `READ_SECONDS` in all; a reading that missed something says so.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterable, Iterator, Sequence
from typing import Annotated, Any, Literal, TypeVar

import msgspec
from cachetools import TTLCache

from corolla.errors import (
    PeerSilent,
    ProtocolError,
    RemoteError,
    SwarmUnavailable,
)
from corolla.swarm.directory.directory import MAX_NAME, Directory, ServerRecord, Word
from corolla.swarm.directory.records import (
    MAX_RECORD_BYTES,
    MAX_RECORDS,
    NAME_BYTES,
    PLACE_BYTES,
    Entry,
    RecordStore,
    Verifier,
    name_of,
    sign_entry,
    version_of,
)
from corolla.swarm.short_messages import StreamLimits, receive_short, send_short
from corolla.swarm.transport.base import Stream, Transport
from corolla.swarm.transport.identity import Identity
from corolla.text import get_logger, one_line

logger = get_logger(__name__)

T = TypeVar("T", bound=msgspec.Struct)

DIRECTORY_PROTOCOL = "corolla-directory/1"
REQUEST_SECONDS = 3.0
READ_SECONDS = 6.0
KEEPER_SECONDS = 30.0  # a stream's whole life at the peer that answers
PAGE = 200  # records in one answer, at most half a megabyte
MAX_STREAMS = 256
MAX_STREAMS_OF_A_PEER = 4
MAX_WAITING = 256  # records that wait to be read before they are kept; half a second's worth
FAILED_SECONDS = 30.0  # for which a peer that failed is asked, but not waited for
_MAX_REQUEST = 8192
_MAX_ANSWER = 1024 * 1024


class Put(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag="put"):
    """Asks to keep the sender's own record."""

    value: Annotated[bytes, msgspec.Meta(max_length=MAX_RECORD_BYTES)]


class List(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag="list"):
    """Asks for the names of the records of a model, or of all."""

    model: Word | None


class Fetch(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag="fetch"):
    """Asks for records by their names, one behind the other."""

    names: Annotated[bytes, msgspec.Meta(max_length=PAGE * NAME_BYTES)]


class Done(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag="done"):
    """The record is kept."""


class Names(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag="names"):
    """Names of records, one behind the other; those of longest standing first."""

    names: Annotated[bytes, msgspec.Meta(max_length=MAX_RECORDS * NAME_BYTES)]


class Records(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag="records"):
    """Those of the records asked for that are still here, in their newest versions."""

    values: Annotated[list[bytes], msgspec.Meta(max_length=PAGE)]


class Refused(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag="refused"):
    """Not answered: to a stranger, a record that is not the sender's own or no good, or one for which there is no
    room."""

    reason: Literal["stranger", "unfit", "full"]


_TO_A_STRANGER = Refused("stranger")
_requests = msgspec.msgpack.Decoder(Put | List | Fetch)
_answers = msgspec.msgpack.Decoder(Done | Names | Records | Refused)


class RecordService:
    """The side that keeps records and answers. Its `handle` serves `DIRECTORY_PROTOCOL`."""

    def __init__(self, store: RecordStore, verifier: Verifier, allowed: Callable[[str], bool]) -> None:
        """`allowed` says of a peer id whether the peer is a member."""
        self._store = store
        self._verifier = verifier
        self._allowed = allowed
        self._members = StreamLimits(MAX_STREAMS_OF_A_PEER, MAX_STREAMS)
        self._strangers = StreamLimits(MAX_STREAMS_OF_A_PEER, MAX_STREAMS)

    async def handle(self, stream: Stream) -> None:
        """Answer one stream."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(KEEPER_SECONDS):
                while True:
                    limits = self._members if self._allowed(stream.peer_id) else self._strangers
                    with limits.waits(stream):
                        request = await receive_short(stream, _requests, _MAX_REQUEST)
                    answer = await self._answer(request, stream.peer_id)
                    with limits.waits(stream):
                        await send_short(stream, answer)

    async def _answer(self, request: Put | List | Fetch, peer: str) -> Done | Names | Records | Refused:
        if not self._allowed(peer):
            return _TO_A_STRANGER
        if isinstance(request, List):
            return Names(self._store.names(request.model))
        if isinstance(request, Fetch):
            return Records(self._store.values(_split(request.names)))
        if self._verifier.waiting > MAX_WAITING or not self._store.may_put(peer):
            return Refused("full")
        (entry,) = await self._verifier.read([request.value])
        if entry is None or entry.record.peer_id != peer:
            return Refused("unfit")
        return Done() if self._store.put(entry, request.value) else Refused("full")


class _Declined(RemoteError):
    """A peer answered, and does not do what it was asked for."""


class DistributedDirectory(Directory):
    """One peer's access to a directory that some peers keep for all."""

    def __init__(
        self,
        transport: Transport,
        identity: Identity | None,
        keepers: Callable[[Sequence[str | None]], Awaitable[Sequence[str]]],
        verifier: Verifier,
        clock: Callable[[], float],
        *,
        own: RecordStore | None = None,
        introduce: Callable[[str], Awaitable[bool]] | None = None,
    ) -> None:
        """`keepers(models)` names the other peers that keep the records of these models; None: of all. `clock`
        tells the swarm's time. `own` is what this peer keeps itself; `introduce` presents it to a peer that does not
        know it."""
        self._transport = transport
        self._identity = identity
        self._keepers = keepers
        self._verifier = verifier
        self._clock = clock
        self._own = own
        self._introduce = introduce
        self._expirations: dict[str, float] = {}  # of our own records, by model
        self._read_before: dict[str | None, dict[bytes, Entry | None]] = {}  # by model, then by name
        self._failed: TTLCache[str, bool] = TTLCache(4096, ttl=FAILED_SECONDS)  # by peer id

    async def announce(self, record: ServerRecord, ttl: float) -> None:
        await self._put(record, withdrawn=False, ttl=ttl)

    async def withdraw(self, record: ServerRecord) -> None:
        await self._put(record, withdrawn=True, ttl=0.0)

    async def servers(self, model: str) -> list[ServerRecord]:
        return await self._read(model)

    async def all_servers(self) -> list[ServerRecord]:
        return await self._read(None)

    async def close(self) -> None:
        self._verifier.close()

    async def _put(self, record: ServerRecord, *, withdrawn: bool, ttl: float) -> None:
        if self._identity is None or record.peer_id != self._identity.peer_id:
            raise ValueError("A peer announces itself only, and a client nothing.")
        record = msgspec.structs.replace(record, model_name=one_line(record.model_name, characters=MAX_NAME))
        # Whichever expires later is kept: each of our records must outlive the one that it replaces.
        expires = max(self._clock() + ttl, self._expirations.get(record.model, 0.0) + 0.001)
        self._expirations[record.model] = expires
        entry = Entry(record, withdrawn, expires)
        value = sign_entry(entry, self._identity)
        if self._own is not None:
            self._own.put(entry, value)
        keepers = await self._keepers([record.model, None])
        if keepers and not await self._ask_all(keepers, lambda peer: self._put_to(peer, value)):
            logger.warning("Nobody took this peer's announcement; it is repeated with the next one.")

    async def _put_to(self, peer: str, value: bytes) -> None:
        async with self._stream(peer) as stream:
            await self._ask(stream, Put(value), Done)

    # --- reading -----------------------------------------------------------------------------------------

    async def _read(self, model: str | None) -> list[ServerRecord]:
        reading = _Reading(self._read_before.get(model, {}))
        if self._own is not None:
            await self._read_own(self._own, model, reading)
        keepers = await self._keepers([model])
        answered = await self._ask_all(keepers, lambda peer: self._read_one(peer, model, reading))
        if answered and reading.missing:  # another had promised them, and failed
            reading.unclaim()
            await self._ask_all(answered, lambda peer: self._read_one(peer, model, reading))
        self._read_before[model] = read = reading.offered_entries()
        self.cut_short = reading.missing
        if keepers and not answered and not read and self._own is None:
            raise SwarmUnavailable(
                "None of the peers that keep the swarm's directory answers; is one that you join through running?"
            )
        return reading.servers(model, self._clock())

    async def _read_own(self, own: RecordStore, model: str | None, reading: _Reading) -> None:
        names = list(_split(own.names(model)))
        for page in reading.pages(names):
            await self._note(reading, page, own.values(page))
        reading.offer(names)

    async def _read_one(self, peer: str, model: str | None, reading: _Reading) -> None:
        async with self._stream(peer) as stream:
            names = list(_split((await self._ask(stream, List(model), Names)).names))
            reading.offer(names)
            for page in reading.pages(names):
                records = await self._ask(stream, Fetch(b"".join(page)), Records)
                await self._note(reading, page, records.values)
                reading.withdraw_offer(page)

    async def _note(self, reading: _Reading, asked: Sequence[bytes], values: Sequence[bytes]) -> None:
        """Note records that were asked for. Raises `ProtocolError` where one is another.

        One that is no good is passed over: whoever keeps it may be of another release, or have been handed it.
        """
        places = {name[:PLACE_BYTES] for name in asked}
        versions = {name[PLACE_BYTES:]: name for name in asked}
        for value, entry in zip(values, await self._verifier.read(values), strict=True):
            name = versions.get(version_of(value), b"") if entry is None else name_of(entry, value)
            if name[:PLACE_BYTES] not in places:
                raise ProtocolError("It sent something else than the records that it was asked for.")
            reading.note(name, entry)

    # --- asking ------------------------------------------------------------------------------------------

    async def _ask_all(
        self, peers: Sequence[str], ask: Callable[[str], Coroutine[Any, Any, None]]
    ) -> list[str]:
        """Ask all of these at a time; gives those that answered. Whoever failed lately is not waited for."""
        tasks = {peer: asyncio.create_task(ask(peer)) for peer in peers}
        awaited = {peer: task for peer, task in tasks.items() if peer not in self._failed} or tasks
        try:
            if tasks:
                await asyncio.wait(awaited.values(), timeout=READ_SECONDS)
        finally:
            for task in tasks.values():
                task.cancel()
        outcomes = await asyncio.gather(*tasks.values(), return_exceptions=True)
        for peer, outcome in zip(tasks, outcomes, strict=True):
            if outcome is None:
                self._failed.pop(peer, None)
            elif peer in awaited or not isinstance(outcome, asyncio.CancelledError):
                logger.debug("Peer %s did not answer for the directory: %r", peer, outcome)
                if not isinstance(outcome, _Declined):
                    self._failed[peer] = True
        return [peer for peer, outcome in zip(tasks, outcomes, strict=True) if outcome is None]

    @contextlib.asynccontextmanager
    async def _stream(self, peer: str) -> AsyncIterator[Stream]:
        async with _in_time(peer):
            stream = await self._transport.open(peer, DIRECTORY_PROTOCOL)
        try:
            yield stream
        finally:
            await stream.close()

    async def _ask(self, stream: Stream, request: msgspec.Struct, kind: type[T]) -> T:
        """The answer to one request, which is asked again of a peer that has been told who we are."""
        answer = await self._exchange(stream, request)
        if answer == _TO_A_STRANGER and self._introduce is not None and await self._introduce(stream.peer_id):
            answer = await self._exchange(stream, request)
        if isinstance(answer, kind):
            return answer
        if isinstance(answer, Refused):
            raise _Declined(f"It refused a request: {answer.reason}.", peer_id=stream.peer_id)
        raise ProtocolError("It gave another kind of answer.", peer_id=stream.peer_id)

    async def _exchange(self, stream: Stream, request: msgspec.Struct) -> Done | Names | Records | Refused:
        async with _in_time(stream.peer_id):
            await send_short(stream, request)
            answer: Done | Names | Records | Refused = await receive_short(stream, _answers, _MAX_ANSWER)
            return answer


class _Reading:
    """One reading of the directory, from many peers at a time."""

    def __init__(self, known: dict[bytes, Entry | None]) -> None:
        self._known = known
        self._offered: dict[bytes, None] = {}
        self._claimed: set[bytes] = set()

    def offer(self, names: Iterable[bytes]) -> None:
        """A peer says that it keeps these."""
        self._offered.update(dict.fromkeys(names))

    def pages(self, names: Iterable[bytes]) -> Iterator[list[bytes]]:
        """Those of a peer's names that nobody has been asked for yet, a page at a time."""
        page: list[bytes] = []
        for name in names:
            if name not in self._known and name not in self._claimed:
                self._claimed.add(name)
                page.append(name)
            if len(page) == PAGE:
                yield page
                page = []
        if page:
            yield page

    def note(self, name: bytes, entry: Entry | None) -> None:
        """A record was read; perhaps a newer version than was offered. None: it is no good."""
        self._known[name] = entry
        self._offered[name] = None

    def withdraw_offer(self, names: Iterable[bytes]) -> None:
        """A peer has answered for these: what it did not send, it does not keep (any more)."""
        for name in names:
            if name not in self._known:
                self._offered.pop(name, None)

    def unclaim(self) -> None:
        """Whoever was asked for records and did not send them will not."""
        self._claimed.clear()

    @property
    def missing(self) -> bool:
        """Whether something was offered that was not read."""
        return any(name not in self._known for name in self._offered)

    def offered_entries(self) -> dict[bytes, Entry | None]:
        """What was read of that which is still offered, by name: the next reading need not ask for it."""
        return {name: self._known[name] for name in self._offered if name in self._known}

    def servers(self, model: str | None, now: float) -> list[ServerRecord]:
        """What the newest of each server's entries say."""
        newest: dict[tuple[str, str], Entry] = {}
        for entry in filter(None, self.offered_entries().values()):
            place = (entry.record.peer_id, entry.record.model)
            if model in (None, entry.record.model) and (
                place not in newest or newest[place].expires < entry.expires
            ):
                newest[place] = entry
        return [one.record for _, one in sorted(newest.items()) if not one.withdrawn and one.expires > now]


@contextlib.asynccontextmanager
async def _in_time(peer: str) -> AsyncIterator[None]:
    try:
        async with asyncio.timeout(REQUEST_SECONDS):
            yield
    except TimeoutError:
        raise PeerSilent(f"Peer {peer} was silent for {REQUEST_SECONDS:g} seconds.", peer_id=peer) from None


def _split(names: bytes) -> Iterator[bytes]:
    return (names[at : at + NAME_BYTES] for at in range(0, len(names), NAME_BYTES))
