"""The shapes of rows that are understood, each turned into a conversation.

Invariant: a row either becomes one conversation or a `BadRow` says why not; nothing of it is guessed. Rows
that tell of the same conversation (equal rows, PersonaChat's many rows of one dialogue) get the same id.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from corolla.data.conversation import Conversation, Role, Turn
from corolla.data.turns import (
    BadRow,
    alternating,
    as_list,
    history_of,
    side_of,
    text_of,
    texts_of,
    turns_of,
    unlearnt,
)

Row = Mapping[str, Any]

SYSTEM = ("system", "system_prompt")  # columns
ASIDE = ("input", "context")  # what an instruction is about
MARKED = re.compile(r"(?:^|\n\n)(Human|Assistant):")


@dataclass(frozen=True)
class Schema:
    """One accepted shape."""

    name: str
    shape: str  # an example, for people
    fits: Callable[[Row], bool]  # by the names of columns alone
    convert: Callable[[Row, bool], Conversation]  # the row, and whether the persona goes in front


def _hash(said: Sequence[str]) -> str:
    return hashlib.sha256(repr(list(said)).encode()).hexdigest()[:16]


def _checked(
    turns: Sequence[Turn], conversation_id: str | None = None, tools: Sequence[Any] = ()
) -> Conversation:
    """Without an id of its own, a conversation is named by what is said in it."""
    conversation = Conversation(
        tuple(turns), conversation_id or _hash([turn.text for turn in turns]), tuple(tools)
    )
    if not conversation.has_reply:
        raise BadRow("no reply to learn, with something said before it")
    return conversation


def _whole(row: Row, turns: Sequence[Turn], conversation_id: str | None = None) -> Conversation:
    """The turns, with what other columns say: a system's text in front, the tools there are."""
    system = _first(row, SYSTEM)
    if system is not None and turns and turns[0].role != "system" and str(system).strip():
        turns = [Turn("system", text_of(system, "system")), *turns]
    tools = as_list(row.get("tools"))
    if tools is None and row.get("tools"):
        raise BadRow("tools is not a list")
    return _checked(turns, conversation_id, tools or ())


def _first(row: Row, names: Sequence[str]) -> Any:
    """The value in the first of these columns that says something."""
    return next((row[name] for name in names if row.get(name) is not None), None)


# --- lists of messages ------------------------------------------------------------------------------------


def _messages(row: Row, _persona: bool) -> Conversation:
    return _whole(row, turns_of(row["messages"], "messages"))


def _sharegpt(row: Row, _persona: bool) -> Conversation:
    name = "conversations" if row.get("conversations") is not None else "conversation"
    name = name if name in row else "conversations"
    return _whole(row, turns_of(row[name], name), str(row["id"]) if row.get("id") else None)


# --- single exchanges -------------------------------------------------------------------------------------


def _exchange(name: str, said: str, *replied: str) -> Schema:
    """What is in the column `said`, and the reply in the first of the columns `replied`."""

    def convert(row: Row, _persona: bool) -> Conversation:
        answer = next((name for name in replied if row.get(name) is not None), replied[0])
        if row.get("label") is False or row.get("label") in ("false", "False"):
            raise BadRow("its label is false: a reply that is not to be learnt")
        return _whole(row, [*_asked(row, said), *side_of(row.get(answer), "assistant", answer)])

    shape = f'{{"{said}": "…", "{replied[0]}": "…"}}'
    return Schema(name, shape, lambda row: said in row and any(name in row for name in replied), convert)


def _asked(row: Row, said: str) -> list[Turn]:
    """What comes before a reply: the history, and what was said. Of these, messages are context."""
    asked = [replace(turn, learn=turn.role == "user") for turn in side_of(row.get(said), "user", said)]
    earlier = history_of(row.get("history"))
    if asked[0].role == "system":
        return [asked[0], *earlier, *asked[1:]]
    return [*earlier, *asked]


def _alpaca(row: Row, _persona: bool) -> Conversation:
    instruction = text_of(row.get("instruction"), "instruction")
    about = _first(row, ASIDE)
    if about not in (None, "", []):
        about = text_of(about, "input") if not isinstance(about, str) or about.strip() else ""
    answer = "output" if row.get("output") is not None or "response" not in row else "response"
    said = f"{instruction}\n\n{about}" if about else instruction
    reply = Turn("assistant", text_of(row.get(answer), answer))
    return _whole(row, [*history_of(row.get("history")), Turn("user", said), reply])


def _preference(row: Row, _persona: bool) -> Conversation:
    """Of two replies the chosen one. What both have in common is context."""
    chosen = _told(row, "chosen")
    try:
        rejected = _told(row, "rejected") if row.get("rejected") is not None else []
    except BadRow:
        rejected = []
    common = 0
    for one, other in zip(chosen, rejected, strict=False):
        if (one.role, one.text) != (other.role, other.text):
            break
        common += 1
    common = common if common < len(chosen) else 0
    return _whole(row, [*unlearnt(chosen[:common]), *chosen[common:]])


