"""Who may come in: what an allow list, certificates and revocations say of a peer. No network here.

Invariant: a revoked peer is never allowed, whatever else speaks for it; a certificate counts only for the peer
that it names and that presented it; a peer that nothing speaks for is a stranger.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Generic, TypeVar

from cachetools import TLRUCache
from filelock import FileLock

from corolla.errors import NotAdmitted, UsageError
from corolla.files import write_private
from corolla.json_files import parse_object
from corolla.swarm.access.invitations import LEEWAY, check_certificate, check_invitation, sign_certificate
from corolla.swarm.transport.identity import Identity, is_peer_id
from corolla.text import get_logger

T = TypeVar("T")

log = get_logger(__name__)

MAX_CERTIFIED = 100_000  # peers whose certificates are remembered
INVITE_HINT = (
    "ask its owner for an invitation and run `corolla join TOKEN`, or have the peer id on the owner's list that "
    "`corolla join` prints"
)


class WatchedFile(Generic[T]):
    """The parsed content of a file, reread when the file changes.

    A first reading that fails raises the parser's `UsageError`; a later one is logged and the content stays as
    it was, so that a slip of an editor neither ends a server nor opens it. With `optional` a file that is not
    there at first reads as empty.
    """

    def __init__(self, path: Path, parse: Callable[[str, Path], T], *, optional: bool = False) -> None:
        self.path = path
        self._parse = parse
        self._optional = optional
        self._seen = self._stamp()
        self._content = self._read()

    @property
    def content(self) -> T:
        """What the file says now."""
        stamp = self._stamp()
        if stamp != self._seen:
            self._seen = stamp
            try:
                self._content = self._read()
                log.info("Read %s again", self.path)
            except UsageError as error:
                log.warning("%s What was read before stays in force.", error)
            self._optional = False  # once it was there, its disappearance is a slip
        return self._content

    def _stamp(self) -> tuple[int, ...]:
        try:
            found = self.path.stat()
        except OSError:
            return ()
        return found.st_mtime_ns, found.st_size, found.st_ino

    def _read(self) -> T:
        try:
            text = self.path.read_text(encoding="utf-8")
        except FileNotFoundError:
            if not self._optional:
                raise UsageError(f"The file {self.path} does not exist.") from None
            text = ""
        except (OSError, UnicodeDecodeError) as error:
            reason = error.strerror if isinstance(error, OSError) else "it is not text"
            raise UsageError(f"The file {self.path} cannot be read: {reason}.") from error
        return self._parse(text, self.path)


def parse_peers(text: str, path: Path) -> frozenset[str]:
    """Peer ids, one a line; what follows a # is a comment. Raises `UsageError` with the line's number."""
    peers = set()
    for number, line in enumerate(text.splitlines(), start=1):
        peer = line.partition("#")[0].strip()
        if peer and not is_peer_id(peer):
            raise UsageError(f"Line {number} of {path} is not a peer id: {peer[:80]!r}.")
        if peer:
            peers.add(peer)
    return frozenset(peers)


PeerFile = WatchedFile[frozenset[str]]


def peer_file(path: Path, *, optional: bool = False) -> PeerFile:
    """A file of peer ids that is reread when it changes. Raises `UsageError`."""
    return WatchedFile(path, parse_peers, optional=optional)


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


# --- what an issuer keeps beside its identity -----------------------------------------------------------


def revocations_path(identity: Path) -> Path:
    """Where the peers stand whose certificates were revoked."""
    return identity.with_name(identity.name + ".revoked")


def redeemed_path(identity: Path) -> Path:
    """Where the invitations stand that were redeemed."""
    return identity.with_name(identity.name + ".redeemed")


def revoke(identity: Path, peer_id: str) -> bool:
    """Write `peer_id` into the identity's revocation file; False when it stood there. Raises `UsageError`."""
    path = revocations_path(identity)
    try:
        with FileLock(f"{path}.lock"):
            text = path.read_text(encoding="utf-8") if path.exists() else ""
            if peer_id in parse_peers(text, path):
                return False
            text += f"{'' if not text or text.endswith(chr(10)) else chr(10)}{peer_id}\n"
            write_private(path, text.encode())
    except OSError as error:
        raise UsageError(f"The file {path} cannot be written: {error.strerror}.") from error
    return True


def addresses_path(identity: Path) -> Path:
    """Where a running peer writes the addresses that others can join through."""
    return identity.with_name(identity.name + ".addresses")


def write_addresses(identity: Path, addresses: Sequence[str]) -> None:
    """Note where the peer of an identity can be reached, for its invitations; a file that fails is no matter."""
    try:
        write_private(addresses_path(identity), "".join(f"{address}\n" for address in addresses).encode())
    except OSError as error:
        log.warning("%s cannot be written: %s", addresses_path(identity), error.strerror)


def read_addresses(identity: Path) -> list[str]:
    """What `write_addresses` wrote; nothing when the peer never ran."""
    try:
        return addresses_path(identity).read_text(encoding="utf-8").split()
    except (OSError, UnicodeDecodeError):
        return []


class Issuer:
    """Redeems the invitations of one identity, each once, and signs certificates."""

    def __init__(self, identity: Identity, path: Path, revoked: PeerFile) -> None:
        """`path` is the identity's file; `revoked` the peers that get no certificate any more."""
        self.identity = identity
        self._path = redeemed_path(path)
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
                return str(certificate)
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
            return {
                nonce: (use[0], float(use[1]), use[2])
                for nonce, use in parse_object(self._path.read_bytes()).items()
            }
        except (ValueError, AttributeError, TypeError, IndexError) as error:
            # Without it a used invitation could be used again: nothing is redeemed until somebody has looked.
            raise NotAdmitted(
                "The issuer's list of redeemed invitations is damaged; tell its owner."
            ) from error


# --- what a member keeps beside its identity ------------------------------------------------------------


def certificates_path(identity: Path) -> Path:
    """Where the certificates stand that were issued for an identity."""
    return identity.with_name(identity.name + ".certificates")


class Certificates:
    """The certificates of one identity, by issuer, on disk beside it."""

    def __init__(self, identity: Path) -> None:
        self._path = certificates_path(identity)

    def all(self) -> list[str]:
        """All of them; none when there is no file. Raises `UsageError` for a damaged one."""
        return list(self._read().values())

    def add(self, issuer: str, certificate: str) -> None:
        """Keep a certificate in place of the issuer's earlier one. Raises `UsageError`."""
        kept = self._read() | {issuer: certificate}
        try:
            write_private(self._path, json.dumps(kept, indent=1).encode())
        except OSError as error:
            raise UsageError(f"The file {self._path} cannot be written: {error.strerror}.") from error

    def _read(self) -> dict[str, str]:
        try:
            found = parse_object(self._path.read_bytes())
            return {str(issuer): str(certificate) for issuer, certificate in found.items()}
        except FileNotFoundError:
            return {}
        except (OSError, ValueError, AttributeError) as error:
            raise UsageError(
                f"The file {self._path} cannot be read as certificates; delete it and join again."
            ) from error
