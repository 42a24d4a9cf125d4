"""Long conversations in windows, tools in templates, and delimiters inside of texts, with any tokenizer."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.data.kinds_of_tokenizers import FAST, KINDS, TEMPLATES, tokenizer_of

from corolla.data.conversation import Conversation, Turn
from corolla.data.cuts import ids_of
from corolla.data.render import NO_LOSS, Example, Renderer, RenderSettings
from corolla.data.styles import delimiter_note
from corolla.errors import DataError

WORDS = st.text("abc de.", min_size=1, max_size=9).map(str.strip).filter(bool)
TALK = [
    Turn("user", "Hi"),
    Turn("assistant", "Hello! How are you?"),
    Turn("user", "Well."),
    Turn("assistant", "I see."),
]
DELIMITER = "\n-----\n"


def runs(example: Example, tokenizer: Any) -> list[str]:
    """The texts that carry loss."""
    found: list[list[int]] = []
    previous = NO_LOSS
    for token, label in zip(example.input_ids, example.labels, strict=True):
        if label != NO_LOSS:
            found += [[]] if previous == NO_LOSS else []
            found[-1].append(token)
        previous = label
    return [tokenizer.decode(run, skip_special_tokens=True).strip() for run in found]


# --- windows ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("template", ["chatml with a system turn of its own", "mistral"])
@settings(max_examples=15)
@given(
    pairs=st.lists(st.tuples(WORDS, WORDS), min_size=1, max_size=8),
    longest=st.integers(80, 160),
    system=st.booleans(),
    everything=st.booleans(),
)
def test_windows_of_a_template_are_conversations(
    template: str, pairs: list[tuple[str, str]], longest: int, system: bool, everything: bool
) -> None:
    tokenizer = tokenizer_of("metaspace first", template)
    turns = [Turn("system", "Be brief.")] if system else []
    turns += [turn for said, reply in pairs for turn in (Turn("user", said), Turn("assistant", reply))]
    renderer = Renderer(
        tokenizer,
        RenderSettings(style="template", max_length=longest, loss_on="all" if everything else "replies"),
    )
    heard: list[str] = []
    for example in renderer.examples(Conversation(tuple(turns), "c")):
        assert len(example.input_ids) == len(example.labels) == len(example.kinds) <= longest
        assert "reply" in example.kinds or "marker" in example.kinds
        ids = [
            token for token, kind in zip(example.input_ids, example.kinds, strict=True) if kind != "context"
        ]
        heard += [tokenizer.decode([token]) for token in ids if token == renderer.closing_ids[0]]
        assert example.input_ids == _some_conversation(tokenizer, turns, system, example)
    assert len(heard) == len(pairs)


def _some_conversation(tokenizer: Any, turns: list[Turn], system: bool, example: Example) -> list[int]:
    """The template's tokens for those successive exchanges whose tokens these are."""
    head, spoken = turns[: int(system)], turns[int(system) :]
    for begin in range(0, len(spoken), 2):
        for end in range(begin + 2, len(spoken) + 1, 2):
            messages = [{"role": turn.role, "content": turn.text} for turn in [*head, *spoken[begin:end]]]
            ids = tokenizer.apply_chat_template(messages, return_dict=False)
            if list(ids) == example.input_ids:
                return list(ids)
    return []


def test_every_reply_is_learnt_once() -> None:
    tokenizer = tokenizer_of("metaspace first", "mistral")
    turns = [
        turn for number in range(9) for turn in (Turn("user", f"q{number}"), Turn("assistant", f"r{number}"))
    ]
    renderer = Renderer(tokenizer, RenderSettings(style="template", max_length=40))
    windows = renderer.examples(Conversation(tuple(turns), "c"))
    assert len(windows) > 2
    assert [run for window in windows for run in runs(window, tokenizer)] == [
        f"r{number}" for number in range(9)
    ]


def test_a_reply_that_does_not_fit_keeps_the_templates_marks() -> None:
    tokenizer = tokenizer_of("gpt2", "chatml")
    renderer = Renderer(tokenizer, RenderSettings(style="template", max_length=24))
    turns = (Turn("user", "a " * 40 + "end?"), Turn("assistant", "yes"))
    (example,) = renderer.examples(Conversation(turns, "c"))
    text = tokenizer.decode(example.input_ids)
    assert len(example.input_ids) == 24
    assert text.startswith("<|im_start|>user\n")
    assert text.endswith(" end?<|im_end|>\n<|im_start|>assistant\nyes<|im_end|>\n")
    (example,) = renderer.examples(Conversation((turns[0], Turn("assistant", "b " * 40)), "c"))
    assert "<|im_start|>assistant\nb b b" in tokenizer.decode(example.input_ids)


