"""Replies of a form that was asked for: JSON, JSON of a schema, calls of tools; a random model would give none."""

from __future__ import annotations

import json
from typing import Any

import pytest
from openai import BadRequestError
from tests.api.deployed import Deployed
from tests.api.world import BASE
from tests.chat.tokenizers import merging_tokenizer, spacing_tokenizer
from tests.covering import covering

from corolla.api.grammar import Vocabulary, json_grammar
from corolla.api.tools import ToolFormat
from corolla.data.cuts import ids_inside

ASK = [{"role": "user", "content": "What is the weather?"}]
SCHEMA = {
    "type": "object",
    "properties": {
        "town": {"enum": ["Oslo", "Rome"]},
        "degrees": {"type": "integer", "minimum": 10, "maximum": 19},
    },
    "required": ["town", "degrees"],
    "additionalProperties": False,
}
WEATHER = {
    "type": "function",
    "function": {"name": "weather", "description": "Of a town.", "parameters": SCHEMA},
}
CLOCK = {"type": "function", "function": {"name": "clock"}}


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
@pytest.mark.parametrize("seed", [1, 2])
def test_a_reply_is_json_of_the_schema(real: Deployed, stream: bool, seed: int) -> None:
    form: Any = {"type": "json_schema", "json_schema": {"name": "weather", "schema": SCHEMA, "strict": True}}
    reply: Any = real.client().chat.completions.create(
        model=BASE, messages=ASK, seed=seed, max_tokens=80, response_format=form, stream=stream
    )
    if stream:
        chunks = list(reply)
        text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
        reason = chunks[-1].choices[0].finish_reason
    else:
        text, reason = reply.choices[0].message.content, reply.choices[0].finish_reason
    found = json.loads(text)
    assert found["town"] in ("Oslo", "Rome")
    assert 10 <= found["degrees"] <= 19
    assert reason == "stop"


def test_a_reply_is_an_object_or_was_cut_short(real: Deployed) -> None:
    reply = real.client().chat.completions.create(
        model=BASE, messages=ASK, temperature=0, max_tokens=40, response_format={"type": "json_object"}
    )
    text = reply.choices[0].message.content
    assert text is not None
    assert text.startswith("{")
    if reply.choices[0].finish_reason == "stop":
        assert isinstance(json.loads(text), dict)


@pytest.mark.parametrize(
    ("choice", "stream"),
    covering(
        {"required": "required", "named": {"type": "function", "function": {"name": "weather"}}},
        {"whole": False, "streamed": True},
        together=1,
    ),
)
def test_a_tool_is_called(real: Deployed, choice: Any, stream: bool) -> None:
    reply: Any = real.client().chat.completions.create(
        model=BASE,
        messages=ASK,
        seed=3,
        max_tokens=150,
        tools=[WEATHER],
        tool_choice=choice,
        parallel_tool_calls=False,
        stream=stream,
    )
    if stream:
        chunks = list(reply)
        (first, *more) = [call for chunk in chunks for call in chunk.choices[0].delta.tool_calls or []]
        arguments = "".join(part.function.arguments for part in (first, *more))
        reason = chunks[-1].choices[0].finish_reason
        assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == ""
    else:
        (first,), reason = reply.choices[0].message.tool_calls, reply.choices[0].finish_reason
        arguments = first.function.arguments
        assert reply.choices[0].message.content is None
    assert first.function.name == "weather"
    assert json.loads(arguments)["town"] in ("Oslo", "Rome")
    assert first.id
    assert reason == "tool_calls"


