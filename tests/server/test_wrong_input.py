"""Whatever a client sends, it gets a typed refusal that names what was wrong, and the server serves on."""

from __future__ import annotations

import struct
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.server.world import (
    CAPACITY,
    HIDDEN,
    PREAMBLE,
    START,
    OneServer,
    RawClient,
    assert_same,
    assert_serves_exactly,
    backward,
    forward,
    frame,
    noise,
    opening,
    packed,
)
from torch import Tensor

from corolla.errors import PeerDisconnected
from corolla.models.attention.pages import PAGE
from corolla.models.prompts import as_tensor
from corolla.wire.failures import MEANINGS
from corolla.wire.frames import Limits
from corolla.wire.messages import (
    PROTOCOL_VERSION,
    Closed,
    CloseSession,
    Failure,
    FailureCode,
    Message,
    Opened,
    Output,
    Ping,
    Prefilled,
    ReadCache,
    ServerStatus,
    Step,
)

Tensors = dict[str, Tensor]


@dataclass(frozen=True)
class Case:
    """A wrong request, and how it is to be answered; `opened` says whether it is sent inside a session.

    That session has two rows, which hold four tokens each and may hold 20.
    """

    name: str
    code: FailureCode
    wrong: str | None  # the field
    message: Message | dict[str, Any]
    tensors: Tensors = field(default_factory=dict)
    opened: bool = False


def hidden(rows: int = 2, tokens: int = 3, width: int = HIDDEN) -> Tensors:
    return {"hidden": noise(rows, tokens, width)}


def whole(rows: int = 2, tokens: int = 3, width: int = HIDDEN, **changes: Tensor) -> Tensors:
    """What `Forward` takes, but for the changes."""
    return packed(noise(rows, tokens, width)) | changes


def step(position: int = 4, reserve: int = 0) -> dict[str, Any]:
    return {"type": "Step", "position": position, "reserve": reserve}


def as_dict(message: Message, **changes: Any) -> dict[str, Any]:
    values = {name: getattr(message, name) for name in message.__struct_fields__}
    return {"type": type(message).__name__} | values | changes


BOTH = packed(noise(2, 3, HIDDEN), grad=noise(2, 3, HIDDEN))
ADAPTER, QUERIES = noise(2, 3, 4 * HIDDEN), as_tensor(["self_attn.q_proj", "self_attention.dense"])
NO_TOKENS = {"hidden": torch.zeros(1, 0, HIDDEN)}
NO_ROWS = {"hidden": torch.zeros(0, 1, HIDDEN)}

