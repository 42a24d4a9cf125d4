"""`/v1/responses`, as far as text goes: one reply to messages, in the form of OpenAI's newer interface."""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncGenerator, Callable
from typing import Annotated, Any, Literal

from pydantic import Field

from corolla.api.chat import ChatAnswer, usage_of
from corolla.api.failures import ApiFailure, unsupported, wrong
from corolla.api.generation import Ended, Piece, Run, Wish
from corolla.api.partners import Partner
from corolla.api.requests import (
    MOST_MESSAGES,
    MOST_TOKENS,
    WHOLE,
    ChatRequest,
    Content,
    FunctionName,
    JsonObjectFormat,
    JsonSchema,
    JsonSchemaFormat,
    Message,
    Open,
    Refusals,
    Sampled,
    Strict,
    TextFormat,
    check_supported,
)
from corolla.api.streaming import Answer, event
from corolla.api.wishes import ChatWish, chat_wish, check_stream, text_of


class InputMessage(Open):
    """A message of the conversation so far."""

    type: Literal["message"] | None = None
    role: Literal["system", "developer", "user", "assistant"]
    content: Content


class NamedSchema(Strict):
    """JSON of a schema."""

    type: Literal["json_schema"]
    name: FunctionName
    schema_: Annotated[dict[str, Any], Field(alias="schema")]
    description: str | None = None
    strict: bool | None = None


class TextConfig(Strict):
    """The form of the reply."""

    format: Annotated[TextFormat | JsonObjectFormat | NamedSchema, Field(discriminator="type")] | None = None
    verbosity: Any = None


class ResponsesRequest(Sampled):
    """`POST /v1/responses`."""

    input: str | Annotated[list[InputMessage], Field(min_length=1, max_length=MOST_MESSAGES)]
    instructions: str | None = None
    max_output_tokens: Annotated[int, Field(ge=1, le=MOST_TOKENS), WHOLE] | None = None
    text: TextConfig | None = None
    # What asks for nothing, or is refused.
    background: Any = None
    conversation: Any = None
    include: Any = None
    max_tool_calls: Any = None
    metadata: Any = None
    parallel_tool_calls: bool | None = None
    previous_response_id: Any = None
    prompt: Any = None
    reasoning: Any = None
    service_tier: Any = None
    store: Any = None
    tool_choice: Any = None
    tools: Any = None
    top_logprobs: Any = None
    truncation: Any = None


_REFUSED: Refusals = {
    "background": ((None, False), "a reply is given to who waits for it"),
    "conversation": ((None,), "nothing is stored here: send all messages"),
    "include": ((None, []), "there is nothing to include"),
    "max_tool_calls": ((None,), "tools are for /v1/chat/completions here"),
    "metadata": ((None, {}), "nothing is stored here"),
    "n": ((None, 1), "one reply is given here; /v1/chat/completions gives more"),
    "parallel_tool_calls": ((None, True), "tools are for /v1/chat/completions here"),
    "previous_response_id": ((None,), "nothing is stored here: send all messages"),
    "prompt": ((None,), "prompts are not stored here"),
    "reasoning": (
        (None, {}, {"effort": None}, {"effort": "none"}),
        "the model thinks as its chat template has it",
    ),
    "service_tier": ((None, "auto", "default"), "there is one tier"),
    "store": ((None, False), "nothing is stored here: give false"),
    "tool_choice": ((None, "auto", "none"), "tools are for /v1/chat/completions here"),
    "tools": ((None, []), "tools are for /v1/chat/completions here"),
    "top_logprobs": ((None, 0), "probabilities are for /v1/chat/completions here"),
    "truncation": ((None, "disabled"), "what is too long is refused"),
}


def as_chat(request: ResponsesRequest) -> ChatRequest:
    """The same as a request for a chat. Raises `ApiFailure` for what is not done here."""
    check_supported(request, _REFUSED)
    check_stream(request)
    if request.stream_options is not None and request.stream_options.include_usage is not None:
        raise unsupported("stream_options.include_usage", "a response always says its usage")
    if request.text is not None and request.text.verbosity not in (None, "medium"):
        raise unsupported("text.verbosity", "say in a message how long the reply should be")
    messages = []
    if request.instructions:
        messages.append(Message(role="system", content=request.instructions))
    if isinstance(request.input, str):
        messages.append(Message(role="user", content=request.input))
    else:
        for index, one in enumerate(request.input):
            if one.model_extra and set(one.model_extra) - {"id", "status", "phase"}:
                raise unsupported(f"input[{index}]", "an item is a message with a role and content here")
            text_of(one.content, f"input[{index}]")
            messages.append(Message(role=one.role, content=one.content))
    shared = {name: getattr(request, name) for name in Sampled.model_fields}
    if len(messages) > MOST_MESSAGES:
        raise wrong(f"At most {MOST_MESSAGES} messages can be sent, the instructions included.", "input")
    return ChatRequest(
        **{**shared, "n": None, "stream_options": None},
        messages=messages,
        max_completion_tokens=request.max_output_tokens,
        response_format=_format(request.text),
    )


