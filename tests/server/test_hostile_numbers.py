"""Numbers that nobody means: not finite, far away, in impossible shapes. They harm who sent them alone."""

from __future__ import annotations

import math
import struct
from typing import Any

import msgspec
import pytest
import torch
from tests.fuzz.frames import written
from tests.server.world import (
    BLOCKS,
    HIDDEN,
    PREAMBLE,
    Blocker,
    OneServer,
    RawClient,
    assert_same,
    assert_serves_exactly,
    forward,
    noise,
    opening,
    packed,
    until_waiting,
)
from torch import Tensor

from corolla.errors import ProtocolError
from corolla.wire.failures import failure_of
from corolla.wire.frames import MAX_DIMENSION, Limits, Packet, encode, parse_header
from corolla.wire.messages import PROTOCOL_VERSION, ClientMessage, CloseSession, Failure, Opened, Output, Step

NOT_FINITE = (math.nan, math.inf, -math.inf)


async def ask(client: RawClient, body: dict[str, Any], tensors: dict[str, Tensor]) -> Packet:
    """Tensors of any dtype, which `RawClient` does not send."""
    await client.stream.write([written(body, tensors)])
    return await client.answer()


@pytest.mark.parametrize("value", NOT_FINITE)
async def test_not_finite_numbers_stay_with_their_sender(world: OneServer, value: float) -> None:
    """In one packed pass with another client's step, for the rows of a prompt and for single tokens."""
    bad, good = await world.raw(), await world.raw()
    hidden = noise(1, 9, HIDDEN)
    wanted = world.reference.forward(hidden)
    for client in (bad, good):
        assert (await client.ask(opening())).message == Opened()
    for begin, end in ((0, 4), (4, 5), (5, 9)):
        async with Blocker(world.engine):
            await bad.send(Step(position=begin), hidden=torch.full((1, end - begin, HIDDEN), value).double())
            await good.send(Step(position=begin), hidden=hidden[:, begin:end])
            await until_waiting(world, 2)
        poisoned, answer = await bad.answer(), await good.answer()
        assert not poisoned.tensors["hidden"].isfinite().all()
        assert_same(answer.tensors["hidden"], wanted[:, begin:end])


@pytest.mark.parametrize("prompts", [True, False])
async def test_pages_that_held_such_numbers_are_clean_for_the_next(world: OneServer, prompts: bool) -> None:
    """All of the pool's pages, and nothing of what stood there counts."""
    bad = await world.raw()
    deep = {"prompts": torch.full((BLOCKS, 3, HIDDEN), math.nan)} if prompts else {}
    assert (await bad.ask(opening(rows=13, tokens=16), **deep)).message == Opened()
    await bad.ask(Step(position=0), hidden=torch.full((13, 16, HIDDEN), math.nan).double())
    assert (await bad.ask(CloseSession())).message.__class__.__name__ == "Closed"
    await assert_serves_exactly(world)


async def test_such_numbers_in_training_stay_with_their_sender(world: OneServer) -> None:
    bad = await world.raw()
    for value in NOT_FINITE:
        answer = await bad.ask(forward(lease="0" * 16), **packed(torch.full((1, 5, HIDDEN), value).double()))
        assert answer.message == Output()
    await assert_serves_exactly(world)


@pytest.mark.parametrize("scale", [*NOT_FINITE, -1.0, 3e38])
async def test_scales_that_nobody_means(world: OneServer, scale: float) -> None:
    bad, good = await world.raw(), await world.raw()
    tensors = {
        "hidden": torch.ones(1, 4, HIDDEN, dtype=torch.int8),
        "hidden_scales": torch.full((1, 4, 1), scale),
    }
    assert (await bad.ask(opening())).message == Opened()
    answer = await ask(bad, {"type": "Step", "position": 0}, tensors)
    assert answer.message == Output()
    assert answer.tensors["hidden"].dtype == torch.int8  # in the form in which it was asked
    await good.stream.close()
    await assert_serves_exactly(world)


@pytest.mark.parametrize(
    ("position", "taken"), [(MAX_DIMENSION, True), (MAX_DIMENSION + 1, False), (2**63 - 1, False)]
)
async def test_positions_far_away(world: OneServer, position: int, taken: bool) -> None:
    client = await world.raw()
    assert (await client.ask(opening())).message == Opened()
    ids = torch.tensor([[0, 1, position]])
    message = (await client.ask(Step(position=0), hidden=noise(1, 3, HIDDEN), positions=ids)).message
    if taken:
        assert message == Output()
    else:
        assert isinstance(message, Failure)
        assert (message.code, message.field) == ("malformed", "positions")
    await client.stream.close()
    await world.all_streams_ended()
    await assert_serves_exactly(world)


# --- tensors and headers; no family is needed for these ----------------------------------------------------


@pytest.fixture
def span_of_one() -> dict[str, Any]:
    return {"model": "m", "start": 0, "end": 1}


def header(message: dict[str, Any], tensors: Any) -> bytes:
    return msgspec.msgpack.encode({"tensors": tensors, "message": message})