def _told(row: Row, name: str) -> list[Turn]:
    """A preference's conversation up to the reply in the column `name`, which may hold all of it."""
    reply, prompt = row[name], row.get("prompt")
    if isinstance(reply, str) and as_list(reply) is None:
        marked = _marked(prompt + reply if isinstance(prompt, str) else reply) or _marked(reply)
        if marked is not None:
            return marked
        if prompt is None:
            raise BadRow(f"{name} is a text, but there is no prompt that it answers")
    turns = side_of(reply, "assistant", name)
    if prompt is None:
        return turns
    asked = _asked(row, "prompt")
    told = {(turn.role, turn.text) for turn in turns}
    if {(turn.role, turn.text) for turn in asked} <= told:  # it is told there once more
        return turns
    return [*asked, *turns]


def _marked(text: str) -> list[Turn] | None:
    r"""The turns of a text such as "\n\nHuman: Hi\n\nAssistant: Hello"; None for any other."""
    before, *parts = MARKED.split(text.strip())
    if before.strip() or len(parts) < 4:
        return None
    roles: dict[str, Role] = {"Human": "user", "Assistant": "assistant"}
    return [
        Turn(roles[who], text_of(said, f"what {who} says"))
        for who, said in zip(parts[::2], parts[1::2], strict=True)
    ]


# --- PersonaChat ------------------------------------------------------------------------------------------


def _dialogue(row: Row, last: Mapping[str, Any], persona: bool, *, learn_all: bool) -> Conversation:
    """PersonaChat's history and its gold reply, the last candidate; the other candidates are distractors.

    The published files tell each dialogue from both sides, one of which begins with a silence. It is dropped,
    and the dialogue named by its first two utterances, so that both sides have one id.
    """
    history = [text for text in texts_of(last.get("history"), "history") if text.strip("_ ") != "SILENCE"]
    texts = [*history, texts_of(last.get("candidates"), "candidates")[-1]]
    turns = alternating(texts)
    if not learn_all:
        turns[:-1] = unlearnt(turns[:-1])
    return _checked((*_persona_turns(row, persona), *turns), _hash(texts[:2]))


def _persona_turns(row: Row, persona: bool) -> list[Turn]:
    if not persona:
        return []
    return [Turn("system", " ".join(texts_of(row.get("personality"), "personality")))]


def _personachat(row: Row, persona: bool) -> Conversation:
    # The earlier replies are rows of their own: here they are context.
    return _dialogue(row, row, persona, learn_all=False)


def _personachat_nested(row: Row, persona: bool) -> Conversation:
    utterances = as_list(row["utterances"])
    if not utterances or not isinstance(utterances[-1], Mapping):
        raise BadRow("utterances is not a list of history and candidates")
    # The last one's history is the whole dialogue.
    return _dialogue(row, utterances[-1], persona, learn_all=True)


def _with(*names: str) -> Callable[[Row], bool]:
    return lambda row: all(name in row for name in names)


SCHEMAS: tuple[Schema, ...] = (
    Schema(
        "messages",
        '{"messages": [{"role": "user", "content": "…"}, {"role": "assistant", "content": "…"}]}',
        _with("messages"),
        _messages,
    ),
    Schema(
        "ShareGPT",
        '{"conversations": [{"from": "human", "value": "…"}, {"from": "gpt", "value": "…"}]}',
        lambda row: "conversations" in row or "conversation" in row,
        _sharegpt,
    ),
    Schema(
        "PersonaChat",
        '{"personality": ["…"], "history": ["…"], "candidates": ["…", "the gold reply"]}',
        _with("history", "candidates"),
        _personachat,
    ),
    Schema(
        "PersonaChat dialogues",
        '{"personality": ["…"], "utterances": [{"history": ["…"], "candidates": ["…"]}]}',
        _with("utterances"),
        _personachat_nested,
    ),
    Schema(
        "preference",
        '{"prompt": "…", "chosen": "…", "rejected": "…"}',
        _with("chosen"),
        _preference,
    ),
    _exchange("prompt and response", "prompt", "response"),
    _exchange("prompt and completion", "prompt", "completion"),
    Schema(
        "Alpaca",
        '{"instruction": "…", "input": "…", "output": "…"}',
        lambda row: "instruction" in row and ("output" in row or "response" in row),
        _alpaca,
    ),
    _exchange("question and answer", "question", "answer", "response"),
)


PERSONA_SCHEMAS = frozenset({"PersonaChat", "PersonaChat dialogues"})


def schema_of(row: Row) -> Schema | None:
    """The shape of a row: that of the columns which say something, else of those which are there."""
    filled = {name: value for name, value in row.items() if value not in (None, "", [])}
    return next(
        (schema for columns in (filled, row) for schema in SCHEMAS if schema.fits(columns)),
        None,
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
        if turns and turns[-1].role == role:  # what stood between them was empty
            text = f"{turns.pop().text}\n{text}"
        turns.append(Turn(role, text))
    return _checked(tuple(turns), conversation_id)
