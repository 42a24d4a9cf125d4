"""Who may ask, for how much, and what of a request is read at all.

Invariant: without a key nothing but this machine's own programs is served: neither other machines nor a web page
that somebody here looks at. A body that is too large, or comes too slowly, is refused while others are served.
"""

from __future__ import annotations

import asyncio
import hashlib
import re
import threading
import time
import tomllib
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from corolla.api.failures import ApiFailure
from corolla.api.streaming import refused
from corolla.errors import UsageError
from corolla.files import read_bounded_text
from corolla.text import one_line

MOST_BODY = 8 * 2**20
MOST_DRAINED = 128 * 2**20  # of a body that is refused, so that the client gets to read why
BODY_SECONDS = 30.0
DAY, MINUTE = 86_400.0, 60.0
OPEN_PATHS = frozenset({"/healthz", "/readyz", "/", "/swarm", "/runs", "/favicon.ico"})
ENDLESS = frozenset({"/api/swarm/events"})
LOOPBACK = frozenset({"localhost", "127.0.0.1", "::1", ""})


@dataclass
class User:
    """Somebody with a key, and what is left of the budget; `name` "" stands for everybody where there are no keys."""

    name: str
    tokens_per_day: int | None = None
    requests_per_minute: int | None = None
    operator: bool = False  # may stop what others have started
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False)
    _day: int = -1
    _spent: int = 0
    _asked: deque[float] = field(default_factory=deque, repr=False)

    @property
    def bounded(self) -> bool:
        """Whether there is something that this user may not spend."""
        return self.tokens_per_day is not None or self.requests_per_minute is not None

    def ask(self, now: float) -> None:
        """A request comes. Raises `ApiFailure` where that is one too many in a minute."""
        if self.requests_per_minute is None:
            return
        with self._lock:
            while self._asked and self._asked[0] <= now - MINUTE:
                self._asked.popleft()
            if len(self._asked) >= self.requests_per_minute:
                wait = max(1, round(self._asked[0] + MINUTE - now))
                raise ApiFailure(
                    429,
                    f"{self.name} may ask {self.requests_per_minute} times a minute: wait {wait} s.",
                    code="rate_limit_exceeded",
                    headers={"Retry-After": str(wait)},
                )
            self._asked.append(now)

    def _left(self, budget: int) -> int:
        return max(0, budget - self._spent)

    def reserve(self, tokens: int, now: float) -> Callable[[int], None]:
        """Take so many tokens of the day's; gives what is to be called with how many it really were.

        Raises `ApiFailure` where they are not left.
        """
        with self._lock:
            day = int(now // DAY)
            if day != self._day:
                self._day, self._spent = day, 0
            if self.tokens_per_day is not None and self._spent + tokens > self.tokens_per_day:
                raise ApiFailure(
                    429,
                    f"{self.name} has {self._left(self.tokens_per_day)} of {self.tokens_per_day} tokens left "
                    f"today, and this request may need {tokens}: ask for fewer (max_tokens), or wait until tomorrow.",
                    code="insufficient_quota",
                    headers={"Retry-After": str(max(1, round(DAY - now % DAY)))},
                )
            self._spent += tokens

        def settle(used: int) -> None:
            with self._lock:
                if self._day == day:
                    self._spent += used - tokens

        return settle


class Keys:
    """The keys that are accepted; without any, everybody may ask."""

    def __init__(self, users: dict[str, User]) -> None:
        """`users` by key."""
        self._users = {hashlib.sha256(key.encode()).digest(): user for key, user in users.items()}
        self._everybody = User("", operator=True)

    def __bool__(self) -> bool:
        return bool(self._users)

    @classmethod
    def read(cls, keys: Sequence[str], path: Path | None) -> Keys:
        """Keys from the command line, and those in a file. Raises `UsageError`."""
        found: dict[str, User] = {}
        for number, key in enumerate(keys, start=1):
            if not key.strip() or not key.isascii() or not key.isprintable():
                raise UsageError("--api-key must be a word of plain characters.")
            found[key] = User("key" if len(keys) == 1 else f"key {number}", operator=True)
        for name, about in ({} if path is None else _read_file(path)).items():
            key, user = _user(name, about, path)
            if key in found:
                raise UsageError(f"{path}: {one_line(name)} has the key of another user.")
            if any(name == one.name for one in found.values()):  # what somebody has is theirs by name
                raise UsageError(
                    f"{path}: the user of --api-key is called {one_line(name)}: give another name."
                )
            found[key] = user
        return cls(found)

    def user(self, authorization: str) -> User:
        """Whose key stands in the header `Authorization`. Raises `ApiFailure`."""
        if not self._users:
            return self._everybody
        kind, _, key = authorization.partition(" ")
        if kind.lower() != "bearer" or not key.strip():
            raise _unauthorized("Give your key: Authorization: Bearer KEY.")
        user = self._users.get(hashlib.sha256(key.strip().encode()).digest())
        if user is None:
            raise _unauthorized("This key is none that is accepted here.")
        return user


def _unauthorized(message: str) -> ApiFailure:
    return ApiFailure(401, message, code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"})


def _read_file(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(read_bounded_text(path))
    except OSError as error:
        raise UsageError(f"The file of keys {path} cannot be read: {error.strerror or 'no file'}.") from error
    except (ValueError, RecursionError) as error:
        raise UsageError(f"The file of keys {path} is not TOML: {one_line(error)}.") from error


def _user(name: str, about: Any, path: Path | None) -> tuple[str, User]:
    numbers = ("tokens_per_day", "requests_per_minute")
    shape = f'{path}: a user is a table such as [{one_line(name)}] with key = "…"'
    if not isinstance(about, dict) or not isinstance(about.get("key"), str) or not about["key"].strip():
        raise UsageError(f"{shape}.")
    for field_name, value in about.items():
        number = (
            field_name in numbers and isinstance(value, int) and not isinstance(value, bool) and value > 0
        )
        if field_name != "key" and not number and not (field_name == "operator" and isinstance(value, bool)):
            raise UsageError(
                f"{shape}, and tokens_per_day and requests_per_minute as numbers, operator as true or false; "
                f"{one_line(field_name)} is not that."
            )
    budgets = (about.get("tokens_per_day"), about.get("requests_per_minute"))
    return about["key"], User(name, *budgets, operator=about.get("operator", False))


class Gate:
    """Stands before the application."""

    def __init__(
        self,
        app: ASGIApp,
        *,
        keys: Keys,
        origins: Sequence[str] = (),
        most_body: int = MOST_BODY,
        body_seconds: float = BODY_SECONDS,
        answered: Callable[[str, int], None] = lambda path, status: None,
    ) -> None:
        """`origins` are web pages that may ask from a browser; `answered(path, status)` is told of every answer."""
        self._app, self._keys, self._origins = app, keys, frozenset(origins)
        self._most_body, self._body_seconds = most_body, body_seconds
        self._answered = answered

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        status = 0
        scope = _plain(scope)

        async def noting(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            self._check(scope)
            body = await self._body(scope, receive)
            _check_kind(scope, body)
        except ApiFailure as failure:
            await refused(failure)(scope, receive, noting)
        else:
            await self._app(scope, _given(body, receive), noting)
        finally:
            route = scope.get("route")
            self._answered(getattr(route, "path", "other"), status)

    def _check(self, scope: Scope) -> None:
        headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
        host = headers.get("host", "")
        origin = headers.get("origin")
        if not self._keys and _hostname(f"//{host}") not in LOOPBACK:
            raise ApiFailure(
                403, "Without a key, only this machine is served, under localhost.", code="host_not_allowed"
            )
        if origin is not None and origin not in self._origins and _netloc(origin) != host:
            raise ApiFailure(403, "Web pages from elsewhere may not ask here.", code="origin_not_allowed")
        path = scope["path"]
        if scope["method"] == "OPTIONS" or path in OPEN_PATHS or path.startswith("/page/"):
            return
        user = self._keys.user(headers.get("authorization", ""))
        if scope["method"] == "POST":
            user.ask(time.monotonic())
        scope["user"] = user

    async def _body(self, scope: Scope, receive: Receive) -> bytes:
        """All of the body. Raises `ApiFailure` where it is too large or takes too long."""
        declared = next((value for name, value in scope["headers"] if name == b"content-length"), b"0")
        too_large = declared.isdigit() and int(declared) > self._most_body
        parts: list[bytes] = []
        size = 0
        try:
            async with asyncio.timeout(self._body_seconds):
                while True:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        raise ApiFailure(400, "The request ended in the middle.")
                    part = message.get("body", b"")
                    size += len(part)
                    too_large = too_large or size > self._most_body
                    if too_large:
                        parts.clear()
                    else:
                        parts.append(part)
                    if size > MOST_DRAINED or not message.get("more_body", False):
                        break
        except TimeoutError:
            raise ApiFailure(
                408,
                f"The request did not come within {self._body_seconds:g} s.",
                headers={"Connection": "close"},
            ) from None
        if too_large:
            raise ApiFailure(
                413,
                f"A request may have {self._most_body // 2**20} MiB: send less text.",
                code="request_too_large",
                headers={"Connection": "close"},
            )
        return b"".join(parts)


def _plain(scope: Scope) -> Scope:
    """The same without a slash at the end, and HEAD as a GET whose body nobody sends."""
    path = scope["path"].rstrip("/") or "/"
    head = scope["method"] == "HEAD" and path not in ENDLESS
    return {**scope, "path": path, "method": "GET" if head else scope["method"]}


def _check_kind(scope: Scope, body: bytes) -> None:
    """Raises `ApiFailure` for a body that is not sent as JSON."""
    headers = dict(scope["headers"])
    kind = headers.get(b"content-type", b"").partition(b";")[0].strip().lower()
    if body and headers.get(b"content-encoding", b"identity").strip().lower() != b"identity":
        raise ApiFailure(415, "Send the request as it is, without Content-Encoding.")
    if body and not re.fullmatch(rb"application/(.+\+)?json", kind):
        raise ApiFailure(415, "Send JSON, with the header Content-Type: application/json.")


def _given(body: bytes, receive: Receive) -> Receive:
    """A `receive` that gives the body once, and what comes then as it comes."""
    waiting = [body]

    async def receive_again() -> Message:
        if waiting:
            return {"type": "http.request", "body": waiting.pop(), "more_body": False}
        return await receive()

    return receive_again


def _hostname(url: str) -> str | None:
    try:
        return urlsplit(url).hostname or ""
    except ValueError:
        return None


def _netloc(url: str) -> str | None:
    try:
        return urlsplit(url).netloc
    except ValueError:
        return None
