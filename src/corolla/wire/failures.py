"""What each code of a `Failure` means, for both sides, in one table.

Invariant: nobody else decides anything by a code's name; all ask this table. What a client does about a failure is
carried out by `client/retry.py`, `client/view.py` and those who sent the request; what is left of the stream follows
here. A `Failure` answers the request at hand:

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

from dataclasses import dataclass
from enum import Enum

from corolla.errors import OutOfOrder, ProtocolError, RequestRefused
from corolla.wire.messages import TRANSITIONS, Failure, FailureCode, State


class Remedy(Enum):
    """What a client does about a refused request."""

    NONE = "any server would refuse it"
    OTHER_SERVER = "ask another server"
    NEWER_RECORD = "read the directory again: the server is not what its record said"
    WAIT = "ask again later, or another server"
    REPLAY = "give the session's tokens again"
    SEND_MORE = "send what was left out"
    BE_ADMITTED = "present oneself to the server"


@dataclass(frozen=True)
class Meaning:
    """What follows from a failure."""

    remedy: Remedy
    session_lost: bool = True  # of the session whose step was refused; otherwise it is as it was before
    stream_lost: bool = False  # what comes next on the stream cannot be trusted
    refuses_streams: bool = False  # may come before any request: then the stream is not taken at all
    garbage: bool = False  # whoever sent the request breaks the protocol; many of these keep a peer out
    request_suspected: bool = False  # if several servers say so, it is the request that they cannot do

    @property
    def final(self) -> bool:
        """Whether asking again, or another server, cannot help."""
        return self.remedy is Remedy.NONE


MEANINGS: dict[FailureCode, Meaning] = {
    "malformed": Meaning(Remedy.NONE, stream_lost=True, garbage=True),
    "version": Meaning(Remedy.OTHER_SERVER, stream_lost=True),
    "out_of_order": Meaning(Remedy.NONE, stream_lost=True, garbage=True),
    "wrong_model": Meaning(Remedy.NEWER_RECORD),
    "wrong_blocks": Meaning(Remedy.NEWER_RECORD),
    "too_large": Meaning(Remedy.NONE, session_lost=False),
    "busy": Meaning(Remedy.WAIT, session_lost=False, refuses_streams=True),
    "evicted": Meaning(Remedy.REPLAY),
    # A server that says one of the next three where nothing was left out is at fault.
    "no_lease": Meaning(Remedy.SEND_MORE),
    "no_bundle": Meaning(Remedy.SEND_MORE),
    "not_batchable": Meaning(Remedy.SEND_MORE, session_lost=False),
    "draining": Meaning(Remedy.OTHER_SERVER),
    "not_allowed": Meaning(Remedy.BE_ADMITTED, refuses_streams=True),
    "internal": Meaning(Remedy.OTHER_SERVER, request_suspected=True),
}


def meaning(failure: Failure | RequestRefused) -> Meaning:
    """What a failure means, as it was sent or as it was raised."""
    return MEANINGS[failure.code]  # type: ignore[index]


def ends_in(failure: Failure, state: State) -> State:
    """Where a stream stands after a failure that came in `state`."""
    means = meaning(failure)
    if means.stream_lost or (state is State.IDLE and means.refuses_streams):
        return State.ENDED
    if state is State.STEPPING and not means.session_lost:
        return State.OPEN
    return TRANSITIONS[state][Failure]


def remedy_of(error: BaseException | None) -> Remedy | None:
    """What to do about an error that is a peer's refusal; None for any other."""
    return meaning(error).remedy if isinstance(error, RequestRefused) else None


def keeps_session(error: BaseException) -> bool:
    """Whether a step that ended with this error has left its session at the server as it was."""
    return isinstance(error, RequestRefused) and not meaning(error).session_lost


def failure_from(refusal: RequestRefused) -> Failure:
    """What a refused request is answered with."""
    return Failure(
        code=refusal.code,  # type: ignore[arg-type]
        message=str(refusal)[:2048],
        field=refusal.field,
        retry_after=refusal.retry_after,
    )


def failure_of(error: ProtocolError) -> Failure:
    """What bytes that cannot be taken are answered with."""
    code: FailureCode = "version" if error.field == "version" else "malformed"
    if isinstance(error, OutOfOrder):
        code = "out_of_order"
    # A field's name may come from the peer, at any length.
    field = None if error.field is None else error.field[:128]
    return Failure(code=code, message=str(error)[:2048], field=field)
