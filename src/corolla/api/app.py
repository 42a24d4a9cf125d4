"""The application: what is asked where, and who answers.

Invariant: every route's work is done elsewhere; here a request becomes a partner, a wish, a run and an answer, in this
order, and whatever goes wrong on the way an answer in OpenAI's form.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, PlainTextResponse, Response
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware

from corolla.api.access import Gate, Keys, User
from corolla.api.chat import ask_chat
from corolla.api.completions import ask_completions
from corolla.api.conversations import Conversations
from corolla.api.failures import ApiFailure, wrong
from corolla.api.generation import Generator, Run, Wish
from corolla.api.metrics import Metrics
from corolla.api.pages import add_pages
from corolla.api.partners import Partner, Partners
from corolla.api.requests import ChatRequest, CompletionRequest, Sampled
from corolla.api.responses import ResponsesRequest, ask_responses
from corolla.api.runs import Runs
from corolla.api.starting import Starter
from corolla.api.streaming import Answer, failure, refused, streamed, unless_gone
from corolla.api.swarm_state import SwarmState
from corolla.text import one_line
from corolla.tuning.bundle import Bundle
from corolla.version import __version__

ABOUT_ERROR = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": ["string", "null"]},
            },
        }
    },
}
REFUSALS: dict[int | str, dict[str, Any]] = {
    status: {"description": words, "content": {"application/json": {"schema": ABOUT_ERROR}}}
    for status, words in {
        400: "Something in the request cannot be done.",
        401: "A key is missing or wrong.",
        403: "Not from there.",
        404: "No such model.",
        408: "The request took too long to come.",
        413: "The request is too large.",
        415: "The request is not sent as JSON.",
        429: "Too much is asked at once, or a budget is spent.",
        503: "The swarm cannot do it now.",
    }.items()
}


@dataclass
class Api:
    """What a process serves, and how."""

    partners: Partners
    generator: Generator
    keys: Keys = field(default_factory=lambda: Keys({}))
    metrics: Metrics = field(default_factory=Metrics)
    conversations: Conversations = field(default_factory=lambda: Conversations(None))
    starter: Starter | None = None  # of training runs
    origins: Sequence[str] = ()
    limits: dict[str, Any] = field(default_factory=dict)  # of `Gate`
    swarm: SwarmState = field(init=False)

    def __post_init__(self) -> None:
        self.swarm = SwarmState(self.partners)
        self.metrics.watch(self.partners.base.model.blocks.connection)

    def drain(self) -> None:
        """Begin nothing more, and let what has no end of its own come to one. On the event loop."""
        self.generator.draining = True
        self.swarm.ended.set()

    def start(self, user: User, wishes: Sequence[Wish]) -> Run:
        """Begin to compute. Raises `ApiFailure`."""
        wanted = sum(len(wish.ids) + wish.max_tokens * wish.count for wish in wishes)
        settle = user.reserve(wanted, time.time())

        def finished(run: Run) -> None:
            settle(sum(len(wish.ids) for wish in run.wishes) + run.timing.tokens)
            self.metrics.finished(run)

        try:
            return self.generator.start(wishes, finished)
        except ApiFailure:
            settle(0)
            raise


def create_app(api: Api) -> Any:
    """The application over `api`; an ASGI callable."""

    @asynccontextmanager
    async def lifespan(_app: FastAPI) -> AsyncIterator[None]:
        yield
        await api.generator.close()
        api.conversations.close()

    app = FastAPI(title="Corolla", version=__version__, lifespan=lifespan, docs_url=None, redoc_url=None)
    app.router.redirect_slashes = False  # `Gate` takes them away
    _explain_failures(app)
    _add_models(app, api)
    _add_replies(app, api)
    _add_health(app, api)
    runs = Runs(api.partners.folder, api.starter)
    add_pages(app, api.conversations, api.swarm, runs, api.starter, api.partners.base.name)
    if api.origins:
        app.add_middleware(
            CORSMiddleware, allow_origins=list(api.origins), allow_methods=["*"], allow_headers=["*"]
        )
    return Gate(app, keys=api.keys, origins=api.origins, answered=api.metrics.answered, **api.limits)


def _explain_failures(app: FastAPI) -> None:
    @app.exception_handler(ApiFailure)
    async def ours(_request: Request, error: ApiFailure) -> Response:
        return refused(error)

    @app.exception_handler(RequestValidationError)
    async def invalid(_request: Request, error: RequestValidationError) -> Response:
        return refused(_invalid(error))

    @app.exception_handler(HTTPException)
    async def http(_request: Request, error: HTTPException) -> Response:
        if error.status_code == 400:  # nested too deeply, a number of too many digits, no UTF-8
            return refused(wrong("The request is no JSON that can be read.", code="invalid_value"))
        words = f"{error.detail}: see /openapi.json for what there is, all under /v1."
        found = ApiFailure(error.status_code, words, headers=dict(error.headers or {}))
        return refused(found)

    @app.middleware("http")
    async def mistakes(request: Request, call_next: Callable[[Request], Any]) -> Any:
        try:
            return await call_next(request)
        except Exception as error:
            return refused(failure(error))


def _invalid(error: RequestValidationError) -> ApiFailure:
    """The first thing that is wrong, in words."""
    first, param = error.errors()[0], None
    if first["type"] == "json_invalid":
        words = "The request is not JSON"
    elif len(first["loc"]) < 2:
        words = "The request is not a JSON object"
    else:
        # Of the kinds of value that a parameter may have, the one that fits best says what is wrong.
        same = [one for one in error.errors() if one["loc"][:2] == first["loc"][:2]]
        places = [_place(one, error.body) for one in same]
        fit = [
            (not one["type"].endswith("_type"), len(place)) for one, place in zip(same, places, strict=True)
        ]
        best = fit.index(max(fit))
        param = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in places[best])
        param = one_line(param.removeprefix("."), characters=200)
        words = f"{param}: {same[best]['msg']}"
        if same[best]["type"] == "extra_forbidden":
            words = f"Unrecognized request argument: {param}"
    return ApiFailure(400, f"{words}.", param=param, code="invalid_value")


def _place(error: dict[str, Any], body: Any) -> list[str | int]:
    """Where in a request something is wrong, without the names of the kinds of value that were tried."""
    source, *path = error["loc"]
    if source != "body":
        return list(path)
    found: list[str | int] = []
    for part in path:
        inside = isinstance(body, dict) and part in body
        if inside or (isinstance(body, list) and isinstance(part, int) and part < len(body)):
            found.append(part)
            body = body[part]
    if error["type"] == "missing":
        found.append(path[-1])
    return found


def _add_models(app: FastAPI, api: Api) -> None:
    def about(name: str, made: int, bundle: Bundle | None) -> dict[str, Any]:
        found: dict[str, Any] = {"id": name, "object": "model", "created": made, "owned_by": "corolla"}
        if bundle is not None:
            found |= {
                "parent": api.partners.base.name,
                "mode": bundle.mode,
                "prompt_tokens": bundle.prompt_tokens,
            }
        return found

    @app.get("/v1/models", responses={401: REFUSALS[401]})
    async def models() -> dict[str, Any]:
        """The base model, and every bundle in the folder."""
        names = await asyncio.to_thread(api.partners.names)
        return {"object": "list", "data": [about(*one) for one in names]}

    @app.get("/v1/models/{name:path}", responses=REFUSALS)
    async def model(name: str) -> dict[str, Any]:
        """One of them."""
        partner = await asyncio.to_thread(api.partners.find, name)
        return about(partner.name, partner.made, partner.bundle)


def _add_replies(app: FastAPI, api: Api) -> None:
    @app.post("/v1/chat/completions", responses=REFUSALS)
    async def chat(body: ChatRequest, request: Request) -> Response:
        """The next reply of a chat."""
        return await _answered(api, request, body, ask_chat)

    @app.post("/v1/completions", responses=REFUSALS)
    async def completions(body: CompletionRequest, request: Request) -> Response:
        """What comes behind a text."""
        return await _answered(api, request, body, ask_completions)

    @app.post("/v1/responses", responses=REFUSALS)
    async def responses(body: ResponsesRequest, request: Request) -> Response:
        """One reply, in the form of OpenAI's newer interface."""
        return await _answered(api, request, body, ask_responses)


