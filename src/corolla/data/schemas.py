"""The shapes of rows that are understood, each turned into conversations.

Invariant: a row either becomes conversations of the shape that its file's first good row has, or a `BadRow`
says why not; nothing of it is guessed.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from corolla.data.conversation import Conversation, Role, Turn

Row = Mapping[str, Any]


class BadRow(ValueError):
    """Why a row does not fit its schema, in a few words."""


@dataclass(frozen=True)
class Schema:
    """One accepted shape."""

    name: str
    shape: str  # an example, for people
    fits: Callable[[Row], bool]  # by the names of columns alone
    convert: Callable[[Row, int, bool], Conversation]  # row, its number, whether the persona is wanted


ROLES: dict[str, Role] = {
    "system": "system",
    "user": "user",
    "human": "user",
    "prompter": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "bot": "assistant",
    "chatgpt": "assistant",
    "model": "assistant",
}


def _text(value: Any, what: str) -> str:
    if not isinstance(value, str):
        raise BadRow(f"{what} is not text")
    if not value.strip():
        raise BadRow(f"{what} is empty")
    return value.strip()


def _texts(value: Any, what: str) -> list[str]:
    if isinstance(value, str) or not isinstance(value, Sequence) or not value:
        raise BadRow(f"{what} is not a list of texts")
    return [_text(item, f"{what}[{index}]") for index, item in enumerate(value)]


def _said(turns: Sequence[Any], role_key: str, text_key: str, what: str) -> tuple[Turn, ...]:
    if isinstance(turns, str) or not isinstance(turns, Sequence):
        raise BadRow(f"{what} is not a list")
    said = []
    for index, item in enumerate(turns):
        if not isinstance(item, Mapping) or role_key not in item or text_key not in item:
            raise BadRow(f"{what}[{index}] has no {role_key} and {text_key}")
        role = ROLES.get(str(item[role_key]).lower())
        if role is None:
            raise BadRow(f"{what}[{index}] has the unknown {role_key} {item[role_key]!r}")
        said.append(Turn(role, _text(item[text_key], f"{what}[{index}].{text_key}")))
    return tuple(said)


def _checked(turns: tuple[Turn, ...], conversation_id: str) -> Conversation:
    conversation = Conversation(turns, conversation_id)
    if not conversation.has_reply:
        raise BadRow("no reply to learn, with something said before it")
    return conversation


def _messages(row: Row, number: int, _persona: bool) -> Conversation:
    return _checked(_said(row["messages"], "role", "content", "messages"), f"row-{number}")


def _sharegpt(row: Row, number: int, _persona: bool) -> Conversation:
    turns = _said(row["conversations"], "from", "value", "conversations")
    return _checked(turns, str(row.get("id") or f"row-{number}"))


def _prompt_response(row: Row, number: int, _persona: bool) -> Conversation:
    turns = (
        Turn("user", _text(row["prompt"], "prompt")),
        Turn("assistant", _text(row["response"], "response")),
    )
    return _checked(turns, f"row-{number}")


def _alternating(texts: Sequence[str]) -> list[Turn]:
    """Turns whose last one is the assistant's."""
    roles: tuple[Role, Role] = ("assistant", "user")
    return [Turn(roles[(len(texts) - 1 - index) % 2], text) for index, text in enumerate(texts)]


def _persona_turns(row: Row, persona: bool) -> list[Turn]:
    if not persona:
        return []
    return [Turn("system", " ".join(_texts(row.get("personality"), "personality")))]


def _personachat(row: Row, _number: int, persona: bool) -> Conversation:
    history = _texts(row["history"], "history")
    gold = _texts(row["candidates"], "candidates")[-1]
    turns = _alternating([*history, gold])
    # The earlier replies are rows of their own: here they are context.
    context = [Turn(turn.role, turn.text, learn=False) for turn in turns[:-1]]
    # The rows of one dialogue begin alike and share its personality (and its number, where there is one).
    beginning = repr((row.get("conv_id"), row.get("personality"), history[0]))
    conversation_id = hashlib.sha256(beginning.encode()).hexdigest()[:16]
    return _checked((*_persona_turns(row, persona), *context, turns[-1]), conversation_id)


def _personachat_dialogue(row: Row, number: int, persona: bool) -> Conversation:
    utterances = row["utterances"]
    if not isinstance(utterances, Sequence) or not utterances or not isinstance(utterances[-1], Mapping):
        raise BadRow("utterances is not a list of history and candidates")
    last = utterances[-1]
    texts = [*_texts(last.get("history"), "history"), _texts(last.get("candidates"), "candidates")[-1]]
    return _checked((*_persona_turns(row, persona), *_alternating(texts)), f"row-{number}")


SCHEMAS: tuple[Schema, ...] = (
    Schema(
        "messages",
        '{"messages": [{"role": "user", "content": "…"}, {"role": "assistant", "content": "…"}]}',
        lambda row: "messages" in row,
        _messages,
    ),
    Schema(
        "ShareGPT",
        '{"conversations": [{"from": "human", "value": "…"}, {"from": "gpt", "value": "…"}]}',
        lambda row: "conversations" in row,
        _sharegpt,
    ),
    Schema(
        "PersonaChat",
        '{"personality": ["…"], "history": ["…"], "candidates": ["…", "the gold reply"]}',
        lambda row: {"history", "candidates"} <= set(row),
        _personachat,
    ),
    Schema(
        "PersonaChat dialogues",
        '{"personality": ["…"], "utterances": [{"history": ["…"], "candidates": ["…"]}]}',
        lambda row: "utterances" in row,
        _personachat_dialogue,
    ),
    Schema(
        "prompt and response",
        '{"prompt": "…", "response": "…"}',
        lambda row: {"prompt", "response"} <= set(row),
        _prompt_response,
    ),
)


def chitchat_conversation(
    content: Mapping[str, Any], conversation_id: str, speaker: str | None
) -> Conversation:
    """One entry of the chitchat data set. Without `speaker`, the second person's turns are the replies.

    Utterances that a person sent one after the other are one turn of several lines.
    """
    turns: list[Turn] = []
    for utterances in content["messages"]:
        text = "\n".join(said["text"].strip() for said in utterances if said["text"].strip())
        if not text:
            continue
        sender = utterances[0]["sender"]
        if speaker is None:
            speaks_first = sender == content["messages"][0][0]["sender"]
            role: Role = "user" if speaks_first else "assistant"
        else:
            role = "assistant" if sender == speaker else "user"
        turns.append(Turn(role, text))
    return _checked(tuple(turns), conversation_id)
