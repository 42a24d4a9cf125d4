"""Conversations from the chitchat package, from files and from the hub.

Invariant: every row is either used or counted, with its number and the reason; one bad row never ends a run,
and a source without a single good row is an error that shows what was found and what is understood.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from corolla.data.conversation import Conversation
from corolla.data.schemas import SCHEMAS, BadRow, Row, Schema, chitchat_conversation
from corolla.errors import DataError

LOADERS = {".json": "json", ".jsonl": "json", ".csv": "csv", ".parquet": "parquet"}
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
            shown = "; ".join(f"row {number}: {reason}" for number, reason in self.skipped[:3])
            lines.append(f"{left:,} left out: {shown}{'; …' if left > 3 else ''}")
        return lines


def load_conversations(
    source: str,
    *,
    speaker: str | None = None,
    persona: bool = False,
    split: str | None = None,
    token: str | None = None,
) -> tuple[list[Conversation], LoadReport]:
    """Read all conversations of `source`: `chitchat`, a json, jsonl, csv or parquet file, or a hub name.

    `speaker` (chitchat) keeps one person's conversations and makes that person's turns the replies;
    `persona` puts PersonaChat's personality in front; `split` and `token` are for hub names.
    Raises `DataError` when nothing can be read or no row has a known shape.
    """
    if source == "chitchat":
        return _load_chitchat(speaker)
    if speaker is not None:
        raise DataError("--speaker goes with the chitchat data only, whose people have ids.")
    path = Path(source)
    suffix = path.suffix.lower()
    if path.exists() or suffix in LOADERS or source.startswith((".", "/")):
        rows = _read_file(path)
    else:
        rows = _read_hub(source, split, token)
    return _convert(rows, source, persona)


def _load_chitchat(speaker: str | None) -> tuple[list[Conversation], LoadReport]:
    try:
        from chitchat_dataset import Dataset
    except ImportError as error:
        raise DataError("The chitchat data is a package: pip install chitchat-dataset") from error
    report = LoadReport("chitchat")
    conversations = []
    for number, (name, content) in enumerate(_chitchat_entries(Dataset), start=1):
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


def _chitchat_entries(dataset: Any) -> Iterable[tuple[str, Any]]:
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)  # the package leaves its file to the collector
        return list(dataset().items())


def _read_file(path: Path) -> list[Row]:
    if not path.is_file():
        raise DataError(f"There is no file {path}.")
    loader = LOADERS.get(path.suffix.lower())
    if loader is None:
        raise DataError(f"{path} is not a {', '.join(name[1:] for name in LOADERS)} file, by its ending.")
    if path.stat().st_size == 0:
        raise DataError(f"{path} is empty.")
    rows = _read_json(path) if loader == "json" else _read_table(path, loader)
    if not rows:
        raise DataError(f"{path} holds no rows.")
    return rows


def _read_json(path: Path) -> list[Row]:
    """JSON lines, or one JSON list. Read here, since `datasets` wants all rows of one shape and we do not."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 text.") from error
    if path.suffix.lower() == ".json":
        try:
            content = json.loads(text)
        except ValueError:
            content = None  # perhaps JSON lines under the wrong ending
        if isinstance(content, list):
            return [_as_row(item) for item in content]
        if isinstance(content, dict):
            lists = [value for value in content.values() if isinstance(value, list)]
            return [_as_row(item) for item in lists[0]] if len(lists) == 1 else [content]
    return [_as_row(_parse_line(line)) for line in text.splitlines() if line.strip()]


def _parse_line(line: str) -> Any:
    try:
        return json.loads(line)
    except ValueError:
        return {"not JSON": line[:200]}


def _as_row(item: Any) -> Row:
    return item if isinstance(item, dict) else {"not an object": item}


def _read_table(path: Path, loader: str) -> list[Row]:
    from datasets import Dataset

    read = Dataset.from_csv if loader == "csv" else Dataset.from_parquet
    try:
        return list(read(str(path), keep_in_memory=True))
    except Exception as error:  # pyarrow, pandas and datasets raise what they like for a broken file
        raise DataError(f"{path} cannot be read as {loader}: {str(error).splitlines()[0][:200]}") from error


def _read_hub(name: str, split: str | None, token: str | None) -> list[Row]:
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise DataError("Reading a hub data set needs: pip install 'corolla[tune]'") from error
    try:
        return list(load_dataset(name, split=split or "train", token=token))
    except Exception as error:  # network, names, splits, scripts: many kinds, one consequence
        reason = str(error).splitlines()[0][:200] if str(error) else type(error).__name__
        raise DataError(
            f"{name} is neither a file here nor a data set that the hub gives: {reason}"
        ) from error


def _convert(rows: list[Row], source: str, persona: bool) -> tuple[list[Conversation], LoadReport]:
    schema = _schema_of(rows)
    if schema is None:
        raise _no_schema(rows, source, "has none of the accepted shapes")
    report = LoadReport(schema.name)
    conversations = []
    for number, row in enumerate(rows, start=1):
        report.read += 1
        try:
            if not schema.fits(row):
                raise BadRow(f"not of the shape of {schema.name}")
            conversations.append(schema.convert(row, number, persona))
            report.used += 1
        except BadRow as reason:
            report.skip(number, str(reason))
    if not conversations:
        raise _no_schema(rows, source, report.skipped[0][1])
    return conversations, report


def _schema_of(rows: list[Row]) -> Schema | None:
    """The shape that most of the first rows have."""
    votes = [schema for row in rows[:100] for schema in SCHEMAS if schema.fits(row)]
    return max(SCHEMAS, key=votes.count) if votes else None


def _no_schema(rows: list[Row], source: str, reason: str) -> DataError:
    first = json.dumps(rows[0], ensure_ascii=False, default=str)
    shapes = "\n".join(f"  {schema.shape}" for schema in SCHEMAS)
    return DataError(
        f"No row of {source} can be used ({reason}). Its first row is\n"
        f"  {first[:300]}{'…' if len(first) > 300 else ''}\nand rows should look like one of these:\n{shapes}"
    )
