"""Conversations of the page, in an SQLite file: they are there tomorrow, and training reads what is exported.

Invariant: a user sees their own only; what was saved is on the disk before the answer. The file is its owner's.
"""

from __future__ import annotations

import contextlib
import json
import sqlite3
import threading
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, StringConstraints

from corolla.api.failures import ApiFailure
from corolla.api.requests import MOST_MESSAGES, Strict
from corolla.errors import UsageError
from corolla.text import one_line

TABLE = """
CREATE TABLE IF NOT EXISTS conversations (
    user TEXT NOT NULL, id TEXT NOT NULL, title TEXT NOT NULL, updated REAL NOT NULL, content TEXT NOT NULL,
    PRIMARY KEY (user, id)
)
"""
MOST_KEPT = 5000  # of one user

Text = Annotated[str, StringConstraints(max_length=1_000_000)]
Id = Annotated[str, StringConstraints(pattern=r"^[0-9a-zA-Z-]{1,64}$")]


class Said(Strict):
    """A message, and what its reader thinks of it."""

    role: Literal["user", "assistant"]
    content: Text
    rating: Literal[-1, 0, 1] = 0


class Column(Strict):
    """What one partner was told and has said."""

    model: Annotated[str, StringConstraints(max_length=1000)]
    messages: Annotated[list[Said], Field(max_length=MOST_MESSAGES)]


class Conversation(Strict):
    """A conversation, with one partner or two side by side."""

    title: Annotated[str, StringConstraints(max_length=200)] = ""
    system: Text = ""
    settings: dict[str, float | int | str | None] = Field(default_factory=dict)
    columns: Annotated[list[Column], Field(min_length=1, max_length=2)]


class Plain(Strict):
    """A message as training has it."""

    role: Literal["system", "user", "assistant"]
    content: Text


class Exported(Strict):
    """A conversation as training reads it."""

    messages: Annotated[list[Plain], Field(min_length=1, max_length=MOST_MESSAGES)]


class Conversations:
    """For any thread."""

    def __init__(self, path: Path | None) -> None:
        """In that file; None: in memory. Raises `UsageError`."""
        self._lock = threading.Lock()
        try:
            if path is not None:
                path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
                path.touch(mode=0o600)
            self._base = sqlite3.connect(":memory:" if path is None else path, check_same_thread=False)
            with self._base:
                self._base.execute("PRAGMA journal_mode = WAL")
                self._base.execute(TABLE)
        except (OSError, sqlite3.Error) as error:
            raise UsageError(
                f"Conversations cannot be kept in {path}: give another file with --conversations."
            ) from error

    def titles(self, user: str) -> list[dict[str, Any]]:
        """What there is, the newest first."""
        rows = self._rows(
            "SELECT id, title, updated FROM conversations WHERE user = ? ORDER BY updated DESC", user
        )
        return [{"id": row[0], "title": row[1], "updated": row[2]} for row in rows]

    def read(self, user: str, name: str) -> Conversation:
        """One of them. Raises `ApiFailure`."""
        rows = self._rows("SELECT content FROM conversations WHERE user = ? AND id = ?", user, name)
        if not rows:
            raise ApiFailure(404, "There is no such conversation.", param="id")
        return Conversation.model_validate_json(rows[0][0])

    def write(self, user: str, name: str, conversation: Conversation) -> None:
        """Save one, which may be there already. Raises `ApiFailure` where there are too many."""
        known = self._rows("SELECT COUNT(*), SUM(id = ?) FROM conversations WHERE user = ?", name, user)[0]
        if known[0] >= MOST_KEPT and not known[1]:
            raise ApiFailure(400, f"{MOST_KEPT} conversations are kept: delete some.")
        values = (user, name, conversation.title, time.time(), conversation.model_dump_json())
        with self._used() as base:
            base.execute("INSERT OR REPLACE INTO conversations VALUES (?, ?, ?, ?, ?)", values)

    def delete(self, user: str, name: str) -> None:
        """Forget one, if it is there."""
        with self._used() as base:
            base.execute("DELETE FROM conversations WHERE user = ? AND id = ?", (user, name))

    def export(self, user: str) -> list[dict[str, Any]]:
        """All of them as `corolla tune` reads them."""
        found = []
        for conversation in self._all(user):
            system = [{"role": "system", "content": conversation.system}] if conversation.system else []
            for column in conversation.columns:
                said = [{"role": one.role, "content": one.content} for one in column.messages]
                if said:
                    found.append({"messages": system + said})
        return found

    def rated(self, user: str, rating: int) -> str:
        """The replies of that rating as lines of `prompt` and `response`, which `corolla tune` reads."""
        lines = []
        for conversation in self._all(user):
            for column in conversation.columns:
                for before, one in zip(column.messages, column.messages[1:], strict=False):
                    if one.role == "assistant" and one.rating == rating and before.role == "user":
                        pair = {"prompt": before.content, "response": one.content}
                        lines.append(json.dumps(pair, ensure_ascii=False) + "\n")
        return "".join(lines)

    def take_in(self, user: str, conversations: list[Exported], model: str) -> int:
        """Save what was exported; how many were new."""
        count = 0
        for one in conversations:
            system = "".join(said.content for said in one.messages if said.role == "system")
            said = [Said(role=m.role, content=m.content) for m in one.messages if m.role != "system"]
            if said:
                made = Conversation(
                    title=said[0].content[:60], system=system, columns=[Column(model=model, messages=said)]
                )
                self.write(user, uuid.uuid4().hex, made)
                count += 1
        return count

    def _all(self, user: str) -> list[Conversation]:
        rows = self._rows("SELECT content FROM conversations WHERE user = ? ORDER BY updated", user)
        return [Conversation.model_validate_json(row[0]) for row in rows]

    def _rows(self, query: str, *values: str) -> list[tuple[Any, ...]]:
        with self._used() as base:
            return base.execute(query, values).fetchall()

    @contextlib.contextmanager
    def _used(self) -> Iterator[sqlite3.Connection]:
        """All of the block or nothing. Raises `ApiFailure` for a disk that is full, or a file that others hold."""
        try:
            with self._lock, self._base:
                yield self._base
        except sqlite3.Error as error:
            raise ApiFailure(
                503, f"Conversations cannot be read or written now: {one_line(error)}.", code="not_kept"
            ) from error

    def close(self) -> None:
        """Let go of the file."""
        with self._lock, contextlib.suppress(sqlite3.Error):
            self._base.close()
