"""From what a request says to what is to be computed.

Invariant: everything is checked here, before anything is computed; whoever reads a `Wish` need not look at the
request.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from corolla.api.failures import too_long, unsupported, wrong
from corolla.api.generation import Wish
from corolla.api.grammar import json_grammar
from corolla.api.partners import Partner
from corolla.api.prompting import plain_arguments
from corolla.api.reading import TextReader
from corolla.api.requests import (
    MOST_REPLIES,
    ChatRequest,
    CompletionRequest,
    ContentPart,
    JsonObjectFormat,
    JsonSchemaFormat,
    Message,
    NamedTool,
    Open,
    ResponseFormat,
    Sampled,
    check_supported,
)
from corolla.api.sampling import Sampling
from corolla.api.tools import ToolFormat
from corolla.text import one_line, well_formed

USUAL_MAX_TOKENS = 16  # of a completion, as OpenAI has it
CONTEXT_BEFORE = 8  # tokens of a prompt that say whether a reply's text begins with a space
ROLES = {"developer": "system"}
JSON_OBJECT = {"type": "object"}


@dataclass(frozen=True)
class ChatWish:
    """A chat's next reply; `tools` is the form of its calls, if it may call some."""

    wish: Wish
    tools: ToolFormat | None = None


def chat_wish(request: ChatRequest, partner: Partner, user: str) -> ChatWish:
    """Raises `ApiFailure`, `DataError`."""
    check_supported(request)
    if request.top_logprobs is not None and not request.logprobs:
        raise wrong("top_logprobs needs logprobs to be true.", "top_logprobs")
    check_stream(request)
    messages = [plain(message, index) for index, message in enumerate(request.messages)]
    _check_answered(request.messages)
    tools = _tools(request)
    ids = partner.prompting.chat_ids(messages, tools)
    form = None
    if tools:
        form = partner.prompting.tool_format
        if form is None:
            raise unsupported("tools", "this model's chat template does not say how a tool is called")
    grammar = _grammar(request, partner, tools, form)
    renderer = partner.prompting.renderer
    ends = partner.chat_ends
    stops = [*_stops(request), *([renderer.stop_text] if renderer.stop_text else [])]
    tail = ""
    if not renderer.stop_text and len(renderer.stop_ids) > 1:
        tail = partner.tokenizer.decode(renderer.stop_ids[:-1], skip_special_tokens=True)
    reader = partial(
        TextReader, partner.tokenizer, ends=ends, stops=stops, tail=tail, special=form is not None
    )
    top = (request.top_logprobs or 0) if request.logprobs else None
    wish = Wish(
        user=user,
        partner=partner,
        ids=ids,
        max_tokens=_room(
            partner, ids, _chat_limit(request), partner.sampling.get("max_new_tokens"), "messages"
        ),
        sampling=sampling_of(request, partner, top),
        reader=reader,
        count=request.n or 1,
        matcher=None if grammar is None else partial(partner.vocabulary.matcher, grammar, ends),
    )
    return ChatWish(wish, form)


def _chat_limit(request: ChatRequest) -> int | None:
    one, other = request.max_completion_tokens, request.max_tokens
    if one is not None and other is not None and one != other:
        raise wrong("Give max_completion_tokens or max_tokens, which is its older name.", "max_tokens")
    return other if one is None else one


def plain(message: Message, index: int) -> dict[str, Any]:
    """A message as chat templates take it. Raises `ApiFailure`."""
    place = f"messages[{index}]"
    found: dict[str, Any] = {
        "role": ROLES.get(message.role, message.role),
        "content": text_of(message.content, place),
    }
    if message.content is None and not message.tool_calls:
        raise wrong(f"{place} has no content.", f"{place}.content")
    _check_known(message, place, "a message has a role, content, a name and tool calls here")
    if message.name:
        found["name"] = well_formed(message.name)
    for call in message.tool_calls or ():
        _check_known(call, f"{place}.tool_calls", "a call has an id and a function here", "index")
        _check_known(call.function, f"{place}.tool_calls", "a function has a name and arguments here")
    if message.tool_calls:
        if message.role != "assistant":
            raise wrong("Only the assistant calls tools.", f"{place}.tool_calls")
        found["tool_calls"] = [
            {
                "id": call.id,
                "type": "function",
                "function": {
                    "name": call.function.name,
                    "arguments": plain_arguments(call.function.arguments, f"{place}.tool_calls"),
                },
            }
            for call in message.tool_calls
        ]
    if message.role == "tool":
        if not message.tool_call_id:
            raise wrong("A tool's message needs tool_call_id.", f"{place}.tool_call_id")
        found["tool_call_id"] = message.tool_call_id
    elif message.tool_call_id:
        raise wrong("Only a tool's message has tool_call_id.", f"{place}.tool_call_id")
    return found


