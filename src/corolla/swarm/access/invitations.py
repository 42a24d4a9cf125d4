"""Invitations and certificates: what is signed so that a peer may come in.

Invariant: nothing that a peer presents is believed before its signature, made by the key whose hash is the
issuer's peer id, was checked; one algorithm is accepted; an invitation is never taken for a certificate. Both
are JSON Web Tokens (RS256). Clocks may differ by `LEEWAY` seconds.
"""

from __future__ import annotations

import base64
import secrets
import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import jwt

from corolla.errors import NotAdmitted, UsageError
from corolla.swarm.directory.addresses import join_multiaddr
from corolla.swarm.transport.identity import Identity, load_public

LEEWAY = 600.0  # seconds that two peers' clocks may differ
CERTIFICATE_SECONDS = 90 * 86400.0
MAX_TOKEN_BYTES = 8192
MAX_ADDRESSES = 8

_ALGORITHM = "RS256"
_INVITATION, _CERTIFICATE = "corolla-invitation", "corolla-certificate"
_TIMES = ["exp", "iat", "iss", "aud", "jti"]


@dataclass(frozen=True)
class Invitation:
    """What an invitation says. `expires` is in seconds since 1970."""

    issuer: str
    addresses: tuple[str, ...]
    nonce: str
    expires: float
    certificate_seconds: float


def sign_invitation(
    identity: Identity,
    addresses: Sequence[str],
    *,
    seconds: float,
    certificate_seconds: float = CERTIFICATE_SECONDS,
    now: float | None = None,
) -> str:
    """A token that lets one peer in; to be redeemed at its issuer within `seconds`."""
    claims = _claims(identity, _INVITATION, seconds, now)
    claims |= {"peers": list(addresses)[:MAX_ADDRESSES], "for": certificate_seconds}
    return jwt.encode(claims, identity.key, algorithm=_ALGORITHM)


# What reading a stranger's token may raise; the last for claims that are nested too deeply.
_MALFORMED = (jwt.PyJWTError, ValueError, LookupError, TypeError, RecursionError)


def read_invitation(token: str) -> Invitation:
    """What an invitation says, unproved: for whom it was given to. Raises `UsageError`."""
    token = token.strip()
    try:
        claims = _unproved(token)
        invitation = _as_invitation(claims)
        if claims["aud"] != _INVITATION or not invitation.addresses:
            raise ValueError("not an invitation")
    except _MALFORMED as error:
        raise UsageError(
            "This is not an invitation; paste the whole token that `corolla invite` printed."
        ) from error
    for address in invitation.addresses:
        join_multiaddr(address)
    return invitation


def check_invitation(token: str, identity: Identity) -> Invitation:
    """An invitation that this identity has signed and that has not expired. Raises `NotAdmitted`."""
    claims = _checked(token, identity.key.public_key(), identity.peer_id, _INVITATION)
    try:
        return _as_invitation(claims)
    except (ValueError, KeyError, TypeError) as error:
        raise NotAdmitted("The invitation is incomplete.") from error


def sign_certificate(
    identity: Identity, peer_id: str, *, seconds: float = CERTIFICATE_SECONDS, now: float | None = None
) -> str:
    """A certificate that lets `peer_id` in, and nobody else, for so many seconds."""
    claims = _claims(identity, _CERTIFICATE, seconds, now)
    claims |= {"sub": peer_id, "key": base64.b64encode(identity.public).decode()}
    return jwt.encode(claims, identity.key, algorithm=_ALGORITHM)


def check_certificate(certificate: str, peer_id: str, issuers: Collection[str]) -> float:
    """When the certificate of `peer_id` by one of these issuers expires. Raises `NotAdmitted`."""
    try:
        stated = _unproved(certificate)
        issuer, public = str(stated["iss"]), base64.b64decode(stated["key"], validate=True)
    except _MALFORMED as error:
        raise NotAdmitted("The certificate is malformed.") from error
    if issuer not in issuers:
        raise NotAdmitted("The certificate is by an issuer that is not trusted here.")
    if stated.get("sub") != peer_id:
        raise NotAdmitted("The certificate is another peer's.")
    key = load_public(public, issuer)
    if key is None:
        raise NotAdmitted("The certificate's key is not its issuer's.")
    return float(_checked(certificate, key, issuer, _CERTIFICATE)["exp"])


def _unproved(token: str) -> dict[str, Any]:
    """What a token says, whoever signed it. Raises one of `_MALFORMED`."""
    if len(token) > MAX_TOKEN_BYTES:
        raise ValueError("too long")
    return dict(jwt.decode(token, options={"verify_signature": False}))


def _claims(identity: Identity, audience: str, seconds: float, now: float | None) -> dict[str, Any]:
    now = time.time() if now is None else now
    return {
        "iss": identity.peer_id,
        "aud": audience,
        "iat": int(now),
        "exp": int(now + seconds),
        "jti": secrets.token_urlsafe(16),
    }


def _checked(token: str, key: Any, issuer: str, audience: str) -> dict[str, Any]:
    what = "invitation" if audience == _INVITATION else "certificate"
    if len(token) > MAX_TOKEN_BYTES:
        raise NotAdmitted(f"The {what} is too long.")
    try:
        return dict(
            jwt.decode(
                token,
                key,
                algorithms=[_ALGORITHM],
                audience=audience,
                issuer=issuer,
                leeway=LEEWAY,
                options={"require": _TIMES},
            )
        )
    except jwt.ExpiredSignatureError as error:
        raise NotAdmitted(f"The {what} has expired.") from error
    except jwt.ImmatureSignatureError as error:
        raise NotAdmitted(f"The {what} is from the future: set the clocks of both machines.") from error
    except jwt.InvalidIssuerError as error:
        raise NotAdmitted(f"The {what} was not issued here.") from error
    except _MALFORMED as error:
        raise NotAdmitted(f"The {what} is not genuine.") from error


def _as_invitation(claims: dict[str, Any]) -> Invitation:
    addresses = claims["peers"]
    if not isinstance(addresses, list) or not all(isinstance(address, str) for address in addresses):
        raise ValueError("not an invitation")
    return Invitation(
        issuer=str(claims["iss"]),
        addresses=tuple(addresses[:MAX_ADDRESSES]),
        nonce=str(claims["jti"]),
        expires=float(claims["exp"]),
        certificate_seconds=float(claims["for"]),
    )
