"""Rows as people have them: every shape, and what stands beside an exchange."""

from __future__ import annotations

import json
from typing import Any

import pytest

from corolla.data.conversation import Turn
from corolla.data.schemas import SCHEMAS, schema_of
from corolla.data.turns import BadRow

ASKED = [("user", "Hi"), ("assistant", "Ho")]
MESSAGES = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]
SAID = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Ho"}]
MARKED = "\n\nHuman: Hi\n\nAssistant: Ho"


def turns_of(row: dict[str, Any]) -> tuple[Turn, ...]:
    schema = schema_of(row)
    assert schema is not None
    return schema.convert(row, False).turns


def said(row: dict[str, Any]) -> list[tuple[str, str]]:
    return [(turn.role, turn.text) for turn in turns_of(row)]


def learnt(row: dict[str, Any]) -> list[str]:
    return [turn.text for turn in turns_of(row) if turn.role == "assistant" and turn.learn]


# --- shapes ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "row",
    [
        {"messages": MESSAGES},
        {"messages": SAID},
        {"messages": json.dumps(MESSAGES)},
        {"conversations": SAID},
        {"conversations": MESSAGES},
        {"conversation": MESSAGES},
        {"messages": None, "prompt": "Hi", "response": "Ho"},
        {"messages": [], "prompt": "Hi", "response": "Ho"},
        {"messages": "", "prompt": "Hi", "response": "Ho"},
        {"prompt": "Hi", "completion": "Ho"},
        {"prompt": MESSAGES[:1], "completion": MESSAGES[1:]},
        {"prompt": json.dumps(MESSAGES[:1]), "completion": json.dumps(MESSAGES[1:])},
        {"prompt": "Hi", "completion": MESSAGES[1:]},
        {"prompt": MESSAGES[:1], "response": "Ho"},
        {"prompt": "Hi", "completion": "Ho", "label": True},
        {"question": "Hi", "answer": "Ho"},
        {"instruction": "Hi", "output": "Ho"},
        {"instruction": "Hi", "input": "", "output": "Ho"},
        {"instruction": "Hi", "input": None, "output": "Ho"},
        {"instruction": "Hi", "input": [], "output": "Ho"},
        {"instruction": "Hi", "context": "", "response": "Ho", "category": "x"},
        {"prompt": "Hi", "chosen": "Ho", "rejected": "No"},
        {"prompt": MESSAGES[:1], "chosen": MESSAGES[1:], "rejected": MESSAGES[1:]},
        {
            "prompt": "Hi",
            "chosen": MESSAGES,
            "rejected": [MESSAGES[0], {"role": "assistant", "content": "No"}],
        },
        {"chosen": MESSAGES, "rejected": [MESSAGES[0], {"role": "assistant", "content": "No"}]},
        {"prompt": MESSAGES[:1], "chosen": MESSAGES[1], "rejected": {"role": "assistant", "content": "No"}},
        {"chosen": MARKED, "rejected": "\n\nHuman: Hi\n\nAssistant: No"},
        {"prompt": "\n\nHuman: Hi\n\nAssistant:", "chosen": " Ho", "rejected": " No"},
        {"chosen": MESSAGES},
    ],
    ids=str,
)
def test_every_shape_is_one_exchange(row: dict[str, Any]) -> None:
    assert said(row) == ASKED
    assert learnt(row) == ["Ho"]


def test_an_instruction_and_its_input_are_joined_by_a_blank_line() -> None:
    row = {"instruction": "Add.", "input": "1 2", "output": "3", "text": "### Instruction: …"}
    assert said(row) == [("user", "Add.\n\n1 2"), ("assistant", "3")]


def test_of_a_preference_the_earlier_replies_are_context() -> None:
    more = [*MESSAGES, {"role": "user", "content": "And?"}]
    chosen, rejected = ([*more, {"role": "assistant", "content": text}] for text in ("yes", "no"))
    for row in (
        {"chosen": chosen, "rejected": rejected},
        {"prompt": more, "chosen": chosen[-1:], "rejected": rejected[-1:]},
        {"prompt": more, "completion": chosen[-1:]},
    ):
        assert [text for _, text in said(row)] == ["Hi", "Ho", "And?", "yes"]
        assert learnt(row) == ["yes"]


@pytest.mark.parametrize(
    "row",
    [
        {"system": "Be brief.", "prompt": "Hi", "response": "Ho"},
        {"system_prompt": "Be brief.", "question": "Hi", "response": "Ho"},
        {"system": "Be brief.", "instruction": "Hi", "output": "Ho"},
        {"system": "Be brief.", "conversations": SAID},
        {"system": "Something else.", "messages": [{"role": "system", "content": "Be brief."}, *MESSAGES]},
        {"messages": [{"role": "developer", "content": "Be brief."}, *MESSAGES]},
        {"prompt": [{"role": "system", "content": "Be brief."}, *MESSAGES[:1]], "completion": MESSAGES[1:]},
    ],
    ids=str,
)
def test_a_systems_text_goes_in_front(row: dict[str, Any]) -> None:
    assert said(row) == [("system", "Be brief."), *ASKED]