def _check_answered(messages: Sequence[Message]) -> None:
    """Raises `ApiFailure` where a tool answers a call that nobody made: templates would not say so."""
    called: set[str] = set()
    for index, message in enumerate(messages):
        called |= {call.id for call in message.tool_calls or ()}
        if message.role == "tool" and message.tool_call_id not in called:
            place = f"messages[{index}].tool_call_id"
            raise wrong(f"{place} is that of no call of a tool before it.", place)


def _check_known(one: Open, place: str, why: str, *harmless: str) -> None:
    """Raises `ApiFailure` where something is said that would be passed over."""
    said = {key for key, value in (one.model_extra or {}).items() if value not in (None, [], {})}
    if said - set(harmless):
        raise unsupported(f"{place}.{one_line(min(said - set(harmless)))}", why)


def text_of(content: str | Sequence[ContentPart] | None, place: str) -> str:
    """The text of a message's content. Raises `ApiFailure` for anything but text."""
    if content is None:
        return ""
    if isinstance(content, str):
        return well_formed(content)
    texts = []
    for part in content:
        if part.type not in ("text", "input_text", "output_text") or part.text is None:
            raise unsupported(
                f"{place}.content", f"the model reads texts only, and no part of type {part.type}"
            )
        _check_known(part, f"{place}.content", "a part is a text here")
        texts.append(part.text)
    return well_formed("".join(texts))


def _tools(request: ChatRequest) -> list[dict[str, Any]] | None:
    """The tools that may be called, as templates take them."""
    if not request.tools:
        if request.tool_choice not in (None, "none", "auto"):
            raise wrong("tool_choice needs tools to choose among.", "tool_choice")
        return None
    if request.tool_choice == "none":
        return None
    if request.response_format is not None and request.response_format.type != "text":
        raise unsupported("response_format", "a reply that may call tools has no other form")
    names = [tool.function.name for tool in request.tools]
    if len(set(names)) != len(names):
        raise wrong("Two tools have the same name.", "tools")
    if isinstance(request.tool_choice, NamedTool) and request.tool_choice.function.name not in names:
        raise wrong(f"There is no tool {request.tool_choice.function.name} to choose.", "tool_choice")
    return [tool.model_dump(exclude_none=True) for tool in request.tools]


def _grammar(
    request: ChatRequest, partner: Partner, tools: list[dict[str, Any]] | None, form: ToolFormat | None
) -> str | None:
    if tools is None or form is None:
        return format_grammar(request.response_format, partner)
    choice = request.tool_choice
    if isinstance(choice, NamedTool):
        tools = [tool for tool in tools if tool["function"]["name"] == choice.function.name]
    grammar = form.grammar(
        tools,
        must=choice not in (None, "auto"),
        several=request.parallel_tool_calls is not False and not isinstance(choice, NamedTool),
        special=partner.prompting.special,
    )
    return partner.vocabulary.checked(grammar, "tools")


def format_grammar(wanted: ResponseFormat | None, partner: Partner) -> str | None:
    """The grammar of a response format; None where any text will do."""
    if isinstance(wanted, JsonObjectFormat):
        return json_grammar(JSON_OBJECT)
    if isinstance(wanted, JsonSchemaFormat):
        schema = wanted.json_schema.schema_
        return partner.vocabulary.checked(
            json_grammar(JSON_OBJECT if schema is None else schema), "response_format"
        )
    return None


