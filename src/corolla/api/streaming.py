"""Answers that go out while they are computed, as server-sent events; and answers that are computed in one piece.

Invariant: nobody computes for a client that is gone, be it that it said so or that it does not read. What goes wrong
before the first event has a status of its own; what goes wrong later is said in the stream, and ends it.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from typing import Any, Protocol, TypeVar

from fastapi import Request
from fastapi.responses import JSONResponse, Response, StreamingResponse

from corolla.api.failures import ApiFailure, failure_of, unforeseen
from corolla.text import get_logger

log = get_logger(__name__)

T = TypeVar("T")
ALIVE_SECONDS = 15.0  # after so long without an event, a comment shows that somebody is there
DONE = "data: [DONE]\n\n"
HEADERS = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}


class Answer(Protocol):
    """An answer that is computed."""

    async def whole(self) -> dict[str, Any]:
        """All of it, as JSON."""

    def events(self) -> AsyncGenerator[str]:
        """As it comes."""

    def failed(self, found: ApiFailure) -> str:
        """What goes wrong on the way, as an event."""


def event(content: dict[str, Any], name: str | None = None) -> str:
    """One event of a stream."""
    lead = "" if name is None else f"event: {name}\n"
    return f"{lead}data: {json.dumps(content, ensure_ascii=False, separators=(',', ':'))}\n\n"


def failure(error: BaseException) -> ApiFailure:
    """What a client is told of an error, which is logged if nobody foresaw it."""
    found = failure_of(error)
    if found is None:
        log.error("A request failed", exc_info=error)
    return found or unforeseen()


def refused(found: ApiFailure) -> Response:
    """A failure as an answer."""
    return JSONResponse(found.body(), found.status, headers=found.headers)


def failed(found: ApiFailure) -> str:
    """What goes wrong on the way, as most streams say it."""
    return event(found.body())


async def streamed(events: AsyncGenerator[str], *, told: Callable[[ApiFailure], str] = failed) -> Response:
    """A stream whose first event is there, unless that takes long. Raises what went wrong before it.

    `told` writes down what goes wrong later.
    """
    first = asyncio.ensure_future(anext(events, None))
    try:
        await asyncio.wait([first], timeout=ALIVE_SECONDS)
    except asyncio.CancelledError:
        await _given_up(first, events)
        raise
    if first.done() and (error := first.exception()) is not None:
        raise error
    return StreamingResponse(_alive(events, first, told), media_type="text/event-stream", headers=HEADERS)


async def _alive(
    events: AsyncGenerator[str], waiting: asyncio.Future[str | None], tell: Callable[[ApiFailure], str]
) -> AsyncIterator[str]:
    """The events, and comments between those that are far apart."""
    try:
        while True:
            done, _ = await asyncio.wait([waiting], timeout=ALIVE_SECONDS)
            if not done:
                yield ": still at work\n\n"
                continue
            found = waiting.result()
            if found is None:
                return
            yield found
            waiting = asyncio.ensure_future(anext(events, None))
    except Exception as error:
        yield tell(failure(error))
    finally:
        await _given_up(waiting, events)


async def _given_up(waiting: asyncio.Future[str | None], events: AsyncGenerator[str]) -> None:
    waiting.cancel()
    with contextlib.suppress(asyncio.CancelledError, Exception):
        await waiting
    await events.aclose()


async def unless_gone(request: Request, work: Awaitable[T]) -> T | None:
    """The result of `work`, which is cancelled when the client goes; None then."""
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_gone(request))
    try:
        await asyncio.wait([task, gone], return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        return None
    finally:
        for one in (task, gone):
            one.cancel()
        with contextlib.suppress(asyncio.CancelledError, Exception):
            await asyncio.gather(task, gone)


async def _gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
