"""What clients may ask for, as OpenAI's documentation has it; what is out of bounds is refused here.

Invariant: a parameter is carried out, or refused, or (`harmless`) asks for what is done anyway; one that nobody knows
is refused. See docs/api.md for the table.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, StringConstraints

from corolla.api.failures import unsupported
from corolla.chat.sampling import LEAST

MOST_MESSAGES = 2048
MOST_REPLIES = 32
MOST_TOOLS = 128
MOST_STOPS = 16
MOST_PROMPTS = 256
MOST_TOKENS = 2**31 - 1  # far more than any model reads
MOST_SEED = 9_223_372_036_854_776_000  # as OpenAI writes 64 bits


def _whole(value: Any) -> Any:
    """A whole number as such: to JSON 2.0 is one, and so some languages write all their numbers."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


WHOLE = BeforeValidator(_whole)
Probability = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]
Penalty = Annotated[float, Field(ge=-2, le=2, allow_inf_nan=False)]
Bias = Annotated[float, Field(ge=-100, le=100, allow_inf_nan=False)]
Stop = Annotated[str, StringConstraints(min_length=1, max_length=1000)]
TokenId = Annotated[int, Field(ge=0, le=MOST_TOKENS), WHOLE]
TokenName = Annotated[str, StringConstraints(pattern=r"^[0-9]{1,18}$")]
# Pydantic itself does not say of the pattern that other names are refused.
Biases = Annotated[dict[TokenName, Bias], Field(json_schema_extra={"additionalProperties": False})]
FunctionName = Annotated[str, StringConstraints(pattern=r"^[a-zA-Z0-9_-]{1,64}$")]


class Strict(BaseModel):
    """Numbers are no texts here, and nothing unknown passes."""

    model_config = ConfigDict(extra="forbid", strict=True)


class Open(BaseModel):
    """A part that may say more than is looked at."""

    model_config = ConfigDict(extra="allow", strict=True)


class ContentPart(Open):
    """A part of a message; only texts are read."""

    type: str
    text: str | None = None


Content = str | Annotated[list[ContentPart], Field(min_length=1)]


class CalledFunction(Open):
    """What a call in the history names."""

    name: FunctionName
    arguments: str = ""


class Call(Open):
    """A call of a tool in the history."""

    id: str = ""
    type: Literal["function"] = "function"
    function: CalledFunction