@pytest.mark.parametrize("most", [20, 60, 150])
def test_a_call_comes_in_parts_as_far_as_it_goes(real: Deployed, most: int) -> None:
    how: dict[str, Any] = {"model": BASE, "messages": ASK, "seed": 3, "max_tokens": most, "tools": [WEATHER]}
    how |= {"tool_choice": "required", "parallel_tool_calls": False}
    whole = real.client().chat.completions.create(**how).choices[0]
    choices = [chunk.choices[0] for chunk in real.client().chat.completions.create(**how, stream=True)]
    parts = [call for one in choices for call in one.delta.tool_calls or []]
    assert not any(one.delta.content for one in choices), "what is around a call is no text"
    assert choices[-1].finish_reason == whole.finish_reason == ("tool_calls" if most == 150 else "length")
    if most == 20:  # cut before it says whom it calls
        assert not parts
        assert (whole.message.content, whole.message.tool_calls) == ("", None)
        return
    assert whole.message.content is None
    assert whole.message.tool_calls
    (call,) = whole.message.tool_calls
    assert [part.index for part in parts] == [0] * len(parts)
    assert [(part.id is None, part.function.name) for part in parts[:2]] == [(False, "weather"), (True, None)]
    assert "".join(part.function.arguments for part in parts) == call.function.arguments
    assert len(parts) > 5
    assert call.function.arguments.startswith('{"town": "')
    assert call.function.arguments.endswith("}") == (most == 150)


def test_what_a_tool_said_goes_on(real: Deployed) -> None:
    first = real.client().chat.completions.create(
        model=BASE,
        messages=ASK,
        seed=3,
        max_tokens=150,
        tools=[WEATHER],
        tool_choice="required",
        parallel_tool_calls=False,
    )
    message = first.choices[0].message
    assert message.tool_calls
    call = message.tool_calls[0]
    talk: list[Any] = [
        *ASK,
        message.model_dump(exclude_none=True),
        {"role": "tool", "tool_call_id": call.id, "content": "12 degrees"},
    ]
    reply = real.client().chat.completions.create(
        model=BASE, messages=talk, temperature=0, max_tokens=8, tools=[WEATHER], tool_choice="none"
    )
    arguments = json.loads(call.function.arguments)
    calling = {"name": "weather", "arguments": arguments}
    called = {"role": "assistant", "content": "", "tool_calls": [{"function": calling}]}
    plain = [*ASK, called]
    plain += [{"role": "tool", "content": "12 degrees"}]
    assert reply.choices[0].message.content == real.text(real.greedy(real.prompt(plain), 8))


def test_a_model_may_say_something_instead(real: Deployed) -> None:
    reply = real.client().chat.completions.create(
        model=BASE, messages=ASK, temperature=0, max_tokens=12, tools=[WEATHER, CLOCK]
    )
    ids = real.prompt(ASK, tools=[WEATHER, CLOCK])
    message = reply.choices[0].message
    assert message.tool_calls is None
    assert reply.usage is not None
    assert reply.usage.prompt_tokens == len(ids)
    assert message.content


