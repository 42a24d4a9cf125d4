"""Odd requests, as they come over the wire: the right status in OpenAI's shape, and nothing passed over silently."""

from __future__ import annotations

import gzip
import http.client
import json
from collections.abc import Iterator
from typing import Any

import pytest
from tests.api.deployed import Deployed
from tests.api.world import BASE

ASK = [{"role": "user", "content": "Hi"}]
CALL = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
CALLED = {"role": "assistant", "content": None, "tool_calls": [CALL]}
CHAT: dict[str, Any] = {"model": BASE, "messages": ASK, "max_tokens": 2, "temperature": 0}
PATHS = {"chat": "/v1/chat/completions", "completions": "/v1/completions", "responses": "/v1/responses"}
BODIES: dict[str, dict[str, Any]] = {
    "chat": CHAT,
    "completions": {"model": BASE, "prompt": "Hi", "max_tokens": 2, "temperature": 0},
    "responses": {"model": BASE, "input": "Hi", "max_output_tokens": 2, "temperature": 0},
}


class Line:
    """One connection that is kept alive."""

    def __init__(self, real: Deployed) -> None:
        self._connection = http.client.HTTPConnection(*real.address, timeout=60)

    def ask(
        self, method: str, path: str, body: Any = None, **headers: str
    ) -> tuple[int, Any, http.client.HTTPMessage]:
        """Status, content and headers."""
        content = body if isinstance(body, bytes | None) else json.dumps(body).encode()
        usual = {} if body is None else {"Content-Type": "application/json"}
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        self._connection.request(method, path, content, usual | named)
        answer = self._connection.getresponse()
        text = answer.read().decode()
        return answer.status, json.loads(text) if text[:1] in ("{", "[") else text, answer.headers

    def close(self) -> None:
        self._connection.close()


@pytest.fixture(scope="module")
def line(real: Deployed) -> Iterator[Line]:
    made = Line(real)
    yield made
    made.close()


def messages(*extra: Any, **last: Any) -> dict[str, Any]:
    return {"messages": [*ASK, *extra, *([last] if last else [])]}


def said(content: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": content}]}


def nested(depth: int) -> dict[str, Any]:
    """A schema of objects in objects."""
    found: dict[str, Any] = {"type": "string"}
    for _ in range(depth):
        found = {"type": "object", "properties": {"a": found}, "required": ["a"]}
    return found


def form(schema: dict[str, Any]) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}


def tool(schema: dict[str, Any]) -> dict[str, Any]:
    return {"type": "function", "function": {"name": "f", "parameters": schema}}


