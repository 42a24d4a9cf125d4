"""A peer's key: the file that keeps it, the peer id that follows from it, what it signs.

Invariant: a key file that we write can be read by its owner only, at every moment; the key in one that exists
is never changed. A peer id is the hash of its public key, so whoever knows the id can check a signature that
comes with the key. Keys are RSA, as libp2p's daemon makes and reads them.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import base58
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import padding, rsa
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_der_private_key,
    load_der_public_key,
)

from corolla.errors import UsageError
from corolla.files import read_bounded, write_private
from corolla.text import get_logger

log = get_logger(__name__)

KEY_BITS = 2048
PUBLIC_EXPONENT = 65537
MAX_KEY_BYTES = 550  # of a public key: RSA with 4096 bits

# libp2p wraps keys in protobuf: field 1, the kind (0: RSA); field 2, the key as DER with its length in front.
_WRAPPED = b"\x08\x00\x12"
_DER_SEQUENCE = b"\x30\x82"  # how a key of more than 255 bytes begins
_MULTIHASH_SHA256 = b"\x12\x20"


class Identity:
    """A key pair. Made by `generate`, `read` or `from_bytes`."""

    def __init__(self, key: rsa.RSAPrivateKey) -> None:
        self.key = key
        self.public = key.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
        self.peer_id = peer_id_of(self.public)

    @classmethod
    def generate(cls) -> Identity:
        """A new one."""
        return cls(rsa.generate_private_key(public_exponent=PUBLIC_EXPONENT, key_size=KEY_BITS))

    @classmethod
    def from_bytes(cls, data: bytes) -> Identity:
        """What an identity file holds. Raises `ValueError`."""
        der = data[data.find(_DER_SEQUENCE) :]
        if data != _wrap(der):
            raise ValueError("not a wrapped RSA key, or truncated")
        key = load_der_private_key(der, password=None)
        if not isinstance(key, rsa.RSAPrivateKey):
            raise ValueError("not an RSA key")
        return cls(key)

    def to_bytes(self) -> bytes:
        """As an identity file holds it."""
        return _wrap(self.key.private_bytes(Encoding.DER, PrivateFormat.TraditionalOpenSSL, NoEncryption()))

    @classmethod
    def read(cls, path: Path) -> Identity:
        """The key in `path`, whose permissions are tightened. Raises `UsageError`."""
        try:
            data = read_bounded(path)
        except OSError as error:
            raise UsageError(f"The identity file {path} cannot be used: {error.strerror}.") from error
        try:
            identity = cls.from_bytes(data)
        except (ValueError, TypeError) as error:
            raise UsageError(
                f"The file {path} is not a peer's identity; give a path that does not exist yet to have one made."
            ) from error
        _tighten(path)
        return identity

    def sign(self, data: bytes) -> bytes:
        """A signature of `data`."""
        return self.key.sign(data, padding.PKCS1v15(), hashes.SHA256())


def prepare_identity(path: Path) -> Identity:
    """The key in `path`; a new one is written when the file is not there.

    Raises `UsageError` when the file cannot be written or read, or holds something else.
    """
    try:
        if not path.exists():
            write_private(path, Identity.generate().to_bytes(), replace=False)
    except FileExistsError:
        pass  # another process was quicker
    except OSError as error:
        raise UsageError(f"The identity file {path} cannot be used: {error.strerror}.") from error
    return Identity.read(path)


def _tighten(path: Path) -> None:
    """Make sure that only the owner can read `path`; says so when it was otherwise. Raises `UsageError`."""
    try:
        mode = path.stat().st_mode & 0o777
        if not mode & 0o077:
            return
        path.chmod(0o600)
    except OSError as error:
        raise UsageError(
            f"Others can read {path} and its permissions cannot be changed ({error.strerror}); run "
            f"`chmod 600 {path}` as its owner, or give another file."
        ) from error
    log.warning(
        "Others could read %s (mode %o); it is now yours alone (600). If somebody may have copied it, delete it "
        "and have a new one made.",
        path,
        mode,
    )


def peer_id_of(public: bytes) -> str:
    """The peer id of a public key (DER, SubjectPublicKeyInfo)."""
    return str(base58.b58encode(_MULTIHASH_SHA256 + hashlib.sha256(_wrap(public)).digest()), "ascii")


def is_peer_id(text: str) -> bool:
    """Whether `text` may be a peer id: one of an RSA key, or of a short key that the id itself holds."""
    try:
        data = base58.b58decode(text)
    except ValueError:
        return False
    return (len(data) == 34 and data.startswith(_MULTIHASH_SHA256)) or (
        2 < len(data) <= 44 and data[0] == 0 and data[1] == len(data) - 2
    )


def load_public(public: bytes, peer_id: str) -> rsa.RSAPublicKey | None:
    """The key, if it is `peer_id`'s and strong enough; else None. Never raises, whatever a peer sent."""
    if len(public) > MAX_KEY_BYTES or peer_id_of(public) != peer_id:
        return None
    try:
        key = load_der_public_key(public)
    except Exception:  # several kinds of a parser's errors
        return None
    # A check takes as long as the exponent is long; libp2p's keys have one exponent.
    if not isinstance(key, rsa.RSAPublicKey) or not KEY_BITS <= key.key_size <= 2 * KEY_BITS:
        return None
    return key if key.public_numbers().e == PUBLIC_EXPONENT else None


def is_signed_by(peer_id: str, public: bytes, data: bytes, signature: bytes) -> bool:
    """Whether the peer `peer_id`, whose key is `public`, signed `data`."""
    key = load_public(public, peer_id)
    if key is None or len(signature) != (key.key_size + 7) // 8:
        return False
    try:
        key.verify(signature, data, padding.PKCS1v15(), hashes.SHA256())
    except InvalidSignature:
        return False
    return True


def _wrap(der: bytes) -> bytes:
    length, varint = len(der), bytearray()
    while length > 0x7F:
        varint.append(length & 0x7F | 0x80)
        length >>= 7
    return _WRAPPED + bytes([*varint, length]) + der
