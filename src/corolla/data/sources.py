"""Conversations from the chitchat package, from files and from the hub.

Invariant: every row is either used or counted, with its number and the reason; one bad row never ends a run,
and a source without a single good row is an error that shows what was found and what is understood.
"""

from __future__ import annotations

import json
import os
import warnings
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from corolla.data.conversation import Conversation
from corolla.data.readers import is_file_name, read_file, read_hub, text_fault
from corolla.data.rows import TOO_DEEP, Found, Unreadable
from corolla.data.schemas import PERSONA_SCHEMAS, SCHEMAS, Schema, chitchat_conversation, schema_of
from corolla.data.turns import BadRow
from corolla.errors import DataError

MOST_SKIPPED = 20  # bad rows that are kept for the report; all are counted


@dataclass
class LoadReport:
    """What became of the rows."""

    schema: str
    unit: str = "row"  # or "line": what the numbers are of
    read: int = 0
    used: int = 0
    skipped: list[tuple[int, str]] = field(default_factory=list)  # the first ones: number from 1, reason

    def skip(self, number: int, reason: str) -> None:
        """Count a row that was not used."""
        if len(self.skipped) < MOST_SKIPPED:
            self.skipped.append((number, reason))

    def lines(self) -> list[str]:
        """The report for people."""
        lines = [f"{self.used:,} of {self.read:,} conversations used ({self.schema})"]
        left = self.read - self.used
        if left:
            lines.append(f"{left:,} left out: {'; '.join(self._reasons(left))}")
        return lines

    def _reasons(self, left: int) -> list[str]:
        """The kept reasons, each once, with the rows that it befell."""
        rows: dict[str, list[str]] = {}
        for number, reason in self.skipped:
            rows.setdefault(reason, []).append(str(number))
        shown = []
        for reason, numbers in rows.items():
            listed = ", ".join([*numbers[:3], *(["…"] if len(numbers) > 3 else [])])
            shown.append(f"{reason} ({self.unit}{'s' if len(numbers) > 1 else ''} {listed})")
        return [*shown, "…"] if left > len(self.skipped) and len(rows) > 1 else shown


def load_conversations(
    source: str | Path,
    *,
    speaker: str | None = None,
    persona: bool = False,
    split: str | None = None,
    token: str | None = None,
) -> tuple[list[Conversation], LoadReport]:
    """Read all conversations of `source`: `chitchat`, a json, jsonl, csv, tsv or parquet file, or a hub name.

    `speaker` (chitchat only) keeps one person's conversations and makes that person's turns the replies;
    `persona` (PersonaChat only) puts the personality in front; `split` is for hub names and json files that
    hold several lists, `token` for the hub. Raises `DataError` when nothing can be read, no row has a known
    shape, or an option does not go with the source.
    """
    if not isinstance(source, str | Path) or not str(source).strip():
        raise DataError(
            f"{source!r:.60} is no source of conversations: give chitchat, a file or a data set's name."
        )
    source = os.fspath(source)
    if source == "chitchat":
        if persona or split:
            raise DataError("The chitchat data has neither personas nor splits; leave these options out.")
        return _load_chitchat(speaker)
    if speaker is not None:
        raise DataError("--speaker goes with the chitchat data only, whose people have ids.")
    found = read_file(source, split) if is_file_name(source) else read_hub(source, split, token)
    return _convert(found, source, persona)


def _load_chitchat(speaker: str | None) -> tuple[list[Conversation], LoadReport]:
    report = LoadReport("chitchat")
    conversations = []
    for number, (name, content) in enumerate(_chitchat_entries().items(), start=1):
        people = {said["sender"] for turn in content["messages"] for said in turn}
        if speaker is not None and speaker not in people:
            continue
        report.read += 1
        try:
            conversations.append(chitchat_conversation(content, name, speaker))
            report.used += 1
        except BadRow as reason:
            report.skip(number, str(reason))
    if not conversations:
        raise DataError(f"Nobody with the id {speaker!r} replies to anyone in the chitchat data.")
    return conversations, report


def _chitchat_entries() -> Mapping[str, Any]:
    try:
        from chitchat_dataset import Dataset
    except ImportError as error:
        raise DataError("The chitchat data is a package: pip install chitchat-dataset") from error
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)  # the package leaves its file to the collector
        entries: Mapping[str, Any] = Dataset()
    return entries


def _convert(found: Found, source: str, persona: bool) -> tuple[list[Conversation], LoadReport]:
    shapes = Counter(schema.name for _, row in found.rows if (schema := _shape(row)) is not None)
    if not shapes:
        raise _no_schema(found, source, _why_none(found))
    named = ", ".join(name for name, _ in shapes.most_common())
    if persona and not PERSONA_SCHEMAS & set(shapes):
        raise DataError(f"--persona goes with PersonaChat's shape, but {source} holds {named}.")
    report = LoadReport(named, found.unit)
    conversations = []
    for number, row in found.rows:
        report.read += 1
        try:
            conversations.append(_conversation(row, persona))
            report.used += 1
        except BadRow as reason:
            report.skip(number, str(reason))
        except RecursionError:
            report.skip(number, TOO_DEEP)
    if not conversations:
        raise _no_schema(found, source, report.skipped[0][1])
    return conversations, report


def _shape(row: Any) -> Schema | None:
    return schema_of(row) if isinstance(row, Mapping) else None


def _conversation(row: Any, persona: bool) -> Conversation:
    """Raises `BadRow`."""
    if isinstance(row, Unreadable):
        raise BadRow(row.reason)
    schema = _shape(row)
    if schema is None:
        raise BadRow("of none of the accepted shapes")
    if persona and schema.name not in PERSONA_SCHEMAS:
        raise BadRow("not of PersonaChat's shape, with which --persona goes")
    conversation = schema.convert(row, persona)
    more = [*conversation.tools, *(dict(turn.more) for turn in conversation.turns)]
    extra = json.dumps(more, ensure_ascii=False, default=str)
    for text in (conversation.id, extra, *(turn.text for turn in conversation.turns)):
        fault = text_fault(text)
        if fault is not None:
            raise BadRow(f"it holds {fault}")
    return conversation


def _why_none(found: Found) -> str:
    if any(isinstance(row, Mapping) and "text" in row for _, row in found.rows):
        return "none has an accepted shape; a text column does not tell who says what in it"
    return "none has an accepted shape"


def _no_schema(found: Found, source: str, reason: str) -> DataError:
    first = found.rows[0][1]
    shown = first.shown if isinstance(first, Unreadable) else _as_json(first)
    shapes = "\n".join(f"  {schema.shape}" for schema in SCHEMAS)
    return DataError(
        f"No row of {source} can be used ({reason}). Its first row is\n"
        f"  {shown[:300]}{'…' if len(shown) > 300 else ''}\nand rows should look like one of these:\n{shapes}"
    )


def _as_json(value: Any) -> str:
    """For people; what no terminal takes is shown as an escape."""
    try:
        text = json.dumps(value, ensure_ascii=False, default=str)
    except (RecursionError, ValueError):
        return "(nested too deeply to be shown)"
    return text.encode("utf-8", "backslashreplace").decode("utf-8")
