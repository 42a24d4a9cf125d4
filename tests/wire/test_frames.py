"""Frames: what goes in comes out, and nothing else comes out."""

from __future__ import annotations

import contextlib
import struct
from typing import Any

import msgspec
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tests.wire.whole import decode

from corolla.errors import ProtocolError, UsageError
from corolla.wire.frames import (
    LIMITS,
    PREAMBLE_SIZE,
    Limits,
    Packet,
    encode,
    parse_header,
    parse_payload,
    parse_preamble,
)
from corolla.wire.messages import (
    PROTOCOL_VERSION,
    Alive,
    Backward,
    CacheContents,
    ClientMessage,
    Closed,
    CloseSession,
    Failure,
    Forward,
    Gradients,
    Message,
    Opened,
    OpenSession,
    Output,
    Outputs,
    Part,
    Ping,
    Prefilled,
    ReadCache,
    ServerMessage,
    ServerStatus,
    Step,
    Steps,
)

AnyMessage = ClientMessage | ServerMessage
R, T, S, H, N, P = 2, 3, 5, 4, 6, 7
FLOATING = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


def hidden(dtype: torch.dtype = torch.float32, *shape: int) -> torch.Tensor:
    return torch.randn(shape or (R, T, H), generator=torch.Generator().manual_seed(1)).to(dtype)


PROMPTS = hidden(torch.float32, N, P, H)
PREFIX = hidden(torch.float32, N, P, 4 * H)
POSITIONS = torch.arange(R * T).reshape(R, T)
EVERYTHING: list[Packet] = [
    Packet(OpenSession(model="m", start=2, end=8, rows=R, max_tokens=9)),
    Packet(OpenSession(model="m", start=2, end=8, rows=R, max_tokens=9), {"prompts": PROMPTS}),
    Packet(Step(position=4, reserve=9), {"hidden": hidden()}),
    Packet(
        Step(position=0),
        {
            "mask": torch.tensor([[True, False, True, True, False]] * R),
            "hidden": hidden(),
            "rows": torch.tensor([1, 1]),
            "positions": POSITIONS,
        },
    ),
    Packet(
        OpenSession(
            model="m", start=2, end=8, rows=R, max_tokens=9, bundle=Prefilled(digest="0" * 64, deep=True)
        )
    ),
    Packet(OpenSession(model="m", start=2, end=8, rows=R, max_tokens=9, known="0" * 64), {"prefix": PREFIX}),
    Packet(ReadCache(tokens=P)),
    Packet(CacheContents(), {"prefix": PREFIX}),
    Packet(CloseSession()),
    Packet(
        Forward(model="m", start=0, end=N),
        {"hidden": hidden()[:1], "lengths": torch.tensor([T - 1, 1]), "prompts": PROMPTS},
    ),
    Packet(
        Backward(model="m", start=0, end=N, prompt_gradient=True),
        {
            "hidden": hidden(),
            "lengths": torch.tensor([T]),
            "grad": hidden() * 2,
            "positions": POSITIONS,
            "prompts": PROMPTS,
        },
    ),
    Packet(
        Forward(model="m", start=0, end=N, lease="a lease's name " + "0" * 20),
        {"hidden": hidden()[:1], "lengths": torch.tensor([T]), "positions": POSITIONS[:1]},
    ),
    Packet(Backward(model="m", start=0, end=N, lease="0" * 16), {"grad": hidden()[:1]}),
    Packet(Ping()),
    Packet(Opened()),
    Packet(Opened(position=P), {"hidden": hidden(torch.float32, 1, P, H)}),
    Packet(Output(), {"hidden": hidden()}),
    Packet(
        Steps(
            parts=(
                Part(name="0" * 16, position=2, rows=1, reserve=9),
                Part(name="1" * 16, position=0, rows=1),
            )
        ),
        {"hidden": hidden()},
    ),
    Packet(Outputs(failures=(("1" * 16, Failure(code="evicted", message="gone")),)), {"hidden": hidden()}),
    Packet(Gradients(), {"grad": hidden(), "prompts": PROMPTS}),
    Packet(Gradients(), {"grad": hidden(), "prefix": PREFIX}),
    Packet(Gradients(), {"grad": hidden(), "lora": PREFIX}),
    Packet(
        Forward(model="m", start=0, end=N, known="0" * 64),
        {
            "hidden": hidden()[:1],
            "lengths": torch.tensor([T]),
            "lora": PREFIX,
            "targets": torch.tensor([97, 10, 98], dtype=torch.uint8),
        },
    ),
    Packet(
        Forward(model="m", start=0, end=N, known="0" * 64),
        {"hidden": hidden()[:1], "lengths": torch.tensor([T]), "prefix": PREFIX},
    ),
    Packet(
        Backward(model="m", start=0, end=N, prompt_gradient=True, known="0" * 64),
        {"hidden": hidden()[:1], "lengths": torch.tensor([T]), "grad": hidden()[:1]},
    ),
    Packet(Closed()),
    Packet(Alive(ahead=3)),
    Packet(
        ServerStatus(
            model="m",
            start=0,
            end=2,
            dtype="float32",
            version="0.1.0",
            sessions=1,
            free_cache_tokens=5,
            tokens_inference=2**40,
            tokens_forward=0,
            tokens_backward=0,
        )
    ),
    Packet(Failure(code="busy", message="Später…", field="hidden", retry_after=1.5)),
]


