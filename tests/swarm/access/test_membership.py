"""Who is a member: lists, certificates, revocations, and the files that they are kept in."""

from __future__ import annotations

import base64
import json
import logging
import time
from functools import cache
from pathlib import Path

import jwt
import pytest

from corolla.errors import NotAdmitted, UsageError
from corolla.swarm.access.invitations import (
    LEEWAY,
    check_certificate,
    check_invitation,
    read_invitation,
    sign_certificate,
    sign_invitation,
)
from corolla.swarm.access.membership import (
    Issuer,
    Membership,
    PeerFile,
    beside,
    keep_certificate,
    read_certificates,
    revoke,
)
from corolla.swarm.transport.identity import Identity, peer_id_of, prepare_identity

DAY = 86400.0


@cache
def someone(name: str) -> Identity:
    return Identity.generate()


def peer(name: str) -> str:
    return someone(name).peer_id


def address(name: str = "issuer") -> str:
    return f"/ip4/127.0.0.1/tcp/4001/p2p/{peer(name)}"


def mode(path: Path) -> int:
    return path.stat().st_mode & 0o777


# --- identities ------------------------------------------------------------------------------------------


def test_an_identity_is_libp2p_s(tmp_path: Path) -> None:
    """The daemon and the library read the same file and make the same peer id of it."""
    from hivemind.p2p import P2P, PeerID

    made = prepare_identity(tmp_path / "ours")
    assert PeerID.from_identity((tmp_path / "ours").read_bytes()).to_base58() == made.peer_id
    P2P.generate_identity(str(tmp_path / "theirs"))
    theirs = PeerID.from_identity((tmp_path / "theirs").read_bytes()).to_base58()
    assert prepare_identity(tmp_path / "theirs").peer_id == theirs
    assert peer_id_of(made.public) == made.peer_id


