"""Who may ask, and how much: keys, budgets, web pages from elsewhere."""

from __future__ import annotations

import http.client
import json
import re
from pathlib import Path
from typing import Any

import pytest
from openai import AuthenticationError, RateLimitError
from tests.api.world import BASE, World, Worlds

from corolla.api.access import DAY, Keys, User
from corolla.api.failures import ApiFailure
from corolla.errors import UsageError

ASK = [{"role": "user", "content": "Hi"}]
FILE = """
[ann]
key = "secret-of-ann"

[bob]
key = "secret-of-bob"
tokens_per_day = 60
requests_per_minute = 3
"""


def asked(
    world: World, path: str, *, method: str = "GET", body: Any = None, headers: dict[str, str] | None = None
) -> tuple[int, Any, http.client.HTTPMessage]:
    """A plain request's status, content and headers."""
    connection = http.client.HTTPConnection(*world.address, timeout=30)
    try:
        content = None if body is None else json.dumps(body)
        usual = {} if body is None else {"Content-Type": "application/json"}
        connection.request(method, path, content, {**usual, **(headers or {})})
        answer = connection.getresponse()
        text = answer.read()
        about: Any = text.decode()
        if answer.headers.get("content-type", "").startswith("application/json"):
            about = json.loads(text)
        return answer.status, about, answer.headers
    finally:
        connection.close()


@pytest.fixture(scope="module")
def guarded(worlds: Worlds, tmp_path_factory: pytest.TempPathFactory) -> World:
    path = tmp_path_factory.mktemp("keys") / "keys.toml"
    path.write_text(FILE)
    return worlds.make("guarded", keys=Keys.read(["master"], path))


def test_a_key_is_needed_where_there_are_keys(guarded: World) -> None:
    for path in ("/v1/models", "/metrics", "/openapi.json"):
        status, about, headers = asked(guarded, path)
        assert (status, about["error"]["code"]) == (401, "invalid_api_key")
        assert headers["www-authenticate"] == "Bearer"
    assert asked(guarded, "/healthz")[:2] == (200, "ok")
    with pytest.raises(AuthenticationError):
        guarded.client("wrong").models.list()
    for key in ("master", "secret-of-ann", "secret-of-bob"):
        assert [one.id for one in guarded.client(key).models.list()] == [BASE]


def test_a_budget_is_kept(guarded: World) -> None:
    bob, ann = guarded.client("secret-of-bob"), guarded.client("secret-of-ann")
    with pytest.raises(RateLimitError) as caught:
        bob.chat.completions.create(model=BASE, messages=ASK, max_tokens=500)
    assert caught.value.code == "insufficient_quota"
    first = bob.chat.completions.create(model=BASE, messages=ASK, max_tokens=30, temperature=0)
    assert first.usage is not None
    with pytest.raises(RateLimitError) as caught:
        bob.chat.completions.create(model=BASE, messages=ASK, max_tokens=60 - first.usage.total_tokens)
    assert caught.value.code == "insufficient_quota"
    with pytest.raises(RateLimitError) as caught:
        bob.chat.completions.create(model=BASE, messages=ASK, max_tokens=1)
    assert caught.value.code == "rate_limit_exceeded"
    assert int(caught.value.response.headers["retry-after"]) <= 60
    assert ann.chat.completions.create(model=BASE, messages=ASK, max_tokens=2).choices


def test_a_budget_is_settled_and_comes_back_the_next_day() -> None:
    user = User("x", tokens_per_day=100)
    settle = user.reserve(90, 5 * DAY)
    with pytest.raises(ApiFailure):
        user.reserve(20, 5 * DAY + 5)
    settle(10)
    user.reserve(90, 5 * DAY + 6)
    with pytest.raises(ApiFailure):
        user.reserve(1, 6 * DAY - 1)
    late = user.reserve(100, 6 * DAY)
    settle(0)
    with pytest.raises(ApiFailure):
        user.reserve(1, 6 * DAY + 1)
    late(0)
    user.reserve(100, 6 * DAY + 2)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("[ann]\n", "key"),
        ('[ann]\nkey = ""\n', "key"),
        ('[ann]\nkey = "x"\nbudget = 3\n', "budget"),
        ('[ann]\nkey = "x"\ntokens_per_day = 0\n', "tokens_per_day"),
        ('[ann]\nkey = "x"\ntokens_per_day = true\n', "tokens_per_day"),
        ('[ann]\nkey = "x"\n[bob]\nkey = "x"\n', "another"),
        ("ann = 1\n", "ann"),
        ("[[", "TOML"),
    ],
)
def test_what_is_wrong_with_a_file_of_keys_is_said(tmp_path: Path, content: str, words: str) -> None:
    path = tmp_path / "keys.toml"
    path.write_text(content)
    with pytest.raises(UsageError, match=words):
        Keys.read([], path)
    with pytest.raises(UsageError, match="cannot be read"):
        Keys.read([], tmp_path / "nowhere")


