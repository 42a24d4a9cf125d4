"""The table of parameters in docs/api.md says of each what the code does."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from pydantic import BaseModel

from corolla.api import requests, responses
from corolla.api.requests import ChatRequest, CompletionRequest
from corolla.api.responses import ResponsesRequest

PAGE = Path(__file__).parents[2] / "docs" / "api.md"
KINDS: list[tuple[type[BaseModel], requests.Refusals]] = [
    (ChatRequest, requests._REFUSED),
    (CompletionRequest, requests._REFUSED),
    (ResponsesRequest, responses._REFUSED),
]


def rows() -> list[tuple[set[str], list[str]]]:
    """The names of each row, and what is said of them: for a chat, a completion, a response."""
    section = PAGE.read_text(encoding="utf-8").split("## Every parameter")[1].split("\n## ")[0]
    found = []
    for line in section.splitlines():
        if line.startswith("| `"):
            first, *said = [cell.strip() for cell in line.strip("|").split("|")]
            names = {re.split(r"[\[.]", name)[0] for name in re.findall("`([^`]+)`", first)}
            found.append((names, said[:3]))
    assert len(found) > 20
    return found


@pytest.mark.parametrize("column", range(3), ids=["chat", "completions", "responses"])
def test_the_table_is_true(column: int) -> None:
    kind, refusals = KINDS[column]
    said: dict[str, set[str]] = {}
    for names, cells in rows():
        assert set(cells) <= {"yes", "accepted", "refused", ""}
        # Several names of one thing stand in a row: one of them is this request's.
        assert not cells[column] or names & set(kind.model_fields) or cells[column] == "refused", names
        for name in names if cells[column] else ():
            said.setdefault(name, set()).add(cells[column])
    for name in kind.model_fields:
        assert name in said, f"{name} is missing"
        assert ("refused" in said[name]) == (name in refusals), name
