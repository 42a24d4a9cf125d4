"""Who may come in: what an allow list, certificates and revocations say of a peer. No network here.

Invariant: a revoked peer is never allowed, whatever else speaks for it; a certificate counts only for the peer
that it names and that presented it; a peer that nothing speaks for is a stranger.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Literal

import msgspec
from cachetools import TLRUCache
from filelock import FileLock

from corolla.errors import NotAdmitted, UsageError
from corolla.files import read_bounded_text, write_private
from corolla.json_files import load_object
from corolla.swarm.access.invitations import LEEWAY, check_certificate, check_invitation, sign_certificate
from corolla.swarm.transport.identity import Identity, is_peer_id
from corolla.text import get_logger

log = get_logger(__name__)

MAX_CERTIFIED = 100_000  # peers whose certificates are remembered
INVITE_HINT = (
    "ask its owner for an invitation and run `corolla join TOKEN`, or have the peer id on the owner's list that "
    "`corolla join` prints"
)


class PeerFile:
    """A file of peer ids, one a line, reread when it changes; what follows a # is a comment.

    A first reading that fails raises `UsageError`; a later one is logged and the content stays as it was, so
    that a slip of an editor neither ends a server nor opens it. With `optional` a file that is not there at
    first reads as empty.
    """

    def __init__(self, path: Path, *, optional: bool = False) -> None:
        self._path = path
        self._seen = self._stamp()
        self._content = frozenset[str]() if optional and not path.exists() else self._read()

    @property
    def content(self) -> frozenset[str]:
        """Whom the file names now."""
        stamp = self._stamp()
        if stamp != self._seen:
            self._seen = stamp
            try:
                self._content = self._read()
                log.info("Read %s again", self._path)
            except UsageError as error:
                log.warning("%s What was read before stays in force.", error)
        return self._content

    def _stamp(self) -> tuple[int, ...]:
        try:
            found = self._path.stat()
        except OSError:
            return ()
        return found.st_mtime_ns, found.st_size, found.st_ino

    def _read(self) -> frozenset[str]:
        try:
            return _parse_peers(read_bounded_text(self._path), self._path)
        except FileNotFoundError:
            raise UsageError(f"The file {self._path} does not exist.") from None
        except (OSError, UnicodeDecodeError) as error:
            raise UsageError(f"The file {self._path} cannot be read: {_reason(error)}.") from error


def _reason(error: OSError | UnicodeDecodeError) -> str:
    return str(error.strerror) if isinstance(error, OSError) else "it is not text"


def _parse_peers(text: str, path: Path) -> frozenset[str]:
    peers = [line.partition("#")[0].strip() for line in text.splitlines()]
    for number, peer in enumerate(peers, start=1):
        if peer and not is_peer_id(peer):
            raise UsageError(f"Line {number} of {path} is not a peer id: {peer[:80]!r}.")
    return frozenset(filter(None, peers))


class Membership:
    """Decides, for one guarded peer, who is a member. Remembers the certificates that were presented."""

    def __init__(
        self,
        own: str,
        *,
        allow: PeerFile | None = None,
        issuers: Collection[str] = (),
        revoked: PeerFile | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        """`own` is the guarded peer's id; `issuers` are peers whose certificates count, members themselves."""
        self._own = own
        self._allow = allow
        self._issuers = frozenset(issuers)
        self._revoked = revoked
        # Peer id -> when its certificate expires; gone then, or when too many others were looked up since.
        self._certified: TLRUCache[str, float] = TLRUCache(
            MAX_CERTIFIED, ttu=lambda _peer, expires, _now: expires + LEEWAY, timer=clock
        )

    def allowed(self, peer_id: str) -> bool:
        """Whether the peer is a member now."""
        if peer_id == self._own:
            return True
        if self.is_revoked(peer_id):
            return False
        if peer_id in self._issuers or (self._allow is not None and peer_id in self._allow.content):
            return True
        return peer_id in self._certified

    def is_revoked(self, peer_id: str) -> bool:
        """Whether the peer's certificates were taken back here."""
        return self._revoked is not None and peer_id in self._revoked.content

    def admit(self, peer_id: str, certificate: str) -> None:
        """Let in the peer that presents a certificate, until that expires. Raises `NotAdmitted`."""
        if self.is_revoked(peer_id):
            raise NotAdmitted("This peer's certificate was revoked.")
        expires = check_certificate(certificate, peer_id, self._issuers)
        self._certified[peer_id] = max(expires, self._certified.get(peer_id, 0.0))


