"""The legal order of messages on one stream, as a table that both sides use.

Invariant: at any moment both peers agree on whose turn it is. A stream carries one exchange at a time: a
client speaks in IDLE and OPEN, a server in all other states, until ENDED, where nobody does.

A `Failure` answers the request at hand and, as `wire/failures.py` says of its code, decides what is left:

- the stream is lost: the bytes that follow cannot be trusted (ENDED). A server may send these in any state, and
  closes the stream after them.
- a stream is refused before any request: the server does not take it at all (ENDED). Its client hears it as the
  answer to its first request.
- a `Step` that does not cost the session: nothing was computed and the cache is as it was (OPEN). So it is for the
  session of a part of `Steps`.
- any other answer to a `Step` or `CloseSession`: the session is gone (IDLE); its client replays it. A refused
  part of `Steps` costs its session the cache likewise, and its stream stays as it is until its client closes it.
- any other answer to another request: as if it had not been made.
"""

from __future__ import annotations

from enum import Enum

from corolla.errors import OutOfOrder
from corolla.wire.failures import meaning
from corolla.wire.messages import (
    Alive,
    Backward,
    CacheContents,
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
    Ping,
    ReadCache,
    ServerStatus,
    Step,
    Steps,
)


class State(Enum):
    """Where the conversation on a stream stands."""

    IDLE = "idle"
    OPENING = "opening a session"
    OPEN = "open session"
    STEPPING = "computing a step"
    CLOSING = "closing a session"
    READING = "reading a session's cache"
    STEPPING_MANY = "computing steps of several sessions"
    FORWARD = "computing a forward pass"
    BACKWARD = "computing a backward pass"
    PING = "answering a ping"
    PING_OPEN = "answering a ping inside a session"
    ENDED = "ended"


TRANSITIONS: dict[State, dict[type[Message], State]] = {
    State.IDLE: {
        OpenSession: State.OPENING,
        Steps: State.STEPPING_MANY,
        Forward: State.FORWARD,
        Backward: State.BACKWARD,
        Ping: State.PING,
    },
    State.OPENING: {Opened: State.OPEN, Alive: State.OPENING, Failure: State.IDLE},
    State.OPEN: {
        Step: State.STEPPING,
        ReadCache: State.READING,
        CloseSession: State.CLOSING,
        Ping: State.PING_OPEN,
    },
    State.STEPPING: {Output: State.OPEN, Alive: State.STEPPING, Failure: State.IDLE},
    State.READING: {CacheContents: State.OPEN, Alive: State.READING, Failure: State.OPEN},
    State.CLOSING: {Closed: State.IDLE, Alive: State.CLOSING, Failure: State.IDLE},
    State.STEPPING_MANY: {Outputs: State.IDLE, Alive: State.STEPPING_MANY, Failure: State.IDLE},
    State.FORWARD: {Output: State.IDLE, Alive: State.FORWARD, Failure: State.IDLE},
    State.BACKWARD: {Gradients: State.IDLE, Alive: State.BACKWARD, Failure: State.IDLE},
    State.PING: {ServerStatus: State.IDLE, Alive: State.PING, Failure: State.IDLE},
    State.PING_OPEN: {ServerStatus: State.OPEN, Alive: State.PING_OPEN, Failure: State.OPEN},
    State.ENDED: {},
}

CLIENT_TURN = frozenset({State.IDLE, State.OPEN})


def following(state: State, message: Message) -> State:
    """The state after `message`. Raises `OutOfOrder(field="type")` where it is not legal in `state`."""
    if state is not State.ENDED and isinstance(message, Failure):
        means = meaning(message)
        if means.stream_lost or (state is State.IDLE and means.refuses_streams):
            return State.ENDED
        if state is State.STEPPING and not means.session_lost:
            return State.OPEN
    try:
        return TRANSITIONS[state][type(message)]
    except KeyError:
        raise OutOfOrder(
            f"{type(message).__name__} is out of order here (state: {state.value}).", field="type"
        ) from None


class Conversation:
    """One side's view of a stream's conversation; both sides advance it with every message."""

    def __init__(self) -> None:
        self.state = State.IDLE

    def advance(self, message: Message) -> None:
        """Note a message that was sent or received. Raises `OutOfOrder`, and stays as it was."""
        self.state = following(self.state, message)

    @property
    def request_open(self) -> bool:
        """Whether the server owes an answer."""
        return self.state not in CLIENT_TURN and self.state is not State.ENDED
