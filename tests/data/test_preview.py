"""What a person sees before training."""

from __future__ import annotations

import io
from typing import Any

from rich.console import Console

from corolla.cli.tune import preview
from corolla.data.conversation import Conversation, Turn
from corolla.data.render import Renderer, RenderSettings


def shown(tokenizer: Any, *texts: str, color: bool = False) -> str:
    turns = tuple(Turn("assistant" if index % 2 else "user", text) for index, text in enumerate(texts))
    examples = Renderer(tokenizer, RenderSettings()).examples(Conversation(turns, "c"))
    stream = io.StringIO()
    console = Console(
        file=stream,
        width=60,
        force_terminal=color,
        no_color=not color,
        color_system="standard" if color else None,
    )
    console.print(preview(examples * 4, tokenizer, 3))
    return stream.getvalue()


def test_the_tokens_with_loss_are_marked_without_colour_too(smol: Any) -> None:
    text = shown(smol, "Hi", "Ho", "What?", "Nothing")
    assert text.count("⟦Ho") == text.count("⟦Nothing") == text.count("example") == 3
    assert "⟦Hi" not in text
    assert "⟧What?" in text  # the delimiter after a reply is marked with it
    assert "⟦8 carry loss⟧" in text
    assert "\x1b" not in text


def test_colour_is_given_where_there_is_some(smol: Any) -> None:
    assert "\x1b[1;32m⟦Ho" in shown(smol, "Hi", "Ho", color=True)


def test_data_cannot_write_to_the_terminal(bos: Any) -> None:
    text = shown(bos, "Hi", "[bold]x[/bold]\x1b[2Jaway")
    assert "\x1b" not in text
    assert "[bold]x[/bold]␛[2Jaway" in text
