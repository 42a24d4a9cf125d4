"""The shapes of rows that are understood, each turned into a conversation.

Invariant: a row either becomes one conversation or a `BadRow` says why not; nothing of it is guessed. Rows
that tell of the same conversation (equal rows, PersonaChat's many rows of one dialogue) get the same id.
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
    convert: Callable[[Row, bool], Conversation]  # the row, and whether the persona goes in front


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


def _hash(said: Sequence[str]) -> str:
    return hashlib.sha256(repr(list(said)).encode()).hexdigest()[:16]


def _checked(turns: tuple[Turn, ...], conversation_id: str | None = None) -> Conversation:
    """Without an id of its own, a conversation is named by what is said in it."""
    conversation = Conversation(turns, conversation_id or _hash([turn.text for turn in turns]))
    if not conversation.has_reply:
        raise BadRow("no reply to learn, with something said before it")
    return conversation


def _messages(row: Row, _persona: bool) -> Conversation:
    return _checked(_said(row["messages"], "role", "content", "messages"))


def _sharegpt(row: Row, _persona: bool) -> Conversation:
    turns = _said(row["conversations"], "from", "value", "conversations")
    return _checked(turns, str(row["id"]) if row.get("id") else None)


def _prompt_response(row: Row, _persona: bool) -> Conversation:
    turns = (
        Turn("user", _text(row["prompt"], "prompt")),
        Turn("assistant", _text(row["response"], "response")),
    )
    return _checked(turns)


def _alternating(texts: Sequence[str]) -> list[Turn]:
    """Turns whose last one is the assistant's."""
    roles: tuple[Role, Role] = ("assistant", "user")
    return [Turn(roles[(len(texts) - 1 - index) % 2], text) for index, text in enumerate(texts)]


def _dialogue(row: Row, last: Mapping[str, Any], persona: bool, *, learn_all: bool) -> Conversation:
    """PersonaChat's history and its gold reply, the last candidate; the other candidates are distractors.

    The published files tell each dialogue from both sides, one of which begins with a silence. It is dropped,
    and the dialogue named by its first two utterances, so that both sides have one id.
    """
    history = [text for text in _texts(last.get("history"), "history") if text.strip("_ ") != "SILENCE"]
    texts = [*history, _texts(last.get("candidates"), "candidates")[-1]]
    turns = _alternating(texts)
    if not learn_all:
        turns[:-1] = [Turn(turn.role, turn.text, learn=False) for turn in turns[:-1]]
    return _checked((*_persona_turns(row, persona), *turns), _hash(texts[:2]))


def _persona_turns(row: Row, persona: bool) -> list[Turn]:
    if not persona:
        return []
    return [Turn("system", " ".join(_texts(row.get("personality"), "personality")))]


def _personachat(row: Row, persona: bool) -> Conversation:
    # The earlier replies are rows of their own: here they are context.
    return _dialogue(row, row, persona, learn_all=False)


def _personachat_nested(row: Row, persona: bool) -> Conversation:
    utterances = row["utterances"]
    if not isinstance(utterances, Sequence) or not utterances or not isinstance(utterances[-1], Mapping):
        raise BadRow("utterances is not a list of history and candidates")
    # The last one's history is the whole dialogue.
    return _dialogue(row, utterances[-1], persona, learn_all=True)


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
        _personachat_nested,
    ),
    Schema(
        "prompt and response",
        '{"prompt": "…", "response": "…"}',
        lambda row: {"prompt", "response"} <= set(row),
        _prompt_response,
    ),
)


PERSONA_SCHEMAS = frozenset({"PersonaChat", "PersonaChat dialogues"})


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
        if turns and turns[-1].role == role:  # what stood between them was empty
            text = f"{turns.pop().text}\n{text}"
        turns.append(Turn(role, text))
    return _checked(tuple(turns), conversation_id)