def frame(packet: Packet) -> bytearray:
    return bytearray(b"".join(encode(packet)))


def raw_frame(header: object, payload: bytes = b"", *, payload_size: int | None = None) -> bytes:
    """A frame that `encode` would not make."""
    data = header if isinstance(header, bytes) else msgspec.msgpack.encode(header)
    size = len(payload) if payload_size is None else payload_size
    return struct.pack("<4sHHIQ", b"CRLA", PROTOCOL_VERSION, 0, len(data), size) + data + payload


def same(a: Packet, b: Packet) -> bool:
    return (
        a.message == b.message
        and list(a.tensors) == list(b.tensors)
        and all(t.dtype == b.tensors[n].dtype and torch.equal(t, b.tensors[n]) for n, t in a.tensors.items())
    )


@pytest.mark.parametrize("packet", EVERYTHING, ids=lambda p: type(p.message).__name__)
def test_every_message_survives(packet: Packet) -> None:
    assert same(decode(frame(packet), AnyMessage), packet)


def test_the_list_above_holds_every_message() -> None:
    assert {type(packet.message) for packet in EVERYTHING} == set(Message.__subclasses__())


@pytest.mark.parametrize("dtype", FLOATING)
def test_every_dtype_survives(dtype: torch.dtype) -> None:
    values = hidden(dtype)
    values[0, 0, 0], values[0, 0, 1] = float("nan"), float("-inf")
    received = decode(frame(Packet(Output(), {"hidden": values})), ServerMessage).tensors["hidden"]
    assert received.dtype == dtype
    assert torch.equal(received.nan_to_num(7.0), values.nan_to_num(7.0))


@given(st.lists(st.integers(1, 9), min_size=3, max_size=3), st.sampled_from(FLOATING), st.booleans())
def test_any_layout_survives(shape: list[int], dtype: torch.dtype, transposed: bool) -> None:
    tensor = torch.arange(shape[0] * shape[1] * shape[2]).reshape(shape).to(dtype)
    tensor = tensor.transpose(0, 2) if transposed else tensor
    received = decode(frame(Packet(Output(), {"hidden": tensor})), ServerMessage).tensors["hidden"]
    assert torch.equal(received, tensor)


def test_gradient_tracking_stays_at_home() -> None:
    tensor = hidden().requires_grad_()
    assert (
        not decode(frame(Packet(Output(), {"hidden": tensor})), ServerMessage).tensors["hidden"].requires_grad
    )


def test_no_copy_on_either_side() -> None:
    tensor = hidden()
    preamble, body = encode(Packet(Output(), {"hidden": tensor}))[:2]
    tensor.zero_()
    assert bytes(body) == bytes(tensor.nbytes)
    sizes = parse_preamble(bytes(preamble)[:PREAMBLE_SIZE])
    header = parse_header(bytes(preamble)[PREAMBLE_SIZE:], sizes.payload, ServerMessage)
    payload = bytearray(sizes.payload)
    received = parse_payload(header, payload).tensors["hidden"]
    received.fill_(1)
    assert any(payload)


def test_tensors_are_aligned() -> None:
    """An odd number of mask bytes in front must not shift the others."""
    packet = decode(frame(EVERYTHING[3]), ClientMessage)
    base = packet.tensors["mask"].data_ptr()
    assert all((tensor.data_ptr() - base) % 16 == 0 for tensor in packet.tensors.values())


# --- what must not come out -------------------------------------------------------------------------------


def refuse(data: bytes | bytearray, field: str, allowed: Any = AnyMessage, limits: Limits = LIMITS) -> str:
    with pytest.raises(ProtocolError) as error:
        decode(data, allowed, limits)
    assert error.value.field == field
    return str(error.value)


def test_what_an_error_says_of_a_peer_s_bytes_steers_no_terminal() -> None:
    header = msgspec.msgpack.encode({"tensors": [], "message": {"type": "Ping", "\x1b[2J\u202e": 1}})
    with pytest.raises(ProtocolError) as error:
        parse_header(header, 0, ClientMessage)
    assert error.value.field == "[2J"
    assert "\x1b" not in str(error.value)


