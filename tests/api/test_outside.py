"""Programs of others, each as its users run it. The heavy ones run at night, where they are installed."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx2 as httpx
import pytest
import torch
from tests.api.deployed import Deployed
from tests.api.world import BASE

ASK = "What of the moon?"
WEATHER_SCHEMA = {
    "type": "object",
    "properties": {"town": {"enum": ["Oslo", "Rome"]}},
    "required": ["town"],
    "additionalProperties": False,
}
others = pytest.mark.filterwarnings("ignore")


def expected(real: Deployed, most: int, *talk: dict[str, str]) -> str:
    messages = talk or ({"role": "user", "content": ASK},)
    return real.text(real.greedy(real.prompt(messages), most))


def run(*command: str, folder: Path | None = None, **environment: str) -> str:
    """What another program prints."""
    done = subprocess.run(
        command,
        cwd=folder,
        env={**os.environ, "LLM_LOAD_PLUGINS": "", "HF_HUB_OFFLINE": "1", **environment},
        capture_output=True,
        text=True,
        timeout=240,
        stdin=subprocess.DEVNULL,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    return done.stdout


@pytest.fixture
def open_webui(real: Deployed) -> Iterator[httpx.Client]:
    """A client with the headers that Open WebUI's backend sends."""
    headers = {
        "Authorization": "Bearer none",
        "X-OpenWebUI-User-Name": "Ann",
        "X-OpenWebUI-User-Id": "1",
        "X-OpenWebUI-User-Email": "ann@example.org",
        "X-OpenWebUI-User-Role": "admin",
    }
    with httpx.Client(base_url=f"{real.url}/v1", headers=headers, timeout=60) as client:
        yield client


def test_what_open_webui_s_backend_asks(real: Deployed, open_webui: httpx.Client) -> None:
    """Its connection test, a chat with the settings of its page, and the titles that it asks for."""
    models = open_webui.get("/models").json()
    assert [one["id"] for one in models["data"]] == [BASE]
    settings = {"temperature": 0, "top_p": 0.9, "max_tokens": 12, "seed": 3, "frequency_penalty": 0}
    talk = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": ASK}]
    chat = {"stream": True, "model": BASE, "messages": talk, "stream_options": {"include_usage": True}}
    with open_webui.stream("POST", "/chat/completions", json=chat | settings) as answer:
        assert answer.status_code == 200
        assert "text/event-stream" in answer.headers["content-type"]
        lines = [line.removeprefix("data: ") for line in answer.iter_lines() if line]
    assert lines.pop() == "[DONE]"
    chunks = [json.loads(line) for line in lines]
    text = "".join(one["choices"][0]["delta"].get("content") or "" for one in chunks if one["choices"])
    assert text == expected(real, 12, *talk)
    assert chunks[-1]["usage"]["total_tokens"] > 12
    title = [{"role": "user", "content": f"### Task: a title for <chat_history>{ASK}</chat_history>"}]
    answer = open_webui.post(
        "/chat/completions",
        json={
            "model": BASE,
            "messages": title,
            "stream": False,
            "max_completion_tokens": 8,
            "temperature": 0,
        },
    )
    assert answer.json()["choices"][0]["message"]["content"] == expected(real, 8, *title)


@others
@pytest.mark.nightly
def test_langchain(real: Deployed) -> None:
    langchain = pytest.importorskip("langchain_openai", reason="langchain-openai is not installed")
    how = {"model": BASE, "base_url": f"{real.url}/v1", "api_key": "none"}
    chat = langchain.ChatOpenAI(**how, temperature=0, max_tokens=12)
    whole = expected(real, 12)
    assert chat.invoke(ASK).content == whole
    assert "".join(chunk.content for chunk in chat.stream(ASK)) == whole
    assert [one.content for one in chat.batch([ASK, ASK])] == [whole, whole]
    talk = [("system", "Be brief."), ("human", [{"type": "text", "text": ASK}])]
    plain = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": ASK}]
    assert chat.invoke(talk).content == expected(real, 12, *plain)

    async def stream() -> str:
        return "".join([chunk.content async for chunk in chat.astream(ASK)])

    assert asyncio.run(stream()) == whole
    probabilities = (
        chat.bind(logprobs=True, top_logprobs=2).invoke(ASK).response_metadata["logprobs"]["content"]
    )
    assert [len(one["top_logprobs"]) for one in probabilities] == [2] * len(probabilities)
    assert langchain.ChatOpenAI(**how, temperature=0, max_tokens=12, use_responses_api=True).invoke(ASK).text
    assert langchain.OpenAI(**how, temperature=0, max_tokens=4).invoke("The moon")

    free = langchain.ChatOpenAI(**how, seed=3, max_tokens=150)
    tool = {"title": "weather", "description": "Of a town.", **WEATHER_SCHEMA}
    for method in ("json_schema", "function_calling"):
        found = free.with_structured_output(tool, method=method).invoke("The weather in a town, as JSON.")
        assert found["town"] in ("Oslo", "Rome"), method
    reply = free.bind_tools([tool], tool_choice="any", parallel_tool_calls=False).invoke("What weather?")
    (call,) = reply.tool_calls
    assert call["args"]["town"] in ("Oslo", "Rome")
    answered = [
        ("human", "What weather?"),
        reply,
        {"role": "tool", "content": "12", "tool_call_id": call["id"]},
    ]
    assert free.invoke(answered).content is not None