def completion_wishes(request: CompletionRequest, partner: Partner, user: str) -> list[tuple[Wish, str]]:
    """What is to come behind each prompt, and the prompt's text. Raises `ApiFailure`."""
    if request.best_of == request.n and type(request.best_of) is int:  # all of them are the best ones
        request = request.model_copy(update={"best_of": None})
    check_supported(request)
    check_stream(request)
    prompts = [_prompt(one, partner) for one in _each(request.prompt)]
    if len(prompts) * (request.n or 1) > 8 * MOST_REPLIES:
        raise wrong(f"At most {8 * MOST_REPLIES} replies can be asked for at once.", "n")
    if request.max_tokens == 0 and not request.echo:
        raise wrong("max_tokens is 0, which needs echo to be true.", "max_tokens")
    usual = partner.sampling.get("max_new_tokens", USUAL_MAX_TOKENS)
    found = []
    for ids, text in prompts:
        reader = partial(
            TextReader,
            partner.tokenizer,
            ends=partner.text_ends,
            stops=_stops(request),
            before=ids[-CONTEXT_BEFORE:],
        )
        wish = Wish(
            user=user,
            partner=partner,
            ids=ids,
            max_tokens=_room(partner, ids, request.max_tokens, usual, "prompt"),
            sampling=sampling_of(request, partner, request.logprobs),
            reader=reader,
            count=request.n or 1,
            score=request.logprobs if request.echo else None,
        )
        found.append((wish, text))
    return found


def _each(prompt: Any) -> list[Any]:
    if isinstance(prompt, str) or isinstance(prompt[0], int):
        return [prompt]
    return list(prompt)


def _prompt(prompt: str | Sequence[int], partner: Partner) -> tuple[list[int], str]:
    """A prompt's tokens and text."""
    rows = int(partner.model.config.get_text_config().vocab_size)
    if isinstance(prompt, str):
        text = well_formed(prompt)
        ids = partner.prompting.text_ids(text)
        if not ids:
            first = partner.tokenizer.bos_token_id
            if first is None:
                raise wrong("The prompt is empty, and this model has no token to begin with.", "prompt")
            ids = [first]
    else:
        ids = list(prompt)
        beyond = max(ids) if max(ids) >= rows else None
        if beyond is not None:
            raise wrong(f"The prompt has token {beyond}, and this model has {rows}.", "prompt")
        text = str(partner.tokenizer.decode(ids, clean_up_tokenization_spaces=False))
    return ids, text


def _room(partner: Partner, ids: Sequence[int], wanted: int | None, usual: int | None, param: str) -> int:
    """How many tokens the reply may have. Raises `ApiFailure`, which names `param`, where it does not fit."""
    left = partner.max_context - len(ids)
    if left < (1 if wanted is None else wanted):
        raise too_long(len(ids), partner.max_context, wanted, param)
    return min(left, usual) if wanted is None and usual else left if wanted is None else wanted


def sampling_of(request: Sampled, partner: Partner, logprobs: int | None) -> Sampling:
    """What a request says, and where it says nothing, what its bundle does. Raises `ApiFailure`."""
    own: Mapping[str, Any] = partner.sampling

    def said(name: str, usual: Any) -> Any:
        value = getattr(request, name)
        return own.get(name, usual) if value is None else value

    rows = int(partner.model.config.get_text_config().vocab_size)
    bias = {int(token): value for token, value in (request.logit_bias or {}).items()}
    if any(token >= rows for token in bias):
        raise wrong(f"logit_bias names token {max(bias)}, and this model has {rows}.", "logit_bias")
    return Sampling(
        temperature=float(said("temperature", 1.0)),
        top_p=float(said("top_p", 1.0)),
        top_k=max(0, int(said("top_k", 0))),
        min_p=float(request.min_p or 0.0),
        seed=said("seed", None),
        frequency_penalty=request.frequency_penalty or 0.0,
        presence_penalty=request.presence_penalty or 0.0,
        repetition_penalty=said("repetition_penalty", None),
        logit_bias=bias,
        logprobs=logprobs,
    )


def _stops(request: Sampled) -> list[str]:
    stop = request.stop
    return [] if stop is None else [stop] if isinstance(stop, str) else list(stop)


def check_stream(request: Sampled) -> None:
    """Raises `ApiFailure` for what is said of a stream where none is asked for."""
    if request.stream_options is not None and not request.stream:
        raise wrong("stream_options is for streams.", "stream_options")
