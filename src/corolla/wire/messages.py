"""Everything that two peers may say to each other, as typed, versioned, closed structures.

Invariant: a message that decodes is well-formed (types, ranges, no unknown field); what it *means* for a session is
judged by its stream (`TRANSITIONS`, the legal order) and by the server (its own blocks and budgets). At any moment
both peers agree on whose turn it is: a stream carries one exchange at a time. A client speaks in IDLE and OPEN, a
server in all other states, until ENDED, where nobody does.
Tensors do not live in messages: a frame carries them beside the message, by name (`wire/frames.py`).
Names of the tensors that each message takes stand in `TENSORS`, with shapes in terms of
R rows (sequences of a batch), T new tokens, S tokens so far including the new ones, D the hidden size, H and W
widths of what crosses a cut, mostly the hidden size, P prompt tokens, N blocks and K packed sequences or passes; Q
positions of a prefix, and E numbers that it has for each; A the rank of an adapter, F what it has of each block, C
bytes of names.
"""

from __future__ import annotations

from enum import Enum
from typing import Annotated, Literal

import msgspec

# Peers refuse another major protocol version with a typed failure; fields may only be added with a new one.
PROTOCOL_VERSION = 5
PROTOCOL_NAME = "corolla/5"

Count = Annotated[int, msgspec.Meta(ge=0, le=2**31 - 1)]
Positive = Annotated[int, msgspec.Meta(ge=1, le=2**31 - 1)]
Identity = Annotated[str, msgspec.Meta(min_length=1, max_length=128)]
ShortText = Annotated[str, msgspec.Meta(max_length=2048)]
Name = Annotated[str, msgspec.Meta(min_length=16, max_length=64)]
MOST_PARTS = 256  # of one `Steps`
BlockIndex = Annotated[int, msgspec.Meta(ge=0, le=65535)]

# What follows from each stands in `wire/failures.py`.
FailureCode = Literal[
    "malformed",  # the frame or a message's field is not what the schema says
    "version",  # another protocol version
    "out_of_order",  # a legal message at the wrong time
    "wrong_model",  # this server serves another model identity
    "wrong_blocks",  # these blocks are not all served here
    "too_large",  # over a limit that will not change by waiting
    "busy",  # over a budget now; try again after `retry_after`
    "evicted",  # the session's cache is gone; replay it
    "no_lease",  # the forward's graph is gone; send the backward's inputs
    "no_bundle",  # the server has not computed this prompt by itself, or has not got this prefix or adapter; send it
    "draining",  # the server is going away; use another
    "not_allowed",  # the peer may not use this server
    "not_batchable",  # this step cannot be taken among `Steps`; send it as a `Step`
    "internal",  # the server's own fault
]


class Message(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag_field="type", kw_only=True):
    """Base of all messages; `type` on the wire is the class name."""


# --- Client to server -----------------------------------------------------------------------------------