REFUSED = [
    ("chat", {"messages": "hi"}, "messages", "list"),
    ("chat", {"messages": [None]}, "messages[0]", ""),
    ("chat", said([]), "messages[0].content", "at least 1"),
    ("chat", said(5), "messages[0].content", "string"),
    ("chat", said(None), "messages[0].content", "no content"),
    ("chat", said(["x"]), "messages[0].content[0]", ""),
    ("chat", said([{"type": "text"}]), "messages[0].content", "no part of type text"),
    (
        "chat",
        said([{"type": "text", "text": "x", "cache_control": {"type": "ephemeral"}}]),
        "messages[0].content.cache_control",
        "",
    ),
    ("chat", messages(role="assistant", content="x", refusal="no"), "messages[1].refusal", ""),
    ("chat", messages(role="user", content="x", weight=1), "messages[1].weight", ""),
    ("chat", messages(role="function", name="f", content="x"), "messages[1].role", "system"),
    (
        "chat",
        messages(CALLED, role="tool", content="x", tool_call_id="c2"),
        "messages[2].tool_call_id",
        "no call",
    ),
    ("chat", messages(CALLED | {"tool_calls": [CALL | {"more": 1}]}), "messages[1].tool_calls.more", ""),
    (
        "chat",
        messages(CALLED | {"tool_calls": [{"type": "custom", "id": "c"}]}),
        "messages[1].tool_calls[0].type",
        "",
    ),
    ("chat", {"stop": [""]}, "stop[0]", "at least 1"),
    ("chat", {"stop": ["a"] * 17}, "stop", "at most 16"),
    ("chat", {"stop": 5}, "stop", ""),
    ("chat", {"logit_bias": {"7": 101}}, "logit_bias.7", "100"),
    ("chat", {"logit_bias": {"x": 1}}, "logit_bias.x", "pattern"),
    ("chat", {"logit_bias": []}, "logit_bias", "dictionary"),
    ("chat", {"max_tokens": 0}, "max_tokens", "1"),
    ("chat", {"max_tokens": True}, "max_tokens", "integer"),
    ("chat", {"n": 33}, "n", "32"),
    ("chat", {"stream": "true"}, "stream", "boolean"),
    ("chat", {"response_format": {}}, "response_format", "type"),
    ("chat", {"response_format": {"type": "json_schema"}}, "response_format.json_schema", "required"),
    ("chat", {"response_format": form(nested(300))}, "response_format", "cannot be followed"),
    ("chat", {"response_format": form({"$ref": "#/nope"})}, "response_format", "cannot be followed"),
    ("chat", {"tools": [tool(nested(300))], "tool_choice": "required"}, "tools", "too deeply"),
    ("chat", {"tool_choice": {"type": "allowed_tools"}}, "tool_choice.type", "function"),
    ("chat", {"prompt_cache_retention": {"a": 1}}, "prompt_cache_retention", ""),
    ("chat", {"safety_identifier": 5}, "safety_identifier", "string"),
    ("chat", {"echo": True}, "echo", "Unrecognized"),
    ("completions", {"prompt": None}, "prompt", ""),
    ("completions", {"prompt": []}, "prompt", ""),
    ("completions", {"prompt": [[]]}, "prompt[0]", ""),
    ("completions", {"prompt": [1.5]}, "prompt[0]", ""),
    ("completions", {"prompt": [True]}, "prompt[0]", ""),
    ("completions", {"prompt": ["a", 1]}, "prompt[1]", ""),
    ("completions", {"prompt": ["a"] * 257}, "prompt", ""),
    ("completions", {"prompt": [10**6]}, "prompt", "1000000"),
    ("completions", {"max_tokens": 0}, "max_tokens", "echo"),
    ("completions", {"best_of": 2}, "best_of", ""),
    ("completions", {"messages": ASK}, "messages", "Unrecognized"),
    ("responses", {"input": []}, "input", ""),
    ("responses", {"input": ASK * 2048, "instructions": "i"}, "input", "2048"),
    ("responses", {"stream_options": {"include_obfuscation": False}}, "stream_options", "streams"),
    (
        "responses",
        {"stream": True, "stream_options": {"include_usage": True}},
        "stream_options.include_usage",
        "",
    ),
    ("responses", {"text": {"verbosity": "low"}}, "text.verbosity", ""),
    ("responses", {"parallel_tool_calls": "x"}, "parallel_tool_calls", "boolean"),
    ("responses", {"parallel_tool_calls": False}, "parallel_tool_calls", "tools"),
    ("responses", {"prompt_cache_key": 5}, "prompt_cache_key", "string"),
    ("responses", {"reasoning": {"effort": "low"}}, "reasoning", ""),
    ("responses", {"input": [{"role": "tool", "content": "x"}]}, "input[0].role", ""),
]


@pytest.mark.parametrize(("kind", "changes", "param", "words"), REFUSED, ids=lambda value: str(value)[:40])
def test_what_is_wrong_is_named(
    real: Deployed, line: Line, kind: str, changes: dict[str, Any], param: str, words: str
) -> None:
    before = real.counted()
    status, about, _ = line.ask("POST", PATHS[kind], BODIES[kind] | changes)
    assert status == 400, about
    assert set(about["error"]) == {"message", "type", "param", "code"}
    assert about["error"]["param"] == param, about
    assert words in about["error"]["message"]
    assert real.counted() == before, "nothing was computed"


