"""Conversations from the chitchat package, from files and from the hub.

Invariant: every row is either used or counted, with its number and the reason; one bad row never ends a run,
and a source without a single good row is an error that shows what was found and what is understood.
"""

from __future__ import annotations

import json
import warnings
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from corolla.data.conversation import Conversation
from corolla.data.readers import UNREADABLE, is_file_name, read_file, read_hub
from corolla.data.schemas import PERSONA_SCHEMAS, SCHEMAS, BadRow, Row, Schema, chitchat_conversation
from corolla.errors import DataError

MOST_SKIPPED = 20  # bad rows that are kept for the report; all are counted


@dataclass
class LoadReport:
    """What became of the rows."""

    schema: str
    read: int = 0
    used: int = 0
    skipped: list[tuple[int, str]] = field(default_factory=list)  # the first ones: row number from 1, reason

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
            shown.append(f"{reason} (row{'s' if len(numbers) > 1 else ''} {listed})")
        return [*shown, "…"] if left > len(self.skipped) and len(rows) > 1 else shown


def load_conversations(
    source: str,
    *,
    speaker: str | None = None,
    persona: bool = False,
    split: str | None = None,
    token: str | None = None,
) -> tuple[list[Conversation], LoadReport]:
    """Read all conversations of `source`: `chitchat`, a json, jsonl, csv or parquet file, or a hub name.

    `speaker` (chitchat only) keeps one person's conversations and makes that person's turns the replies;
    `persona` (PersonaChat only) puts the personality in front; `split` is for hub names and json files that
    hold several lists, `token` for the hub. Raises `DataError` when nothing can be read, no row has a known
    shape, or an option does not go with the source.
    """
    if source == "chitchat":
        if persona or split:
            raise DataError("The chitchat data has neither personas nor splits; leave these options out.")
        return _load_chitchat(speaker)
    if speaker is not None:
        raise DataError("--speaker goes with the chitchat data only, whose people have ids.")
    rows = read_file(Path(source), split) if is_file_name(source) else read_hub(source, split, token)
    return _convert(rows, source, persona)


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


def _convert(rows: list[Row], source: str, persona: bool) -> tuple[list[Conversation], LoadReport]:
    schema = _schema_of(rows)
    if schema is None:
        raise _no_schema(rows, source, "none has an accepted shape")
    if persona and schema.name not in PERSONA_SCHEMAS:
        raise DataError(f"--persona goes with PersonaChat's shape, but {source} holds {schema.name}.")
    report = LoadReport(schema.name)
    conversations = []
    for number, row in enumerate(rows, start=1):
        report.read += 1
        try:
            conversations.append(_conversation(schema, row, persona))
            report.used += 1
        except BadRow as reason:
            report.skip(number, str(reason))
    if not conversations:
        raise _no_schema(rows, source, report.skipped[0][1])
    return conversations, report


def _conversation(schema: Schema, row: Row, persona: bool) -> Conversation:
    if UNREADABLE in row:
        raise BadRow("not valid JSON")
    if not schema.fits(row):
        raise BadRow(f"not of the shape of {schema.name}")
    return schema.convert(row, persona)


def _schema_of(rows: list[Row]) -> Schema | None:
    """The shape that most rows have."""
    votes = Counter(index for row in rows for index, schema in enumerate(SCHEMAS) if schema.fits(row))
    return SCHEMAS[votes.most_common(1)[0][0]] if votes else None


def _no_schema(rows: list[Row], source: str, reason: str) -> DataError:
    first = json.dumps(rows[0], ensure_ascii=False, default=str)
    shapes = "\n".join(f"  {schema.shape}" for schema in SCHEMAS)
    return DataError(
        f"No row of {source} can be used ({reason}). Its first row is\n"
        f"  {first[:300]}{'…' if len(first) > 300 else ''}\nand rows should look like one of these:\n{shapes}"
    )