def test_nobody_in_the_file_is_called_as_the_user_of_the_options(tmp_path: Path) -> None:
    path = tmp_path / "keys.toml"
    path.write_text('[key]\nkey = "x"\n')
    assert Keys.read([], path).user("Bearer x").name == "key"
    with pytest.raises(UsageError, match="called key"):
        Keys.read(["y"], path)


def test_no_web_page_from_elsewhere_may_ask(world: World) -> None:
    body = {"model": BASE, "messages": ASK, "max_tokens": 1}
    host = f"{world.address[0]}:{world.address[1]}"
    ask: dict[str, Any] = {"method": "POST", "body": body}
    path = "/v1/chat/completions"
    assert asked(world, path, **ask)[0] == 200
    assert asked(world, path, **ask, headers={"Origin": f"http://{host}"})[0] == 200
    for headers in ({"Origin": "https://evil.example"}, {"Origin": "null"}, {"Host": "evil.example"}):
        status, about, answer = asked(world, path, **ask, headers=headers)
        assert status == 403
        assert about["error"]["type"] == "permission_error"
        assert "access-control-allow-origin" not in answer
    plain = asked(world, path, method="POST", headers={"Content-Type": "text/plain"}, body=body)
    assert plain[0] == 415, "a page's form could send it"


def test_every_refusal_has_openai_s_form(world: World) -> None:
    for path, method, status in (
        ("/v1/nothing", "GET", 404),
        ("/v1/chat/completions", "GET", 405),
        ("/v1/models/none", "GET", 404),
        ("/v1/embeddings", "POST", 404),
    ):
        found, about, _ = asked(world, path, method=method)
        assert found == status
        assert set(about["error"]) == {"message", "type", "param", "code"}


def test_the_dashboard_shows_figures_that_there_are(world: World) -> None:
    text = asked(world, "/metrics")[1]
    board = json.loads((Path(__file__).parents[2] / "deploy" / "grafana-api.json").read_text())
    named = {
        name
        for panel in board["panels"]
        for target in panel["targets"]
        for name in re.findall(r"corolla_\w+", target["expr"])
    }
    assert len(named) > 6
    assert {name for name in named if f"{name} " not in text and f"{name}{{" not in text} == set()


def test_retries_are_counted_by_cause(worlds: Worlds) -> None:
    world = worlds.make("retries", spans=((0, 4), (0, 4)))
    world.client().chat.completions.create(model=BASE, messages=ASK, max_tokens=3)
    assert "corolla_api_retries_total{" not in asked(world, "/metrics")[1]
    counted = world.swarm.counted()
    world.swarm.kill(max(counted, key=lambda peer: counted[peer]))
    talk = [*ASK, {"role": "assistant", "content": "Hello."}, {"role": "user", "content": "And?"}]
    world.client().chat.completions.create(model=BASE, messages=talk, max_tokens=3)
    text = asked(world, "/metrics")[1]
    assert re.search(r'corolla_api_retries_total\{cause="peer_[a-z]+"\} [1-9]', text), text


def test_figures_for_prometheus(world: World) -> None:
    world.client().chat.completions.create(model=BASE, messages=ASK, max_tokens=3, temperature=0)
    wanted = (
        f'corolla_api_tokens_total{{kind="completion",model="{BASE}"}} ',
        'corolla_api_requests_total{route="/v1/chat/completions",status="200"} ',
        "corolla_api_time_to_first_token_seconds_bucket",
        "corolla_api_replies_running 0.0",
    )
    for _ in range(100):  # a reply is counted once it has been sent: whoever has read it may be quicker
        status, text, headers = asked(world, "/metrics")
        if all(line in text for line in wanted):
            break
    assert [line for line in wanted if line not in text] == []
    assert status == 200
    assert headers["content-type"].startswith("text/plain")
    assert asked(world, "/readyz")[:2] == (200, "ready")
