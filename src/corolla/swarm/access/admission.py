"""How a peer comes in: the small protocol in which it presents itself, and the gate that it passes.

Invariant: this protocol is the only thing that a guarded peer speaks with strangers. One request and one answer
a stream, each of at most `MAX_BYTES`; no stream lasts longer than `SECONDS`, and of those whose request is awaited
few are one peer's, few there are in all, and the newest are let in. A stream that the gate refuses is told so before
anything of it is read.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path
from typing import Annotated

import msgspec
from cachetools import TTLCache

from corolla.errors import (
    NotAdmitted,
    PeerDisconnected,
    PeerSilent,
    ProtocolError,
    RemoteError,
    SwarmUnavailable,
)
from corolla.swarm.access.invitations import MAX_TOKEN_BYTES, check_certificate, read_invitation
from corolla.swarm.access.membership import Issuer, Membership, keep_certificate, read_certificates
from corolla.swarm.channel import PIECE, Channel
from corolla.swarm.short_messages import StreamLimits, receive_short, send_short
from corolla.swarm.transport.base import Stream, StreamHandler, Transport
from corolla.text import get_logger, one_line
from corolla.wire.frames import Packet
from corolla.wire.messages import Failure

log = get_logger(__name__)

ADMISSION_PROTOCOL = "corolla-admit/1"
MAX_CERTIFICATES = 8
MAX_BYTES = 32 * 1024
SECONDS = 10.0
MAX_STREAMS = 64
MAX_STREAMS_OF_A_PEER = 2
SWEEP_SECONDS = 1.0
REFUSAL_SECONDS = 2.0
AGAIN_SECONDS = 30.0  # after which a peer that refused us is asked again
MAX_REFUSED = 4096  # that are remembered

Token = Annotated[str, msgspec.Meta(max_length=MAX_TOKEN_BYTES)]


class Hello(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag="hello"):
    """Asks to be let in, with whatever speaks for the peer."""

    certificates: Annotated[list[Token], msgspec.Meta(max_length=MAX_CERTIFICATES)] = []


class Redeem(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag="redeem"):
    """Asks an invitation's issuer for a certificate."""

    token: Token


class Welcome(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag="welcome"):
    """The peer may come in. `time`: the swarm's, in seconds since 1970; `certificate`: what was redeemed."""

    time: float
    certificate: Token | None = None


class Refused(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag="refused"):
    """The peer may not come in."""

    reason: Annotated[str, msgspec.Meta(max_length=512)]


_requests = msgspec.msgpack.Decoder(Hello | Redeem)
_answers = msgspec.msgpack.Decoder(Welcome | Refused)