@pytest.mark.parametrize("empty", [None, "", " "])
def test_no_systems_text_is_none(empty: Any) -> None:
    assert said({"system": empty, "prompt": "Hi", "response": "Ho"}) == ASKED


@pytest.mark.parametrize(
    "history",
    [
        [["a", "b"], ["c", "d"]],
        ["a", "b", "c", "d"],
        json.dumps([["a", "b"], ["c", "d"]]),
        [
            {"role": "user", "content": "a"},
            {"role": "assistant", "content": "b"},
            {"from": "human", "value": "c"},
            {"from": "gpt", "value": "d"},
        ],
    ],
    ids=str,
)
def test_a_history_comes_before_the_exchange(history: Any) -> None:
    earlier = [("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d")]
    for row in ({"prompt": "Hi", "response": "Ho"}, {"instruction": "Hi", "output": "Ho"}):
        assert said({**row, "history": history}) == [*earlier, *ASKED]
        assert said({**row, "history": []}) == said({**row, "history": None}) == ASKED
    with_system = {"system": "S", "prompt": "Hi", "response": "Ho", "history": history}
    assert said(with_system) == [("system", "S"), *earlier, *ASKED]


def test_a_greeting_in_a_history_answers_nobody() -> None:
    row = {"prompt": "Hi", "response": "Ho", "history": [[None, "Welcome"]]}
    assert said(row) == [("assistant", "Welcome"), *ASKED]


# --- what is learnt -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("mark", "kept"),
    [
        ({"weight": 0}, False),
        ({"weight": 0.0}, False),
        ({"weight": False}, False),
        ({"weight": "0"}, False),
        ({"train": False}, False),
        ({"train": "false"}, False),
        ({"train": 0}, False),
        ({"weight": 1, "train": False}, False),
        ({"weight": 1}, True),
        ({"weight": 1.0, "train": True}, True),
        ({"weight": None, "train": None}, True),
    ],
    ids=str,
)
@pytest.mark.parametrize("shape", ["messages", "conversations", "prompt", "chosen", "history"])
def test_a_reply_without_weight_is_context(mark: dict[str, Any], kept: bool, shape: str) -> None:
    marked = [MESSAGES[0], {**MESSAGES[1], **mark}, *SAID]
    if shape == "prompt":
        row: dict[str, Any] = {"prompt": MESSAGES[:1], "completion": marked[1:]}
    elif shape == "history":
        row = {"history": marked[:2], "prompt": "Hi", "response": "Ho"}
    else:
        row = {shape: marked}
    assert [turn.learn for turn in turns_of(row) if turn.role == "assistant"] == [kept, True]


@pytest.mark.parametrize("weight", [0.5, 2, -1, "much", [1], float("nan")])
def test_another_weight_is_not_guessed(weight: Any) -> None:
    with pytest.raises(BadRow, match=r"messages\[1\].weight is .*, neither 0 nor 1"):
        turns_of({"messages": [MESSAGES[0], {**MESSAGES[1], "weight": weight}]})


def test_a_row_of_which_nothing_is_to_be_learnt_is_left_out() -> None:
    with pytest.raises(BadRow, match="no reply to learn"):
        turns_of({"messages": [MESSAGES[0], {**MESSAGES[1], "weight": 0}]})
    with pytest.raises(BadRow, match="its label is false"):
        turns_of({"prompt": "Hi", "completion": "Ho", "label": False})


# --- parts ----------------------------------------------------------------------------------------------------


def part(text: str, kind: str = "text") -> dict[str, Any]:
    return {"type": kind, "text": text}


@pytest.mark.parametrize(
    "content",
    [
        [part("H"), part("i")],
        [{"text": "Hi"}],
        [part(" Hi", "input_text")],
        [{**part("Hi"), "image_url": None}],
    ],
    ids=str,
)
def test_parts_of_a_text_are_joined(content: Any) -> None:
    assert said({"messages": [{"role": "user", "content": content}, MESSAGES[1]]}) == ASKED
    assert said({"prompt": content, "response": [part("Ho", "output_text")]}) == ASKED


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (
            [part("Hi"), {"type": "image_url", "image_url": {"url": "x"}}],
            "a part that is not text but 'image_url'",
        ),
        ([{"type": "image"}], "a part that is not text but 'image'"),
        ([{"type": "text", "text": None}], "a part without text"),
        ([part(" ")], "content is empty"),
        ([], "content is not text"),
        (["Hi"], "content is not text"),
        (5, "content is not text"),
        (float("nan"), "content is not text"),
        ({"text": "Hi"}, "content is not text"),
        (None, "content is not text, it is missing"),
    ],
    ids=str,
)
def test_other_parts_make_a_row_unfit(content: Any, reason: str) -> None:
    with pytest.raises(BadRow, match=reason):
        turns_of({"messages": [{"role": "user", "content": content}, MESSAGES[1]]})


