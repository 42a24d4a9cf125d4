"""Becoming a member: an invitation is redeemed at its issuer, and the certificate kept.

Invariant: the certificate is on disk before `join` returns; asking again with the same identity gives it again.
"""

from __future__ import annotations

from pathlib import Path

from corolla.errors import NotAdmitted, RemoteError, SwarmUnavailable
from corolla.swarm.access.admission import redeem
from corolla.swarm.access.invitations import check_certificate, read_invitation
from corolla.swarm.access.membership import Certificates


async def join(token: str, identity: Path) -> str:
    """Redeem `token` for the identity in that file, which is made when it is not there; gives the issuer's id.

    Raises `UsageError` for what is no invitation, `NotAdmitted` for one that is used, expired or forged,
    `SwarmUnavailable` when the issuer does not answer.
    """
    from corolla.swarm.transport.libp2p import Libp2pTransport

    invitation = read_invitation(token)
    certificates = Certificates(identity)
    certificates.all()  # a damaged file is said before the invitation is used
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
    certificates.add(invitation.issuer, certificate)
    return invitation.issuer
