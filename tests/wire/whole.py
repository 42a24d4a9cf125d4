"""A whole frame at once, for those who have one in memory."""

from __future__ import annotations

from typing import Any

from corolla.errors import ProtocolError
from corolla.wire.frames import (
    LIMITS,
    PREAMBLE_SIZE,
    Buffer,
    Limits,
    Packet,
    parse_header,
    parse_payload,
    parse_preamble,
)


def decode(data: Buffer, allowed: Any, limits: Limits = LIMITS) -> Packet:
    """The packet that a frame holds. Raises as the three steps of a channel do."""
    whole = bytearray(data)
    if len(whole) < PREAMBLE_SIZE:
        raise ProtocolError("The frame is shorter than its preamble.", field="frame")
    sizes = parse_preamble(whole[:PREAMBLE_SIZE], limits)
    if len(whole) != PREAMBLE_SIZE + sizes.header + sizes.payload:
        raise ProtocolError("The frame is not as long as its preamble says.", field="frame")
    body = PREAMBLE_SIZE + sizes.header
    header = parse_header(whole[PREAMBLE_SIZE:body], sizes.payload, allowed, limits)
    return parse_payload(header, whole[body:])
