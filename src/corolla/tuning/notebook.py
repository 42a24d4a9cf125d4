"""The questions and answers of a study, in a file that people can read and that survives whoever writes it.

    OUT.questions.jsonl    first what the answers depend on, then an exchange a line

Invariant: a line is written once its exchange is whole; what a kill has cut, or a disk spoilt, is asked anew.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec

from corolla.errors import BundleError, UsageError
from corolla.files import write_atomically
from corolla.json_files import parse, parse_object
from corolla.tuning.teacher import Exchange


class Notebook:
    """Exchanges by number, as they are in the file of the study that will end in the bundle `out`."""

    def __init__(self, out: Path) -> None:
        self.path = out.parent / f"{out.name}.questions.jsonl"
        self.exchanges: dict[int, Exchange] = {}

    def check(self, *, resume: bool, overwrite: bool) -> None:
        """Raises `UsageError` when something is in the way, or nothing is there to go on with."""
        if resume and not self.path.is_file():
            raise UsageError(f"There is no {self.path} to go on with; start without --resume.")
        if self.path.exists() and not resume and not overwrite:
            raise UsageError(
                f"{self.path} holds the questions of a study: go on with them with --resume, or drop them with "
                "--overwrite."
            )

    def exchanges_kept(self) -> int:
        """How many lines the file has besides its first."""
        try:
            return max(0, self.path.read_bytes().count(b"\n") - 1)
        except OSError:
            return 0

    def begin(self, decisive: Mapping[str, Any], *, resume: bool) -> None:
        """Make the file ready; with `resume`, read what is in it. Raises `UsageError`, `BundleError`."""
        decisive = parse(json.dumps(decisive))  # as it will be read
        if resume:
            self._read(decisive)
        lines = [decisive, *(msgspec.to_builtins(one) for one in self.exchanges.values())]
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(self.path, b"".join(_line(one) for one in lines))
        except OSError as error:
            raise BundleError(f"{self.path} cannot be written: {error.strerror or error}.") from error

    def add(self, exchange: Exchange) -> None:
        """Keep one more. Raises `BundleError`."""
        self.exchanges[exchange.number] = exchange
        try:
            with self.path.open("ab") as file:
                file.write(_line(msgspec.to_builtins(exchange)))
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise BundleError(
                f"{self.path} cannot be written ({error.strerror or error}); go on with --resume from what is in it."
            ) from error

    def _read(self, decisive: Mapping[str, Any]) -> None:
        try:
            first, *rest = self.path.read_text(encoding="utf-8", errors="replace").split("\n")
            noted = parse_object(first)
        except (OSError, ValueError) as error:
            raise BundleError(f"{self.path} cannot be read: start anew with --overwrite.") from error
        for name in sorted(noted.keys() | decisive.keys()):
            if noted.get(name) != decisive.get(name):
                raise UsageError(
                    f"The questions in {self.path} were asked with another {name}: go on with the same, or start "
                    "anew with --overwrite."
                )
        for line in rest:
            try:
                exchange = msgspec.convert(parse_object(line), Exchange)
            except (ValueError, msgspec.MsgspecError):
                continue  # cut by a kill
            self.exchanges[exchange.number] = exchange


def _line(content: Any) -> bytes:
    return json.dumps(content, ensure_ascii=False).encode("utf-8", "replace") + b"\n"