class Message(Open):
    """One of the conversation so far."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Content | None = None
    name: Annotated[str, StringConstraints(max_length=256)] | None = None
    tool_calls: list[Call] | None = None
    tool_call_id: str | None = None


class Function(Strict):
    """A function that the model may call."""

    name: FunctionName
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(Strict):
    """A tool that the model may call."""

    type: Literal["function"]
    function: Function


class NamedFunction(Strict):
    """By its name."""

    name: FunctionName


class NamedTool(Strict):
    """The one tool to be called."""

    type: Literal["function"]
    function: NamedFunction


class JsonSchema(Strict):
    """A form for replies."""

    name: FunctionName
    description: str | None = None
    schema_: Annotated[dict[str, Any] | None, Field(alias="schema")] = None
    strict: bool | None = None


class TextFormat(Strict):
    """Any text."""

    type: Literal["text"]


class JsonObjectFormat(Strict):
    """Any JSON object."""

    type: Literal["json_object"]


class JsonSchemaFormat(Strict):
    """JSON of a schema."""

    type: Literal["json_schema"]
    json_schema: JsonSchema


ResponseFormat = Annotated[TextFormat | JsonObjectFormat | JsonSchemaFormat, Field(discriminator="type")]


class StreamOptions(Strict):
    """What a stream has besides text."""

    include_usage: bool | None = None
    include_obfuscation: bool | None = None


class Sampled(Strict):
    """What all requests say of how tokens are chosen; what they leave out is the bundle's, or OpenAI's default."""

    model: Annotated[str, StringConstraints(min_length=1, max_length=1000)]
    temperature: Annotated[float, Field(ge=0, le=2, allow_inf_nan=False)] | None = None
    top_p: Probability | None = None
    top_k: Annotated[int, Field(ge=-1, le=MOST_TOKENS), WHOLE] | None = None
    min_p: Probability | None = None
    seed: Annotated[int, Field(ge=-MOST_SEED, le=MOST_SEED), WHOLE] | None = None
    frequency_penalty: Penalty | None = None
    presence_penalty: Penalty | None = None
    repetition_penalty: Annotated[float, Field(ge=LEAST, le=10, allow_inf_nan=False)] | None = None
    logit_bias: Biases | None = None
    stop: Stop | Annotated[list[Stop], Field(max_length=MOST_STOPS)] | None = None
    n: Annotated[int, Field(ge=1, le=MOST_REPLIES), WHOLE] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    # They ask for nothing here.
    prompt_cache_key: str | None = None
    prompt_cache_retention: Literal["in-memory", "in_memory", "24h"] | None = None
    safety_identifier: str | None = None
    user: str | None = None


class ChatRequest(Sampled):
    """`POST /v1/chat/completions`."""

    messages: Annotated[list[Message], Field(min_length=1, max_length=MOST_MESSAGES)]
    max_tokens: Annotated[int, Field(ge=1, le=MOST_TOKENS), WHOLE] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1, le=MOST_TOKENS), WHOLE] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20), WHOLE] | None = None
    response_format: ResponseFormat | None = None
    tools: Annotated[list[Tool], Field(max_length=MOST_TOOLS)] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    parallel_tool_calls: bool | None = None
    # What asks for nothing, or is refused.
    audio: Any = None
    function_call: Any = None
    functions: Any = None
    metadata: Any = None
    modalities: Any = None
    moderation: Any = None
    prediction: Any = None
    prompt_cache_options: Any = None
    reasoning_effort: Any = None
    service_tier: Any = None
    store: Any = None
    verbosity: Any = None
    web_search_options: Any = None


class CompletionRequest(Sampled):
    """`POST /v1/completions`."""

    prompt: (
        str
        | Annotated[list[str], Field(min_length=1, max_length=MOST_PROMPTS)]
        | Annotated[list[TokenId], Field(min_length=1)]
        | Annotated[
            list[Annotated[list[TokenId], Field(min_length=1)]], Field(min_length=1, max_length=MOST_PROMPTS)
        ]
    )
    max_tokens: Annotated[int, Field(ge=0, le=MOST_TOKENS), WHOLE] | None = None
    logprobs: Annotated[int, Field(ge=0, le=20), WHOLE] | None = None
    echo: bool | None = None
    best_of: Any = None
    suffix: Any = None


# By name: the values that ask for nothing special, and why others are refused.
_NOTHING: tuple[Any, ...] = (None,)
Refusals = dict[str, tuple[tuple[Any, ...], str]]
_REFUSED: Refusals = {
    "audio": (_NOTHING, "the model says texts only"),
    "best_of": ((None, 1), "as many replies are computed as n says, and given"),
    "function_call": ((None, "none", "auto"), "it has become tool_choice"),
    "functions": ((None, []), "they have become tools"),
    "metadata": ((None, {}), "nothing is stored here"),
    "modalities": ((None, ["text"]), "the model says texts only"),
    "moderation": (_NOTHING, "nobody moderates here"),
    "prediction": (_NOTHING, "replies are not predicted"),
    "prompt_cache_options": (_NOTHING, "what is kept is decided here"),
    "reasoning_effort": ((None, "none"), "the model thinks as its chat template has it"),
    "service_tier": ((None, "auto", "default"), "there is one tier"),
    "store": ((None, False), "nothing is stored here"),
    "suffix": ((None, ""), "text is only put behind the prompt"),
    "verbosity": ((None, "medium"), "say in a message how long the reply should be"),
    "web_search_options": (_NOTHING, "the model searches nothing"),
}


def check_supported(request: BaseModel, refusals: Refusals = _REFUSED) -> None:
    """Raises `ApiFailure` for a parameter that asks for what is not done here."""
    for name, (harmless, why) in refusals.items():
        value = getattr(request, name, None)
        if not any(value is one or (type(value) is type(one) and value == one) for one in harmless):
            raise unsupported(name, why)
