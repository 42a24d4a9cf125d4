"""Calls of tools in a model's own words: how its chat template writes them, as a grammar, and read back.

Invariant: nothing is known here of any family. A template is shown a call, and what it makes of that is the form in
which the model is to call, and in which a later request tells it that it has.
"""

from __future__ import annotations

import json
import re
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from corolla.api.grammar import json_rule
from corolla.json_files import JsonError, end_of_value

NAME, OTHER = "corolla_probe", "petal_probe"
CALL_ID = "probe0123"  # as long as some templates want it
ARGUMENTS = {"corolla_key": "corolla_value"}
MARK = re.compile(r"<[^<>\s]+>|\[[A-Z_]+\]")
SPAN = re.compile(r'\{\s*"corolla_key"\s*:\s*"corolla_value"\s*\}')
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": name,
            "description": "A probe.",
            "parameters": {"type": "object", "properties": {"corolla_key": {"type": "string"}}},
        },
    }
    for name in (NAME, OTHER)
]
Render = Callable[[Sequence[Mapping[str, Any]], Sequence[Any] | None, bool], str]


@dataclass(frozen=True)
class ToolCall:
    """A call that the model has made; `arguments` is JSON, or the beginning of it where the reply was cut short."""

    name: str
    arguments: str
    id: str = field(default_factory=lambda: f"call_{uuid.uuid4().hex[:24]}")

    def to_dict(self) -> dict[str, Any]:
        """As OpenAI writes it."""
        return {
            "id": self.id,
            "type": "function",
            "function": {"name": self.name, "arguments": self.arguments},
        }


@dataclass(frozen=True)
class ToolFormat:
    """`before` NAME `between` ARGUMENTS `after`.

    `next` stands between the arguments of a call and the name of the next; None where only one is possible.
    """

    before: str
    between: str
    after: str
    next: str | None

    @classmethod
    def learn(cls, render: Render) -> ToolFormat | None:
        """What a template writes for calls; `render(messages, tools, reply)`. None where it does not write them."""
        asked = [{"role": "user", "content": "corolla-asks"}]
        try:
            prompt = render(asked, TOOLS, True)
            plain = render([*asked, {"role": "assistant", "content": "petal-answers"}], TOOLS, False)
            one = render([*asked, _calling(NAME)], TOOLS, False)
        except Exception:  # templates raise what their authors wrote
            return None
        closing = plain.partition("petal-answers")[2]
        if NAME not in prompt or not one.startswith(prompt) or not one.endswith(closing):
            return None
        said = one[len(prompt) : len(one) - len(closing)]
        found = SPAN.search(said)
        if found is None or NAME not in said[: found.start()]:
            return None
        before, _, between = said[: found.start()].partition(NAME)
        if not before.strip():
            return None  # nothing tells a call from a text that begins with a name
        return cls(before, between, said[found.end() :], _between_two(render, asked, before, between))

    @property
    def mark(self) -> str:
        """With what a call begins: a tag, where there is one."""
        lead = self.before.strip()
        tag = MARK.match(lead)
        return lead if tag is None else tag[0]

    def begins_in(self, text: str) -> int:
        """Where the first call begins in `text`, or may have begun; its length where there is none."""
        mark = self.mark
        place = text.find(mark)
        if place >= 0:
            return place
        sizes = range(min(len(mark), len(text)), 0, -1)
        return len(text) - next((size for size in sizes if text.endswith(mark[:size])), 0)

    def grammar(
        self, tools: Sequence[Mapping[str, Any]], *, must: bool, several: bool, special: Mapping[str, int]
    ) -> str:
        """Text with calls of these tools, in Lark; `must`: nothing but calls. `special` are tokens by their text."""
        calls = " | ".join(f"call_{index}" for index in range(len(tools)))
        more = f"({_words(self.next, special)} ({calls}))*" if several and self.next is not None else ""
        mark = self.mark
        lead, rest = self.before.split(mark, 1)
        opening = f"{_words(lead, special)} {_words(mark, special)}"
        lines = ["%llguidance {}"]
        ending = _words(self.after, special)
        if must:
            lines.append(f"start: {opening} {_words(rest, special)} ({calls}) {more} {ending}")
        else:
            called = f"mark {_words(rest, special)} ({calls}) {more} {ending}"
            lines += [f"start: {called} | text", "text: TEXT", r"TEXT: /(.|\n)*/"]
            if mark in special:
                lines.append(f"mark: TEXT {_words(mark, special)}")
            else:
                lines.append(f"mark[lazy]: TEXT {json.dumps(mark)}")
        for index, tool in enumerate(tools):
            about = tool["function"]
            schema = about.get("parameters") or {"type": "object"}
            name = _words(about["name"] + self.between, special)
            lines += [f"call_{index}: {name} args_{index}", f"args_{index}: {json_rule(schema)}"]
        return "\n".join(lines) + "\n"

    def read(self, text: str) -> tuple[str, list[ToolCall]]:
        """The text before the first call, and the calls that have a name; the last one may be cut in its arguments."""
        place, lead = self.begins_in(text), self.before.lstrip()
        said = text[place:]
        if not said.startswith(lead):
            cut = said.startswith(self.mark) and lead.startswith(said)  # before the name
            return text[:place] if cut else text, []
        found: list[ToolCall] = []
        rest = said[len(lead) :]
        while self.between in rest:
            name, _, rest = rest.partition(self.between)
            try:
                end = end_of_value(rest)
            except JsonError:  # it goes on
                end = len(rest)
            found.append(ToolCall(name.strip(), rest[:end]))
            if self.next is None or not rest[end:].startswith(self.next):
                break
            rest = rest[end + len(self.next) :]
        return text[:place], found


def _calling(*names: str) -> dict[str, Any]:
    calls = [
        {"id": CALL_ID, "type": "function", "function": {"name": name, "arguments": ARGUMENTS}}
        for name in names
    ]
    return {"role": "assistant", "content": "", "tool_calls": calls}


def _between_two(render: Render, asked: Sequence[Mapping[str, Any]], before: str, between: str) -> str | None:
    """What stands between the arguments of one call and the name of the next."""
    try:
        two = render([*asked, _calling(NAME, OTHER)], TOOLS, False)
    except Exception:
        return None
    first = re.search(re.escape(before + NAME + between) + SPAN.pattern, two)
    if first is None:
        return None
    sep, found, rest = two[first.end() :].partition(OTHER)
    return sep if found and rest.startswith(between) else None


def _words(text: str, special: Mapping[str, int]) -> str:
    """A text as Lark literals, with special tokens by their number."""
    if not text:
        return ""
    if special:
        pattern = "|".join(re.escape(one) for one in sorted(special, key=len, reverse=True))
        parts = re.split(f"({pattern})", text)
    else:
        parts = [text]
    return " ".join(f"<[{special[part]}]>" if part in special else json.dumps(part) for part in parts if part)