@others
@pytest.mark.nightly
def test_llm(real: Deployed, tmp_path: Path) -> None:
    pytest.importorskip("llm", reason="llm is not installed")
    (tmp_path / "extra-openai-models.yaml").write_text(
        f"- {{model_id: ours, model_name: {BASE}, api_base: '{real.url}/v1', supports_schema: true}}\n"
    )

    def llm(*words: str) -> str:
        command = (sys.executable, "-m", "llm", *words)
        return run(*command, LLM_USER_PATH=str(tmp_path), OPENAI_API_KEY="none").rstrip("\n")

    how = ("-m", "ours", "-o", "temperature", "0", "-o", "max_tokens", "12")
    whole = expected(real, 12)
    assert llm(*how, ASK) == whole.rstrip("\n")
    assert llm(*how, "--no-stream", ASK) == whole.rstrip("\n")
    talk = [("user", ASK), ("assistant", whole), ("user", "And then?")]
    further = expected(real, 12, *({"role": role, "content": text} for role, text in talk))
    assert llm(*how, "-c", "And then?") == further.rstrip("\n")
    schema = (
        "-m",
        "ours",
        "-o",
        "seed",
        "3",
        "-o",
        "max_tokens",
        "150",
        "--schema",
        json.dumps(WEATHER_SCHEMA),
    )
    assert json.loads(llm(*schema, "The weather?"))["town"] in ("Oslo", "Rome")


@others
@pytest.mark.nightly
def test_lm_eval(real: Deployed) -> None:
    pytest.importorskip("lm_eval", reason="lm-eval is not installed")
    from lm_eval.api.instance import Instance
    from lm_eval.models.openai_completions import LocalCompletionsAPI

    model = LocalCompletionsAPI(
        model=BASE, base_url=f"{real.url}/v1/completions", tokenizer=str(real.folder), num_concurrent=2
    )
    pairs = [("The moon is", " a stone"), ("Rain falls", " down"), ("x", "yz")]
    asked = [Instance("loglikelihood", {}, pair, index) for index, pair in enumerate(pairs)]
    found = model.loglikelihood(asked, disable_tqdm=True)
    for (before, after), (probability, greedy) in zip(pairs, found, strict=True):
        ids = model.tok_encode(before + after)
        known = len(model.tok_encode(before))
        with torch.no_grad():
            rows = real.local(torch.tensor([ids])).logits[0].log_softmax(-1)[known - 1 : -1]
        following = torch.tensor(ids[known:])
        assert abs(probability - float(rows.gather(1, following[:, None]).sum())) < 1e-3
        assert greedy == bool((rows.argmax(-1) == following).all())
    until = Instance("generate_until", {}, ("Rain falls", {"until": ["\n\n"], "max_gen_toks": 8}), 0)
    (said,) = model.generate_until([until], disable_tqdm=True)
    assert said == real.text(real.greedy(model.tok_encode("Rain falls"), 8))


@others
@pytest.mark.nightly
def test_schemathesis(real: Deployed, tmp_path: Path) -> None:
    """Thousands of requests after our own OpenAPI document: nothing fails, no answer is of another form."""
    pytest.importorskip("schemathesis", reason="schemathesis is not installed")
    command = shutil.which(
        "schemathesis", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    )
    assert command is not None
    options = ("--checks", "all", "--max-examples", "25", "--seed", "1", "--continue-on-failure")
    endless = ("--exclude-path", "/api/swarm/events")
    text = run(command, "run", f"{real.url}/openapi.json", *endless, *options, folder=tmp_path)
    assert "Tested: 9" in text