# --- tools ------------------------------------------------------------------------------------------------------

WITH_TOOLS = (
    "{% if tools %}{{ '<|im_start|>system\n' + tools | tojson + '<|im_end|>\n' }}{% endif %}"
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}"
    "{% if m['content'] %}{{ m['content'] }}{% endif %}"
    "{% for call in m['tool_calls'] or [] %}{{ '<call>' + call.function | tojson + '</call>' }}{% endfor %}"
    "{{ '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
CALL = {"type": "function", "function": {"name": "weather", "arguments": "{}"}}
ABOUT_TOOLS = Conversation(
    (
        Turn("user", "Is it raining?"),
        Turn("assistant", "", more={"tool_calls": [CALL], "content": None}),
        Turn("tool", 'rain & "wind"', more={"tool_call_id": "0"}),
        Turn("assistant", "Yes."),
    ),
    "c",
    tools=({"type": "function", "function": {"name": "weather"}},),
)


@pytest.mark.parametrize("kind", ["gpt2", "metaspace first"])
def test_calls_of_tools_are_rendered_by_a_template_that_can(kind: str) -> None:
    tokenizer = tokenizer_of(kind, WITH_TOOLS)
    renderer = Renderer(tokenizer, RenderSettings(style="template", max_length=5000))
    assert renderer.refusal(ABOUT_TOOLS) is None
    (example,) = renderer.examples(ABOUT_TOOLS)
    messages = [
        {"role": "user", "content": "Is it raining?"},
        {"role": "assistant", "content": None, "tool_calls": [CALL]},
        {"role": "tool", "tool_call_id": "0", "content": 'rain & "wind"'},
        {"role": "assistant", "content": "Yes."},
    ]
    wanted = tokenizer.apply_chat_template(messages, tools=list(ABOUT_TOOLS.tools), return_dict=False)
    assert example.input_ids == list(wanted)
    call, answer = runs(example, tokenizer)
    assert call.startswith("<call>")
    assert "weather" in call
    assert answer == "Yes."


@pytest.mark.parametrize(
    ("style", "template", "why"),
    [
        ("delimiter", None, "need a chat template"),
        ("template", "zephyr", "refuses the conversation"),
        ("template", "mistral", "refuses the conversation"),
        (
            "template",
            TEMPLATES["llama 3"].replace("m['content'] | trim", "(m['content'] or '')"),
            "does not render",
        ),
    ],
)
def test_where_they_cannot_be_rendered_the_conversation_is_left_out(
    style: str, template: str | None, why: str
) -> None:
    renderer = Renderer(tokenizer_of("gpt2", template), RenderSettings(style=style))
    assert why in str(renderer.refusal(ABOUT_TOOLS))
    with pytest.raises(DataError, match=why):
        renderer.examples(ABOUT_TOOLS)


# --- delimiters -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_turns_have_the_tokens_that_they_have_inside_of_a_text(kind: str) -> None:
    tokenizer = tokenizer_of(kind)
    (example,) = Renderer(tokenizer, RenderSettings()).examples(Conversation(tuple(TALK), "c"))
    assert example.input_ids == ids_of(tokenizer, "".join(turn.text + DELIMITER for turn in TALK))


@pytest.mark.parametrize("kind", FAST)
def test_what_was_saved_before_is_rendered_as_before(kind: str) -> None:
    tokenizer = tokenizer_of(kind)
    saved = RenderSettings().to_dict()
    del saved["spaced"]
    rendering = RenderSettings.from_dict(saved)
    (example,) = Renderer(tokenizer, rendering).examples(Conversation(tuple(TALK), "c"))
    apart = [text for turn in TALK for text in (turn.text, DELIMITER)]
    assert example.input_ids == [token for text in apart for token in ids_of(tokenizer, text)]


def test_a_text_with_the_delimiter_is_counted_and_another_is_named() -> None:
    drawn = Conversation((Turn("user", f"a{DELIMITER}b"), Turn("assistant", f"c{DELIMITER}d\n=====\ne")), "c")
    clean = Conversation(tuple(TALK), "d")
    note = delimiter_note([drawn, clean], DELIMITER)
    assert note is not None
    assert note.startswith("2 of 6 texts contain the delimiter, 1 of them replies")
    assert note.endswith(r"--delimiter '\n#####\n'.")
    assert delimiter_note([clean], DELIMITER) is None
