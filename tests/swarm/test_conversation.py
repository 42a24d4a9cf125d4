"""The order of messages: what is legal when, on both sides."""

from __future__ import annotations

from typing import get_args

import pytest

from corolla.errors import ProtocolError
from corolla.swarm.channel import Conversation, following
from corolla.wire.messages import (
    CLIENT_TURN,
    TRANSITIONS,
    Alive,
    Backward,
    CacheContents,
    ClientMessage,
    Closed,
    CloseSession,
    Failure,
    FailureCode,
    Forward,
    Gradients,
    Message,
    Opened,
    OpenSession,
    Output,
    Outputs,
    Part,
    Ping,
    ReadCache,
    ServerMessage,
    ServerStatus,
    State,
    Step,
    Steps,
)

OPEN = OpenSession(model="m", start=0, end=1, rows=1, max_tokens=1)
STEP, CLOSE, PING = Step(position=0), CloseSession(), Ping()
READ, CONTENTS = ReadCache(tokens=1), CacheContents()
FORWARD = Forward(model="m", start=0, end=1)
BACKWARD = Backward(model="m", start=0, end=1)
STATUS = ServerStatus(
    model="m",
    start=0,
    end=1,
    dtype="float32",
    version="",
    sessions=0,
    free_cache_tokens=0,
    tokens_inference=0,
    tokens_forward=0,
    tokens_backward=0,
)
STEPS, OUTPUTS = Steps(parts=(Part(name="0" * 16, position=0, rows=1),)), Outputs()
OPENED, OUTPUT, GRADIENTS, CLOSED, ALIVE = Opened(), Output(), Gradients(), Closed(), Alive()
ASKED = [OPEN, STEP, STEPS, READ, CLOSE, PING, FORWARD, BACKWARD]
ALL = [*ASKED, OPENED, OUTPUT, OUTPUTS, GRADIENTS, CONTENTS, CLOSED, ALIVE, STATUS]


def failure(code: str) -> Failure:
    return Failure(code=code, message="")  # type: ignore[arg-type]


def after(*messages: Message) -> State:
    conversation = Conversation()
    for message in messages:
        conversation.advance(message)
    return conversation.state


def test_whole_conversations() -> None:
    assert (
        after(OPEN, ALIVE, OPENED, STEP, ALIVE, OUTPUT, PING, STATUS, STEP, OUTPUT, CLOSE, CLOSED)
        is State.IDLE
    )
    assert after(FORWARD, ALIVE, ALIVE, OUTPUT, BACKWARD, ALIVE, GRADIENTS, PING, STATUS) is State.IDLE
    assert after(OPEN, OPENED, CLOSE, CLOSED, OPEN, OPENED) is State.OPEN


LEGAL = {
    (): {OPEN, STEPS, FORWARD, BACKWARD, PING},
    (STEPS,): {OUTPUTS, ALIVE},
    (OPEN,): {OPENED, ALIVE},
    (OPEN, OPENED): {STEP, READ, CLOSE, PING},
    (OPEN, OPENED, READ): {CONTENTS, ALIVE},
    (OPEN, OPENED, STEP): {OUTPUT, ALIVE},
    (OPEN, OPENED, CLOSE): {CLOSED, ALIVE},
    (OPEN, OPENED, PING): {STATUS, ALIVE},
    (FORWARD,): {OUTPUT, ALIVE},
    (BACKWARD,): {GRADIENTS, ALIVE},
    (PING,): {STATUS, ALIVE},
}


@pytest.mark.parametrize("before", LEGAL, ids=lambda b: "-".join(type(m).__name__ for m in b) or "start")
def test_only_these_are_legal(before: tuple[Message, ...]) -> None:
    for message in ALL:
        conversation = Conversation()
        for earlier in before:
            conversation.advance(earlier)
        if message in LEGAL[before]:
            conversation.advance(message)
            continue
        state = conversation.state
        with pytest.raises(ProtocolError) as error:
            conversation.advance(message)
        assert error.value.field == "type"
        assert conversation.state is state


def test_every_state_is_covered_and_belongs_to_one_side() -> None:
    assert {after(*before) for before in LEGAL} == set(State) - {State.ENDED}
    for state, row in TRANSITIONS.items():
        speaker = ClientMessage if state in CLIENT_TURN else ServerMessage
        assert set(row) <= set(get_args(speaker))


@pytest.mark.parametrize("code", get_args(FailureCode))
def test_a_refused_step(code: str) -> None:
    expected = dict.fromkeys(("busy", "too_large", "not_batchable"), State.OPEN)
    expected |= dict.fromkeys(("malformed", "version", "out_of_order"), State.ENDED)
    assert after(OPEN, OPENED, STEP, failure(code)) is expected.get(code, State.IDLE)


def test_other_refusals() -> None:
    assert after(OPEN, failure("busy")) is State.IDLE
    assert after(FORWARD, failure("internal")) is State.IDLE
    assert after(STEPS, failure("busy")) is after(STEPS, OUTPUTS) is State.IDLE
    assert after(BACKWARD, failure("no_lease"), BACKWARD, GRADIENTS) is State.IDLE
    assert after(OPEN, OPENED, PING, failure("internal")) is State.OPEN
    assert (
        after(OPEN, OPENED, READ, failure("too_large")) is after(OPEN, OPENED, READ, CONTENTS) is State.OPEN
    )
    assert after(OPEN, OPENED, CLOSE, failure("evicted")) is State.IDLE


@pytest.mark.parametrize("state", [state for state in State if state is not State.ENDED])
def test_a_server_may_end_the_stream_at_any_time(state: State) -> None:
    assert following(state, failure("malformed")) is State.ENDED


@pytest.mark.parametrize("message", [*ALL, failure("busy"), failure("malformed")])
def test_nothing_follows_the_end(message: Message) -> None:
    with pytest.raises(ProtocolError):
        following(State.ENDED, message)


def test_a_server_does_not_refuse_what_nobody_asked() -> None:
    for before, code in (((OPEN, OPENED), "busy"), ((OPEN, OPENED), "not_allowed"), ((), "evicted")):
        with pytest.raises(ProtocolError):
            after(*before, failure(code))


@pytest.mark.parametrize("code", ["busy", "not_allowed"])
def test_a_server_may_refuse_a_stream_before_any_request(code: FailureCode) -> None:
    assert after(failure(code)) is State.ENDED
    assert after(OPEN, failure(code)) is State.IDLE  # so its client hears it


def test_whose_turn_it_is() -> None:
    conversation = Conversation()
    assert not conversation.request_open
    conversation.advance(FORWARD)
    assert conversation.request_open
    conversation.advance(OUTPUT)
    assert not conversation.request_open
    conversation.advance(failure("malformed"))
    assert not conversation.request_open
