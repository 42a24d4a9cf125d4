"""Frames: how one message and its tensors become bytes, and bytes become a message again. No I/O.

A frame is a preamble of fixed size, a msgpack header and a payload:

    preamble  magic "CRLA", protocol version (u16), reserved 0 (u16), header bytes (u32), payload bytes (u64)
    header    {"tensors": [[name, dtype, shape], …], "message": {"type": …, …}}
    payload   the tensors' bytes, as `wire/tensors.py` lays them out

Invariant: no size that a peer names is believed before it is checked against `Limits`, and a `Packet` that
comes out of `parse_payload` is well-formed in every respect that `wire/messages.py` describes.
"""

from __future__ import annotations

import re
import struct
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Annotated, Any

import msgspec
import torch

from corolla.errors import ProtocolError, UsageError
from corolla.text import one_line
from corolla.wire import tensors as codec
from corolla.wire.messages import PROTOCOL_VERSION, Message
from corolla.wire.tensors import TensorSpec

Buffer = bytes | bytearray | memoryview

MAGIC = b"CRLA"
_PREAMBLE = struct.Struct("<4sHHIQ")
PREAMBLE_SIZE = _PREAMBLE.size


@dataclass(frozen=True)
class Limits:
    """What one frame may take, in bytes."""

    max_header_bytes: int = 64 * 1024
    max_payload_bytes: int = 256 * 1024 * 1024


LIMITS = Limits()


@dataclass(frozen=True)
class Sizes:
    """What a preamble announces, in bytes; within the limits."""

    header: int
    payload: int


@dataclass(frozen=True)
class Header:
    """A checked header: what the payload will hold."""

    message: Message
    tensors: tuple[TensorSpec, ...]
    payload_size: int

    @property
    def expanded_size(self) -> int:
        """Bytes that the tensors take once they are as they were before compression."""
        return codec.expanded_size(self.tensors)


@dataclass(frozen=True)
class Packet:
    """A message and its tensors, by the names of `messages.TENSORS`."""

    message: Message
    tensors: dict[str, torch.Tensor] = field(default_factory=dict)


MOST_TENSORS = 16  # more than any message takes


class _RawHeader(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    tensors: Annotated[tuple[TensorSpec, ...], msgspec.Meta(max_length=MOST_TENSORS)]
    message: msgspec.Raw


_header_decoder = msgspec.msgpack.Decoder(_RawHeader)


def encode(packet: Packet, limits: Limits = LIMITS) -> list[Buffer]:
    """The bytes of a frame, as buffers to be written one after the other.

    The tensors' buffers share memory with the tensors. Raises `ValueError` for a packet that breaks the
    rules of `messages.TENSORS` (a mistake of ours), `UsageError` for one that is larger than a peer would
    take.
    """
    try:
        specs = codec.describe(packet.tensors)
        codec.check(packet.message, specs)
    except ProtocolError as error:
        raise ValueError(f"This packet must not be sent: {error}") from error
    size = codec.payload_size(specs)
    taken = max(size, codec.expanded_size(specs))
    if taken > limits.max_payload_bytes:
        raise UsageError(
            f"One request would take {taken / 2**20:.0f} MiB, and a server accepts at most "
            f"{limits.max_payload_bytes / 2**20:.0f}; use a smaller batch, shorter sequences or a shorter prompt."
        )
    raw = msgspec.Raw(msgspec.msgpack.encode(packet.message))
    header = msgspec.msgpack.encode(_RawHeader(specs, raw))
    preamble = _PREAMBLE.pack(MAGIC, PROTOCOL_VERSION, 0, len(header), size)
    return [preamble + header, *codec.to_buffers(packet.tensors)]


def parse_preamble(data: Buffer, limits: Limits = LIMITS) -> Sizes:
    """The sizes of header and payload, from exactly `PREAMBLE_SIZE` bytes.

    Raises `ProtocolError` for what is not a preamble or announces more than `limits` allow, and, with
    `field="version"`, for another version: the peer may be answered with `Failure("version")`.
    """
    magic, version, reserved, header, payload = _PREAMBLE.unpack(data)
    if magic != MAGIC:
        raise ProtocolError("The peer does not speak Corolla's protocol.", field="magic")
    if version != PROTOCOL_VERSION:
        raise ProtocolError(
            f"The peer speaks version {version} of the protocol and this is version {PROTOCOL_VERSION}; "
            "run the same release on both sides.",
            field="version",
        )
    if reserved != 0:
        raise ProtocolError("A reserved field of the preamble is not zero.", field="reserved")
    if header > limits.max_header_bytes:
        raise ProtocolError(
            f"A header of {header} bytes is over the limit of {limits.max_header_bytes}.", field="header"
        )
    if payload > limits.max_payload_bytes:
        raise ProtocolError(
            f"A payload of {payload} bytes is over the limit of {limits.max_payload_bytes}.", field="payload"
        )
    return Sizes(header, payload)


def parse_header(data: Buffer, payload_size: int, allowed: Any, limits: Limits = LIMITS) -> Header:
    """Decode and check a header; `allowed` is the union of the message types that the peer may send.

    A payload must stay within `limits` in its expanded form too.

    Raises `ProtocolError`, with the `field` that was wrong.
    """
    try:
        raw = _header_decoder.decode(data)
        message: Message = _message_decoder(allowed).decode(raw.message)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        # What the error says may come from the peer: the name of a field, for one.
        text = one_line(error)
        raise ProtocolError(f"A message could not be read: {text}.", field=_field_of(text)) from error
    codec.check(message, raw.tensors)
    expected = codec.payload_size(raw.tensors)
    if expected != payload_size:
        raise ProtocolError(
            f"The payload has {payload_size} bytes, and its tensors take {expected}.", field="payload"
        )
    header = Header(message, raw.tensors, payload_size)
    if header.expanded_size > limits.max_payload_bytes:
        raise ProtocolError(
            f"The tensors take {header.expanded_size} bytes when they are expanded, which is over the limit.",
            field="payload",
        )
    return header


def parse_payload(header: Header, payload: bytearray) -> Packet:
    """The packet; its tensors share the payload's memory. Raises `ProtocolError` for impossible values."""
    if len(payload) != header.payload_size:
        raise ValueError(f"The payload has {len(payload)} bytes instead of {header.payload_size}.")
    return Packet(header.message, codec.from_payload(header.tensors, payload))


@lru_cache(maxsize=16)
def _message_decoder(allowed: Any) -> msgspec.msgpack.Decoder[Any]:
    return msgspec.msgpack.Decoder(allowed)


def _field_of(text: str) -> str:
    """The name of the offending field, as far as msgspec tells it."""
    named = re.search(r"(?:required|unknown) field `([^`]+)`", text) or re.search(r"`\$\.(\w+)", text)
    return named.group(1) if named else "message"