ANSWERED = [
    ("chat", messages(role="developer", content="Be kind.")),
    ("chat", messages(CALLED, role="tool", tool_call_id="c1", content=[{"type": "text", "text": "5"}])),
    ("chat", messages(CALLED | {"tool_calls": [CALL | {"index": 0}]})),
    ("chat", messages(role="assistant", content="x", refusal=None, annotations=[], audio=None)),
    (
        "chat",
        {"max_tokens": 2.0, "n": 1.0, "seed": -3.0, "top_k": 0.0, "logprobs": True, "top_logprobs": 1.0},
    ),
    ("completions", {"max_tokens": 2.0, "prompt": [5.0, 6.0]}),
    ("responses", {"max_output_tokens": 2.0}),
    ("chat", {"max_tokens": 2, "temperature": 2, "repetition_penalty": 1e-4}),
    ("chat", {"stop": [], "logit_bias": None, "tool_choice": "auto", "parallel_tool_calls": True}),
    ("chat", {"max_tokens": 1, "top_p": 0, "top_k": -1, "seed": -5, "n": None}),
    ("completions", {"prompt": [""], "best_of": 1, "suffix": ""}),
    ("completions", {"prompt": "", "echo": True, "max_tokens": 0, "logprobs": 0}),
    ("responses", {"reasoning": {"effort": None}, "background": False, "store": None, "text": {}}),
]


@pytest.mark.parametrize(("kind", "changes"), ANSWERED, ids=lambda value: str(value)[:60])
def test_what_is_only_odd_is_answered(line: Line, kind: str, changes: dict[str, Any]) -> None:
    status, about, _ = line.ask("POST", PATHS[kind], BODIES[kind] | changes)
    assert status == 200, about


def test_content_in_parts_is_their_text(line: Line) -> None:
    texts = [{"type": "text", "text": "What of "}, {"type": "text", "text": "the moon?"}]
    parts = line.ask("POST", PATHS["chat"], CHAT | said(texts) | {"max_tokens": 12})[1]
    whole = line.ask("POST", PATHS["chat"], CHAT | said("What of the moon?") | {"max_tokens": 12})[1]
    assert parts["choices"] == whole["choices"]
    assert parts["usage"]["prompt_tokens"] == whole["usage"]["prompt_tokens"]


@pytest.mark.parametrize(
    ("headers", "words"),
    [
        ({"Content_Type": "text/plain"}, "application/json"),
        ({"Content_Type": "application/x-www-form-urlencoded"}, "application/json"),
        ({"Content_Type": ""}, "application/json"),
        ({"Content_Encoding": "gzip"}, "Content-Encoding"),
    ],
    ids=str,
)
def test_what_is_not_sent_as_json(line: Line, headers: dict[str, str], words: str) -> None:
    content = json.dumps(CHAT).encode()
    body = gzip.compress(content) if "Content_Encoding" in headers else content
    status, about, _ = line.ask("POST", PATHS["chat"], body, **headers)
    assert status == 415
    assert words in about["error"]["message"]


@pytest.mark.parametrize("kind", ["application/json; charset=utf-8", "application/vnd.api+json"])
def test_kinds_of_json(line: Line, kind: str) -> None:
    assert line.ask("POST", PATHS["chat"], CHAT, Content_Type=kind, Accept_Encoding="gzip")[0] == 200


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("HEAD", "/v1/models", 200),
        ("HEAD", "/healthz", 200),
        ("HEAD", "/", 200),
        ("HEAD", "/nothing", 404),
        ("HEAD", "/v1/chat/completions", 405),
        ("HEAD", "/api/swarm/events", 405),
        ("GET", "/v1/models/", 200),
        ("GET", f"/v1/models/{BASE}/", 200),
        ("GET", "/v1/models/org/name", 404),
        ("GET", "/v1/models/org%2Fname", 404),
        ("GET", "/v1/chat/completions", 405),
        ("OPTIONS", "/v1/chat/completions", 405),
        ("DELETE", f"/v1/models/{BASE}", 405),
        ("POST", "/v1/embeddings", 404),
        ("POST", "/chat/completions", 404),
        ("GET", "/page/%2e%2e%2fapp.py", 404),
    ],
)
def test_methods_and_paths(line: Line, method: str, path: str, status: int) -> None:
    found, about, headers = line.ask(method, path)
    assert found == status
    if method == "HEAD":
        assert about == ""
    elif status == 405:
        assert headers["allow"]
    if status >= 400 and method != "HEAD":
        assert about["error"]["type"] == "invalid_request_error"
    if path == "/chat/completions":
        assert "/v1" in about["error"]["message"]


def test_a_slash_at_the_end_of_a_path(line: Line) -> None:
    assert line.ask("POST", "/v1/chat/completions/", CHAT)[0] == 200
