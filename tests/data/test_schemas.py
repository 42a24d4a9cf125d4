"""Rows of every accepted shape."""

from __future__ import annotations

from typing import Any

import pytest

from corolla.data.conversation import Conversation, Turn
from corolla.data.schemas import SCHEMAS, chitchat_conversation
from corolla.data.turns import BadRow

BY_NAME = {schema.name: schema for schema in SCHEMAS}
ASKED = [("user", "How are you?"), ("assistant", "Well.")]

PERSONALITY = ["I have a cat.", "I like tea."]
DISTRACTORS = ["My dog is red.", "No idea."]


def convert(name: str, row: dict[str, Any], *, persona: bool = False) -> Conversation:
    assert [schema.name for schema in SCHEMAS if schema.fits(row)] == [name]
    return BY_NAME[name].convert(row, persona)


@pytest.mark.parametrize(
    ("name", "row"),
    [
        (
            "messages",
            {
                "messages": [
                    {"role": "user", "content": " How are you?\n"},
                    {"role": "assistant", "content": "Well."},
                ]
            },
        ),
        (
            "ShareGPT",
            {
                "conversations": [
                    {"from": "human", "value": "How are you?"},
                    {"from": "gpt", "value": "Well."},
                ]
            },
        ),
        ("prompt and response", {"prompt": "How are you?", "response": "Well.", "score": 3}),
        ("PersonaChat", {"history": ["How are you?"], "candidates": [*DISTRACTORS, "Well."]}),
        (
            "PersonaChat dialogues",
            {"utterances": [{"history": ["How are you?"], "candidates": [*DISTRACTORS, "Well."]}]},
        ),
    ],
)
def test_every_shape_gives_the_same_conversation(name: str, row: dict[str, Any]) -> None:
    assert [(turn.role, turn.text) for turn in convert(name, row).turns] == ASKED


def test_a_system_turn_stays_in_front() -> None:
    row = {"conversations": [{"from": "system", "value": "Be brief."}, *_sharegpt("Hi", "Ho", "He")]}
    assert [turn.role for turn in convert("ShareGPT", row).turns] == ["system", "user", "assistant", "user"]


def _sharegpt(*texts: str) -> list[dict[str, str]]:
    return [{"from": ("human", "gpt")[index % 2], "value": text} for index, text in enumerate(texts)]


# --- PersonaChat ------------------------------------------------------------------------------------------


def persona_row(history: list[str], gold: str) -> dict[str, Any]:
    return {"personality": PERSONALITY, "history": history, "candidates": [*DISTRACTORS, gold], "conv_id": 1}


def test_of_a_persona_chat_row_only_the_gold_reply_is_learnt() -> None:
    conversation = convert("PersonaChat", persona_row(["a", "b", "c"], "gold"))
    assert conversation.turns == (
        Turn("user", "a", learn=False),
        Turn("assistant", "b", learn=False),
        Turn("user", "c", learn=False),
        Turn("assistant", "gold"),
    )


def test_of_a_whole_dialogue_every_reply_is_learnt() -> None:
    utterances = [
        {"history": ["a"], "candidates": [*DISTRACTORS, "b"]},
        {"history": ["a", "b", "c"], "candidates": [*DISTRACTORS, "gold"]},
    ]
    conversation = convert("PersonaChat dialogues", {"personality": PERSONALITY, "utterances": utterances})
    assert [turn.text for turn in conversation.turns if turn.role == "assistant" and turn.learn] == [
        "b",
        "gold",
    ]
    assert [turn.text for turn in conversation.turns if turn.role == "user"] == ["a", "c"]


@pytest.mark.parametrize("name", ["PersonaChat", "PersonaChat dialogues"])
def test_the_persona_goes_in_front_when_wanted(name: str) -> None:
    row = persona_row(["a"], "gold")
    if name == "PersonaChat dialogues":
        row = {"personality": PERSONALITY, "utterances": [row]}
    assert convert(name, row, persona=True).turns[0] == Turn("system", "I have a cat. I like tea.")
    assert [turn.role for turn in convert(name, row).turns] == ["user", "assistant"]
    del row["personality"]
    with pytest.raises(BadRow, match="personality is not a list of texts"):
        convert(name, row, persona=True)


