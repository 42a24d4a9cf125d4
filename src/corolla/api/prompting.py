"""Messages as the tokens that a model reads before its reply.

Invariant: a pure function of the request: the tokens that the tokenizer's chat template gives for the messages and
tools (for a bundle, as it was trained), whatever was said here before. What a template leaves out is refused.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

from corolla.api.failures import unsupported, wrong
from corolla.api.tools import ToolFormat
from corolla.data.conversation import Turn
from corolla.data.cuts import ids_of
from corolla.data.render import Renderer
from corolla.data.styles import TemplateStyle
from corolla.json_files import JsonError, parse_object
from corolla.text import one_line


class Prompting:
    """For one tokenizer and one way to write conversations down. For any thread."""

    def __init__(self, renderer: Renderer, *, tuned: bool = False) -> None:
        """`tuned`: a prompt was trained on conversations rendered so, in which texts have no white space around."""
        self.renderer = renderer
        self._tuned = tuned
        self._lock = threading.Lock()  # tokenizers are not made for several threads at once

    @property
    def by_template(self) -> bool:
        """Whether the tokenizer's chat template writes conversations down."""
        return isinstance(self.renderer.style, TemplateStyle)

    @cached_property
    def tool_format(self) -> ToolFormat | None:
        """How the template writes calls of tools; None where it does not."""
        return ToolFormat.learn(self._rendered) if self.by_template else None

    @cached_property
    def special(self) -> dict[str, int]:
        """Special tokens by their text."""
        known = self.renderer.tokenizer.added_tokens_decoder.items()
        return {str(token.content): int(number) for number, token in known if token.special}

    def chat_ids(
        self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]] | None
    ) -> list[int]:
        """All that the model reads before its reply. Raises `ApiFailure`, `DataError`."""
        if not self.by_template:
            return self._delimited(messages, tools)
        try:
            text = self._rendered(messages, tools, True)
        except RecursionError as error:
            raise wrong("The tools' parameters are nested too deeply.", "tools") from error
        except Exception as error:  # templates raise what their authors wrote
            raise wrong(
                f"The model's chat template refuses these messages: {one_line(error, characters=200)}",
                "messages",
            ) from error
        if tools and not all(tool["function"]["name"] in text for tool in tools):
            raise unsupported("tools", "this model's chat template does not tell it of tools")
        return self.text_ids(text, special=False)

    def text_ids(self, text: str, *, special: bool = True) -> list[int]:
        """A text's tokens; with `special`, those that the tokenizer puts around it too."""
        tokenizer = self.renderer.tokenizer
        with self._lock:
            if not special:
                return ids_of(tokenizer, text)
            ids: list[int] = tokenizer(text, verbose=False).input_ids
            return ids

    def _delimited(
        self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]] | None
    ) -> list[int]:
        if tools:
            raise unsupported("tools", "this model's conversations are written down without a chat template")
        for message in messages:
            if message.get("name"):
                raise unsupported("messages.name", "without a chat template nobody has a name")
        turns = [Turn(message["role"], str(message["content"]), more=_more(message)) for message in messages]
        with self._lock:
            return self.renderer.prompt_ids(turns)

    def _rendered(
        self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Any] | None, reply: bool
    ) -> str:
        if self._tuned:
            messages = [{**one, "content": str(one["content"]).strip()} for one in messages]
        text: str = self.renderer.tokenizer.apply_chat_template(
            list(messages), tools=list(tools) if tools else None, tokenize=False, add_generation_prompt=reply
        )
        return text


def _more(message: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in message.items() if key not in ("role", "content")}


def plain_arguments(text: str, param: str) -> dict[str, Any]:
    """A call's arguments, which OpenAI writes as JSON in a text, as templates take them. Raises `ApiFailure`."""
    try:
        return parse_object(text) if text else {}
    except JsonError as error:
        raise wrong(f"{param} {error}.", param) from error
