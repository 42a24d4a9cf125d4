"""Writes docs/compatibility.md."""

from __future__ import annotations

from pathlib import Path

from tests.client.ways.document import document

Path("docs/compatibility.md").write_text(document())
