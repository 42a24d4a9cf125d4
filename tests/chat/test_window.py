"""The window's tokens are what training renders; exchanges leave it whole."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.chat.reference import byte_tokenizer
from tests.data.kinds_of_tokenizers import KINDS, TEMPLATES, tokenizer_of

from corolla.chat.window import Exchange, Window, newest_that_fit
from corolla.data.conversation import Conversation, Turn
from corolla.data.render import Renderer, RenderSettings

TOKENIZER = byte_tokenizer()
STYLES = pytest.mark.parametrize("style", ["delimiter", "template"])
SYSTEMS = st.none() | st.just("Be brief.")
TEXTS = st.text("abc é?\n", min_size=1, max_size=12).map(str.strip).filter(bool)
EXCHANGES = st.lists(st.tuples(TEXTS, TEXTS), min_size=1, max_size=6)


def renderer_of(style: str) -> Renderer:
    return Renderer(TOKENIZER, RenderSettings(style=style, max_length=4096))


def exchange(said: str, reply: str) -> Exchange:
    return Exchange(said, reply, tuple(TOKENIZER(reply, add_special_tokens=False).input_ids))


def window_of(style: str, system: str | None, exchanges: Sequence[Exchange]) -> Window:
    window = Window(renderer_of(style), system)
    for item in exchanges:
        window.add(item)
    return window


@STYLES
@given(SYSTEMS, EXCHANGES)
def test_the_tokens_are_those_of_a_training_example(
    style: str, system: str | None, said: list[tuple[str, str]]
) -> None:
    turns = [] if system is None else [Turn("system", system)]
    for user, reply in said:
        turns += [Turn("user", user), Turn("assistant", reply)]
    (example,) = renderer_of(style).examples(Conversation(tuple(turns), "one"))
    assert window_of(style, system, [exchange(*pair) for pair in said]).ids == example.input_ids


@STYLES
@given(SYSTEMS, EXCHANGES, TEXTS)
def test_dropping_the_newest_exchange_leaves_no_trace(
    style: str, system: str | None, said: list[tuple[str, str]], then: str
) -> None:
    exchanges = [exchange(*pair) for pair in said]
    window = window_of(style, system, exchanges)
    window.drop_newest()
    never = window_of(style, system, exchanges[:-1])
    assert (window.ids, len(window)) == (never.ids, len(never))
    assert window.prompted(then) == never.prompted(then)


@STYLES
@given(SYSTEMS, EXCHANGES, TEXTS, st.integers(0, 200))
def test_as_many_of_the_newest_as_fit(
    style: str, system: str | None, said: list[tuple[str, str]], then: str, room: int
) -> None:
    exchanges = [exchange(*pair) for pair in said]
    window = newest_that_fit(renderer_of(style), system, exchanges, then, room)
    kept = len(window)
    assert window.ids == window_of(style, system, exchanges[len(exchanges) - kept :]).ids
    assert kept == 0 or len(window.prompted(then)) <= room
    if kept < len(exchanges):
        one_more = window_of(style, system, exchanges[len(exchanges) - kept - 1 :])
        assert len(one_more.prompted(then)) > room


def test_a_reply_stays_the_tokens_that_were_said() -> None:
    said = exchange("a", "bb")
    other_tokens = Exchange("a", "bb", (7, 8, 9))
    window = window_of("delimiter", None, [other_tokens, said])
    assert window.ids[1 + len(renderer_of("delimiter").closing_ids) :][:3] == [7, 8, 9]


@STYLES
def test_a_reply_of_nothing_can_be_gone_on_from(style: str) -> None:
    window = newest_that_fit(renderer_of(style), None, [exchange("a", ""), exchange("b", "c")], "d", 500)
    assert len(window) == 2


# --- other tokenizers -------------------------------------------------------------------------------------


def by_template(tokenizer: Any, said: Sequence[str], **options: Any) -> list[int]:
    messages = [
        {"role": ("user", "assistant")[index % 2], "content": text} for index, text in enumerate(said)
    ]
    return list(tokenizer.apply_chat_template(messages, return_dict=False, **options))


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("kind", KINDS)
def test_a_chat_reads_the_templates_tokens_with_its_own_replies(kind: str, template: str) -> None:
    tokenizer = tokenizer_of(kind, template)
    renderer = Renderer(tokenizer, RenderSettings(style="template"))
    one, two = "Hello there", "By the river"
    prompts = [
        by_template(tokenizer, said, add_generation_prompt=True)
        for said in (["Hi"], ["Hi", one, "Where?"], ["Hi", one, "Where?", two, "a\nb"])
    ]
    # What the model says is the reply letter by letter, in tokens that no tokenizer makes of it.
    own = [[token for letter in text for token in tokenizer(letter, add_special_tokens=False).input_ids]
           for text in (one, two)]  # fmt: skip
    window = Window(renderer, None)
    assert window.prompted("Hi") == prompts[0]
    window.add(Exchange("Hi", one, tuple(own[0])))
    told = by_template(tokenizer, ["Hi", one])
    closing = told[-len(renderer.closing_ids) :]
    assert closing == renderer.closing_ids
    assert window.ids == [*prompts[0], *own[0], *closing]
    assert window.prompted("Where?") == [*window.ids, *prompts[1][len(told) :]]
    window.add(Exchange("Where?", two, tuple(own[1])))
    after = prompts[2][len(by_template(tokenizer, ["Hi", one, "Where?", two])) :]
    assert window.prompted("a\nb") == [*window.ids, *after]


def test_a_reply_that_is_one_token_with_what_closes_it_is_the_templates() -> None:
    tokenizer = tokenizer_of("gpt2", TEMPLATES["chatml"].replace("<|im_end|>", "/b>"))
    renderer = Renderer(tokenizer, RenderSettings(style="template"))
    reply = "four<"  # `</` is one token
    told = by_template(tokenizer, ["Hi", reply])
    own = tokenizer(reply, add_special_tokens=False).input_ids
    prompt = by_template(tokenizer, ["Hi"], add_generation_prompt=True)
    assert told[: len(prompt) + len(own)] != [*prompt, *own], "the tokenizer keeps them apart"
    window = Window(renderer, None, [Exchange("Hi", reply, tuple(own))])
    assert window.ids == told
    (example,) = renderer.examples(Conversation((Turn("user", "Hi"), Turn("assistant", reply)), "c"))
    assert example.input_ids == told
    learnt = [token for token, kind in zip(told, example.kinds, strict=True) if kind == "reply"]
    assert tokenizer.decode(learnt) == "four</"


def test_a_reply_that_the_template_leaves_out_is_left_out() -> None:
    """Templates of models that think aloud forget what was thought once more is said."""
    forgets = TEMPLATES["chatml"].replace("m['content']", "m['content'].split('</think>')[-1]")
    tokenizer = tokenizer_of("gpt2", forgets)
    reply = "well, well</think>Yes"
    own = tuple(tokenizer(reply, add_special_tokens=False).input_ids)
    window = Window(Renderer(tokenizer, RenderSettings(style="template")), None, [Exchange("Hi", reply, own)])
    assert window.prompted("So?") == by_template(tokenizer, ["Hi", reply, "So?"], add_generation_prompt=True)