class Origin(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A session of the same peer, open or kept, whose first `tokens` a new one shall begin with.

    `epoch` counts the steps that took something of it back or reordered it; if the server has counted
    another number, the client's picture of that session is out of date, and nothing is copied.
    """

    name: Name
    tokens: Positive
    epoch: Count


class Prefilled(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A prompt that the server may have computed by itself, for a new session to begin with.

    `digest` names it (`models/prompts.py`). A `deep` one is left out of the message: a server that has not
    got it refuses with "no_bundle".
    """

    digest: Name
    deep: bool = False


class OpenSession(Message, frozen=True):
    """Reserve an attention cache for `rows` sequences over blocks [start, end) of `model`.

    `max_tokens` counts what the caches must hold, prompts included. What blocks are given besides (deep prompts, a
    prefix, an adapter) travels here, once, so that whoever replays the session cannot forget it; what comes behind a
    prefix is counted from 0. With an `origin` the columns of `bundle` are the origin's own.
    """

    model: Identity
    start: BlockIndex
    end: BlockIndex
    rows: Positive
    max_tokens: Positive  # reserved at once; a `Step` may ask for more
    name: Name | None = None  # made up by the client, to be named as an `origin`
    origin: Origin | None = None
    bundle: Prefilled | None = None
    known: Name | None = (
        None  # the digest of `prefix` or `lora`, which may be left out: a server that lacks it says "no_bundle"
    )


class Step(Message, frozen=True):
    """Run the new tokens through the session's blocks, from `position` on.

    What the cache holds from `position` on is forgotten first (a rollback costs no round trip); with the
    tensor `rows` the cached sequences are reordered (beam search) or repeated before that; their number
    may change. `reserve` is the total number of tokens a row may reach in the present call: the server grows
    the session's reservation to that, or refuses with "busy" before it computes anything. Tokens of a replay may have
    come in several passes; `lengths` says in which, where that makes a difference to what is computed.
    """

    position: Count
    reserve: Count = 0


class Part(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One session's step among `Steps`; the next `rows` of the hidden states are its own.

    `name` is the session's, the rest as in `Step`.
    """

    name: Name
    position: Count
    rows: Positive
    reserve: Count = 0


class Steps(Message, frozen=True):
    """The next tokens of several sessions that the peer has open on other streams of its own.

    Each part is taken or refused by itself. One that cannot be taken here, since it would have to wait for room
    or be computed in pieces, is refused with "not_batchable" and leaves its session as it was.
    """

    parts: Annotated[tuple[Part, ...], msgspec.Meta(min_length=1, max_length=MOST_PARTS)]


class ReadCache(Message, frozen=True):
    """Ask for the keys and values of the session's first `tokens` tokens, of its only row, as a prefix has them."""

    tokens: Positive


class CloseSession(Message, frozen=True):
    """Free the session's cache; the stream may then be used for another session.

    With `keep` the server may keep the cache under the session's name until it needs the room.
    """

    keep: bool = False


class Forward(Message, frozen=True):
    """Run whole sequences through blocks [start, end), without a cache (training).

    They travel packed, one behind the other in a single row. With a `lease`, a name that the client makes
    up, the server may keep what a backward needs for a while.
    """

    model: Identity
    start: BlockIndex
    end: BlockIndex
    lease: Name | None = None
    known: Name | None = None  # as in `OpenSession`


class Backward(Message, frozen=True):
    """Gradients of `Forward` on the same tensors, given the gradient of its output.

    With a `lease` only `grad` is sent; a server that has kept nothing under that name answers "no_lease",
    and is sent everything.
    """

    model: Identity
    start: BlockIndex
    end: BlockIndex
    prompt_gradient: bool = False  # whether that for what blocks are given is wanted as well
    lease: Name | None = None
    known: Name | None = None  # as in `OpenSession`


class Ping(Message, frozen=True):
    """Ask for `ServerStatus`."""


# --- Server to client -----------------------------------------------------------------------------------


class Opened(Message, frozen=True):
    """The session's cache is reserved, and holds the first `position` tokens of its origin or of its bundle.

    Those of a bundle come with the outputs for them, [1, position, H], the same for every row.
    """

    position: Count = 0


class Output(Message, frozen=True):
    """The hidden states after the blocks that were asked for."""


class CacheContents(Message, frozen=True):
    """The answer to `ReadCache`."""


class Gradients(Message, frozen=True):
    """The answer to `Backward`."""


class Closed(Message, frozen=True):
    """The session's cache is freed."""


class Alive(Message, frozen=True):
    """Sign of life, sent every `HEARTBEAT_SECONDS` while a request waits or computes."""

    ahead: Count = 0  # requests that will be computed before this one


class ServerStatus(Message, frozen=True):
    """What a server is and has done; counters are totals since its start."""

    model: Identity
    start: BlockIndex
    end: BlockIndex
    dtype: Annotated[str, msgspec.Meta(max_length=32)]
    version: Annotated[str, msgspec.Meta(max_length=64)]
    sessions: Count
    free_cache_tokens: Count
    tokens_inference: int  # rows × new tokens of all `Step`s
    tokens_forward: int
    tokens_backward: int


class Failure(Message, frozen=True):
    """A typed refusal; `field` names the message field or tensor that was wrong, where one was."""

    code: FailureCode
    message: ShortText
    field: Annotated[str, msgspec.Meta(max_length=128)] | None = None
    retry_after: Annotated[float, msgspec.Meta(ge=0, le=3600)] | None = None


class Outputs(Message, frozen=True):
    """The answer to `Steps`: the hidden states of all parts; zeros for those that were refused, which are named."""

    failures: Annotated[tuple[tuple[Name, Failure], ...], msgspec.Meta(max_length=MOST_PARTS)] = ()


ClientMessage = OpenSession | Step | Steps | ReadCache | CloseSession | Forward | Backward | Ping
ServerMessage = (
    Opened | Output | Outputs | CacheContents | Gradients | Closed | Alive | ServerStatus | Failure
)

HEARTBEAT_SECONDS = 1.0
SILENCE_SECONDS = 4.0  # a peer that says nothing for so long while a request is open is taken for hung

# name -> (shape, required). Optional tensors are left out of the frame.
#   hidden     activations in the compute dtype: hidden states, and what else crosses the cut (models/cut_layout.py)
#   mask       bool, True where a token is real; left out when all are
#   positions  int64 position ids; left out when they are start, start+1, …
#   rows       int64 [R], which cached row each row continues
#   …_scales   float32, of a compressed tensor, B a token (`frames.compress`)
#   lengths    int64 [K], of the sequences that are packed into one row (R = 1) of T tokens; of a `Step`, of the passes
#              in which its T tokens came first
#   prompts    float32 deep prompts, added to positions 0…P-1 before each of the N blocks
#   prefix     float32 keys and values of Q positions before all tokens, for each of the N blocks (models/prompts.py)
#   lora       float32 adapter of the N blocks (models/lora.py), of the layers that `targets` names
#   targets    uint8, UTF-8, a line each
_GIVEN = {
    "prompts": ("N P D", False),
    "prefix": ("N Q E", False),
    "lora": ("N A F", False),
    "targets": ("C", False),
}
TENSORS: dict[type[Message], dict[str, tuple[str, bool]]] = {
    OpenSession: _GIVEN,
    Step: {
        "hidden": ("R T H", True),
        "hidden_scales": ("R T B", False),
        "mask": ("R S", False),
        "positions": ("R T", False),
        "rows": ("R", False),
        "lengths": ("K", False),
    },
    Steps: {"hidden": ("R T H", True), "hidden_scales": ("R T B", False)},
    Forward: {
        "hidden": ("R T H", True),
        "hidden_scales": ("R T B", False),
        "lengths": ("K", True),
        "positions": ("R T", False),
        **_GIVEN,
    },
    Backward: {
        "grad": ("R T H", True),
        "grad_scales": ("R T B", False),
        "hidden": ("R T W", False),
        "hidden_scales": ("R T C", False),
        "lengths": ("K", False),
        "positions": ("R T", False),
        **_GIVEN,
    },
    CacheContents: {"prefix": ("N Q E", True)},
    Opened: {"hidden": ("R T H", False), "hidden_scales": ("R T B", False)},
    Output: {"hidden": ("R T H", True), "hidden_scales": ("R T B", False)},
    Outputs: {"hidden": ("R T H", True), "hidden_scales": ("R T B", False)},
    Gradients: {
        "grad": ("R T H", True),
        "grad_scales": ("R T B", False),
        "prompts": ("N P D", False),
        "prefix": ("N Q E", False),
        "lora": ("N A F", False),
    },
}

_FLOATING = ("float16", "bfloat16", "float32", "float64")
DTYPES: dict[str, tuple[str, ...]] = {
    "hidden": (*_FLOATING, "int8"),
    "grad": (*_FLOATING, "int8"),
    "hidden_scales": ("float32",),
    "grad_scales": ("float32",),
    "prompts": _FLOATING,
    "prefix": _FLOATING,
    "lora": _FLOATING,
    "targets": ("uint8",),
    "mask": ("bool",),
    "positions": ("int64",),
    "rows": ("int64",),
    "lengths": ("int64",),
}


# --- The legal order of messages on one stream ------------------------------------------------------------


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


# What may be said in each state, and the state after it; what a `Failure` leaves depends on its code
# (`failures.ends_in`).
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

# Whose turn it is.
CLIENT_TURN = frozenset({State.IDLE, State.OPEN})