def test_all_rows_of_a_dialogue_have_one_id_whoever_tells_it() -> None:
    mine = [
        persona_row(["hello", "hi there", "how goes it"], "fine"),
        persona_row(["hello"], "hi there"),
        {"utterances": [{"history": ["hello", "hi there", "how goes it"], "candidates": ["x", "fine"]}]},
    ]
    theirs = [persona_row(["__ SILENCE __", "hello", "hi there"], "how goes it")]
    names = {
        next(schema for schema in SCHEMAS if schema.fits(row)).convert(row, False).id for row in mine + theirs
    }
    assert len(names) == 1
    other = convert("PersonaChat", persona_row(["hello"], "good day"))
    assert other.id not in names


def test_a_silence_is_nothing_to_answer() -> None:
    with pytest.raises(BadRow, match="no reply to learn"):
        convert("PersonaChat", persona_row(["__ SILENCE __"], "hello"))


# --- ids --------------------------------------------------------------------------------------------------


def test_equal_rows_are_one_conversation() -> None:
    rows = [{"prompt": prompt, "response": "Well."} for prompt in ("How are you?", "How are you? ", "How?")]
    first, same, other = (convert("prompt and response", row).id for row in rows)
    assert first == same != other


def test_a_share_gpt_id_is_kept() -> None:
    assert convert("ShareGPT", {"id": "x7", "conversations": _sharegpt("Hi", "Ho")}).id == "x7"
    assert convert("ShareGPT", {"id": None, "conversations": _sharegpt("Hi", "Ho")}).id != "None"


# --- rows that do not fit ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"messages": None}, "messages is not a list"),
        ({"messages": "user: hi"}, "messages is not a list"),
        ({"messages": []}, "no reply to learn"),
        ({"messages": [{"role": "user", "content": "Hi"}]}, "no reply to learn"),
        ({"messages": [{"role": "assistant", "content": "Hi"}]}, "no reply to learn"),
        ({"messages": ["Hi"]}, r"messages\[0\] has no role and content"),
        ({"messages": [{"role": "wizard", "content": "Hi"}]}, r"messages\[0\] has the unknown role 'wizard'"),
        ({"messages": [{"role": "user", "content": ["Hi"]}]}, r"messages\[0\].content is not text"),
        ({"conversations": [{"from": "human", "value": " "}]}, r"conversations\[0\].value is empty"),
        ({"prompt": "Hi", "response": None}, "response is not text"),
        ({"history": "Hi", "candidates": ["Ho"]}, "history is not a list of texts"),
        ({"history": ["Hi"], "candidates": []}, "candidates is not a list of texts"),
        ({"history": ["Hi", 3], "candidates": ["Ho"]}, r"history\[1\] is not text"),
        ({"utterances": []}, "utterances is not a list of history and candidates"),
        ({"utterances": [{"candidates": ["Ho"]}]}, "history is not a list of texts"),
    ],
)
def test_a_bad_row_says_what_is_wrong(row: dict[str, Any], reason: str) -> None:
    schema = next(schema for schema in SCHEMAS if schema.fits(row))
    with pytest.raises(BadRow, match=reason):
        schema.convert(row, False)


# --- chitchat ---------------------------------------------------------------------------------------------


def chitchat(*turns: tuple[str, list[str]]) -> dict[str, Any]:
    return {"messages": [[{"sender": who, "text": text} for text in texts] for who, texts in turns]}


TALK = chitchat(("ann", ["Hi", " there "]), ("ben", ["Ho"]), ("ann", ["What?", ""]), ("ben", ["Nothing"]))


def test_the_second_person_replies_in_chitchat() -> None:
    conversation = chitchat_conversation(TALK, "t", None)
    assert conversation == Conversation(
        (
            Turn("user", "Hi\nthere"),
            Turn("assistant", "Ho"),
            Turn("user", "What?"),
            Turn("assistant", "Nothing"),
        ),
        "t",
    )


def test_one_persons_turns_can_be_the_replies() -> None:
    roles = [turn.role for turn in chitchat_conversation(TALK, "t", "ann").turns]
    assert roles == ["assistant", "user", "assistant", "user"]
    alone = chitchat(("ann", ["Hi"]), ("ben", ["Ho"]))
    with pytest.raises(BadRow, match="no reply to learn"):
        chitchat_conversation(alone, "t", "ann")


def test_what_an_empty_turn_parted_is_one_turn() -> None:
    content = chitchat(("ann", ["Hi"]), ("ben", [" "]), ("ann", ["Anyone?"]), ("ben", ["Yes"]))
    assert chitchat_conversation(content, "t", None).turns == (
        Turn("user", "Hi\nAnyone?"),
        Turn("assistant", "Yes"),
    )