CASES = [
    # --- what this server does not have
    Case("open, another model", "wrong_model", "model", opening(model="another")),
    Case("forward, another model", "wrong_model", "model", forward(model="another"), whole()),
    Case("backward, another model", "wrong_model", "model", backward(model="another"), BOTH),
    Case("open, a block before", "wrong_blocks", "start", opening(start=0)),
    Case("open, a block behind", "wrong_blocks", "end", opening(end=4)),
    Case("forward, a block before", "wrong_blocks", "start", forward(start=0), whole()),
    Case("backward, a block behind", "wrong_blocks", "end", backward(end=4), BOTH),
    Case("forward, blocks far away", "wrong_blocks", "start", forward(start=7, end=9), whole()),
    Case("open, no blocks", "malformed", "end", opening(end=START)),
    Case("open, a bundle that is not here", "no_bundle", "bundle",
         opening(bundle=Prefilled(digest="0" * 64, deep=True))),
    Case("open, a bundle of a long name", "malformed", "bundle",
         as_dict(opening(), bundle={"digest": "0" * 65, "deep": True})),
    # --- shapes
    Case("forward, hidden too narrow", "malformed", "hidden", forward(), whole(width=HIDDEN - 1)),
    Case("backward, hidden too wide", "malformed", "hidden", backward(),
         packed(noise(2, 3, HIDDEN + 1), grad=noise(2, 3, HIDDEN + 1))),
    Case("step, hidden too wide", "malformed", "hidden", step(), hidden(width=HIDDEN + 1), opened=True),
    Case("forward, flat hidden", "malformed", "hidden", forward(), whole(hidden=noise(3, HIDDEN))),
    Case("forward, no hidden", "malformed", "hidden", forward(), {"lengths": torch.tensor([1])}),
    Case("forward, integer hidden", "malformed", "hidden", forward(),
         whole(hidden=torch.zeros(1, 6, HIDDEN, dtype=torch.int64))),
    Case("forward, no tokens", "malformed", "tensors", forward(), whole() | NO_TOKENS),
    Case("forward, no rows", "malformed", "tensors", forward(), whole() | NO_ROWS),
    Case("backward, grad of another shape", "malformed", "hidden", backward(),
         whole(grad=noise(1, 5, HIDDEN))),
    Case("backward, no grad", "malformed", "grad", backward(), whole()),
    Case("backward, neither inputs nor a lease", "malformed", "hidden", backward(), {"grad": noise(1, 3, HIDDEN)}),
    Case("backward, no lengths", "malformed", "hidden", backward(),
         {name: noise(1, 3, HIDDEN) for name in ("hidden", "grad")}),
    Case("backward, a lease that nobody made", "no_lease", None, backward(lease="0" * 16),
         {"grad": noise(1, 3, HIDDEN)}),
    Case("forward, a lease of no name", "malformed", "lease", as_dict(forward(), lease=""), whole()),
    Case("forward, a lease of a long name", "malformed", "lease", as_dict(forward(), lease="0" * 65), whole()),
    Case("open, prompts for too many blocks", "malformed", "prompts", opening(),
         {"prompts": noise(3, 4, HIDDEN)}),
    Case("open, prompts too narrow", "malformed", "prompts", opening(), {"prompts": noise(2, 4, HIDDEN - 1)}),
    Case("open, more prompts than tokens", "malformed", "prompts", opening(tokens=3),
         {"prompts": noise(2, 4, HIDDEN)}),
    Case("forward, prompts for too few blocks", "malformed", "prompts", forward(),
         whole(prompts=noise(1, 2, HIDDEN))),
    Case("forward, prompts too wide", "malformed", "prompts", forward(),
         whole(prompts=noise(2, 2, HIDDEN + 1))),
    Case("open, a prefix for too many blocks", "malformed", "prefix", opening(),
         {"prefix": noise(3, 4, 2 * HIDDEN)}),
    Case("open, a prefix too narrow", "malformed", "prefix", opening(), {"prefix": noise(2, 4, 2 * HIDDEN - 1)}),
    Case("open, a prefix and prompts", "malformed", "prefix", opening(),
         {"prefix": noise(2, 4, 2 * HIDDEN), "prompts": noise(2, 4, HIDDEN)}),
    Case("open, a prefix that nobody sent", "no_bundle", "known", opening(known="0" * 64)),
    Case("forward, a prefix that nobody sent", "no_bundle", "known", forward(known="0" * 64), whole()),
    Case("forward, a prefix too wide", "malformed", "prefix", forward(),
         whole(prefix=noise(2, 4, 2 * HIDDEN + 1))),
    Case("forward, a prefix and prompts", "malformed", "prefix", forward(),
         whole(prefix=noise(2, 4, 2 * HIDDEN), prompts=noise(2, 2, HIDDEN))),
    Case("open, an adapter without names", "malformed", "targets", opening(), {"lora": ADAPTER}),
    Case("open, an adapter too narrow", "malformed", "lora", opening(),
         {"lora": ADAPTER[..., :9], "targets": QUERIES}),
    Case("open, an adapter whose names are no text", "malformed", "targets", opening(),
         {"lora": ADAPTER, "targets": torch.tensor([255], dtype=torch.uint8)}),
    Case("open, an adapter that names a layer twice", "malformed", "lora", opening(),
         {"lora": ADAPTER, "targets": as_tensor(["self_attn.q_proj"] * 2)}),
    Case("forward, an adapter of no linear layer", "malformed", "targets", forward(),
         whole(lora=ADAPTER, targets=as_tensor(["self_attn", "self_attention"]))),
    Case("forward, an adapter of too high a rank", "malformed", "lora", forward(),
         whole(lora=noise(2, HIDDEN + 1, 4 * HIDDEN), targets=QUERIES)),
    Case("forward, an adapter and prompts", "malformed", "lora", forward(),
         whole(lora=ADAPTER, targets=QUERIES, prompts=noise(2, 2, HIDDEN))),
    Case("read, more than there is", "malformed", "tokens", ReadCache(tokens=9), opened=True),
    Case("forward, positions for another batch", "malformed", "positions", forward(),
         whole(positions=torch.zeros(1, 3, dtype=torch.int64))),
    Case("forward, negative positions", "malformed", "positions", forward(),
         whole(positions=torch.full((1, 6), -1))),
    Case("forward, a tensor that it does not take", "malformed", "rows", forward(),
         whole() | {"rows": torch.zeros(1, dtype=torch.int64)}),
    Case("forward, a mask", "malformed", "mask", forward(), whole(mask=torch.ones(1, 6, dtype=torch.bool))),
    Case("forward, a tensor that nobody takes", "malformed", "soul", forward(), whole(soul=noise(1))),
    Case("step, a mask of integers", "malformed", "mask", step(),
         hidden() | {"mask": torch.ones(2, 7, dtype=torch.int64)}, opened=True),
    # --- sequences
    Case("forward, no lengths", "malformed", "lengths", forward(), {"hidden": noise(1, 3, HIDDEN)}),
    Case("forward, lengths of too few tokens", "malformed", "lengths", forward(),
         whole(lengths=torch.tensor([3, 2]))),
    Case("forward, lengths of too many tokens", "malformed", "lengths", forward(),
         whole(lengths=torch.tensor([3, 4]))),
    Case("forward, lengths beyond all numbers", "malformed", "lengths", forward(),
         whole(lengths=torch.tensor([2**63 - 1, 2**63 - 1, 8]))),
    Case("forward, a sequence of no length", "malformed", "lengths", forward(),
         whole(lengths=torch.tensor([3, 0, 3]))),
    Case("forward, a negative length", "malformed", "lengths", forward(), whole(lengths=torch.tensor([7, -1]))),
    Case("forward, lengths as numbers with a point", "malformed", "lengths", forward(),
         whole(lengths=torch.tensor([3.0, 3.0]))),
    Case("forward, lengths in rows", "malformed", "lengths", forward(), whole(lengths=torch.tensor([[3, 3]]))),
    Case("forward, sequences in rows", "malformed", "lengths", forward(),
         {"hidden": noise(2, 3, HIDDEN), "lengths": torch.tensor([3, 3])}),
    Case("backward, lengths of too few tokens", "malformed", "lengths", backward(),
         BOTH | {"lengths": torch.tensor([3, 2])}),
    # --- a session's state
    Case("step, position behind the cache", "malformed", "position", step(position=5), hidden(), opened=True),
    Case("step, no tokens", "malformed", "tensors", step(), NO_TOKENS, opened=True),
    Case("step, no rows", "malformed", "tensors", step(), NO_ROWS, opened=True),
    Case("step, more rows than there are", "malformed", "hidden", step(), hidden(rows=3), opened=True),
    Case("step, fewer rows than there are", "malformed", "hidden", step(), hidden(rows=1), opened=True),
    Case("step, a row that is not there", "malformed", "rows", step(),
         hidden() | {"rows": torch.tensor([0, 2])}, opened=True),
    Case("step, a negative row", "malformed", "rows", step(),
         hidden() | {"rows": torch.tensor([0, -1])}, opened=True),
    Case("step, rows for another batch", "malformed", "rows", step(),
         hidden() | {"rows": torch.tensor([0, 1, 1])}, opened=True),
    Case("step, a mask for the new tokens only", "malformed", "mask", step(),
         hidden() | {"mask": torch.ones(2, 3, dtype=torch.bool)}, opened=True),
    Case("step, a mask too long", "malformed", "mask", step(),
         hidden() | {"mask": torch.ones(2, 8, dtype=torch.bool)}, opened=True),
    # --- budgets
    Case("open, more than the server has", "too_large", "max_tokens", opening(tokens=CAPACITY * PAGE + 1)),
    Case("open, more rows than the server has room for", "too_large", "max_tokens", opening(rows=2**31 - 1)),
    Case("step, a reserve that the server does not have", "too_large", "reserve",
         step(reserve=(CAPACITY // 2 + 1) * PAGE + 1), hidden(), opened=True),
    Case("step, an enormous reserve", "too_large", "reserve", step(reserve=2**31 - 1), hidden(), opened=True),
    # --- messages
    Case("a message of no kind", "malformed", "type", {"type": "Nonsense"}),
    Case("a message without a kind", "malformed", "type", {}),
    Case("a server's message", "malformed", "type", {"type": "Closed"}),
    Case("an unknown field", "malformed", "colour", as_dict(opening(), colour="red")),
    Case("a missing field", "malformed", "max_tokens", {"type": "OpenSession", "model": "m", "start": 1,
                                                       "end": 2, "rows": 1}),
    Case("no rows to open", "malformed", "rows", as_dict(opening(), rows=0)),
    Case("a negative position", "malformed", "position", step(position=-1), hidden(), opened=True),
    Case("an enormous position", "malformed", "position", step(position=2**40), hidden(), opened=True),
    Case("text for a number", "malformed", "start", as_dict(opening(), start="one")),
    # --- order
    Case("step without a session", "out_of_order", "type", step(position=0), hidden()),
    Case("close without a session", "out_of_order", "type", CloseSession()),
    Case("open inside a session", "out_of_order", "type", opening(), opened=True),
    Case("forward inside a session", "out_of_order", "type", forward(), whole(), opened=True),
    Case("backward inside a session", "out_of_order", "type", backward(), BOTH, opened=True),
]  # fmt: skip


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
async def test_a_wrong_request_is_refused_by_name(world: OneServer, case: Case) -> None:
    client = await world.raw()
    if case.opened:
        await open_with_four(client)
    before = world.held
    refusal = (await client.ask(case.message, **case.tensors)).message
    assert isinstance(refusal, Failure)
    assert (refusal.code, refusal.field) == (case.code, case.wrong)
    if MEANINGS[case.code].stream_lost:
        with pytest.raises(PeerDisconnected):
            await client.next()
        await world.all_streams_ended()
        assert world.held == (0, 0, 0)
    else:  # nothing has changed, and the stream goes on
        assert world.held == before
        assert isinstance((await client.ask(Ping())).message, ServerStatus)
        if case.opened:
            await goes_on_after_four(world, client)
    await client.stream.close()
    await world.all_streams_ended()
    await assert_serves_exactly(world)


async def open_with_four(client: RawClient) -> None:
    assert (await client.ask(opening(rows=2))).message == Opened()
    answer = await client.ask(Step(position=0), hidden=noise(2, 9, HIDDEN, seed=3)[:, :4])
    assert answer.message == Output()


async def goes_on_after_four(world: OneServer, client: RawClient) -> None:
    """The session of `open_with_four` is as it was."""
    tokens = noise(2, 9, HIDDEN, seed=3)
    answer = await client.ask(Step(position=4), hidden=tokens[:, 4:])
    assert_same(answer.tensors["hidden"], world.reference.forward(tokens)[:, 4:])
    assert (await client.ask(CloseSession())).message == Closed()


def preamble(
    magic: bytes = b"CRLA",
    version: int = PROTOCOL_VERSION,
    reserved: int = 0,
    header: int = 8,
    payload: int = 0,
) -> bytes:
    return struct.pack(PREAMBLE, magic, version, reserved, header, payload)


@pytest.mark.parametrize(
    ("data", "code", "wrong"),
    [
        (b"GET / HTTP/1.1\r\nHost: x\r\n\r\n", "malformed", "magic"),
        (preamble(version=1), "version", "version"),
        (preamble(version=PROTOCOL_VERSION + 1), "version", "version"),
        (preamble(version=0), "version", "version"),
        (preamble(reserved=1), "malformed", "reserved"),
        (preamble(header=2**32 - 1), "malformed", "header"),
        (preamble(payload=2**64 - 1), "malformed", "payload"),
        (preamble(payload=Limits().max_payload_bytes + 1), "malformed", "payload"),
        (preamble(header=8) + b"\xff" * 8, "malformed", "message"),
        (preamble(header=8) + b"\x91" * 8, "malformed", "message"),
        (preamble(header=0), "malformed", "message"),
        (frame(forward(), **whole())[:-1], None, None),  # ends within the payload
        (frame(Ping())[:30], None, None),  # ends within the header
        (b"CRLA", None, None),  # ends within the preamble
        (b"", None, None),
    ],
)  # fmt: skip
async def test_garbage_is_refused_or_forgotten(
    world: OneServer, data: bytes, code: FailureCode | None, wrong: str | None
) -> None:
    client = await world.raw()
    await client.stream.write([data])
    if code is not None:
        refusal = (await client.answer()).message
        assert isinstance(refusal, Failure)
        assert (refusal.code, refusal.field) == (code, wrong)
        with pytest.raises(PeerDisconnected):
            await client.next()
    await client.stream.close()
    await world.all_streams_ended()
    assert world.held == (0, 0, 0)
    await assert_serves_exactly(world)


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
async def test_no_damaged_frame_harms_the_server(data: st.DataObject) -> None:
    """Honest frames with some of their bytes changed, dropped or added."""
    world = OneServer()
    await world.start()
    try:
        client = await world.raw()
        honest = bytearray(
            frame(opening(rows=2))
            + frame(Step(position=0), hidden=noise(2, 3, HIDDEN))
            + frame(CloseSession())
            + frame(forward(lease="1" * 16), **whole(1, 2))
            + frame(backward(lease="1" * 16), grad=noise(1, 2, HIDDEN))
        )
        place = data.draw(st.integers(0, len(honest) - 1))
        dropped = data.draw(st.integers(0, 3))
        honest[place : place + dropped] = data.draw(st.binary(max_size=4))
        await client.stream.write([honest])
        await client.stream.close()
        await world.all_streams_ended()
        assert world.held == (0, 0, 0)
        await assert_serves_exactly(world)
    finally:
        await world.close()
