"""`/v1/chat/completions`: replies in OpenAI's form, whole or as they come."""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncGenerator, Callable
from dataclasses import dataclass, field
from typing import Any

from corolla.api.generation import Ended, Piece, Run, Wish
from corolla.api.partners import Partner
from corolla.api.requests import ChatRequest
from corolla.api.sampling import TokenProbability
from corolla.api.streaming import DONE, Answer, event, failed
from corolla.api.wishes import ChatWish, chat_wish


def usage_of(run: Run) -> dict[str, Any]:
    """Exactly what was read and computed: a prompt counts once, and a token that ends a reply is one of it."""
    prompt = sum(len(wish.ids) for wish in run.wishes)
    said = run.timing.tokens
    return {
        "prompt_tokens": prompt,
        "completion_tokens": said,
        "total_tokens": prompt + said,
        "prompt_tokens_details": {"cached_tokens": min(run.timing.cached, prompt)},
    }


def ask_chat(request: ChatRequest, partner: Partner, user: str) -> tuple[list[Wish], Callable[[Run], Answer]]:
    """What is to be computed, and the answer from it. Raises `ApiFailure`."""
    wish = chat_wish(request, partner, user)
    return [wish.wish], lambda run: ChatAnswer(request, wish, run)


class ChatAnswer:
    """The answer to one request."""

    failed = staticmethod(failed)

    def __init__(self, request: ChatRequest, wish: ChatWish, run: Run) -> None:
        self.id = f"chatcmpl-{uuid.uuid4().hex}"
        self._request, self._wish, self._run = request, wish, run
        self._partner = wish.wish.partner
        self._created = int(time.time())
        self._choices = [_Choice(wish, self._partner) for _ in range(run.count)]

    async def whole(self) -> dict[str, Any]:
        """All of it."""
        async for one in self._run.events():
            if isinstance(one, Piece):
                self._choices[one.index].take(one)
            elif isinstance(one, Ended):
                self._choices[one.index].end(one)
        choices = [choice.to_dict(index) for index, choice in enumerate(self._choices)]
        return {**self._head("chat.completion"), "choices": choices, "usage": usage_of(self._run)}

    async def events(self) -> AsyncGenerator[str]:
        """As it comes."""
        begun = False
        async for one in self._run.events():
            if not begun:  # what cannot be computed at all has an answer with a status of its own
                begun = True
                for index in range(self._run.count):
                    yield self._chunk(index, {"role": "assistant", "content": "", "refusal": None})
            if isinstance(one, Piece):
                choice = self._choices[one.index]
                text, probabilities = choice.take(one)
                if text or probabilities:
                    yield self._chunk(one.index, {"content": text}, logprobs=choice.logprobs(probabilities))
            elif isinstance(one, Ended):
                choice = self._choices[one.index]
                rest = choice.end(one)
                if rest or choice.fresh:
                    yield self._chunk(one.index, {"content": rest}, logprobs=choice.logprobs(choice.news()))
                for number, call in enumerate(choice.calls):
                    yield self._chunk(one.index, {"tool_calls": [{"index": number, **call.to_dict()}]})
                yield self._chunk(one.index, {}, reason=choice.reason)
        options = self._request.stream_options
        if options is not None and options.include_usage:
            yield event({**self._head("chat.completion.chunk"), "choices": [], "usage": usage_of(self._run)})
        yield DONE

    def _chunk(
        self, index: int, delta: dict[str, Any], *, reason: str | None = None, logprobs: Any = None
    ) -> str:
        choice = {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": reason}
        content = {**self._head("chat.completion.chunk"), "choices": [choice]}
        if self._request.stream_options is not None and self._request.stream_options.include_usage:
            content["usage"] = None
        return event(content)

    def _head(self, kind: str) -> dict[str, Any]:
        return {
            "id": self.id,
            "object": kind,
            "created": self._created,
            "model": self._partner.name,
            "system_fingerprint": None,
        }


@dataclass
class _Choice:
    """One reply as far as it has come."""

    wish: ChatWish
    partner: Partner
    text: str = ""  # all of it
    shown: int = 0  # characters that were given out
    probabilities: list[TokenProbability] = field(default_factory=list)
    fresh: list[TokenProbability] = field(default_factory=list)  # that were not given out yet
    calls: list[Any] = field(default_factory=list)
    reason: str = ""

    def take(self, piece: Piece) -> tuple[str, list[TokenProbability]]:
        """What of the reply can be given out now."""
        self.text += piece.text
        if piece.probability is not None:
            self.probabilities.append(piece.probability)
            self.fresh.append(piece.probability)
        return self._show(self._certain()), self.news()

    def news(self) -> list[TokenProbability]:
        """Probabilities that were not given out yet."""
        found, self.fresh = self.fresh, []
        return found

    def _certain(self) -> int:
        """The characters that are certainly text, and no call of a tool."""
        return len(self.text) if self.wish.tools is None else self.wish.tools.begins_in(self.text)

    def _show(self, until: int) -> str:
        text = self.text[self.shown : until]
        self.shown = max(self.shown, until)
        return text

    def end(self, ended: Ended) -> str:
        """The reply is whole; gives what was held back of its text."""
        self.reason = ended.reason
        if self.wish.tools is not None:
            text, self.calls = self.wish.tools.read(self.text)
            if self.calls:
                self.text = text
                self.reason = "tool_calls" if ended.reason == "stop" else ended.reason
        return self._show(len(self.text))

    def logprobs(self, probabilities: list[TokenProbability]) -> dict[str, Any] | None:
        """In OpenAI's form; None where nobody asked."""
        if self.wish.wish.sampling.logprobs is None:
            return None
        return {"content": [self._probability(one) for one in probabilities], "refusal": None}

    def _probability(self, one: TokenProbability) -> dict[str, Any]:
        top = [self._token(token, logprob) for token, logprob in one.top]
        return {**self._token(one.token, one.logprob), "top_logprobs": top}

    def _token(self, token: int, logprob: float) -> dict[str, Any]:
        raw = self.partner.vocabulary.bytes_of(token)
        text = raw.decode("utf-8", "replace")
        return {"token": text, "logprob": max(logprob, -9999.0), "bytes": list(raw)}

    def to_dict(self, index: int) -> dict[str, Any]:
        """The whole reply."""
        message: dict[str, Any] = {"role": "assistant", "content": self.text, "refusal": None}
        if self.calls:
            message["content"] = self.text or None
            message["tool_calls"] = [call.to_dict() for call in self.calls]
        return {
            "index": index,
            "message": message,
            "logprobs": self.logprobs(self.probabilities),
            "finish_reason": self.reason,
        }