def _format(text: TextConfig | None) -> Any:
    if text is None or text.format is None:
        return None
    if isinstance(text.format, NamedSchema):
        about = JsonSchema(name=text.format.name, schema=text.format.schema_)  # type: ignore[call-arg]
        return JsonSchemaFormat(type="json_schema", json_schema=about)
    return text.format


def ask_responses(
    request: ResponsesRequest, partner: Partner, user: str
) -> tuple[list[Wish], Callable[[Run], Answer]]:
    """What is to be computed, and the answer from it. Raises `ApiFailure`."""
    chat = as_chat(request)
    try:
        wish = chat_wish(chat, partner, user)
    except ApiFailure as error:
        if error.param == "messages":  # as the chat has it
            error.param = "input"
        raise
    return [wish.wish], lambda run: ResponsesAnswer(request, chat, wish, run)


class ResponsesAnswer:
    """The answer to one request."""

    def __init__(self, request: ResponsesRequest, chat: ChatRequest, wish: ChatWish, run: Run) -> None:
        self.id, self._item = f"resp_{uuid.uuid4().hex}", f"msg_{uuid.uuid4().hex}"
        self._request, self._run = request, run
        self._chat = ChatAnswer(chat, wish, run)
        self._partner, self._sampling = wish.wish.partner, wish.wish.sampling
        self._created = int(time.time())
        self._told = 0  # events

    async def whole(self) -> dict[str, Any]:
        """All of it."""
        choice = (await self._chat.whole())["choices"][0]
        return self._response(choice["message"]["content"], choice["finish_reason"])

    async def events(self) -> AsyncGenerator[str]:
        """As it comes."""
        told = self._event
        place = {"item_id": self._item, "output_index": 0, "content_index": 0}
        text, reason, begun = "", "stop", False
        async for one in self._run.events():
            if not begun:  # what cannot be computed at all has an answer with a status of its own
                begun = True
                yield told("response.created", response=self._response("", None))
                yield told("response.in_progress", response=self._response("", None))
                empty = {**self._message("", "in_progress"), "content": []}
                yield told("response.output_item.added", output_index=0, item=empty)
                yield told("response.content_part.added", **place, part=_part(""))
            if isinstance(one, Piece) and one.text:
                text += one.text
                yield told("response.output_text.delta", **place, delta=one.text, logprobs=[])
            elif isinstance(one, Ended):
                reason = one.reason
        yield told("response.output_text.done", **place, text=text, logprobs=[])
        yield told("response.content_part.done", **place, part=_part(text))
        response = self._response(text, reason)
        yield told("response.output_item.done", output_index=0, item=response["output"][0])
        kind = "response.completed" if reason == "stop" else "response.incomplete"
        yield told(kind, response=response)

    def failed(self, found: ApiFailure) -> str:
        """What goes wrong on the way, as an event."""
        return self._event("error", code=found.code, message=str(found), param=found.param)

    def _event(self, kind: str, **about: Any) -> str:
        self._told += 1
        return event({"type": kind, "sequence_number": self._told - 1, **about}, kind)

    def _message(self, text: str, status: str) -> dict[str, Any]:
        about = {"id": self._item, "type": "message", "role": "assistant", "status": status}
        return {**about, "content": [_part(text)]}

    def _response(self, text: str, reason: str | None) -> dict[str, Any]:
        status = {None: "in_progress", "stop": "completed", "length": "incomplete"}[reason]
        usage = usage_of(self._run)
        request = self._request
        return {
            "id": self.id,
            "object": "response",
            "created_at": self._created,
            "status": status,
            "error": None,
            "incomplete_details": {"reason": "max_output_tokens"} if status == "incomplete" else None,
            "instructions": request.instructions,
            "max_output_tokens": request.max_output_tokens,
            "model": self._partner.name,
            "output": [] if reason is None else [self._message(text, status)],
            "parallel_tool_calls": True,
            "previous_response_id": None,
            "reasoning": {"effort": None, "summary": None},
            "store": False,
            "temperature": self._sampling.temperature,
            "text": {"format": {"type": "text"}}
            if request.text is None
            else request.text.model_dump(by_alias=True),
            "tool_choice": "auto",
            "tools": [],
            "top_p": self._sampling.top_p,
            "truncation": "disabled",
            "usage": None
            if reason is None
            else {
                "input_tokens": usage["prompt_tokens"],
                "input_tokens_details": usage["prompt_tokens_details"],
                "output_tokens": usage["completion_tokens"],
                "output_tokens_details": {"reasoning_tokens": 0},
                "total_tokens": usage["total_tokens"],
            },
            "metadata": {},
        }


def _part(text: str) -> dict[str, Any]:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}
