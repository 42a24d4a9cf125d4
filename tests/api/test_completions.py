"""`/v1/completions`: what comes behind a text, and how likely a text is, as evaluation harnesses ask."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from openai import BadRequestError
from tests.api.deployed import Deployed
from tests.api.world import BASE

TEXT = "The moon is "


def test_a_completion_is_what_generate_gives(real: Deployed) -> None:
    ids = real.tokenizer(TEXT).input_ids
    said = real.greedy(ids, 12)
    for prompt in (TEXT, ids, [TEXT], [ids]):
        reply = real.client().completions.create(model=BASE, prompt=prompt, temperature=0, max_tokens=12)
        assert reply.choices[0].text == real.text(said)
        assert reply.usage is not None
        assert (reply.usage.prompt_tokens, reply.usage.completion_tokens) == (len(ids), len(said))


def test_sixteen_tokens_unless_more_are_asked_for(real: Deployed) -> None:
    reply = real.client().completions.create(model=BASE, prompt="Once", temperature=0)
    assert reply.choices[0].text == real.text(real.greedy(real.tokenizer("Once").input_ids, 16))


def test_the_best_two_of_two(real: Deployed) -> None:
    reply = real.client().completions.create(
        model=BASE, prompt=TEXT, n=2, best_of=2, temperature=0, max_tokens=4
    )
    said = real.text(real.greedy(real.tokenizer(TEXT).input_ids, 4))
    assert [choice.text for choice in reply.choices] == [said, said]


def test_several_prompts_and_a_stream_of_them(real: Deployed) -> None:
    prompts = ["One", "Two and three", "Four"]
    expected = [real.text(real.greedy(real.tokenizer(one).input_ids, 8)) for one in prompts]
    how: dict[str, Any] = {"model": BASE, "prompt": prompts, "temperature": 0, "max_tokens": 8}
    whole = real.client().completions.create(**how)
    assert [choice.text for choice in whole.choices] == expected
    texts = ["", "", ""]
    for chunk in real.client().completions.create(**how, stream=True):
        for choice in chunk.choices:
            texts[choice.index] += choice.text
    assert texts == expected


@pytest.mark.parametrize("most", [0, 1, 4])
def test_an_echo_tells_how_likely_every_token_of_a_text_is(real: Deployed, most: int) -> None:
    text = "It rains on the river, and the lamp is lit."
    ids = real.tokenizer(text).input_ids
    reply = real.client().completions.create(
        model=BASE, prompt=[ids], temperature=0, max_tokens=most, logprobs=2, echo=True, seed=1234
    )
    said = [token for token in real.greedy(ids, most) if token != 2] if most else []
    with torch.no_grad():
        probabilities = real.local(torch.tensor([[*ids, *said]])).logits[0].log_softmax(-1)
    found = reply.choices[0].logprobs
    assert found is not None
    assert found.token_logprobs is not None
    assert found.top_logprobs is not None
    assert found.tokens is not None
    assert found.text_offset is not None
    own = [float(probabilities[place, token]) for place, token in enumerate([*ids, *said][1:])]
    assert found.token_logprobs[0] is None
    assert found.token_logprobs[1:] == pytest.approx(own, abs=1e-4)
    for place, row in enumerate(found.top_logprobs[1:]):
        assert max(row.values()) == pytest.approx(float(probabilities[place].max()), abs=1e-4)
        assert len(row) in (2, 1)
    rows = zip(found.tokens[1:], found.top_logprobs[1:], strict=True)
    greedy = [name == max(row, key=row.__getitem__) for name, row in rows]
    best = [token == int(probabilities[place].argmax()) for place, token in enumerate([*ids, *said][1:])]
    assert greedy == best, "whether a token is the likeliest can be told by its name"
    assert reply.choices[0].text == text + real.text(said)
    assert "".join(found.tokens[: len(ids)]) == text
    assert found.text_offset[: len(ids)] == list(range(len(ids)))
    assert reply.usage is not None
    assert reply.usage.prompt_tokens == len(ids)


def test_tokens_stand_where_their_character_does(real: Deployed) -> None:
    text = "a\U0001f327b\u00e9c"
    reply = real.client().completions.create(
        model=BASE, prompt=text, temperature=0, max_tokens=0, logprobs=0, echo=True
    )
    found = reply.choices[0].logprobs
    assert found is not None
    assert found.text_offset is not None
    own = [offset for offset in found.text_offset if offset < len(text)]
    assert own == [place for place, one in enumerate(text) for _ in one.encode()]


def test_an_echo_without_probabilitys(real: Deployed) -> None:
    reply = real.client().completions.create(model=BASE, prompt=TEXT, temperature=0, max_tokens=5, echo=True)
    said = real.greedy(real.tokenizer(TEXT).input_ids, 5)
    assert reply.choices[0].text == TEXT + real.text(said)
    assert reply.choices[0].logprobs is None


@pytest.mark.parametrize(
    ("changes", "param"),
    [
        ({"prompt": []}, None),
        ({"prompt": [[]]}, None),
        ({"prompt": [5, 100_000]}, "prompt"),
        ({"prompt": [-1]}, None),
        ({"prompt": [1, "two"]}, None),
        ({"suffix": "!"}, "suffix"),
        ({"best_of": 3}, "best_of"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": -1}, "max_tokens"),
        ({"logprobs": True}, "logprobs"),
        ({"best_of": 2, "n": 3}, "best_of"),
        ({"best_of": True, "n": 1}, "best_of"),
        ({"prompt": "x" * 5000}, "prompt"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_what_cannot_be_done_is_refused(real: Deployed, changes: dict[str, Any], param: str | None) -> None:
    body = {"prompt": TEXT, **changes}
    with pytest.raises(BadRequestError) as caught:
        real.client().completions.create(model=BASE, prompt=body.pop("prompt"), extra_body=body)
    if param is not None:
        assert caught.value.param == param
