"""One tree of errors; the class says whose fault it is, the text says what to do about it.

    CorollaError                  all that Corolla raises on purpose
    ├── UsageError                something that the user gave is wrong
    │   ├── UnexpectedArgument    a function has no argument of this name; a `TypeError`, too
    │   ├── UnknownModel          no checkpoint of this name
    │   ├── UnsupportedFamily     a model that cannot be split into spans
    │   ├── CheckpointError       files of a checkpoint that are missing or damaged
    │   ├── DataError             training data that cannot be read
    │   ├── BundleError           a saved prompt that cannot be read, or of another model
    │   ├── TranscriptError       a saved chat that cannot be read or written, or of another model
    │   ├── SessionLimit          a call that would run past its session's `max_length`
    │   ├── NonFiniteLoss         a training loss that is not a number any more
    │   └── NotAdmitted           a guarded swarm that does not let this client in
    ├── RemoteError               a peer (`peer_id`) did not do what it should; others are tried before you see it
    │   ├── PeerUnreachable       no connection could be opened
    │   ├── PeerDisconnected      the stream ended in the middle
    │   ├── PeerSilent            no sign of life for longer than allowed
    │   ├── ProtocolError         it sent what the protocol does not allow
    │   │   └── OutOfOrder        ... or not at this moment
    │   ├── RequestRefused        it answered with a typed refusal (`code`)
    │   └── LyingServer           its results are wrong: do again what it had a part in
    └── SwarmUnavailable          nobody can do the work now
        └── MissingBlocks         nobody serves some `blocks`

Invariant: the text of each is one sentence that a user can act on. The command line prints that sentence and exits
with `exit_code`. Whatever a peer or a file has put into it, it steers no terminal, has an end, and is one line where a
peer has a part in it.
"""

from __future__ import annotations

from collections.abc import Sequence

from corolla.text import for_terminal, one_line

MOST_OF_A_PEER = 2048  # characters


class CorollaError(Exception):
    """Base of all errors that Corolla raises on purpose."""

    exit_code = 1

    def __init__(self, message: str = "") -> None:
        super().__init__(for_terminal(message))


# --- The caller's fault: a wrong argument, file or model ------------------------------------------------


class UsageError(CorollaError):
    """Something that the user gave is wrong; the text says what, and what to do instead."""

    exit_code = 2


class UnexpectedArgument(UsageError, TypeError):
    """A function of Corolla's has no argument of this name; the text says which it has, or what was meant."""


class UnknownModel(UsageError):
    """No checkpoint answers to this name, or it cannot be reached."""


class UnsupportedFamily(UsageError):
    """The model's family cannot be split into spans; refused at load, before anything is served."""


class CheckpointError(UsageError):
    """A checkpoint's files are missing, truncated or do not hold the tensors that they should."""


class DataError(UsageError):
    """Training data that cannot be read or in which no row has a known shape."""


class BundleError(UsageError):
    """A saved prompt that cannot be read, or that belongs to another model."""


class TranscriptError(UsageError):
    """A chat's transcript that cannot be read or written, or that is of a chat with another model."""


class SessionLimit(UsageError):
    """A call would run past the `max_length` that its session was opened with; nothing was computed."""


class NonFiniteLoss(UsageError):
    """The training loss became NaN or infinite; the text says what to try."""


class NotAdmitted(UsageError):
    """A guarded peer does not let this one in: not invited, expired, revoked; the text says what to do."""


# --- A peer's fault: it is avoided for a while, and another one is tried --------------------------------


class RemoteError(CorollaError):
    """A peer did not do what it should; `peer_id` says which."""

    def __init__(self, message: str, *, peer_id: str | None = None) -> None:
        super().__init__(one_line(message, characters=MOST_OF_A_PEER))
        self.peer_id = peer_id


class PeerUnreachable(RemoteError):
    """No connection to the peer could be opened."""


class PeerDisconnected(RemoteError):
    """The stream ended in the middle of an exchange."""


class PeerSilent(RemoteError):
    """The peer sent nothing, not even a sign of life, for longer than allowed."""


class ProtocolError(RemoteError):
    """The peer sent something that the protocol does not allow; `field` names what was wrong."""

    def __init__(self, message: str, *, field: str | None = None, peer_id: str | None = None) -> None:
        super().__init__(message, peer_id=peer_id)
        self.field = field


class OutOfOrder(ProtocolError):
    """The peer sent a message that is legal, but not at this moment."""


class RequestRefused(RemoteError):
    """The peer answered with a typed refusal (`wire.messages.Failure`).

    `code` is one of `wire.messages.FailureCode`; `retry_after` is in seconds where the peer named a time.
    """

    def __init__(
        self,
        message: str,
        *,
        code: str,
        field: str | None = None,
        retry_after: float | None = None,
        peer_id: str | None = None,
    ) -> None:
        super().__init__(message, peer_id=peer_id)
        self.code = code
        self.field = field
        self.retry_after = retry_after


class LyingServer(RemoteError):
    """An audit found that the peer's results are wrong; what it had a part in is to be done again."""


# --- Nobody's fault, or the swarm's as a whole ----------------------------------------------------------


class SwarmUnavailable(CorollaError):
    """The swarm cannot do the work now: nobody answers, or nobody serves some blocks."""


class MissingBlocks(SwarmUnavailable):
    """No reachable server serves `blocks`; the text says which, and what to start."""

    def __init__(self, message: str, *, blocks: Sequence[int] = ()) -> None:
        super().__init__(message)
        self.blocks = tuple(blocks)
