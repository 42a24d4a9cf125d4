"""Addresses as people write them."""

from __future__ import annotations

import socket

import pytest

from corolla.errors import UsageError
from corolla.swarm.directory.addresses import (
    check_ports_free,
    is_loopback,
    join_multiaddr,
    listen_multiaddr,
    peer_of,
)

PEER = "12D3KooWHHcuvioMQumpjayJRYA6bZce9ic3yadLDrZRCncNKGZq"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("127.0.0.1:31330", "/ip4/127.0.0.1/tcp/31330"),
        ("localhost:0", "/ip4/127.0.0.1/tcp/0"),
        ("[::1]:80", "/ip6/::1/tcp/80"),
        ("/ip4/0.0.0.0/tcp/31330", "/ip4/0.0.0.0/tcp/31330"),
        ("/ip4/0.0.0.0/udp/31330/quic", "/ip4/0.0.0.0/udp/31330/quic"),
    ],
)
def test_listen_addresses(text: str, expected: str) -> None:
    assert listen_multiaddr(text) == expected


@pytest.mark.parametrize(
    "text",
    [
        "",
        "8080",
        "example.org:80",
        "1.2.3.4:99999",
        "1.2.3.4:-1",
        "1.2.3.4:x",
        "300.0.0.1:1",
        "/ip4/300.0.0.1/tcp/1",
        "/ip4/1.2.3.4",
        "/ip4/1.2.3.4/tcp/70000",
        "/dns/example.org/tcp/1",
        "1.2.3.4",
        "/ip4/1.2.3.4/tcp/1/nonsense",
        "/ip4/1.2.3.4/tcp/1/p2p/Qm",
        "/ip4/1.2.3.4/tcp/1/p2p/QmXXmzXr867UwrKLdepRzy6zCfKGVzajvQEdzocjj1AKFZ",
    ],
)
def test_wrong_listen_addresses_are_named(text: str) -> None:
    with pytest.raises(UsageError) as error:
        listen_multiaddr(text)
    assert repr(text) in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("prefix", ["/ip4/1.2.3.4/tcp/1", "/dns/example.org/tcp/1", "/ip6/::1/tcp/1"])
def test_join_addresses(prefix: str) -> None:
    assert join_multiaddr(f" {prefix}/p2p/{PEER}\n") == f"{prefix}/p2p/{PEER}"
    assert peer_of(f"{prefix}/p2p/{PEER}") == PEER


@pytest.mark.parametrize(
    "text",
    [
        "junk",
        "",
        PEER,
        f"/p2p/{PEER}",
        "/ip4/1.2.3.4/tcp/1",
        "/ip4/1.2.3.4/tcp/1/p2p/short",
        "1.2.3.4:1",
        f"/ip4/1.2.3.4/tcp/1/p2p/{PEER[:-1]}0",
        f"/ip4/1.2.3.4/tcp/1/p2p/{PEER},/ip4/1.2.3.4/tcp/1/p2p/{PEER}",
    ],
)
def test_wrong_join_addresses_are_named(text: str) -> None:
    with pytest.raises(UsageError) as error:
        join_multiaddr(text)
    assert repr(text) in str(error.value)


def test_loopback() -> None:
    assert is_loopback(["/ip4/127.0.0.1/tcp/0", "/ip6/::1/tcp/0"])
    assert not is_loopback(["/ip4/127.0.0.1/tcp/0", "/ip4/0.0.0.0/tcp/0"])


def test_a_port_in_use_is_named() -> None:
    with socket.socket() as taken:
        taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(UsageError, match=rf"127\.0\.0\.1:{port}.*in use"):
            check_ports_free([f"/ip4/127.0.0.1/tcp/{port}"])
    check_ports_free([f"/ip4/127.0.0.1/tcp/{port}", "/ip4/127.0.0.1/tcp/0", "/ip4/127.0.0.1/udp/1/quic"])
