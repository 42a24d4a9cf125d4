"""Turns from what stands in a row: texts, lists of parts, lists of messages, earlier exchanges.

Invariant: nothing is guessed; what is not clearly a text or a turn is a `BadRow` that says why not.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from corolla.data.conversation import Role, Turn
from corolla.json_files import JsonError, parse


class BadRow(ValueError):
    """Why a row does not fit its schema, in a few words."""


ROLES: dict[str, Role] = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "prompter": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "bot": "assistant",
    "chatgpt": "assistant",
    "ai": "assistant",
    "model": "assistant",
    "function_call": "assistant",
    "tool": "tool",
    "function": "tool",
    "observation": "tool",
    "ipython": "tool",
}
TEXT_PARTS = ("text", "input_text", "output_text")


# --- texts ------------------------------------------------------------------------------------------------


def text_of(value: Any, what: str) -> str:
    """A text without the white space around it, be it in parts. Raises `BadRow`."""
    text = _joined(value, what)
    if not text.strip():
        raise BadRow(f"{what} is empty")
    return text.strip()


def texts_of(value: Any, what: str) -> list[str]:
    """A list of texts, at least one. Raises `BadRow`."""
    items = as_list(value)
    if not items:
        raise BadRow(f"{what} is not a list of texts")
    return [text_of(item, f"{what}[{index}]") for index, item in enumerate(items)]


def _joined(value: Any, what: str) -> str:
    if isinstance(value, str):
        return value
    if value is None:
        raise BadRow(f"{what} is not text, it is missing")
    parts = as_list(value)
    if not parts:
        raise BadRow(f"{what} is not text")
    return "".join(_part(part, what) for part in parts)


def _part(part: Any, what: str) -> str:
    if not isinstance(part, Mapping):
        raise BadRow(f"{what} is not text")
    kind = part.get("type") or "text"
    if kind not in TEXT_PARTS:
        raise BadRow(f"{what} has a part that is not text but {kind!r}")
    if not isinstance(part.get("text"), str):
        raise BadRow(f"{what} has a part without text")
    return str(part["text"])


def as_list(value: Any) -> Sequence[Any] | None:
    """A list, as it is or written as JSON (in a cell of a table); None for anything else."""
    if isinstance(value, str):
        if not value.lstrip().startswith("["):
            return None
        try:
            value = parse(value)
        except JsonError:
            return None
    if isinstance(value, Sequence) and not isinstance(value, (str, bytes)):
        return value
    return None


# --- messages ---------------------------------------------------------------------------------------------


def turns_of(value: Any, what: str) -> list[Turn]:
    """The turns of a list of messages: `role` or `from`, `content` or `value`. Raises `BadRow`."""
    messages = as_list(value)
    if messages is None:
        raise BadRow(f"{what} is not a list")
    return [_turn(message, f"{what}[{index}]") for index, message in enumerate(messages)]


def _turn(message: Any, what: str) -> Turn:
    role_key = _key(message, ("role", "from"))
    text_key = _key(message, ("content", "value"))
    more = {} if role_key is None else _more(message)
    if role_key is None or (text_key is None and "tool_calls" not in more):
        raise BadRow(f"{what} has no {role_key or 'role'} and content")
    said_by = message[role_key]
    role = ROLES.get(str(said_by).strip().lower())
    if role is None:
        raise BadRow(f"{what} has the unknown {role_key} {str(said_by)[:80]!r}")
    learn = _learnt(message, what)
    content = message[text_key] if text_key else None
    where = f"{what}.{text_key or 'content'}"
    if str(said_by).strip().lower() == "function_call":
        return Turn(role, "", learn, {"tool_calls": [_call(content, where)]})
    if role == "tool" or "tool_calls" in more:  # these may say nothing
        more |= {"content": None} if content is None and role != "tool" else {}
        return Turn(role, "" if content in (None, "", []) else _joined(content, where).strip(), learn, more)
    return Turn(role, text_of(content, where), learn, more)


def is_messages(value: Any) -> bool:
    """Whether this is a list of messages, and not a text or a list of parts."""
    items = as_list(value)
    return bool(items) and all(
        _key(item, ("role", "from")) and (_key(item, ("content", "value")) or _more(item))
        for item in items or ()
    )


def _key(message: Any, names: Sequence[str]) -> str | None:
    """The first of these names that says something, else that is there."""
    if not isinstance(message, Mapping):
        return None
    there = [name for name in names if name in message]
    return next((name for name in there if message[name] is not None), there[0] if there else None)


def _more(message: Mapping[str, Any]) -> dict[str, Any]:
    more = {name: message[name] for name in ("tool_calls", "tool_call_id") if message.get(name)}
    called = message.get("function_call")
    if isinstance(called, Mapping) and "tool_calls" not in more:  # as it was called before
        more["tool_calls"] = [{"type": "function", "function": dict(called)}]
    if message.get("name") and ROLES.get(str(message.get("role")).lower()) == "tool":
        more["name"] = message["name"]
    if "tool_calls" in more:
        more["tool_calls"] = as_list(more["tool_calls"])
        if not more["tool_calls"] or not all(isinstance(call, Mapping) for call in more["tool_calls"]):
            raise BadRow("tool_calls is not a list of calls")
    return more


def _call(content: Any, what: str) -> dict[str, Any]:
    try:
        called = parse(content)
    except (AttributeError, JsonError):
        called = None
    if not isinstance(called, Mapping) or "name" not in called:
        raise BadRow(f"{what} is not a call of a function, written as JSON")
    return {"type": "function", "function": dict(called)}


def _learnt(message: Mapping[str, Any], what: str) -> bool:
    """Whether a message carries loss, by its `weight` (0 or 1) and its `train`."""
    learnt = True
    for name in ("weight", "train"):
        value = message.get(name)
        if value is None:
            continue
        flag = flag_of(value)
        if flag is None:
            raise BadRow(f"{what}.{name} is {str(value)[:40]!r}, neither 0 nor 1")
        learnt = learnt and flag
    return learnt


def flag_of(value: Any) -> bool | None:
    """True or False, be it as a number or in words; None for anything else."""
    if isinstance(value, str):
        word = value.strip().lower()
        if word in ("true", "false"):
            return word == "true"
        try:
            value = float(word)
        except ValueError:
            return None
    if not isinstance(value, (bool, int, float)) or not math.isfinite(value) or value not in (0, 1):
        return None
    return bool(value)


# --- what stands around an exchange -------------------------------------------------------------------------


def side_of(value: Any, role: Role, what: str) -> list[Turn]:
    """One side of an exchange: a text, or messages."""
    if isinstance(value, Mapping) and _key(value, ("role", "from")):
        value = [value]
    return turns_of(value, what) if is_messages(value) else [Turn(role, text_of(value, what))]


def history_of(value: Any) -> list[Turn]:
    """Earlier turns: messages, pairs of what was said and replied, or texts by turns. Raises `BadRow`."""
    if value is None or value == "":
        return []
    items = as_list(value)
    if items is None:
        raise BadRow("history is not a list")
    if is_messages(items):
        return turns_of(items, "history")
    if all(isinstance(item, str) for item in items):
        return alternating(texts_of(items, "history")) if items else []
    turns = []
    for index, item in enumerate(items):
        pair = as_list(item)
        if pair is None or len(pair) != 2:
            raise BadRow(f"history[{index}] is not a pair of what was said and what was replied")
        for role, said in zip(("user", "assistant"), pair, strict=True):
            if said not in (None, ""):  # who greets, answers nobody
                turns.append(Turn(ROLES[role], text_of(said, f"history[{index}]")))
    return turns


def alternating(texts: Sequence[str]) -> list[Turn]:
    """Turns whose last one is the assistant's."""
    roles: tuple[Role, Role] = ("assistant", "user")
    return [Turn(roles[(len(texts) - 1 - index) % 2], text) for index, text in enumerate(texts)]


def unlearnt(turns: Sequence[Turn]) -> list[Turn]:
    """The same turns as context."""
    return [replace(turn, learn=False) for turn in turns]
