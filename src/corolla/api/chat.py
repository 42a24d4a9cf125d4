"""`/v1/chat/completions`: replies in OpenAI's form, whole or as they come."""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncGenerator, Callable
from dataclasses import dataclass, field, replace
from typing import Any

from corolla.api.generation import Ended, Piece, Run, Wish
from corolla.api.partners import Partner
from corolla.api.requests import ChatRequest, Sampled
from corolla.api.sampling import TokenProbability
from corolla.api.streaming import DONE, Answer, event, failed
from corolla.api.tools import ToolCall
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


def tells_usage(request: Sampled) -> bool:
    """Whether a stream ends with its usage."""
    options = request.stream_options
    return options is not None and bool(options.include_usage)


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
                for delta in choice.call_news():
                    yield self._chunk(one.index, {"tool_calls": [delta]})
            elif isinstance(one, Ended):
                choice = self._choices[one.index]
                rest = choice.end(one)
                if rest or choice.fresh:
                    yield self._chunk(one.index, {"content": rest}, logprobs=choice.logprobs(choice.news()))
                for delta in choice.call_news():
                    yield self._chunk(one.index, {"tool_calls": [delta]})
                yield self._chunk(one.index, {}, reason=choice.reason)
        if tells_usage(self._request):
            yield event({**self._head("chat.completion.chunk"), "choices": [], "usage": usage_of(self._run)})
        yield DONE

    def _chunk(
        self, index: int, delta: dict[str, Any], *, reason: str | None = None, logprobs: Any = None
    ) -> str:
        choice = {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": reason}
        content = {**self._head("chat.completion.chunk"), "choices": [choice]}
        if tells_usage(self._request):
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
    calls: list[ToolCall] = field(default_factory=list)  # as far as they were given out
    reason: str = ""

    def take(self, piece: Piece) -> tuple[str, list[TokenProbability]]:
        """What of the reply can be given out now."""
        self.text += piece.text
        self.probabilities += piece.probabilities
        self.fresh += piece.probabilities
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
        until = len(self.text)
        if self.wish.tools is not None:
            text, calls = self.wish.tools.read(self.text)
            until = len(text)
            if calls and ended.reason == "stop":
                self.reason = "tool_calls"
        return self._show(until)

    def call_news(self) -> list[dict[str, Any]]:
        """What was not given out yet of the calls of tools, in OpenAI's form."""
        tools, found = self.wish.tools, list[dict[str, Any]]()
        if tools is None or tools.begins_in(self.text) == len(self.text):
            return found
        for number, call in enumerate(tools.read(self.text)[1]):
            if number == len(self.calls):
                self.calls.append(replace(call, arguments=""))
                found.append({"index": number, **self.calls[number].to_dict()})
            known = self.calls[number]
            if more := call.arguments[len(known.arguments) :]:
                self.calls[number] = replace(known, arguments=call.arguments)
                found.append({"index": number, "function": {"arguments": more}})
        return found

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
        self.call_news()
        text = self.text[: self.shown]
        message: dict[str, Any] = {"role": "assistant", "content": text, "refusal": None}
        if self.calls:
            message["content"] = text or None
            message["tool_calls"] = [call.to_dict() for call in self.calls]
        return {
            "index": index,
            "message": message,
            "logprobs": self.logprobs(self.probabilities),
            "finish_reason": self.reason,
        }
