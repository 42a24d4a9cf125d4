"""Frames: how one message and its tensors become bytes, and bytes become a message again. No I/O.

A frame is a preamble of fixed size, a msgpack header and a payload:

    preamble  magic "CRLA", protocol version (u16), reserved 0 (u16), header bytes (u32), payload bytes (u64)
    header    {"tensors": [[name, dtype, shape], …], "message": {"type": …, …}}
    payload   the tensors' bytes, little-endian, row-major; each tensor starts at a multiple of `ALIGNMENT`

Invariant: no size that a peer names is believed before it is checked against `Limits`, and a `Packet` that
comes out of `parse_payload` is well-formed in every respect that `wire/messages.py` describes: its tensors have
names, dtypes and shapes that its message may have, and lie inside the payload that was announced. That is checked on
the header, before the payload's memory is taken. Both directions are free of copies where a tensor is contiguous and
on the CPU.

Activations and gradients may travel in fewer bytes, for slow lines: a compressed tensor under its own name, with its
scales beside it. What is compressed is a pure function of the values, so a replay gives a server the very same
tensors as the first time. Blockwise 8-bit integers as in Dettmers et al. 2022 (arXiv:2110.02861), with a linear code.
"""

from __future__ import annotations

import re
import struct
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from math import prod
from typing import Annotated, Any

import msgspec
import torch
from torch import Tensor
from torch.nn.functional import pad

from corolla.config import WireFormat
from corolla.errors import ProtocolError, UsageError
from corolla.text import one_line
from corolla.wire.messages import (
    DTYPES,
    PROTOCOL_VERSION,
    TENSORS,
    Backward,
    Forward,
    Message,
    OpenSession,
    Steps,
)

if sys.byteorder != "little":
    raise ImportError("Corolla's wire format is little-endian; this machine is not.")

Buffer = bytes | bytearray | memoryview

MAGIC = b"CRLA"
_PREAMBLE = struct.Struct("<4sHHIQ")
PREAMBLE_SIZE = _PREAMBLE.size

ALIGNMENT = 16
MAX_DIMENSION = 2**31 - 1
COMPRESSED = ("hidden", "grad")  # names of the tensors that are worth it
INT8_BLOCK = 64  # values that share a scale

_DTYPES: dict[str, torch.dtype] = {
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "float32": torch.float32,
    "float64": torch.float64,
    "int8": torch.int8,
    "uint8": torch.uint8,
    "bool": torch.bool,
    "int64": torch.int64,
}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}

Dimension = Annotated[int, msgspec.Meta(ge=1, le=MAX_DIMENSION)]