# --- tools ----------------------------------------------------------------------------------------------------

CALL = {"id": "0", "type": "function", "function": {"name": "weather", "arguments": "{}"}}


def test_turns_about_tools_keep_what_a_template_needs() -> None:
    row = {
        "messages": [
            {"role": "user", "content": "Rain?"},
            {"role": "assistant", "content": None, "tool_calls": [CALL]},
            {"role": "tool", "tool_call_id": "0", "name": "weather", "content": ""},
            {"role": "assistant", "content": "Yes."},
        ],
        "tools": json.dumps([{"type": "function", "function": {"name": "weather"}}]),
    }
    turns = turns_of(row)
    assert [turn.role for turn in turns] == ["user", "assistant", "tool", "assistant"]
    assert turns[1].more == {"tool_calls": [CALL], "content": None}
    assert turns[2].more == {"tool_call_id": "0", "name": "weather"}
    assert [turn.about_tools for turn in turns] == [False, True, True, False]
    schema = schema_of(row)
    assert schema is not None
    assert schema.convert(row, False).tools == ({"type": "function", "function": {"name": "weather"}},)


@pytest.mark.parametrize(
    "called",
    [
        {"role": "assistant", "content": "", "tool_calls": [CALL]},
        {"role": "assistant", "tool_calls": [CALL]},
        {"role": "assistant", "content": None, "tool_calls": json.dumps([CALL])},
        {"role": "assistant", "content": None, "function_call": CALL["function"]},
        {"from": "function_call", "value": json.dumps(CALL["function"])},
    ],
    ids=str,
)
def test_calls_in_every_form(called: dict[str, Any]) -> None:
    (_, turn, *_) = turns_of(
        {"messages": [MESSAGES[0], called, {"from": "observation", "value": "x"}, *SAID]}
    )
    (call,) = turn.more["tool_calls"]
    assert (call["function"], turn.text) == (CALL["function"], "")


@pytest.mark.parametrize(
    ("message", "reason"),
    [
        ({"role": "assistant", "tool_calls": "soon"}, "tool_calls is not a list of calls"),
        ({"role": "assistant", "content": None, "tool_calls": []}, "content is not text"),
        ({"from": "function_call", "value": "weather"}, "not a call of a function"),
        ({"role": "tool", "content": 3}, "content is not text"),
    ],
    ids=str,
)
def test_bad_calls_make_a_row_unfit(message: dict[str, Any], reason: str) -> None:
    with pytest.raises(BadRow, match=reason):
        turns_of({"messages": [MESSAGES[0], message, *SAID]})


# --- what does not fit ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"prompt": "Hi", "response": "Ho", "history": "a, b"}, "history is not a list"),
        ({"prompt": "Hi", "response": "Ho", "history": [["a", "b", "c"]]}, r"history\[0\] is not a pair"),
        ({"prompt": "Hi", "response": "Ho", "history": [["a", 3]]}, r"history\[0\] is not text"),
        ({"prompt": "Hi", "response": "Ho", "system": 3}, "system is not text"),
        ({"prompt": "Hi", "response": 4}, "response is not text"),
        ({"instruction": "Hi", "input": ["x"], "output": "Ho"}, "input is not text"),
        ({"instruction": "Hi", "output": ""}, "output is empty"),
        ({"chosen": "Ho", "rejected": "No"}, "there is no prompt that it answers"),
        ({"messages": MESSAGES, "tools": "hammer"}, "tools is not a list"),
        ({"messages": None}, "messages is not a list"),
    ],
    ids=str,
)
def test_a_bad_row_says_what_is_wrong(row: dict[str, Any], reason: str) -> None:
    with pytest.raises(BadRow, match=reason):
        turns_of(row)


@pytest.mark.parametrize(
    "row", [{}, {"text": "Hi"}, {"prompt": "Hi"}, {"output": "Ho"}, {"answer": "Ho"}], ids=str
)
def test_a_row_of_no_shape_has_none(row: dict[str, Any]) -> None:
    assert schema_of(row) is None


def test_shapes_have_names_of_their_own() -> None:
    assert len({schema.name for schema in SCHEMAS}) == len(SCHEMAS)
