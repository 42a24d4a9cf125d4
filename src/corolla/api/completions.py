"""`/v1/completions`: what comes behind a text, and how likely the text is."""

from __future__ import annotations

import codecs
import time
import uuid
from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from corolla.api.chat import tells_usage, usage_of
from corolla.api.generation import Ended, Event, Piece, Run, Scored, Wish
from corolla.api.partners import Partner
from corolla.api.requests import CompletionRequest
from corolla.api.sampling import TokenProbability
from corolla.api.streaming import DONE, Answer, event, failed
from corolla.api.wishes import completion_wishes


def ask_completions(
    request: CompletionRequest, partner: Partner, user: str
) -> tuple[list[Wish], Callable[[Run], Answer]]:
    """What is to be computed, and the answer from it. Raises `ApiFailure`."""
    wishes = completion_wishes(request, partner, user)
    return [wish for wish, _ in wishes], lambda run: CompletionAnswer(request, wishes, run)


class CompletionAnswer:
    """The answer to one request."""

    failed = staticmethod(failed)

    def __init__(self, request: CompletionRequest, wishes: Sequence[tuple[Wish, str]], run: Run) -> None:
        self.id = f"cmpl-{uuid.uuid4().hex}"
        self._request, self._run = request, run
        self._created = int(time.time())
        self._partner = wishes[0][0].partner
        self._choices = [
            _Choice(wish, self._partner, text if request.echo else None)
            for wish, text in wishes
            for _ in range(wish.count)
        ]

    async def whole(self) -> dict[str, Any]:
        """All of it."""
        async for one in self._run.events():
            self._choices[one.index].take(one)
        choices = [
            {
                "index": index,
                "text": choice.text,
                "logprobs": choice.logprobs(),
                "finish_reason": choice.reason,
            }
            for index, choice in enumerate(self._choices)
        ]
        return {**self._head(), "choices": choices, "usage": usage_of(self._run)}

    async def events(self) -> AsyncGenerator[str]:
        """As it comes."""
        told = tells_usage(self._request)
        async for one in self._run.events():
            choice = self._choices[one.index]
            choice.take(one)
            if choice.news or isinstance(one, Ended):
                text, logprobs = choice.take_news()
                about = {"index": one.index, "text": text, "logprobs": logprobs}
                reason = one.reason if isinstance(one, Ended) else None
                chunk = {**self._head(), "choices": [{**about, "finish_reason": reason}]}
                yield event({**chunk, "usage": None} if told else chunk)
        if told:
            yield event({**self._head(), "choices": [], "usage": usage_of(self._run)})
        yield DONE

    def _head(self) -> dict[str, Any]:
        return {
            "id": self.id,
            "object": "text_completion",
            "created": self._created,
            "model": self._partner.name,
            "system_fingerprint": None,
        }


@dataclass
class _Choice:
    """One completion as far as it has come; `prompt` is its text where it is to be repeated."""

    wish: Wish
    partner: Partner
    prompt: str | None
    text: str = ""
    tokens: list[tuple[int, TokenProbability | None]] = field(default_factory=list)
    reason: str | None = None
    shown: tuple[int, int] = (0, 0)  # characters and tokens that were given out
    offset: int = 0  # of the next token, in characters
    offsets: list[int] = field(default_factory=list)
    _decoder: codecs.IncrementalDecoder = field(default_factory=codecs.getincrementaldecoder("utf-8"))

    def __post_init__(self) -> None:
        self._decoder.errors = "replace"
        if self.prompt is not None:
            self.text = self.prompt

    @property
    def news(self) -> bool:
        """Whether something is there to be given out."""
        return self.shown != (len(self.text), len(self.tokens))

    def take(self, one: Event) -> None:
        """Something has happened."""
        if isinstance(one, Scored):
            for token, probability in zip(self.wish.ids, one.probabilities, strict=True):
                self._add(token, probability)
        elif isinstance(one, Piece):
            self.text += one.text
            for probability in one.probabilities:
                self._add(probability.token, probability)
        else:
            self.reason = one.reason

    def _add(self, token: int, probability: TokenProbability | None) -> None:
        self.tokens.append((token, probability))
        self.offsets.append(self.offset)
        # A character may be of several tokens: all of them stand where it does.
        self.offset += len(self._decoder.decode(self.partner.vocabulary.bytes_of(token)))

    def take_news(self) -> tuple[str, dict[str, Any] | None]:
        """What was not given out yet."""
        characters, tokens = self.shown
        self.shown = (len(self.text), len(self.tokens))
        return self.text[characters:], self.logprobs(tokens)

    def logprobs(self, first: int = 0) -> dict[str, Any] | None:
        """In OpenAI's form, of the tokens from `first` on; None where nobody asked."""
        wanted = self.wish.sampling.logprobs
        if wanted is None:
            return None
        rows = self.tokens[first:]
        return {
            "tokens": [self._named(token) for token, _ in rows],
            "token_logprobs": [None if one is None else _finite(one.logprob) for _, one in rows],
            "top_logprobs": [
                None if one is None else {self._named(token): _finite(value) for token, value in one.top}
                for _, one in rows
            ],
            "text_offset": self.offsets[first:],
        }

    def _named(self, token: int) -> str:
        """A token's text; what is no text by itself by its bytes, so that no two tokens have one name."""
        raw = self.partner.vocabulary.bytes_of(token)
        try:
            return raw.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)


def _finite(logprob: float) -> float:
    return max(logprob, -9999.0)  # JSON has no infinity