class TensorSpec(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """One tensor of a frame: its name, dtype and shape."""

    name: Annotated[str, msgspec.Meta(max_length=32)]
    dtype: Annotated[str, msgspec.Meta(max_length=16)]
    shape: Annotated[tuple[Dimension, ...], msgspec.Meta(max_length=4)]

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor itself, without padding."""
        return prod(self.shape) * _DTYPES[self.dtype].itemsize


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
        return expanded_bytes(self.tensors)


@dataclass(frozen=True)
class Packet:
    """A message and its tensors, by the names of `messages.TENSORS`."""

    message: Message
    tensors: dict[str, Tensor] = field(default_factory=dict)


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
        specs = describe(packet.tensors)
        check_tensors(packet.message, specs)
    except ProtocolError as error:
        raise ValueError(f"This packet must not be sent: {error}") from error
    size = bytes_of(specs)
    taken = max(size, expanded_bytes(specs))
    if taken > limits.max_payload_bytes:
        raise UsageError(
            f"One request would take {taken / 2**20:.0f} MiB, and a server accepts at most "
            f"{limits.max_payload_bytes / 2**20:.0f}; use a smaller batch, shorter sequences or a shorter prompt."
        )
    raw = msgspec.Raw(msgspec.msgpack.encode(packet.message))
    header = msgspec.msgpack.encode(_RawHeader(specs, raw))
    preamble = _PREAMBLE.pack(MAGIC, PROTOCOL_VERSION, 0, len(header), size)
    return [preamble + header, *to_buffers(packet.tensors)]


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
    check_tensors(message, raw.tensors)
    expected = bytes_of(raw.tensors)
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
    return Packet(header.message, from_payload(header.tensors, payload))


@lru_cache(maxsize=16)
def _message_decoder(allowed: Any) -> msgspec.msgpack.Decoder[Any]:
    return msgspec.msgpack.Decoder(allowed)


def _field_of(text: str) -> str:
    """The name of the offending field, as far as msgspec tells it."""
    named = re.search(r"(?:required|unknown) field `([^`]+)`", text) or re.search(r"`\$\.(\w+)", text)
    return named.group(1) if named else "message"


# --- Tensors ---------------------------------------------------------------------------------------------


def describe(tensors: Mapping[str, Tensor]) -> tuple[TensorSpec, ...]:
    """The specs of `tensors`, in their order. Raises `ProtocolError` for a dtype that cannot travel."""
    for name, tensor in tensors.items():
        if tensor.dtype not in _NAMES:
            raise ProtocolError(f"A tensor of dtype {tensor.dtype} cannot be sent.", field=name)
    return tuple(TensorSpec(name, _NAMES[t.dtype], tuple(t.shape)) for name, t in tensors.items())


def check_tensors(message: Message, specs: Sequence[TensorSpec]) -> None:
    """Compare the tensors of a frame with what its message takes.

    Raises `ProtocolError`, whose `field` is the tensor's name (or the message's field), for an unknown,
    repeated or missing tensor, a dtype outside the allowlist, a wrong rank, or shapes that contradict each
    other or the message.
    """
    table = TENSORS.get(type(message), {})
    given = {spec.name: spec for spec in specs}
    if len(given) != len(specs):
        raise ProtocolError("A frame names the same tensor twice.", field="tensors")
    for name in given.keys() - table.keys():
        raise ProtocolError(f"{type(message).__name__} takes no tensor {name!r}.", field=name)
    sizes = _sizes_from_message(message)
    # In the table's order: what contradicts the hidden states is at fault, not the hidden states.
    for name, (shape, required) in table.items():
        if name in given:
            _check_dtype(given[name])
            _match(given[name], shape.split(), sizes)
        elif required:
            raise ProtocolError(f"{type(message).__name__} needs the tensor {name!r}.", field=name)
        if name not in given and scales_of(name) in given:
            raise ProtocolError(f"There are scales for {name!r}, which is missing.", field=scales_of(name))
    if "S" in sizes and "T" in sizes and sizes["S"] < sizes["T"]:
        raise ProtocolError("The mask is shorter than the new tokens; it must cover them all.", field="mask")


def _sizes_from_message(message: Message) -> dict[str, int]:
    if isinstance(message, Steps):
        return {"R": sum(part.rows for part in message.parts)}
    if not isinstance(message, OpenSession | Forward | Backward):
        return {}
    if message.end <= message.start:
        raise ProtocolError(f"Blocks {message.start}:{message.end} are an empty range.", field="end")
    return {"N": message.end - message.start}


def _check_dtype(spec: TensorSpec) -> None:
    allowed = DTYPES[spec.name]
    if spec.dtype not in allowed:
        raise ProtocolError(
            f"The tensor {spec.name!r} is {one_line(spec.dtype)}; it may be {', '.join(allowed)}.",
            field=spec.name,
        )


def _match(spec: TensorSpec, letters: list[str], sizes: dict[str, int]) -> None:
    """Bind each letter of a shape to its size, or compare it with the size that it already has."""
    if len(spec.shape) != len(letters):
        raise ProtocolError(
            f"The tensor {spec.name!r} has {len(spec.shape)} dimensions instead of {len(letters)}.",
            field=spec.name,
        )
    for letter, size in zip(letters, spec.shape, strict=True):
        if sizes.setdefault(letter, size) != size:
            raise ProtocolError(
                f"The tensor {spec.name!r} has shape {list(spec.shape)}, but its dimension {letter} must be "
                f"{sizes[letter]}.",
                field=spec.name,
            )


def padded(nbytes: int) -> int:
    """`nbytes`, rounded up to where the next tensor starts."""
    return -(-nbytes // ALIGNMENT) * ALIGNMENT


def bytes_of(specs: Sequence[TensorSpec]) -> int:
    """Bytes that the tensors take in a payload, padding included. The dtypes must be known ones."""
    return sum(padded(spec.nbytes) for spec in specs)


def expanded_bytes(specs: Sequence[TensorSpec]) -> int:
    """Bytes that the tensors take in memory once those with scales are float32 again (`expand`)."""
    names = {spec.name for spec in specs}
    return sum(
        4 * prod(spec.shape) if scales_of(spec.name) in names else padded(spec.nbytes) for spec in specs
    )


def to_buffers(tensors: Mapping[str, Tensor]) -> list[memoryview]:
    """The payload's bytes. The buffers share memory with the tensors: do not change these until sent."""
    buffers: list[memoryview] = []
    for tensor in tensors.values():
        flat = tensor.detach().cpu().reshape(-1)  # copies only what is not contiguous
        raw: Any = flat.view(torch.uint8).numpy()
        buffers.append(memoryview(raw))
        if gap := padded(raw.nbytes) - raw.nbytes:
            buffers.append(memoryview(bytes(gap)))
    return buffers


