"""What the page is made of, and what it asks besides OpenAI's interface: conversations, the swarm, training runs.

Invariant: a page loads nothing from elsewhere and runs no script but its own, whatever a model has said.
"""

from __future__ import annotations

import asyncio
from importlib.resources import files
from typing import Annotated, Any

from fastapi import FastAPI, Path, Request
from fastapi.responses import PlainTextResponse, Response

from corolla.api.access import User
from corolla.api.conversations import Conversation, Conversations, Exported
from corolla.api.failures import ApiFailure
from corolla.api.runs import Runs
from corolla.api.starting import NewRun, Starter
from corolla.api.streaming import streamed
from corolla.api.swarm_state import SwarmState

POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
# A report comes from a bundle, maybe a stranger's: it is looked at, and can do nothing.
SANDBOX = "sandbox; default-src 'none'; style-src 'unsafe-inline'; img-src data:; frame-ancestors 'none'"
HEADERS = {
    "Content-Security-Policy": POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}
KINDS = {
    "chat.html": "text/html",
    "swarm.html": "text/html",
    "runs.html": "text/html",
    "chat.js": "text/javascript",
    "talk.js": "text/javascript",
    "markdown.js": "text/javascript",
    "swarm.js": "text/javascript",
    "runs.js": "text/javascript",
    "start.js": "text/javascript",
    "style.css": "text/css",
    "icon.svg": "image/svg+xml",
}
Id = Annotated[str, Path(pattern=r"^[0-9a-zA-Z-]{1,64}$")]
RunName = Annotated[str, Path(pattern=r"^[^./\\][^/\\]{0,200}$")]


def add_pages(
    app: FastAPI,
    conversations: Conversations,
    swarm: SwarmState,
    runs: Runs,
    starter: Starter | None,
    model: str,
) -> None:
    """`model` is the partner of conversations that name none; without a `starter` no run can be started."""
    _add_files(app)
    _add_conversations(app, conversations, model)

    _add_runs(app, runs, starter)
    _add_starting(app, starter)

    @app.get("/api/swarm")
    async def state() -> dict[str, Any]:
        """Who serves what, what is missing, what has changed lately."""
        return await swarm.now()

    @app.get("/api/swarm/events")
    async def changes() -> Response:
        """The same as server-sent events, whenever something has changed."""
        return await streamed(swarm.events())


def _may_end(user: User, starter: Starter, name: str) -> bool:
    """Whether a run may be stopped and gone on with by this user: who has started it may, and the operator."""
    return user.operator or starter.owner(name) in (None, user.name)


def _add_runs(app: FastAPI, runs: Runs, starter: Starter | None) -> None:
    def seen_by(user: User) -> list[dict[str, Any]]:
        def one(about: dict[str, Any]) -> dict[str, Any]:
            if starter is None or user.bounded or not about.get("started_here"):
                return about | {"yours": False}
            return about | {"yours": _may_end(user, starter, about["name"])}

        return [one(about) for about in runs.all()]

    @app.get("/api/runs", include_in_schema=False)
    async def all_runs(request: Request) -> list[dict[str, Any]]:
        return await asyncio.to_thread(seen_by, request.scope["user"])

    @app.get("/api/runs/{name}/report", include_in_schema=False)
    async def report(name: RunName) -> Response:
        page = await asyncio.to_thread(runs.report, name)
        if page is None:
            raise ApiFailure(404, "There is no report of a run of that name.", param="name")
        return Response(page, media_type="text/html", headers=HEADERS | {"Content-Security-Policy": SANDBOX})


def _add_starting(app: FastAPI, known: Starter | None) -> None:
    def starter(request: Request) -> Starter:
        if known is None:
            raise ApiFailure(403, "Runs cannot be started here.")
        if request.scope["user"].bounded:
            raise ApiFailure(
                403, "A key with a budget starts no runs, which no budget counts: ask who runs this server."
            )
        return known

    def own(request: Request, name: str) -> Starter:
        found = starter(request)
        if not _may_end(request.scope["user"], found, name):
            raise ApiFailure(
                403, f"{name} was started with another key: ask whoever has that, or the operator."
            )
        return found

    @app.post("/api/runs/preview", include_in_schema=False)
    async def preview(body: NewRun, request: Request) -> dict[str, Any]:
        return await asyncio.to_thread(starter(request).preview, body)

    @app.post("/api/runs", include_in_schema=False)
    async def start(body: NewRun, request: Request) -> dict[str, Any]:
        return await asyncio.to_thread(starter(request).start, body, request.scope["user"].name)

    @app.post("/api/runs/{name}/stop", include_in_schema=False)
    async def stop(name: RunName, request: Request) -> dict[str, Any]:
        return await asyncio.to_thread(own(request, name).stop, name)

    @app.post("/api/runs/{name}/resume", include_in_schema=False)
    async def resume(name: RunName, request: Request) -> dict[str, Any]:
        return await asyncio.to_thread(own(request, name).resume, name)


def _add_files(app: FastAPI) -> None:
    folder = files("corolla.api").joinpath("page")

    def file(name: str) -> Response:
        if name not in KINDS:
            raise ApiFailure(404, "There is no such file.")
        return Response(folder.joinpath(name).read_bytes(), media_type=KINDS[name], headers=HEADERS)

    @app.get("/", include_in_schema=False)
    async def chat() -> Response:
        return file("chat.html")

    @app.get("/swarm", include_in_schema=False)
    async def swarm() -> Response:
        return file("swarm.html")

    @app.get("/runs", include_in_schema=False)
    async def runs() -> Response:
        return file("runs.html")

    @app.get("/favicon.ico", include_in_schema=False)
    async def icon() -> Response:
        return file("icon.svg")

    @app.get("/page/{name}", include_in_schema=False)
    async def part(name: str) -> Response:
        return file(name)


def _add_conversations(app: FastAPI, kept: Conversations, model: str) -> None:
    def user(request: Request) -> str:
        return str(request.scope["user"].name)

    @app.get("/api/conversations", include_in_schema=False)
    async def titles(request: Request) -> list[dict[str, Any]]:
        return await asyncio.to_thread(kept.titles, user(request))

    @app.get("/api/conversations/{name}", include_in_schema=False)
    async def read(name: Id, request: Request) -> Conversation:
        return await asyncio.to_thread(kept.read, user(request), name)

    @app.put("/api/conversations/{name}", include_in_schema=False)
    async def write(name: Id, body: Conversation, request: Request) -> dict[str, str]:
        await asyncio.to_thread(kept.write, user(request), name, body)
        return {"id": name}

    @app.delete("/api/conversations/{name}", include_in_schema=False)
    async def delete(name: Id, request: Request) -> dict[str, str]:
        await asyncio.to_thread(kept.delete, user(request), name)
        return {"id": name}

    @app.get("/api/export", include_in_schema=False)
    async def export(request: Request) -> list[dict[str, Any]]:
        return await asyncio.to_thread(kept.export, user(request))

    @app.get("/api/rated", include_in_schema=False)
    async def rated(request: Request, rating: int = 1) -> Response:
        return PlainTextResponse(await asyncio.to_thread(kept.rated, user(request), rating))

    @app.post("/api/import", include_in_schema=False)
    async def take_in(body: list[Exported], request: Request) -> dict[str, int]:
        return {"count": await asyncio.to_thread(kept.take_in, user(request), body, model)}