def refused(data: bytes, payload: int = 0) -> ProtocolError:
    with pytest.raises(ProtocolError) as found:
        parse_header(data, payload, ClientMessage)
    assert isinstance(
        msgspec.msgpack.decode(msgspec.msgpack.encode(failure_of(found.value)), type=Failure), Failure
    )
    return found.value


@pytest.mark.parametrize("scaled", ["hidden", "grad"])
def test_scales_without_their_tensor(span_of_one: dict[str, Any], scaled: str) -> None:
    """A backward may leave its hidden states out; it used to be a KeyError when only their scales came."""
    given = {"grad": "hidden", "hidden": "grad"}[scaled]
    tensors = [[given, "float32", [1, 2, 8]], [f"{scaled}_scales", "float32", [1, 2, 1]]]
    error = refused(header({"type": "Backward", **span_of_one}, tensors), 64 + 16)
    assert error.field == ("hidden_scales" if scaled == "hidden" else "grad")


def test_many_tiny_tensors(span_of_one: dict[str, Any]) -> None:
    tensors = [["hidden", "int8", [1]]] * 4000
    assert refused(header({"type": "Forward", **span_of_one}, tensors), 4000 * 16).field == "tensors"
    different = [[f"{number}", "bool", []] for number in range(5000)]
    assert refused(header({"type": "Forward", **span_of_one}, different), 5000 * 16).field == "tensors"


def test_what_is_small_on_the_wire_and_large_in_memory(span_of_one: dict[str, Any]) -> None:
    """Eight-bit numbers are expanded to four times their size; that counts too."""
    tokens = Limits().max_payload_bytes // 4 // 1024 + 1
    tensors = [["hidden", "int8", [1, tokens, 1024]], ["hidden_scales", "float32", [1, tokens, 1]],
               ["lengths", "int64", [1]]]  # fmt: skip
    payload = tokens * 1024 + -(-tokens * 4 // 16) * 16 + 16
    assert payload < Limits().max_payload_bytes
    error = refused(header({"type": "Forward", **span_of_one}, tensors), payload)
    assert (error.field, "expanded" in str(error)) == ("payload", True)


def test_a_client_does_not_send_what_would_be_too_large_when_expanded() -> None:
    from corolla.errors import UsageError

    tensors = {"hidden": torch.zeros(1, 300, 8, dtype=torch.int8), "hidden_scales": torch.zeros(1, 300, 1)}
    with pytest.raises(UsageError, match="a smaller batch"):
        encode(Packet(Step(position=0), tensors), Limits(max_payload_bytes=9000))


@pytest.mark.parametrize("count", [b"\xdd\xff\xff\xff\xff", b"\xdd\x05\xff\xff\xff", b"\xdc\xff\xff"])
def test_a_header_that_announces_more_than_it_holds(count: bytes) -> None:
    for data in (b"\x82\xa7tensors" + count + b"\x93\xa1x\xa4bool\x90" * 50, b"\x82" + count, count):
        assert refused(data).field is not None


@pytest.mark.parametrize("opened", [b"\x91", b"\x81\xa1a", b"\xdd\x00\x00\x00\x01"])
def test_deep_nesting(opened: bytes) -> None:
    depth = 60_000 // len(opened)
    for before in (b"\x82\xa7tensors\x90\xa7message", b"\x82\xa7tensors", b"\x81", b""):
        assert refused(before + opened * depth).field is not None


def test_the_name_of_a_wrong_field_is_not_sent_back() -> None:
    """It is the peer's, and a refusal must be well-formed itself."""
    answer = failure_of(refused(header({"type": "Ping", "x" * 50_000: 1}, [])))
    assert answer.field == "message"
    assert len(answer.message) < 2048


@pytest.mark.parametrize("dtype", ["int32", "complex64", "object", "float8_e4m3fn", "", "x" * 17, "Float32"])
def test_dtypes_that_do_not_travel(dtype: str) -> None:
    error = refused(header({"type": "Step", "position": 0}, [["hidden", dtype, [1, 1, 8]]]), 32)
    assert error.field in ("hidden", "tensors")


@pytest.mark.parametrize(
    "shape", [[], [0], [1, 0, 8], [1, 1, 2**31], [1, -1, 8], [2**31 - 1] * 3, [1] * 5, [1, 1, 8.5]]
)
def test_shapes_that_no_tensor_has(shape: list[Any]) -> None:
    error = refused(header({"type": "Step", "position": 0}, [["hidden", "float32", shape]]), 32)
    assert error.field in ("hidden", "tensors", "payload")


async def test_a_preamble_that_promises_a_payload_of_no_tensors(world: OneServer) -> None:
    client = await world.raw()
    data = header({"type": "Ping"}, [])
    await client.stream.write([struct.pack(PREAMBLE, b"CRLA", PROTOCOL_VERSION, 0, len(data), 2**20) + data])
    message = (await client.answer()).message
    assert isinstance(message, Failure)
    assert (message.code, message.field) == ("malformed", "payload")