def from_payload(specs: Sequence[TensorSpec], payload: bytearray) -> dict[str, Tensor]:
    """The tensors of a payload; they share its memory, so that it must not be used for anything else.

    Raises `ProtocolError` for values that no dtype can rule out: a bool that is neither 0 nor 1, a position,
    row or length that is negative or beyond `MAX_DIMENSION`.
    """
    tensors: dict[str, Tensor] = {}
    offset = 0
    for spec in specs:
        tensors[spec.name] = _checked(spec, payload, offset).reshape(spec.shape)
        offset += padded(spec.nbytes)
    return tensors


def _checked(spec: TensorSpec, payload: bytearray, offset: int) -> Tensor:
    dtype = _DTYPES[spec.dtype]
    flat: Tensor
    if dtype == torch.bool:
        # Any other byte would be an invalid C++ bool, whose meaning differs between kernels.
        flat = torch.frombuffer(payload, dtype=torch.uint8, count=prod(spec.shape), offset=offset)
        if int(flat.max()) > 1:
            raise ProtocolError(f"The tensor {spec.name!r} holds bytes other than 0 and 1.", field=spec.name)
        return flat.view(torch.bool)
    flat = torch.frombuffer(payload, dtype=dtype, count=prod(spec.shape), offset=offset)
    if dtype == torch.int64:
        if int(flat.min()) < 0:
            raise ProtocolError(f"The tensor {spec.name!r} holds a negative number.", field=spec.name)
        if int(flat.max()) > MAX_DIMENSION:
            raise ProtocolError(f"The tensor {spec.name!r} holds a number beyond 2^31.", field=spec.name)
    return flat


# --- Fewer bytes -----------------------------------------------------------------------------------------


def scales_of(name: str) -> str:
    """The name of the tensor that holds the scales of `name`."""
    return f"{name}_scales"


def compress(tensors: Mapping[str, Tensor], form: WireFormat) -> dict[str, Tensor]:
    """The same tensors with `COMPRESSED` ones [R, T, H] in `form`, and their scales float32 [R, T, B] beside them."""
    sent = dict(tensors)
    if form == "compute":
        return sent
    for name in COMPRESSED:
        if name in sent:
            sent[name], sent[scales_of(name)] = _squeezed(sent[name], form)
    return sent


def expand(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], WireFormat]:
    """The tensors as they were before, float32 where they were compressed; and the form that they came in.

    Raises `ProtocolError` for scales that do not fit their tensor.
    """
    found = dict(tensors)
    form: WireFormat = "compute"
    for name in COMPRESSED:
        scales = found.pop(scales_of(name), None)
        if scales is None:
            if name in found and found[name].dtype == torch.int8:
                raise ProtocolError(f"The tensor {name!r} is int8 and has no scales.", field=name)
            continue
        form = "int8" if found[name].dtype == torch.int8 else "float16"
        found[name] = _restored(name, found[name], scales)
    return found, form


def _squeezed(values: Tensor, form: WireFormat) -> tuple[Tensor, Tensor]:
    size = int(values.shape[-1])
    block = size if form == "float16" else INT8_BLOCK
    blocks = _in_blocks(values.float(), -(-size // block))
    # Infinite values stay infinite, and NaN stays NaN, through the scale.
    scales = blocks.abs().amax(-1)
    unit = blocks / scales.clamp(min=torch.finfo(torch.float32).tiny).unsqueeze(-1)
    if form == "float16":
        return unit.half().flatten(-2)[..., :size].contiguous(), scales
    levels = (unit * 127).round().nan_to_num(0.0).clamp(-127, 127)
    return levels.to(torch.int8).flatten(-2)[..., :size].contiguous(), scales


def _restored(name: str, values: Tensor, scales: Tensor) -> Tensor:
    size, count = int(values.shape[-1]), int(scales.shape[-1])
    if count not in (1, -(-size // INT8_BLOCK)) or values.dtype not in (torch.int8, torch.float16):
        raise ProtocolError(f"{count} scales a token do not fit {name!r}.", field=scales_of(name))
    unit = _in_blocks(values.float(), count)
    if values.dtype == torch.int8:
        unit.div_(127)
    # In place: the values are large, and a peer chose how large.
    return unit.mul_(scales.unsqueeze(-1)).flatten(-2)[..., :size].contiguous()


def _in_blocks(values: Tensor, count: int) -> Tensor:
    """[R, T, H] as [R, T, count, ceil(H / count)] (blocks of 64 for int8), filled up with zeros."""
    size = int(values.shape[-1])
    block = size if count == 1 else INT8_BLOCK
    return pad(values, (0, count * block - size)).reshape(*values.shape[:-1], count, block)
