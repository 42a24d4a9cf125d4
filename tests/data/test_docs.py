"""What docs/data.md shows is so."""

from __future__ import annotations

import re
from itertools import groupby
from pathlib import Path
from typing import Any

import pytest

from corolla.data.conversation import Conversation, Turn
from corolla.data.render import NO_LOSS, Renderer, RenderSettings
from corolla.data.schemas import SCHEMAS
from corolla.data.sources import load_conversations

TEXT = (Path(__file__).parents[2] / "docs" / "data.md").read_text(encoding="utf-8")
SHAPES = re.findall(r"^\| ([^|]+) \| `(\{.*\})` \|$", TEXT, re.MULTILINE)
TALK = [
    Turn("user", "Hi there!"),
    Turn("assistant", "Hello. How was your day?"),
    Turn("user", "Long."),
    Turn("assistant", "Tell me."),
]


@pytest.mark.parametrize(("name", "row"), SHAPES)
def test_the_rows_shown_are_of_the_shapes_named(tmp_path: Path, name: str, row: str) -> None:
    path = tmp_path / "row.jsonl"
    path.write_text(row)
    (read,), report = load_conversations(str(path))
    assert report.schema == name
    assert [(turn.role, turn.text) for turn in read.turns] == [("user", "Hi"), ("assistant", "Hello!")]


def test_all_shapes_are_shown() -> None:
    assert {name for name, _ in SHAPES} == {schema.name for schema in SCHEMAS}


@pytest.mark.parametrize(("style", "turns"), [("delimiter", 4), ("template", 2)])
def test_the_renderings_shown_are_what_is_rendered(smol: Any, style: str, turns: int) -> None:
    renderer = Renderer(smol, RenderSettings(style=style))
    (example,) = renderer.examples(Conversation(tuple(TALK[:turns]), "talk"))
    marked = ""
    tokens = zip(example.input_ids, example.labels, strict=True)
    for learnt, run in groupby(tokens, key=lambda pair: pair[1] != NO_LOSS):
        piece = smol.decode([token for token, _ in run])
        marked += f"⟦{piece}⟧" if learnt else piece
    assert f"\n```\n{marked}\n```\n" in TEXT
