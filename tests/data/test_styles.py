"""Turns as tokens: the delimiter, and chat templates of several habits."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.data.tokenizers_made import FORGETS, INST, LAST_DIFFERS, NO_END, STRICT, with_bos

from corolla.data.conversation import Turn
from corolla.data.styles import DelimiterStyle, TemplateStyle
from corolla.errors import DataError, UsageError

# Anything that people write, but no text that a tokenizer takes for a special token.
TEXTS = st.text(st.characters(codec="utf-8", exclude_characters="<|>\r"), min_size=1, max_size=30).map(
    str.strip
)
TEXTS = TEXTS.filter(bool)


@st.composite
def exchanges(draw: st.DrawFn) -> list[Turn]:
    """Perhaps a system's turn, then a user and an assistant by turns, the assistant last."""
    system = [Turn("system", draw(TEXTS))] if draw(st.booleans()) else []
    pairs = draw(st.lists(st.tuples(TEXTS, TEXTS), min_size=1, max_size=4))
    return system + [turn for said, reply in pairs for turn in (Turn("user", said), Turn("assistant", reply))]


def by_template(tokenizer: Any, turns: list[Turn], **options: Any) -> list[int]:
    messages = [{"role": turn.role, "content": turn.text} for turn in turns]
    return list(tokenizer.apply_chat_template(messages, return_dict=False, **options))


@given(turns=exchanges())
def test_tokens_are_what_the_embedded_models_template_gives(smol: Any, turns: list[Turn]) -> None:
    style = TemplateStyle(smol)
    assert style.render(turns).ids == by_template(smol, turns)
    prompted = style.render(turns[:-1], reply=True).ids
    assert prompted == by_template(smol, turns[:-1], add_generation_prompt=True)
    assert prompted == [*style.render(turns[:-1]).ids, *style.reply_lead]


@pytest.mark.parametrize("template", [INST, STRICT], ids=["inst", "strict"])
@given(turns=exchanges())
def test_tokens_are_what_other_templates_give(template: str, turns: list[Turn]) -> None:
    tokenizer = with_bos(template)
    assert TemplateStyle(tokenizer).render(turns).ids == by_template(tokenizer, turns)


def test_replies_are_found_in_a_template(smol: Any) -> None:
    # The reply repeats what was asked and the template's own words, so a search for text would go wrong.
    turns = [Turn("user", "user"), Turn("assistant", "assistant"), Turn("user", "assistant")]
    style = TemplateStyle(smol)
    rendering = style.render(turns)
    (reply,) = rendering.replies.values()
    assert smol.decode(rendering.ids[reply.begin - 4 : reply.begin]) == "<|im_start|>assistant\n"
    assert smol.decode(rendering.ids[reply.begin : reply.end]) == "assistant"
    assert smol.decode(rendering.ids[reply.end : reply.closed]) == "<|im_end|>\n"
    assert smol.decode(rendering.ids[reply.closed :]) == "<|im_start|>user\nassistant<|im_end|>\n"
    assert smol.decode(style.stop) == "<|im_end|>"
    assert style.stop_text == ""


def test_the_space_before_a_reply_is_the_models_to_say() -> None:
    tokenizer = with_bos(INST)
    style = TemplateStyle(tokenizer)
    rendering = style.render([Turn("user", "a"), Turn("assistant", "b")])
    (reply,) = rendering.replies.values()
    assert style.reply_lead == []
    assert tokenizer.decode(rendering.ids[reply.begin : reply.end]) == " b"
    assert rendering.ids[reply.end : reply.closed] == style.stop == [tokenizer.eos_token_id]


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (None, "has no chat template; use the delimiter style"),
        (LAST_DIFFERS, "renders a turn differently"),
        (NO_END, "does not mark a reply's end"),
        ("{{ raise_exception('no') }}", "refuses the conversation"),
    ],
)
def test_templates_that_a_chat_could_not_follow_are_refused(template: str | None, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        TemplateStyle(with_bos(template))


def test_a_template_is_held_to_every_conversation() -> None:
    style = TemplateStyle(with_bos(FORGETS))
    said = [Turn("user", "a"), Turn("assistant", "b")]
    style.render(said * 2)
    with pytest.raises(DataError, match="renders a turn differently"):
        style.render(said * 3)
    # A chat goes on with what the template makes of it all.
    assert style.render(said * 3, strict=False).ids == style.render(said * 2).ids


def test_a_conversation_that_a_template_refuses_says_why() -> None:
    with pytest.raises(DataError, match=r"refuses the conversation \(roles must alternate\)"):
        TemplateStyle(with_bos(STRICT)).render([Turn("user", "a"), Turn("user", "b")])


@given(turns=exchanges())
def test_the_delimiter_follows_every_turn(bos: Any, turns: list[Turn]) -> None:
    ids = DelimiterStyle(bos, "\n-----\n").render(turns).ids
    assert bos.decode(ids, skip_special_tokens=True) == "".join(f"{turn.text}\n-----\n" for turn in turns)


def test_bos_comes_once_and_first(bos: Any) -> None:
    style = DelimiterStyle(bos, "\n-----\n")
    ids = style.render([Turn("user", "Hi"), Turn("assistant", "Ho"), Turn("user", "He")]).ids
    assert [index for index, token in enumerate(ids) if token == bos.bos_token_id] == [0]
    assert bos.decode(ids[1:]) == "Hi\n-----\nHo\n-----\nHe\n-----\n"


def test_an_empty_delimiter_is_refused(smol: Any) -> None:
    with pytest.raises(UsageError, match="delimiter is empty"):
        DelimiterStyle(smol, "")
