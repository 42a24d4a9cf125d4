"""Which style is chosen where nobody says: the template where a chat could follow it, else the delimiter."""

from __future__ import annotations

from typing import Any

import pytest
from tests.chat.reference import byte_tokenizer

from corolla.data.conversation import Turn
from corolla.data.render import Renderer, RenderSettings
from corolla.errors import UsageError

UNSTABLE = "{% for message in messages %}{% if loop.last %}<|user|>{% endif %}{{ message['content'] }}</s>{% endfor %}"


def tokenizer(template: str | None) -> Any:
    made = byte_tokenizer()
    if template != "own":
        made.chat_template = template
    return made


@pytest.mark.parametrize(
    ("template", "style", "words"),
    [
        ("own", "template", "the tokenizer's chat template"),
        (None, "delimiter", r"the delimiter '\n-----\n': the tokenizer has no chat template"),
        (UNSTABLE, "delimiter", "renders a turn differently"),
        ("{{ raise_exception('no') }}", "delimiter", "refuses the conversation"),
    ],
)
def test_auto_is_the_template_where_it_will_do(template: str | None, style: str, words: str) -> None:
    renderer = Renderer(tokenizer(template), RenderSettings(style="auto"))
    assert renderer.settings == RenderSettings(style=style)
    assert words in renderer.about_style
    assert "\n" not in renderer.about_style
    asked_for = Renderer(tokenizer(template), RenderSettings(style=style))
    turns = [Turn("user", "Hi")]
    assert renderer.prompt_ids(turns) == asked_for.prompt_ids(turns)


def test_a_template_that_was_asked_for_is_not_replaced() -> None:
    with pytest.raises(UsageError, match="use the delimiter style"):
        Renderer(tokenizer(UNSTABLE), RenderSettings(style="template"))
    assert Renderer(tokenizer("own"), RenderSettings(style="delimiter")).settings.style == "delimiter"