@pytest.mark.parametrize(
    "changes",
    [
        {"tools": [WEATHER, WEATHER]},
        {"tools": [WEATHER], "tool_choice": {"type": "function", "function": {"name": "clock"}}},
        {"tools": [{"type": "function", "function": {"name": "bad name"}}]},
        {"tools": [{"type": "web_search"}]},
        {"tools": [{"type": "function", "function": {"name": "f", "parameters": {"type": "wrong"}}}]},
        {"tools": [WEATHER], "response_format": {"type": "json_object"}},
        {"messages": [{"role": "tool", "content": "x"}]},
        {"messages": [{"role": "user", "content": "x", "tool_calls": [{"function": {"name": "f"}}]}]},
        {
            "messages": [
                *ASK,
                {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{"}}]},
            ]
        },
    ],
    ids=lambda value: str(value)[:60],
)
def test_what_is_wrong_with_tools_is_said(real: Deployed, changes: dict[str, Any]) -> None:
    body = {"messages": ASK, "max_tokens": 4, **changes}
    with pytest.raises(BadRequestError):
        real.client().chat.completions.create(model=BASE, messages=body.pop("messages"), extra_body=body)


TEMPLATES = {
    "tags": (
        '<tool_call>\n{"name": "NAME", "arguments": ARGS}\n</tool_call>',
        '\n<tool_call>\n{"name": "NAME", "arguments": ARGS}\n</tool_call>',
    ),
    "json": ('{"name": "NAME", "parameters": ARGS}', None),
    "list": ('[TOOL_CALLS][{"name": "NAME", "arguments": ARGS}', ', {"name": "NAME", "arguments": ARGS}'),
    "words": ("<function=NAME>ARGS</function>", "<function=NAME>ARGS</function>"),
}


def render_as(form: str) -> Any:
    first, later = TEMPLATES[form]

    def render(messages: Any, tools: Any, reply: bool) -> str:
        text = "".join(f"[{tool['function']['name']}]" for tool in tools or [])
        for message in messages:
            text += f"<{message['role']}>"
            calls = message.get("tool_calls") or []
            if len(calls) > 1 and later is None:
                raise ValueError("only one")
            for number, call in enumerate(calls):
                words = first if number == 0 else later
                assert words is not None
                about = call["function"]
                text += words.replace("NAME", about["name"]).replace("ARGS", json.dumps(about["arguments"]))
            text += "]" if calls and form == "list" else ""
            text += (message["content"] if not calls else "") + "<end>"
        return text + ("<assistant>" if reply else "")

    return render


@pytest.mark.parametrize("form", TEMPLATES)
@pytest.mark.parametrize("tokenizer", [merging_tokenizer, spacing_tokenizer], ids=["merging", "spacing"])
def test_a_form_is_learnt_and_followed(form: str, tokenizer: Any) -> None:
    render = render_as(form)
    learnt = ToolFormat.learn(render)
    assert learnt is not None
    assert (learnt.next is None) == (form == "json")
    made = tokenizer()
    vocabulary = Vocabulary(made)
    calling = {"role": "assistant", "content": ""}
    calls = [{"function": {"name": "weather", "arguments": {"town": "Rome", "degrees": 12}}}]
    if form != "json":
        calls.append({"function": {"name": "clock", "arguments": {"a": 1}}})
    said = (
        render([{**calling, "tool_calls": calls}], None, False)
        .removeprefix("<assistant>")
        .removesuffix("<end>")
    )
    for must, before in ((True, ""), (False, ""), (False, "I ask. ")):
        grammar = vocabulary.checked(
            learnt.grammar([WEATHER, CLOCK], must=must, several=True, special={}), "tools"
        )
        text = before + said
        assert follows(vocabulary, grammar, ids_inside(made, text))
        found, read = learnt.read(text)
        assert found == before
        assert [(one.name, json.loads(one.arguments)) for one in read] == [
            (one["function"]["name"], one["function"]["arguments"]) for one in calls
        ]
    must = vocabulary.checked(learnt.grammar([WEATHER], must=True, several=True, special={}), "tools")
    assert not follows(vocabulary, must, ids_inside(made, said.replace("Rome", "Riga")))
    assert not follows(vocabulary, must, ids_inside(made, "I ask. " + said))


def follows(vocabulary: Vocabulary, grammar: str, ids: list[int]) -> bool:
    """Whether a model could have said these tokens under the grammar, and then end."""
    matcher = vocabulary.matcher(grammar, [2])
    for token in ids:
        if not matcher.allowed(400)[token]:
            return False
        matcher.take(token)
    return bool(matcher.allowed(400)[2])


def test_a_template_that_writes_no_calls_has_no_form() -> None:
    assert (
        ToolFormat.learn(lambda messages, tools, reply: "".join(str(one["content"]) for one in messages))
        is None
    )


def test_json_comes_to_an_end() -> None:
    vocabulary = Vocabulary(merging_tokenizer())
    grammar = json_grammar({"type": "object"})

    def may_be(text: str) -> bool:
        return follows(vocabulary, grammar, ids_inside(merging_tokenizer(), text))

    assert may_be('{"a": [1, 2]}')
    assert not may_be('{"a":   1}'), "a model that likes white space would go on for ever"
    assert not may_be('{"a": 1')