# --- files beside an identity's -------------------------------------------------------------------------


def beside(identity: Path, kind: Literal["revoked", "redeemed", "addresses", "certificates"]) -> Path:
    """Where an identity keeps the peers whose certificates it revoked, the invitations that were redeemed with it,
    the addresses that others can join it through, or the certificates that were issued for it. Raises `UsageError`."""
    if not identity.name:
        raise UsageError(
            f"The identity file {str(identity)!r} cannot be used: that is a folder; name a file in it."
        )
    return identity.with_name(f"{identity.name}.{kind}")


def revoke(identity: Path, peer_id: str) -> bool:
    """Write `peer_id` into the identity's revocation file; False when it stood there. Raises `UsageError`."""
    path = beside(identity, "revoked")
    try:
        with FileLock(f"{path}.lock"):
            text = read_bounded_text(path) if path.exists() else ""
            if peer_id in _parse_peers(text, path):
                return False
            text += f"{'' if not text or text.endswith(chr(10)) else chr(10)}{peer_id}\n"
            write_private(path, text.encode())
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"The file {path} cannot be written: {_reason(error)}.") from error
    return True


def write_addresses(identity: Path, addresses: Sequence[str]) -> None:
    """Note where the peer of an identity can be reached, for its invitations; a file that fails is no matter."""
    path = beside(identity, "addresses")
    try:
        write_private(path, "".join(f"{address}\n" for address in addresses).encode())
    except OSError as error:
        log.warning("%s cannot be written: %s", path, error.strerror)


def read_addresses(identity: Path) -> list[str]:
    """What `write_addresses` wrote; nothing when the peer never ran."""
    try:
        return read_bounded_text(beside(identity, "addresses")).split()
    except (OSError, UnicodeDecodeError):
        return []


def read_certificates(identity: Path) -> dict[str, str]:
    """The identity's certificates, by issuer. Raises `UsageError` for a damaged file."""
    path = beside(identity, "certificates")
    try:
        return {issuer: str(one) for issuer, one in load_object(path).items()}
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise UsageError(
            f"The file {path} cannot be read as certificates; delete it and join again."
        ) from error


def keep_certificate(identity: Path, issuer: str, certificate: str) -> None:
    """Keep a certificate in place of the issuer's earlier one. Raises `UsageError`."""
    path, kept = beside(identity, "certificates"), read_certificates(identity) | {issuer: certificate}
    try:
        write_private(path, json.dumps(kept, indent=1).encode())
    except OSError as error:
        raise UsageError(f"The file {path} cannot be written: {error.strerror}.") from error


class Issuer:
    """Redeems the invitations of one identity, each once, and signs certificates."""

    def __init__(self, identity: Identity, path: Path, revoked: PeerFile) -> None:
        """`path` is the identity's file; `revoked` the peers that get no certificate any more."""
        self.identity = identity
        self._path = beside(path, "redeemed")
        self._revoked = revoked

    def redeem(self, token: str, peer_id: str) -> str:
        """A certificate for the peer that presents an invitation; the same one when it asks again.

        What was redeemed is on disk before this returns. Raises `NotAdmitted`; `OSError` for a full disk.
        """
        invitation = check_invitation(token, self.identity)
        if peer_id in self._revoked.content:
            raise NotAdmitted("This peer's certificate was revoked.")
        with FileLock(f"{self._path}.lock", mode=0o600):
            redeemed = self._read()
            if invitation.nonce in redeemed:
                owner, _, certificate = redeemed[invitation.nonce]
                if owner != peer_id:
                    raise NotAdmitted(
                        "This invitation was redeemed by another peer; ask for one of your own."
                    )
                return certificate
            certificate = sign_certificate(self.identity, peer_id, seconds=invitation.certificate_seconds)
            redeemed[invitation.nonce] = (peer_id, invitation.expires, certificate)
            # An invitation that has expired is refused by its date, and need not be remembered.
            fresh = {nonce: use for nonce, use in redeemed.items() if use[1] + 2 * LEEWAY > time.time()}
            write_private(self._path, json.dumps(fresh).encode())
        return certificate

    def _read(self) -> dict[str, tuple[str, float, str]]:
        if not self._path.exists():
            return {}
        try:
            return msgspec.convert(load_object(self._path), dict[str, tuple[str, float, str]])
        except (ValueError, msgspec.ValidationError) as error:
            # Without it a used invitation could be used again: nothing is redeemed until somebody has looked.
            raise NotAdmitted(
                "The issuer's list of redeemed invitations is damaged; tell its owner."
            ) from error