class AdmissionService:
    """Answers the peers that present themselves. Its `handle` serves `ADMISSION_PROTOCOL`."""

    def __init__(
        self,
        membership: Membership | None,
        issuer: Issuer | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        """Without a `membership` everybody is welcome; `clock` tells the swarm's time."""
        self._membership = membership
        self._issuer = issuer
        self._clock = clock
        self._streams = StreamLimits(MAX_STREAMS_OF_A_PEER, MAX_STREAMS)

    async def handle(self, stream: Stream) -> None:
        """Answer one stream."""
        try:
            async with asyncio.timeout(SECONDS):
                with self._streams.waits(stream):
                    request = await receive_short(stream, _requests, MAX_BYTES)
                await send_short(stream, await self._answer(request, stream.peer_id))
        except TimeoutError:
            log.debug("Peer %s took too long to present itself", stream.peer_id)

    async def _answer(self, request: Hello | Redeem, peer: str) -> Welcome | Refused:
        try:
            if isinstance(request, Redeem):
                return Welcome(self._clock(), await self._redeem(request.token, peer))
            self._let_in(peer, request.certificates)
            return Welcome(self._clock())
        except NotAdmitted as error:
            return Refused(str(error))

    def _let_in(self, peer: str, certificates: Sequence[str]) -> None:
        if self._membership is None:
            return
        reason = NotAdmitted("It lets only members in.")
        for certificate in certificates:
            try:
                self._membership.admit(peer, certificate)
            except NotAdmitted as error:
                reason = error
        if not self._membership.allowed(peer):
            raise reason

    async def _redeem(self, token: str, peer: str) -> str:
        if self._issuer is None:
            raise NotAdmitted("It has issued no invitations.")
        try:
            certificate = await asyncio.to_thread(self._issuer.redeem, token, peer)
        except OSError as error:
            log.warning("An invitation could not be redeemed: %s", error)
            raise NotAdmitted("It cannot write down that the invitation is used; try again later.") from error
        if self._membership is not None:
            with contextlib.suppress(NotAdmitted):  # an issuer need not trust itself
                self._membership.admit(peer, certificate)
        return certificate


class Gate:
    """Lets only members' streams through to a handler, and ends those of peers that are members no more."""

    def __init__(self, allowed: Callable[[str], bool]) -> None:
        self.allowed = allowed
        self._open: dict[Stream, None] = {}
        self._turned_away = StreamLimits(MAX_STREAMS_OF_A_PEER, MAX_STREAMS)

    def guarded(self, handler: StreamHandler) -> StreamHandler:
        """The same handler, for members only; a stranger is told `not_allowed`."""

        async def handle(stream: Stream) -> None:
            if not self.allowed(stream.peer_id):
                with self._turned_away.waits(stream):
                    await refuse(stream)
                return
            self._open[stream] = None
            try:
                await handler(stream)
            finally:
                del self._open[stream]

        return handle

    async def sweep(self) -> None:
        """End the streams of peers that are members no more."""
        for stream in list(self._open):
            if not self.allowed(stream.peer_id):
                log.info("Peer %s is a member no more; its stream is closed", stream.peer_id)
                await stream.close()

    @contextlib.asynccontextmanager
    async def watched(self) -> AsyncIterator[None]:
        """Sweep every second while the body runs."""
        task = asyncio.create_task(self._watch())
        try:
            yield
        finally:
            task.cancel()
            await asyncio.wait([task])

    async def _watch(self) -> None:
        while True:
            await asyncio.sleep(SWEEP_SECONDS)
            await self.sweep()


async def refuse(stream: Stream) -> None:
    """Tell a stranger, in the main protocol's words, that it may not come in, before anything of it is read.

    What it was sending is then let run out for a moment: were the stream closed under it, it would see a broken
    connection instead of the answer.
    """
    failure = Failure(code="not_allowed", message="This server lets only members in.")
    channel = Channel(stream, side="server", silence=REFUSAL_SECONDS)
    with contextlib.suppress(PeerDisconnected, PeerSilent, TimeoutError):
        await channel.send(Packet(failure))
        async with asyncio.timeout(REFUSAL_SECONDS):
            while True:
                await stream.read(PIECE)


# --- the other side -------------------------------------------------------------------------------------


async def present(transport: Transport, peer_id: str, certificates: Sequence[str] = ()) -> float:
    """Present oneself to a peer; the swarm's time there. Raises `NotAdmitted`, `RemoteError`."""
    answer = await _ask(transport, peer_id, Hello(list(certificates)[:MAX_CERTIFICATES]))
    return answer.time


async def redeem(transport: Transport, issuer: str, token: str) -> str:
    """Redeem an invitation at its issuer; the certificate. Raises `NotAdmitted`, `RemoteError`."""
    answer = await _ask(transport, issuer, Redeem(token))
    if answer.certificate is None:
        raise ProtocolError(f"Peer {issuer} sent no certificate.", peer_id=issuer)
    return answer.certificate


async def join(token: str, identity: Path) -> str:
    """Become a member: redeem `token` for the identity in that file, which is made when it is not there.

    Gives the issuer's id, once the certificate is on disk; asking again gives it again. Raises `UsageError` for
    what is no invitation, `NotAdmitted` for one that is used, expired or forged, `SwarmUnavailable` when the
    issuer does not answer.
    """
    from corolla.swarm.transport.libp2p import Libp2pTransport

    invitation = read_invitation(token)
    read_certificates(identity)  # a damaged file is said before the invitation is used
    at_issuer = [address for address in invitation.addresses if address.endswith(f"/p2p/{invitation.issuer}")]
    transport = await Libp2pTransport.create(
        initial_peers=at_issuer or invitation.addresses, identity=identity, client_only=True
    )
    try:
        certificate = await redeem(transport, invitation.issuer, token.strip())
    except NotAdmitted as error:
        raise NotAdmitted(f"The invitation was not accepted: {error}") from error
    except RemoteError as error:
        raise SwarmUnavailable(
            f"The invitation's issuer, peer {invitation.issuer}, does not answer; try again when it is up."
        ) from error
    finally:
        await transport.close()
    check_certificate(certificate, transport.peer_id, {invitation.issuer})
    keep_certificate(identity, invitation.issuer, certificate)
    return invitation.issuer


class Introductions:
    """Presents this peer to others that do not let it in, as often as may help and no oftener."""

    def __init__(self, transport: Transport, certificates: Sequence[str] = ()) -> None:
        self._transport = transport
        self._certificates = list(certificates)
        self._refused: TTLCache[str, bool] = TTLCache(MAX_REFUSED, ttl=AGAIN_SECONDS)  # by peer id
        self._asking: dict[str, asyncio.Task[bool]] = {}

    async def introduce(self, peer_id: str) -> bool:
        """Present this peer's certificates; whether it is let in now. Never raises."""
        if not self._certificates or peer_id in self._refused:
            return False
        task = self._asking.get(peer_id)
        if task is None:  # of many streams that are refused at once, one asks
            task = self._asking[peer_id] = asyncio.create_task(self._present(peer_id))
            task.add_done_callback(lambda _: self._asking.pop(peer_id, None))
        return await asyncio.shield(task)

    async def _present(self, peer_id: str) -> bool:
        try:
            await present(self._transport, peer_id, self._certificates)
        except (NotAdmitted, RemoteError) as error:
            log.info("Peer %s does not let this one in: %s", peer_id, error)
            self._refused[peer_id] = True
            return False
        self._refused.pop(peer_id, None)
        return True


async def _ask(transport: Transport, peer_id: str, message: Hello | Redeem) -> Welcome:
    stream = await transport.open(peer_id, ADMISSION_PROTOCOL)
    try:
        async with asyncio.timeout(SECONDS):
            await send_short(stream, message)
            answer: Welcome | Refused = await receive_short(stream, _answers, MAX_BYTES)
    except TimeoutError:
        raise PeerSilent(f"Peer {peer_id} was silent for {SECONDS:g} seconds.", peer_id=peer_id) from None
    finally:
        await stream.close()
    if isinstance(answer, Refused):
        raise NotAdmitted(one_line(answer.reason, characters=512))
    return answer
