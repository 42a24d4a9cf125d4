"""The tokens of a conversation are those of its chat template, in training and in chat, whatever the tokenizer."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.data.kinds_of_tokenizers import FAST, KINDS, SPACE_AT_THE_END, TEMPLATES, tokenizer_of

from corolla.data.conversation import Conversation, Turn
from corolla.data.cuts import cut, ids_of
from corolla.data.render import NO_LOSS, Example, Renderer, RenderSettings
from corolla.errors import UsageError

TEXTS = st.one_of(
    st.sampled_from(
        ["Hi", "Hello there!", "<b>", "two\nlines", "1. a\n2. b", "ends with a dot.", "é🌸", "a  b", "'s"]
    ),
    st.text(st.characters(codec="utf-8", exclude_categories=("C",)), min_size=1, max_size=12)
    .map(str.strip)
    .filter(bool),
)
PAIRS = st.lists(st.tuples(TEXTS, TEXTS), min_size=1, max_size=4)
TALK = [("Hi", "Hello! How are you?"), ("Where do you live?", "By the river."), ("a\nb", "- one\n- two")]


def turns_of(pairs: list[tuple[str, str]], system: str | None = None) -> list[Turn]:
    turns = [] if system is None else [Turn("system", system)]
    for said, reply in pairs:
        turns += [Turn("user", said), Turn("assistant", reply)]
    return turns


def by_template(tokenizer: Any, turns: list[Turn], **options: Any) -> list[int]:
    messages = [{"role": turn.role, "content": turn.text} for turn in turns]
    return list(tokenizer.apply_chat_template(messages, tokenize=True, return_dict=False, **options))


def renderer_of(tokenizer: Any, **options: Any) -> Renderer:
    return Renderer(tokenizer, RenderSettings(style="template", **{"max_length": 5000, **options}))


def example_of(renderer: Renderer, turns: list[Turn]) -> Example:
    (example,) = renderer.examples(Conversation(tuple(turns), "c"))
    return example


def check_all(tokenizer: Any, pairs: list[tuple[str, str]], system: str | None) -> None:
    """Training's tokens, and a chat's at every turn, are the template's; labels fall on the replies."""
    renderer = renderer_of(tokenizer)
    turns = turns_of(pairs, system)
    example = example_of(renderer, turns)
    assert example.input_ids == by_template(tokenizer, turns)
    own = []
    for index, turn in enumerate(turns):
        if turn.role != "assistant":
            continue
        prompt = renderer.prompt_ids(turns[:index], own)
        assert prompt == by_template(tokenizer, turns[:index], add_generation_prompt=True)
        assert example.input_ids[: len(prompt)] == prompt
        rest = list(zip(example.input_ids, example.kinds, strict=True))[len(prompt) :]
        spoken = []
        while rest and rest[0][1] == "reply":
            spoken.append(rest.pop(0)[0])
        assert rest == [] or rest[0][1] == "marker" or spoken, "nothing of the reply is learnt"
        own.append(spoken)
        # What is said is the template's text here; so its tokens are, reply by reply.
        assert renderer.ids(turns[: index + 1], own) == by_template(tokenizer, turns[: index + 1])
    labels = [
        token for token, kind in zip(example.input_ids, example.kinds, strict=True) if kind != "context"
    ]
    assert labels == [label for label in example.labels if label != NO_LOSS]


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("marked", [True, False], ids=["marks are tokens", "marks are text"])
def test_the_tokens_are_the_templates(kind: str, template: str, marked: bool) -> None:
    system = "Be brief." if marked else None
    check_all(tokenizer_of(kind, template, marked=marked), TALK, system)


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=15)
@given(template=st.sampled_from(sorted(TEMPLATES)), marked=st.booleans(), pairs=PAIRS)
def test_whatever_is_said(kind: str, template: str, marked: bool, pairs: list[tuple[str, str]]) -> None:
    tokenizer = tokenizer_of(kind, template, marked=marked)
    check_all(tokenizer, pairs, None)


@pytest.mark.parametrize("kind", FAST)
@given(text=st.text(st.sampled_from("ab .\n'é1<|>"), max_size=20), share=st.floats(0, 1))
def test_a_clean_cut_parts_tokens_as_it_parts_the_text(kind: str, text: str, share: float) -> None:
    tokenizer = tokenizer_of(kind)
    place = round(share * len(text))
    ids, (found,) = cut(tokenizer, text, [place])
    assert ids == ids_of(tokenizer, text)
    if found.clean:
        assert ids[: found.index] == ids_of(tokenizer, text[:place])


@pytest.mark.parametrize(
    ("kind", "refused"), [(kind, kind not in ("unigram", "word piece", "slow")) for kind in KINDS]
)
def test_a_prompt_that_ends_within_a_token_is_refused(kind: str, refused: bool) -> None:
    tokenizer = tokenizer_of(kind, SPACE_AT_THE_END)
    if refused:
        with pytest.raises(UsageError, match="one token of the end of its chat template's prompt") as error:
            renderer_of(tokenizer)
        assert "\n" not in str(error.value)
    else:
        check_all(tokenizer, TALK, None)
