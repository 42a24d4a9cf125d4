"""`/v1/chat/completions` with OpenAI's own client: what comes is what `generate` gives, and exactly counted."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
import torch
from openai import BadRequestError, NotFoundError
from tests.api.deployed import Deployed
from tests.api.world import BASE

from corolla.api.reading import TextReader

HELLO = [{"role": "user", "content": "What of the moon?"}]


def talks(count: int) -> list[list[dict[str, str]]]:
    found = []
    for number in range(count):
        talk = [{"role": "user", "content": f"Number {number}: what of {'rain ' * (number % 5)}?"}]
        if number % 3:
            talk += [{"role": "assistant", "content": "It falls."}, {"role": "user", "content": "And then?"}]
        if number % 2:
            talk.insert(0, {"role": "system", "content": "Be brief."})
        found.append(talk)
    return found


def test_a_reply_is_what_generate_gives(real: Deployed) -> None:
    reply = real.client().chat.completions.create(model=BASE, messages=HELLO, temperature=0, max_tokens=24)
    ids = real.prompt(HELLO)
    said = real.greedy(ids, 24)
    assert reply.choices[0].message.content == real.text(said)
    assert len(set(said)) > 4
    assert reply.usage is not None
    assert (reply.usage.prompt_tokens, reply.usage.completion_tokens) == (len(ids), len(said))
    assert reply.usage.total_tokens == len(ids) + len(said)
    assert reply.choices[0].finish_reason == ("length" if len(said) == 24 and said[-1] != 2 else "stop")
    assert reply.model == BASE
    assert reply.object == "chat.completion"


def test_a_stream_is_the_same_reply(real: Deployed) -> None:
    whole = real.client().chat.completions.create(model=BASE, messages=HELLO, temperature=0, max_tokens=24)
    chunks = list(
        real.client().chat.completions.create(
            model=BASE,
            messages=HELLO,
            temperature=0,
            max_tokens=24,
            stream=True,
            stream_options={"include_usage": True},
        )
    )
    assert chunks[0].choices[0].delta.role == "assistant"
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == whole.choices[0].message.content
    assert chunks[-1].choices == []
    assert chunks[-1].usage is not None
    assert whole.usage is not None
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens
    assert [chunk.usage for chunk in chunks[:-1]] == [None] * (len(chunks) - 1)
    reasons = [chunk.choices[0].finish_reason for chunk in chunks[:-1]]
    assert reasons[-1] == whole.choices[0].finish_reason
    assert set(reasons[:-1]) == {None}
    assert len({chunk.id for chunk in chunks}) == 1


async def test_sixteen_at_once_are_what_each_is_alone(real: Deployed) -> None:
    client = real.async_client()

    async def ask(number: int, talk: list[Any]) -> str:
        if number % 2:
            reply = await client.chat.completions.create(
                model=BASE, messages=talk, temperature=0, max_tokens=16
            )
            return reply.choices[0].message.content or ""
        stream = await client.chat.completions.create(
            model=BASE, messages=talk, temperature=0, max_tokens=16, stream=True
        )
        return "".join([chunk.choices[0].delta.content or "" async for chunk in stream])

    async with client:
        found = await asyncio.gather(*(ask(number, talk) for number, talk in enumerate(talks(16))))
    expected = [real.text(real.greedy(real.prompt(talk), 16)) for talk in talks(16)]
    assert found == expected
    assert len(set(expected)) > 8


def test_several_replies_share_a_prompt_and_are_told_apart(real: Deployed) -> None:
    before = real.counted()
    reply = real.client().chat.completions.create(
        model=BASE,
        messages=[{"role": "user", "content": "x" * 100}],
        temperature=1,
        seed=5,
        n=4,
        max_tokens=8,
    )
    texts = [choice.message.content for choice in reply.choices]
    assert [choice.index for choice in reply.choices] == [0, 1, 2, 3]
    assert len(set(texts)) == 4
    assert reply.usage is not None
    assert reply.usage.completion_tokens <= 32
    assert real.counted() - before < 2 * reply.usage.prompt_tokens, "the prompt is computed once"
    again = real.client().chat.completions.create(
        model=BASE,
        messages=[{"role": "user", "content": "x" * 100}],
        temperature=1,
        seed=5,
        n=4,
        max_tokens=8,
    )
    assert [choice.message.content for choice in again.choices] == texts, "a seed makes replies repeatable"


def test_the_second_of_several_has_the_next_seed(real: Deployed) -> None:
    how: dict[str, Any] = {"model": BASE, "messages": HELLO, "max_tokens": 8}
    several = real.client().chat.completions.create(**how, seed=-5, n=2)
    alone = real.client().chat.completions.create(**how, seed=-4)
    assert several.choices[1].message.content == alone.choices[0].message.content


def test_a_seed_draws_what_generate_draws(real: Deployed) -> None:
    how = {"temperature": 0.8, "top_p": 0.9}
    reply = real.client().chat.completions.create(
        model=BASE, messages=HELLO, seed=11, max_tokens=12, extra_body={"top_k": 40}, **how
    )
    ids = torch.tensor([real.prompt(HELLO)])
    torch.manual_seed(11)
    said = real.local.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=True, top_k=40, **how
    )
    assert reply.choices[0].message.content == real.text(said[0, ids.shape[1] :].tolist())


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
def test_what_ends_a_reply_is_none_of_its_tokens_although_text_was_held_back(
    real: Deployed, stream: bool
) -> None:
    how: dict[str, Any] = {"model": BASE, "messages": HELLO, "max_tokens": 40, "logit_bias": {"2": 4}}
    for first in range(0, 200, 8):
        several = real.client().chat.completions.create(**how, seed=first, n=8)
        texts = [(one.message.content or "") * (one.finish_reason == "stop") for one in several.choices]
        fit = [number for number, text in enumerate(texts) if len(text) > 1 and text.isascii()]
        if fit:
            break
    seed, text = first + fit[0], texts[fit[0]]
    reply = real.client().chat.completions.create(**how, seed=seed)
    assert reply.choices[0].message.content == text
    # The last character may be the beginning of a stop text until the end comes.
    how |= {"seed": seed, "stop": [f"{text[-1]}\x00never"], "logprobs": True}
    if stream:
        chunks = list(real.client().chat.completions.create(**how, stream=True))
        content = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
        rows = [row for chunk in chunks if (own := chunk.choices[0].logprobs) for row in own.content or []]
    else:
        found = real.client().chat.completions.create(**how).choices[0]
        assert found.logprobs is not None
        content, rows = found.message.content or "", found.logprobs.content or []
    assert content == text
    assert reply.usage is not None
    assert len(rows) == reply.usage.completion_tokens - 1, "the end itself is computed, and not told of"


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
def test_a_stop_text_ends_a_reply_before_it(real: Deployed, stream: bool) -> None:
    said = real.text(real.greedy(real.prompt(HELLO), 24))
    stop = said[6:9]
    assert said.index(stop) == 6
    how: dict[str, Any] = {"model": BASE, "messages": HELLO, "temperature": 0, "max_tokens": 24}
    reply: Any = real.client().chat.completions.create(**how, stop=["never-said", stop], stream=stream)
    if stream:
        chunks = list(reply)
        text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
        reason = chunks[-1].choices[0].finish_reason
    else:
        text, reason = reply.choices[0].message.content, reply.choices[0].finish_reason
    assert (text, reason) == (said[:6], "stop")


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
def test_tokens_of_a_stop_text_are_told_of_no_more_than_it_is(real: Deployed, stream: bool) -> None:
    """It may begin some tokens before it is whole, or in the middle of one."""
    said = real.text(real.greedy(real.prompt(HELLO), 24))
    how: dict[str, Any] = {"model": BASE, "messages": HELLO, "temperature": 0, "max_tokens": 24}
    for size in (1, 3, 6):
        stop = said[5 : 5 + size]
        found = real.client().chat.completions.create(**how, stop=[stop], logprobs=True, stream=stream)
        choices = [chunk.choices[0] for chunk in found] if stream else [found.choices[0]]
        rows = [row for one in choices if one.logprobs for row in one.logprobs.content or []]
        text = b"".join(bytes(row.bytes or []) for row in rows).decode(errors="replace")
        for special in real.tokenizer.all_special_tokens:
            text = text.replace(special, "")
        assert text == said[: said.index(stop)]


def test_bytes_that_are_no_text_hold_nothing_up(real: Deployed) -> None:
    half = next(token for token in range(3, 259) if real.text([token]) == "\ufffd")
    how: dict[str, Any] = {"model": BASE, "messages": HELLO, "temperature": 0, "max_tokens": 30}
    chunks = list(real.client().chat.completions.create(**how, logit_bias={str(half): 100}, stream=True))
    pieces = [text for chunk in chunks if (text := chunk.choices[0].delta.content)]
    assert "".join(pieces) == real.text([half] * 30)
    assert len(pieces) > 20
    read = TextReader(real.tokenizer)
    text = "\u20ac\U0001f327 and \u00e9"
    ids = [half] * 9 + real.tokenizer(text, add_special_tokens=False).input_ids + [half]
    assert "".join([*(read.push(token) for token in ids), read.finish()]) == real.text(ids)


def test_probabilitys_are_those_of_the_local_model(real: Deployed) -> None:
    reply = real.client().chat.completions.create(
        model=BASE, messages=HELLO, temperature=0, max_tokens=10, logprobs=True, top_logprobs=3
    )
    assert reply.choices[0].logprobs is not None
    rows = reply.choices[0].logprobs.content
    assert rows is not None
    ids = real.prompt(HELLO)
    said = [token for token in real.greedy(ids, 10) if token != 2]
    assert len(rows) == len(said)
    with torch.no_grad():
        logits = real.local(torch.tensor([[*ids, *said]])).logits[0, len(ids) - 1 : -1]
    probabilities = logits.log_softmax(-1)
    for row, token, own in zip(rows, said, probabilities, strict=True):
        assert abs(row.logprob - float(own[token])) < 1e-4
        best = own.topk(3)
        likeliest = [one.logprob for one in row.top_logprobs]
        assert likeliest == pytest.approx(best.values.tolist(), abs=1e-4)
        assert row.top_logprobs[0].logprob == row.logprob, "greedy takes the likeliest"
        assert (
            bytes(row.bytes or [])
            == real.tokenizer.convert_tokens_to_string([real.tokenizer.convert_ids_to_tokens(token)]).encode()
            or row.token == "\ufffd"
        )


def test_a_bias_decides(real: Deployed) -> None:
    token = real.tokenizer("Q", add_special_tokens=False).input_ids[0]
    reply = real.client().chat.completions.create(
        model=BASE, messages=HELLO, temperature=0, max_tokens=5, logit_bias={str(token): 100}
    )
    assert reply.choices[0].message.content == "QQQQQ"


def test_penalties_are_taken_from_what_was_said(real: Deployed) -> None:
    ids = real.prompt(HELLO)
    said: list[int] = []
    for _ in range(10):
        with torch.no_grad():
            scores = real.local(torch.tensor([[*ids, *said]])).logits[0, -1].clone()
        for token in set(said):
            scores[token] -= 1.5 * said.count(token) + 2
        scores[said[0] if said else 0] += 9
        said.append(int(scores.argmax()))
    assert len(set(said)) < len(said), "something is said again, and costs more each time"
    bias = {str(said[0]): 9.0}
    reply = real.client().chat.completions.create(
        model=BASE,
        messages=HELLO,
        temperature=0,
        max_tokens=10,
        frequency_penalty=1.5,
        presence_penalty=2,
        logit_bias=bias,
    )
    assert reply.choices[0].message.content == real.text(said)


@pytest.mark.parametrize(
    ("changes", "param"),
    [
        ({"temperature": 3}, "temperature"),
        ({"temperature": "warm"}, "temperature"),
        ({"n": 0}, "n"),
        ({"max_tokens": 100_000}, "messages"),
        ({"max_tokens": 5, "max_completion_tokens": 6}, "max_tokens"),
        ({"top_logprobs": 3}, "top_logprobs"),
        ({"logit_bias": {"100000": 1}}, "logit_bias"),
        ({"stop": ""}, None),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "wizard", "content": "x"}]}, None),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
            None,
        ),
        ({"messages": [{"role": "user", "content": [{"type": "input_audio", "input_audio": {}}]}]}, None),
        ({"messages": [{"role": "user"}]}, None),
        ({"messages": [{"role": "user", "content": "x" * 2000}]}, "messages"),
        ({"audio": {"voice": "x"}}, "audio"),
        ({"modalities": ["text", "audio"]}, "modalities"),
        ({"store": True}, "store"),
        ({"reasoning_effort": "high"}, "reasoning_effort"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"no_such_parameter": 1}, "no_such_parameter"),
        ({"response_format": {"type": "xml"}}, None),
        (
            {
                "response_format": {
                    "type": "json_schema",
                    "json_schema": {"name": "x", "schema": {"type": "wrong"}},
                }
            },
            "response_format",
        ),
    ],
    ids=lambda value: str(value)[:40],
)
def test_what_cannot_be_done_is_refused_in_a_sentence(
    real: Deployed, changes: dict[str, Any], param: str | None
) -> None:
    body = {"model": BASE, "messages": HELLO, "max_tokens": 4, **changes}
    before = real.counted()
    with pytest.raises(BadRequestError) as caught:
        real.client().chat.completions.create(
            model=body.pop("model"), messages=body.pop("messages"), extra_body=body
        )
    error = caught.value.body
    assert isinstance(error, dict)
    assert set(error) == {"message", "type", "param", "code"}
    assert error["type"] == "invalid_request_error"
    assert error["message"].strip()
    if param is not None:
        assert error["param"] == param
    assert real.counted() == before, "nothing was computed"


def test_nobody_of_that_name(real: Deployed) -> None:
    with pytest.raises(NotFoundError) as caught:
        real.client().chat.completions.create(model="gpt-9", messages=HELLO)
    assert caught.value.code == "model_not_found"


@pytest.mark.parametrize(
    "harmless",
    [
        {"user": "u-1", "store": False, "modalities": ["text"], "service_tier": "auto"},
        {"tools": [], "functions": None, "response_format": {"type": "text"}},
        {"safety_identifier": "x", "prompt_cache_key": "y", "verbosity": "medium"},
    ],
    ids=lambda value: ",".join(value),
)
def test_what_asks_for_nothing_changes_nothing(real: Deployed, harmless: dict[str, Any]) -> None:
    reply = real.client().chat.completions.create(
        model=BASE, messages=HELLO, temperature=0, max_tokens=6, extra_body=harmless
    )
    assert reply.choices[0].message.content == real.text(real.greedy(real.prompt(HELLO), 6))