def test_an_identity_is_its_owner_s_alone(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "identity"
    made = prepare_identity(path)
    assert mode(path) == 0o600
    assert not caplog.records
    path.chmod(0o644)
    assert prepare_identity(path).peer_id == made.peer_id
    assert mode(path) == 0o600
    assert "Others could read" in caplog.text
    assert [file.name for file in tmp_path.iterdir()] == ["identity"]


# --- lists -----------------------------------------------------------------------------------------------


def test_a_list_is_read_again_when_it_changes(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "peers.txt"
    path.write_text(f"# friends\n\n{peer('a')}  # Ada\n")
    membership = Membership("me", allow=PeerFile(path))
    assert membership.allowed("me")
    assert membership.allowed(peer("a"))
    assert not membership.allowed(peer("b"))
    path.write_text(f"{peer('b')}\n")
    assert membership.allowed(peer("b"))
    assert not membership.allowed(peer("a"))
    path.write_text(f"{peer('a')}\nnonsense\n")
    assert membership.allowed(peer("b")), "a slip of the editor changes nothing"
    assert "Line 2" in caplog.text
    path.unlink()
    assert membership.allowed(peer("b"))
    assert not membership.allowed(peer("a"))


def test_a_wrong_line_is_named(tmp_path: Path) -> None:
    path = tmp_path / "peers.txt"
    path.write_text(f"{peer('a')}\n\n{peer('a')[:-3]}\n")
    with pytest.raises(UsageError, match=r"Line 3 of .*peers\.txt is not a peer id"):
        PeerFile(path)
    with pytest.raises(UsageError, match="does not exist"):
        PeerFile(tmp_path / "missing")


# --- certificates ----------------------------------------------------------------------------------------


def guarded(revoked: Path | None = None) -> Membership:
    return Membership(
        "me", issuers={peer("issuer")}, revoked=None if revoked is None else PeerFile(revoked, optional=True)
    )


def test_a_certificate_lets_in_whom_it_names() -> None:
    membership = guarded()
    certificate = sign_certificate(someone("issuer"), peer("a"))
    assert not membership.allowed(peer("a"))
    membership.admit(peer("a"), certificate)
    assert membership.allowed(peer("a"))
    with pytest.raises(NotAdmitted, match="another peer's"):
        membership.admit(peer("b"), certificate)
    assert not membership.allowed(peer("b"))


def forged(**changes: object) -> str:
    """Signed by b, in the issuer's name."""
    true = sign_certificate(someone("issuer"), peer("b"))
    claims = jwt.decode(true, options={"verify_signature": False}) | changes
    return jwt.encode(claims, someone("b").key, algorithm="RS256")


def unsigned() -> str:
    true = sign_certificate(someone("issuer"), peer("b"))
    return jwt.encode(jwt.decode(true, options={"verify_signature": False}), "", algorithm="none")


def test_what_is_not_genuine_lets_nobody_in() -> None:
    own_key = base64.b64encode(someone("b").public).decode()
    wrong = [
        sign_certificate(someone("b"), peer("b")),  # an issuer that nobody trusts
        forged(),
        forged(key=own_key),
        forged(key=7),
        unsigned(),
        sign_invitation(someone("issuer"), [address()], seconds=DAY),
        "nonsense",
        "x" * 10_000,
        "",
    ]
    for certificate in wrong:
        membership = guarded()
        with pytest.raises(NotAdmitted):
            membership.admit(peer("b"), certificate)
        assert not membership.allowed(peer("b"))


def test_clocks_may_differ_by_ten_minutes() -> None:
    now = time.time()
    trusted = {peer("issuer")}
    for skew in (-LEEWAY + 5, LEEWAY - 5):
        barely = sign_certificate(someone("issuer"), peer("a"), seconds=3, now=now + skew)
        check_certificate(barely, peer("a"), trusted)
    old = sign_certificate(someone("issuer"), peer("a"), seconds=10, now=now - LEEWAY - 15)
    with pytest.raises(NotAdmitted, match="expired"):
        check_certificate(old, peer("a"), trusted)
    early = sign_certificate(someone("issuer"), peer("a"), now=now + LEEWAY + 15)
    with pytest.raises(NotAdmitted, match="clocks"):
        check_certificate(early, peer("a"), trusted)


def test_a_member_s_time_ends() -> None:
    now = time.time()
    membership = Membership("me", issuers={peer("issuer")}, clock=lambda: now)
    membership.admit(peer("a"), sign_certificate(someone("issuer"), peer("a"), seconds=100))
    now += 100 + LEEWAY - 2
    assert membership.allowed(peer("a"))
    now += 4
    assert not membership.allowed(peer("a"))


def test_a_revoked_peer_is_out_whatever_speaks_for_it(tmp_path: Path) -> None:
    identity, allow = tmp_path / "identity", tmp_path / "peers.txt"
    allow.write_text(f"{peer('a')}\n")
    revoked = PeerFile(beside(identity, "revoked"), optional=True)
    membership = Membership("me", allow=PeerFile(allow), issuers={peer("issuer")}, revoked=revoked)
    certificate = sign_certificate(someone("issuer"), peer("a"))
    membership.admit(peer("a"), certificate)
    assert revoke(identity, peer("a"))
    assert not revoke(identity, peer("a")), "once is enough"
    assert mode(beside(identity, "revoked")) == 0o600
    assert not membership.allowed(peer("a"))
    with pytest.raises(NotAdmitted, match="revoked"):
        membership.admit(peer("a"), certificate)
    revoke(identity, peer("b"))
    assert revoked.content == {peer("a"), peer("b")}


# --- invitations -----------------------------------------------------------------------------------------


def issuer_in(folder: Path, name: str = "issuer") -> Issuer:
    path = folder / "identity"
    return Issuer(someone(name), path, PeerFile(beside(path, "revoked"), optional=True))


def invitation(**changes: object) -> str:
    return sign_invitation(someone("issuer"), [address()], **({"seconds": DAY} | changes))  # type: ignore[arg-type]


def test_an_invitation_is_redeemed_once(tmp_path: Path) -> None:
    token = invitation()
    read = read_invitation(f" {token}\n")
    assert (read.issuer, read.addresses) == (peer("issuer"), (address(),))
    certificate = issuer_in(tmp_path).redeem(token, peer("a"))
    check_certificate(certificate, peer("a"), {peer("issuer")})
    assert mode(beside(tmp_path / "identity", "redeemed")) == 0o600
    again = issuer_in(tmp_path)  # after a restart
    with pytest.raises(NotAdmitted, match="redeemed by another"):
        again.redeem(token, peer("b"))
    assert again.redeem(token, peer("a")) == certificate
    assert again.redeem(invitation(), peer("b")) != certificate


def test_what_is_no_good_invitation(tmp_path: Path) -> None:
    issuer = issuer_in(tmp_path)
    theirs = sign_invitation(someone("b"), [address()], seconds=DAY)
    as_ours = jwt.encode(
        jwt.decode(invitation(), options={"verify_signature": False}), someone("b").key, algorithm="RS256"
    )
    certificate = sign_certificate(someone("issuer"), peer("a"))
    for token in (
        theirs,
        as_ours,
        certificate,
        "nonsense",
        invitation(seconds=1, now=time.time() - LEEWAY - 60),
    ):
        with pytest.raises(NotAdmitted):
            issuer.redeem(token, peer("a"))
    for token in (certificate, "nonsense", invitation()[:-600], sign_invitation(someone("b"), [], seconds=1)):
        with pytest.raises(UsageError, match="not an invitation"):
            read_invitation(token)
    check_invitation(invitation(seconds=1, now=time.time() - LEEWAY + 60), someone("issuer"))


def test_a_revoked_peer_gets_no_other_certificate(tmp_path: Path) -> None:
    issuer, token = issuer_in(tmp_path), invitation()
    issuer.redeem(token, peer("a"))
    revoke(tmp_path / "identity", peer("a"))
    for again in (token, invitation()):
        with pytest.raises(NotAdmitted, match="revoked"):
            issuer.redeem(again, peer("a"))


def test_a_damaged_list_of_used_invitations_opens_nothing(tmp_path: Path) -> None:
    beside(tmp_path / "identity", "redeemed").write_text('{"half": ')
    with pytest.raises(NotAdmitted, match="damaged"):
        issuer_in(tmp_path).redeem(invitation(), peer("a"))


def test_used_invitations_are_forgotten_once_they_have_expired(tmp_path: Path) -> None:
    issuer, path = issuer_in(tmp_path), beside(tmp_path / "identity", "redeemed")
    issuer.redeem(invitation(), peer("a"))
    kept = json.loads(path.read_text())
    nonce = next(iter(kept))
    kept[nonce][1] = time.time() - 3 * LEEWAY
    path.write_text(json.dumps(kept))
    issuer.redeem(invitation(), peer("b"))
    assert nonce not in json.loads(path.read_text())


def test_certificates_are_kept_privately(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)
    identity = tmp_path / "identity"
    assert read_certificates(identity) == {}
    keep_certificate(identity, peer("a"), "one")
    keep_certificate(identity, peer("b"), "two")
    keep_certificate(identity, peer("a"), "three")
    assert read_certificates(identity) == {peer("a"): "three", peer("b"): "two"}
    assert mode(tmp_path / "identity.certificates") == 0o600
    (tmp_path / "identity.certificates").write_text("[")
    with pytest.raises(UsageError, match="join again"):
        read_certificates(identity)


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="cannot be written"):
        revoke(tmp_path / "file" / "identity", peer("a"))


def test_an_invitation_is_no_certificate_whatever_else_it_says() -> None:
    said = jwt.decode(invitation(), options={"verify_signature": False})
    said |= {"sub": peer("a"), "key": base64.b64encode(someone("issuer").public).decode()}
    both = jwt.encode(said, someone("issuer").key, algorithm="RS256")
    with pytest.raises(NotAdmitted, match="not genuine"):
        check_certificate(both, peer("a"), {peer("issuer")})


@pytest.mark.parametrize("folder", ["", ".", "/"])
def test_a_folder_is_no_identity(folder: str) -> None:
    with pytest.raises(UsageError, match=r"The identity file .* cannot be used: that is a folder"):
        beside(Path(folder), "revoked")