Asking = Callable[[Any, Partner, str], tuple[Sequence[Wish], Callable[[Run], Answer]]]


async def _answered(api: Api, request: Request, body: Sampled, ask: Asking) -> Response:
    """The answer to a request; nobody's work goes on once the client is gone."""
    user: User = request.scope["user"]

    async def answer() -> Response:
        partner = await asyncio.to_thread(api.partners.find, body.model)
        wishes, answered = await asyncio.to_thread(ask, body, partner, user.name)
        made = answered(api.start(user, wishes))
        return (
            await streamed(made.events(), told=made.failed)
            if body.stream
            else JSONResponse(await made.whole())
        )

    try:
        found = await unless_gone(request, answer())
    except Exception as error:
        return refused(failure(error))
    return Response(status_code=499) if found is None else found


def _add_health(app: FastAPI, api: Api) -> None:
    @app.get("/healthz", response_class=PlainTextResponse)
    async def healthz() -> str:
        """The process is there."""
        return "ok"

    @app.get("/readyz", response_class=PlainTextResponse, responses={503: {"description": "Not now."}})
    async def readyz() -> Response:
        """Every block is served, and more is begun."""
        if api.generator.draining:
            return PlainTextResponse("ending", 503)
        try:
            await asyncio.wait_for(asyncio.to_thread(_complete, api), 10)
        except Exception as error:
            return PlainTextResponse(one_line(error) or "the swarm does not answer", 503)
        return PlainTextResponse("ready")

    @app.get("/metrics", response_class=PlainTextResponse)
    async def metrics() -> Response:
        """For Prometheus."""
        content, kind = api.metrics.page(api.generator)
        return Response(content, media_type=kind)


def _complete(api: Api) -> None:
    connection = api.partners.base.model.blocks.connection
    local = connection.config.local_blocks
    connection.check_complete(local)
