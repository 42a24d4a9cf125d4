"""Rendered examples for a person's eyes, before hours are spent on them.

Invariant: what is marked is exactly what carries loss; the mark can be read without colour.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from typing import Any

from rich.console import Group, RenderableType
from rich.panel import Panel
from rich.text import Text

from corolla.data.render import NO_LOSS, Example


def preview(examples: Sequence[Example], tokenizer: Any, count: int = 3) -> RenderableType:
    """The first `count` examples; ⟦…⟧ and colour mark the tokens that carry loss."""
    return Group(*(_panel(example, tokenizer, number) for number, example in enumerate(examples[:count], 1)))


def _panel(example: Example, tokenizer: Any, number: int) -> RenderableType:
    text = Text()
    tokens = zip(example.input_ids, example.labels, strict=True)
    for learnt, run in groupby(tokens, key=lambda pair: pair[1] != NO_LOSS):
        piece = tokenizer.decode([token for token, _ in run], skip_special_tokens=False)
        piece = piece.replace("\x1b", "␛")  # data must not steer the terminal
        text.append(f"⟦{piece}⟧" if learnt else piece, style="bold green" if learnt else "dim")
    learnt_count = sum(label != NO_LOSS for label in example.labels)
    title = f"example {number}: {len(example.input_ids)} tokens, ⟦{learnt_count} carry loss⟧"
    return Panel(text, title=title, title_align="left", border_style="dim")