def test_a_wrong_preamble() -> None:
    good = frame(Packet(Ping()))
    refuse(b"HTTP" + good[4:], "magic")
    for other in (PROTOCOL_VERSION - 1, PROTOCOL_VERSION + 1):
        changed = good[:4] + other.to_bytes(2, "little") + good[6:]
        assert f"version {other}" in refuse(changed, "version")
    refuse(good[:6] + b"\x01\x00" + good[8:], "reserved")


def test_sizes_are_refused_before_memory_is_taken() -> None:
    limits = Limits(max_header_bytes=1000, max_payload_bytes=2000)
    for header, payload, field in [(1001, 0, "header"), (10, 2001, "payload"), (10, 2**64 - 1, "payload")]:
        data = struct.pack("<4sHHIQ", b"CRLA", PROTOCOL_VERSION, 0, header, payload)
        with pytest.raises(ProtocolError) as error:
            parse_preamble(data, limits)
        assert error.value.field == field
    parse_preamble(struct.pack("<4sHHIQ", b"CRLA", PROTOCOL_VERSION, 0, 1000, 2000), limits)


def test_a_shape_that_claims_more_than_the_payload() -> None:
    huge = [["hidden", "float64", [2**31 - 1] * 3]]
    refuse(raw_frame({"tensors": huge, "message": {"type": "Output"}}, b"\0" * 16), "payload")


def test_a_payload_of_another_size_than_its_tensors() -> None:
    header = {"tensors": [["hidden", "float32", [1, 1, 4]]], "message": {"type": "Output"}}
    refuse(raw_frame(header, bytes(32)), "payload")
    refuse(raw_frame(header, b""), "payload")
    refuse(raw_frame({"tensors": [], "message": {"type": "Ping"}}, bytes(1)), "payload")


def test_a_bottomless_message() -> None:
    body = b"\x82\xa7tensors\x90\xa7message" + b"\x91" * 60_000 + b"\xc0"
    refuse(raw_frame(body), "message")


@pytest.mark.parametrize(
    ("message", "field"),
    [
        ({"type": "Nonsense"}, "type"),
        ({}, "type"),
        ({"type": "Ping", "extra": 1}, "extra"),
        ({"type": "Step"}, "position"),
        ({"type": "Step", "position": -1}, "position"),
        ({"type": "Step", "position": 2**31}, "position"),
        ({"type": "Step", "position": 1.5}, "position"),
        ({"type": "Step", "position": "1"}, "position"),
        ({"type": "Step", "position": True}, "position"),
        ({"type": "Forward", "model": "", "start": 0, "end": 1}, "model"),
        ({"type": "Forward", "model": "m" * 129, "start": 0, "end": 1}, "model"),
        ({"type": "Forward", "model": "m", "start": 0, "end": 65536}, "end"),
        ({"type": "Forward", "model": "m", "start": 3, "end": 3}, "end"),
        ({"type": "Forward", "model": "m", "start": 0, "end": 1, "lease": "too short"}, "lease"),
        ({"type": "Forward", "model": "m", "start": 0, "end": 1, "lease": "x" * 65}, "lease"),
        ({"type": "Forward", "model": "m", "start": 0, "end": 1, "lease": 1}, "lease"),
        ({"type": "OpenSession", "model": "m", "start": 0, "end": 1, "rows": 0, "max_tokens": 1}, "rows"),
        ({"type": "Failure", "code": "whatever", "message": ""}, "code"),
        ({"type": "Failure", "code": "busy", "message": "x" * 2049}, "message"),
        ({"type": "Failure", "code": "busy", "message": "", "retry_after": float("nan")}, "retry_after"),
        ([1, 2], "message"),
        (None, "message"),
    ],
)
def test_a_wrong_message(message: object, field: str) -> None:
    tensors: list[object] = []
    payload = b""
    if isinstance(message, dict) and message.get("type") in ("Step", "Forward"):
        tensors, payload = [["hidden", "float32", [1, 1, 4]]], bytes(16)
        if message["type"] == "Forward":
            tensors, payload = [*tensors, ["lengths", "int64", [1]]], bytes(32)
    refuse(raw_frame({"tensors": tensors, "message": message}, payload), field)


