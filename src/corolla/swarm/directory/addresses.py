"""Addresses as people write them, checked before any process is started.

Invariant: what comes out is a multiaddress that the network layer can parse; what cannot become one is a
`UsageError` that names it.
"""

from __future__ import annotations

import ipaddress
import re
import socket
from collections.abc import Sequence

from corolla.errors import UsageError

_BASE58 = re.compile(r"[1-9A-HJ-NP-Za-km-z]{40,64}")
_LISTEN = re.compile(r"/(ip4|ip6)/([^/]+)/(tcp|udp)/(\d{1,5})(/.*)?")
_JOIN = re.compile(r"/(ip4|ip6|dns|dns4|dns6|dnsaddr)/[^/,\s]+(/[^,\s]*)?/p2p/([^/,\s]+)")


def listen_multiaddr(text: str) -> str:
    """`host:port`, `[ip6]:port` or a multiaddress without a peer id, as a multiaddress.

    A host must be an IP address of this machine, or `localhost`. Raises `UsageError`.
    """
    match = _LISTEN.fullmatch(text)
    if match is not None:
        _checked_ip(match[2], text)
        _checked_port(match[4], text)
        return _parsed(text)
    host, separator, port = text.rpartition(":")
    if not separator or text.startswith("/"):
        raise UsageError(
            f"{text!r} is not an address to listen on; write it as HOST:PORT, like 0.0.0.0:31330."
        )
    ip = _checked_ip("127.0.0.1" if host == "localhost" else host.strip("[]"), text)
    return f"/ip{ip.version}/{ip}/tcp/{_checked_port(port, text)}"


def _parsed(text: str) -> str:
    from hivemind.utils.multiaddr import Multiaddr  # slow to import, and few write multiaddresses

    try:
        names_peer = "p2p" in (each.name for each in Multiaddr(text).protocols())
    except ValueError as error:
        raise UsageError(
            f"{text!r} is not a multiaddress; write it as HOST:PORT, like 0.0.0.0:31330."
        ) from error
    if names_peer:
        raise UsageError(f"{text!r} names a peer: give the address alone, up to the port.")
    return text


def join_multiaddr(text: str) -> str:
    """A join address, as `corolla bootstrap` prints it, checked. Raises `UsageError`."""
    match = _JOIN.fullmatch(text.strip())
    if match is None or not _BASE58.fullmatch(match[3]):
        raise UsageError(
            f"{text!r} is not a join address; paste the line that `corolla bootstrap` printed, "
            "like /ip4/10.0.0.1/tcp/31330/p2p/12D3Koo…"
        )
    return text.strip()


def peer_of(join_address: str) -> str:
    """The peer id at the end of a join address."""
    return join_address.rpartition("/p2p/")[2]


def is_loopback(listen: Sequence[str]) -> bool:
    """Whether none of these listen multiaddresses can be reached from another machine."""
    return all(ipaddress.ip_address(address.split("/")[2]).is_loopback for address in listen)


def check_ports_free(listen: Sequence[str]) -> None:
    """Raises `UsageError` for a TCP port that is in use or an address that this machine has not.

    The network layer listens with SO_REUSEPORT and would share the port with another peer in silence.
    """
    for address in listen:
        _, family, host, protocol, port, *_ = address.split("/")
        if protocol != "tcp" or port == "0":
            continue
        with socket.socket(socket.AF_INET6 if family == "ip6" else socket.AF_INET) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # old connections do not count
            try:
                probe.bind((host, int(port)))
            except OSError as error:
                raise UsageError(
                    f"Cannot listen on {host}:{port}: {error.strerror}; choose another."
                ) from error


def _checked_ip(host: str, text: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address:
    try:
        return ipaddress.ip_address(host)
    except ValueError:
        raise UsageError(
            f"{host!r} in the address {text!r} is not an IP address; give one, like 0.0.0.0."
        ) from None


def _checked_port(port: str, text: str) -> int:
    if not port.isdigit() or int(port) > 65535:
        raise UsageError(f"{port!r} in the address {text!r} is not a port; give a number up to 65535.")
    return int(port)
