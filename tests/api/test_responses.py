"""`/v1/responses` with OpenAI's own client."""

from __future__ import annotations

import json
from typing import Any

import pytest
from openai import BadRequestError
from tests.api.deployed import Deployed
from tests.api.world import BASE, Worlds

TALK: list[Any] = [
    {"role": "user", "content": "What of the rain?"},
    {"role": "assistant", "content": [{"type": "output_text", "text": "It falls."}]},
    {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "And then?"}]},
]
PLAIN = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "What of the rain?"},
    {"role": "assistant", "content": "It falls."},
    {"role": "user", "content": "And then?"},
]


def test_a_response_is_the_chat_s_reply(real: Deployed) -> None:
    found = real.client().responses.create(
        model=BASE, input=TALK, instructions="Be brief.", temperature=0, max_output_tokens=10
    )
    ids = real.prompt(PLAIN)
    said = real.greedy(ids, 10)
    assert found.output_text == real.text(said)
    assert found.usage is not None
    assert (found.usage.input_tokens, found.usage.output_tokens) == (len(ids), len(said))
    cut = len(said) == 10 and said[-1] != 2
    assert found.status == ("incomplete" if cut else "completed")
    alone = real.client().responses.create(model=BASE, input="Hi", temperature=0, max_output_tokens=5)
    assert alone.output_text == real.text(real.greedy(real.prompt([{"role": "user", "content": "Hi"}]), 5))


def test_a_stream_of_it(real: Deployed) -> None:
    events = list(
        real.client().responses.create(
            model=BASE, input=TALK, instructions="Be brief.", temperature=0, max_output_tokens=10, stream=True
        )
    )
    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert events[0].type == "response.created"
    text = "".join(event.delta for event in events if event.type == "response.output_text.delta")
    assert text == real.text(real.greedy(real.prompt(PLAIN), 10))
    last = events[-1]
    assert last.type in ("response.completed", "response.incomplete")
    assert last.response.output_text == text


def test_what_goes_wrong_on_the_way_is_an_event_too(worlds: Worlds) -> None:
    world = worlds.make("lost", patience=0.5)
    how: dict[str, Any] = {"model": BASE, "input": "Hi", "temperature": 0, "max_output_tokens": 800}
    stream = world.client().responses.create(**how, stream=True, extra_body={"logit_bias": {"2": -100}})
    events = []
    for one in stream:
        events.append(one)
        if one.type == "response.content_part.added":
            for peer in list(world.swarm.servers):
                world.swarm.kill(peer)
    assert [one.sequence_number for one in events] == list(range(len(events)))
    last = events[-1]
    assert last.type == "error"
    assert (last.code, last.param) == ("swarm_unavailable", None)
    assert last.message


def test_json_of_a_schema(real: Deployed) -> None:
    schema = {
        "type": "object",
        "properties": {"yes": {"type": "boolean"}},
        "required": ["yes"],
        "additionalProperties": False,
    }
    found = real.client().responses.create(
        model=BASE,
        input="Is it so?",
        max_output_tokens=30,
        text={"format": {"type": "json_schema", "name": "answer", "schema": schema, "strict": True}},
    )
    assert set(json.loads(found.output_text)) == {"yes"}


@pytest.mark.parametrize(
    ("changes", "param"),
    [
        ({"previous_response_id": "resp_1"}, "previous_response_id"),
        ({"tools": [{"type": "web_search"}]}, "tools"),
        ({"store": True}, "store"),
        ({"truncation": "auto"}, "truncation"),
        (
            {"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}]},
            "input[0].content",
        ),
        ({"input": "x" * 5000}, "input"),
        ({"input": [{"type": "function_call_output", "call_id": "x", "output": "y"}]}, None),
    ],
    ids=lambda value: str(value)[:40],
)
def test_what_is_not_done_is_refused(real: Deployed, changes: dict[str, Any], param: str | None) -> None:
    body = {"input": "Hi", **changes}
    with pytest.raises(BadRequestError) as caught:
        real.client().responses.create(model=BASE, input=body.pop("input"), extra_body=body)
    if param is not None:
        assert caught.value.param == param