@pytest.mark.parametrize(
    "data", [b"", b"\xc1", b"\x81", b"\xa1\xff", b"\x91" * 50_000, b"\xdd\xff\xff\xff\xff"]
)
def test_a_header_that_is_not_msgpack(data: bytes) -> None:
    refuse(raw_frame(data), "message")


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"mask": None, "other": hidden()}, "other"),
        ({"hidden": None}, "hidden"),
        ({"hidden": hidden(torch.float32, T, H)}, "hidden"),
        ({"hidden": torch.ones(R, T, H, dtype=torch.int64)}, "hidden"),
        ({"mask": torch.ones(R, S, dtype=torch.int64)}, "mask"),
        ({"mask": torch.ones(R + 1, S, dtype=torch.bool)}, "mask"),
        ({"mask": torch.ones(R, T - 1, dtype=torch.bool)}, "mask"),
        ({"positions": POSITIONS.float()}, "positions"),
        ({"positions": POSITIONS[:, 1:]}, "positions"),
        ({"rows": torch.zeros(R + 1, dtype=torch.int64)}, "rows"),
        ({"rows": -torch.ones(R, dtype=torch.int64)}, "rows"),
        ({"positions": POSITIONS - 1}, "positions"),
    ],
)
def test_wrong_tensors(change: dict[str, torch.Tensor | None], field: str) -> None:
    tensors = {name: t for name, t in (EVERYTHING[3].tensors | change).items() if t is not None}
    names = {torch.float32: "float32", torch.int64: "int64", torch.bool: "bool"}
    specs = [[name, names[t.dtype], list(t.shape)] for name, t in tensors.items()]
    payload = b"".join(
        t.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes().ljust(-(-t.nbytes // 16) * 16, b"\0")
        for t in tensors.values()
    )
    refuse(raw_frame({"tensors": specs, "message": {"type": "Step", "position": 0}}, payload), field)
    if field not in ("rows", "positions") or change[field].min() >= 0:  # type: ignore[union-attr]
        with pytest.raises(ValueError, match="must not be sent"):
            encode(Packet(Step(position=0), tensors))


@pytest.mark.parametrize(
    ("spec", "field"),
    [
        (["hidden", "complex64", [1, 1, 2]], "hidden"),
        (["hidden", "float32", [1, 0, 4]], "tensors"),
        (["hidden", "float32", [1, -1, 4]], "tensors"),
        (["hidden", "float32", [1, 2**31, 4]], "tensors"),
        (["hidden", "float32"], "tensors"),
        (["hidden", "float32", [1, 1, 4], 0], "tensors"),
    ],
)
def test_wrong_tensor_specs(spec: list[object], field: str) -> None:
    refuse(raw_frame({"tensors": [spec], "message": {"type": "Output"}}, bytes(16)), field)


def test_the_same_tensor_twice() -> None:
    spec = ["hidden", "float32", [1, 1, 4]]
    refuse(raw_frame({"tensors": [spec, spec], "message": {"type": "Output"}}, bytes(32)), "tensors")


def test_prompts_must_fit_the_blocks() -> None:
    whole = {"hidden": hidden(), "lengths": torch.tensor([T])}
    with pytest.raises(ValueError, match="prompts"):
        encode(Packet(Forward(model="m", start=1, end=N), whole | {"prompts": PROMPTS}))
    # What crosses a cut may be wider than the hidden states; the server knows by how much.
    wide = hidden(torch.float32, R, T, H + 1)
    encode(Packet(Forward(model="m", start=0, end=N), whole | {"hidden": wide, "prompts": PROMPTS}))


def test_a_mask_byte_that_is_no_bool() -> None:
    data = frame(
        Packet(Step(position=0), {"mask": torch.ones(1, 1, dtype=torch.bool), "hidden": hidden()[:1, :1]})
    )
    start = len(data) - 32
    assert data[start] == 1
    data[start] = 2
    refuse(data, "mask")


def test_the_other_side_s_messages_are_refused() -> None:
    refuse(frame(EVERYTHING[2]), "type", ServerMessage)
    refuse(frame(Packet(Opened())), "type", ClientMessage)


def test_a_frame_too_large_for_the_peer_is_not_sent() -> None:
    with pytest.raises(UsageError, match="smaller batch"):
        encode(Packet(Output(), {"hidden": hidden()}), Limits(max_payload_bytes=95))
    encode(Packet(Output(), {"hidden": hidden()}), Limits(max_payload_bytes=96))


@given(st.data())
def test_no_damage_gets_through_as_another_error(data: st.DataObject) -> None:
    """Flipped bits and cut ends give a packet or a `ProtocolError`, never anything else."""
    packet = data.draw(st.sampled_from(EVERYTHING))
    damaged = frame(packet)
    for _ in range(data.draw(st.integers(0, 4))):
        damaged[data.draw(st.integers(0, min(len(damaged), 300) - 1))] ^= data.draw(st.integers(1, 255))
    damaged = damaged[: data.draw(st.integers(len(damaged) // 2, len(damaged)))]
    with contextlib.suppress(ProtocolError):
        decode(damaged, AnyMessage)


def test_the_rows_of_steps_are_all_somebodys() -> None:
    parts = (Part(name="0" * 16, position=0, rows=1), Part(name="1" * 16, position=0, rows=2))
    with pytest.raises(ValueError, match="dimension R must be 3"):
        encode(Packet(Steps(parts=parts), {"hidden": hidden()}))
