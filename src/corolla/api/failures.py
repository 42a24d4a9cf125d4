"""What a client is told when something cannot be done, in OpenAI's shape.

Invariant: every answer that is no success is `{"error": {"message", "type", "param", "code"}}` with the right status,
and its message is one sentence that says what to do; what went wrong inside is logged and not told.
"""

from __future__ import annotations

from typing import Any

from corolla.errors import (
    CorollaError,
    DataError,
    LyingServer,
    RemoteError,
    SessionLimit,
    SwarmUnavailable,
    UsageError,
)
from corolla.text import one_line

MOST_CHARACTERS = 1000  # of a message


class ApiFailure(Exception):
    """A request that is answered with an error; the text is for the client."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        """`param` is the name of the parameter that is wrong, `code` what programs go by."""
        super().__init__(one_line(message, characters=MOST_CHARACTERS))
        self.status, self.param, self.code = status, param, code
        self.headers = headers or {}

    def body(self) -> dict[str, Any]:
        """As OpenAI says it."""
        about = {"message": str(self), "type": kind_of(self.status, self.code)}
        return {"error": {**about, "param": self.param, "code": self.code}}


def kind_of(status: int, code: str | None = None) -> str:
    """OpenAI's type of error for a status."""
    if code == "insufficient_quota":
        return "insufficient_quota"
    kinds = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}
    return kinds.get(status, "invalid_request_error" if status < 500 else "server_error")


def wrong(message: str, param: str | None = None, code: str | None = None) -> ApiFailure:
    """Something in the request cannot be done as it stands."""
    return ApiFailure(400, message, param=param, code=code)


def unsupported(param: str, why: str) -> ApiFailure:
    """A parameter of OpenAI's that nobody here carries out."""
    return wrong(f"{param} is not supported: {why}", param, "unsupported_parameter")


def too_long(prompt: int, room: int, wanted: int | None, param: str) -> ApiFailure:
    """The prompt, or what was asked for behind it, does not fit the model's context of `room` tokens."""
    asked = "" if wanted is None else f" and {wanted} for the reply"
    return wrong(
        f"This model reads {room} tokens, and the request has {prompt} in its prompt{asked}: shorten the prompt"
        + (" or the reply." if wanted is not None else "."),
        param,
        "context_length_exceeded",
    )


def failure_of(error: BaseException) -> ApiFailure | None:
    """The failure that an error of ours is to a client; None for one that nobody foresaw."""
    if isinstance(error, ApiFailure):
        return error
    if isinstance(error, SessionLimit):
        return wrong(str(error), "messages", "context_length_exceeded")
    if isinstance(error, DataError):
        return wrong(str(error), "messages")
    if isinstance(error, UsageError):
        return wrong(str(error))
    if isinstance(error, LyingServer):
        return ApiFailure(503, str(error), code="server_found_lying", headers={"Retry-After": "1"})
    if isinstance(error, SwarmUnavailable | RemoteError):
        return ApiFailure(503, str(error), code="swarm_unavailable", headers={"Retry-After": "10"})
    if isinstance(error, CorollaError):
        return ApiFailure(500, str(error), code="internal_error")
    return None


def unforeseen() -> ApiFailure:
    """A mistake of ours, which the log tells more about."""
    return ApiFailure(500, "Something went wrong here; the server's log says what.", code="internal_error")
