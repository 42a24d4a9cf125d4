"""Replies of a given form: JSON, JSON of a schema, calls of tools; by llguidance, at the client's own head.

Invariant: a grammar that exists has been checked; under a matcher only tokens can be chosen with which the reply can
still become what the grammar describes, and it ends no sooner.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Collection
from typing import Any

import torch
from llguidance import LLMatcher, LLTokenizer, TokenizerWrapper
from llguidance.hf import from_tokenizer
from torch import Tensor

from corolla.api.failures import wrong
from corolla.data.cuts import ids_inside
from corolla.text import one_line

# As Python and most models write JSON; a model that may put in any white space may never come to an end.
JSON_OPTIONS: dict[str, Any] = {
    "whitespace_flexible": False,
    "item_separator": ", ",
    "key_separator": ": ",
}
SPACE = "\u2581"  # what sentencepiece writes for a space


class Matcher:
    """One reply under a grammar."""

    def __init__(self, tokenizer: LLTokenizer, grammar: str, ends: Collection[int]) -> None:
        """`ends` are the tokens that may end the reply once it is what it should be."""
        self._matcher = LLMatcher(tokenizer, grammar, log_level=0)
        self._ends = sorted(ends)

    @property
    def over(self) -> bool:
        """Whether nothing but an end can follow."""
        return bool(self._matcher.is_stopped())

    def allowed(self, width: int) -> Tensor:
        """Which of `width` tokens may come next, bool [width]; where the grammar allows an end, all of `ends`."""
        found = torch.zeros(width, dtype=torch.bool)
        accepting = self._matcher.is_accepting()
        if not self._matcher.is_stopped():
            words = torch.frombuffer(bytearray(self._matcher.compute_bitmask()), dtype=torch.int32)
            bits = ((words[:, None] >> torch.arange(32, dtype=torch.int32)) & 1).bool().flatten()
            count = min(width, len(bits))
            found[:count] = bits[:count]
        ends = [end for end in self._ends if end < width]
        found[ends] = accepting or self._matcher.is_stopped()
        if not bool(found.any()):  # a reply that cannot go on may only end
            found[ends or [0]] = True
        return found

    def take(self, token: int) -> None:
        """A token was chosen."""
        if token not in self._ends and not self._matcher.is_stopped():
            self._matcher.consume_token(token)


class Vocabulary:
    """A tokenizer's tokens as bytes, which grammars are about; made when it is first needed. For any thread."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._lock = threading.Lock()
        self._made: LLTokenizer | None = None

    @property
    def tokens(self) -> LLTokenizer:
        """For llguidance; takes about a second the first time."""
        with self._lock:
            if self._made is None:
                self._made = _tokens_of(self._tokenizer)
            return self._made

    def bytes_of(self, token: int) -> bytes:
        """What a token stands for; nothing for one that the tokenizer does not have."""
        tokens = self.tokens
        return tokens.decode_bytes([token]) if 0 <= token < tokens.vocab_size else b""

    def matcher(self, grammar: str, ends: Collection[int]) -> Matcher:
        """For one reply under a grammar that was checked."""
        return Matcher(self.tokens, grammar, ends)

    def checked(self, grammar: str, param: str) -> str:
        """The same grammar. Raises `ApiFailure` for one that is no grammar, or says what llguidance cannot do."""
        trial = LLMatcher(self.tokens, grammar, log_level=0)
        if trial.is_error():
            reason = one_line(trial.get_error().partition("<state>")[0], characters=300)
            raise wrong(f"{param} cannot be followed: {reason}.", param, "invalid_schema")
        return grammar


def json_grammar(schema: dict[str, Any] | bool) -> str:
    """For any JSON that a schema describes. Raises `ApiFailure` for one that is nested too deeply."""
    try:
        return str(LLMatcher.grammar_from_json_schema(json.dumps(schema), overrides=JSON_OPTIONS))
    except (ValueError, RecursionError) as error:
        raise wrong(
            f"response_format cannot be followed: {one_line(error, characters=300)}.",
            "response_format",
            "invalid_schema",
        ) from error


def json_rule(schema: dict[str, Any]) -> str:
    """The same as a part of a Lark grammar."""
    return "%json " + json.dumps({**schema, "x-guidance": JSON_OPTIONS})


def _tokens_of(tokenizer: Any) -> LLTokenizer:
    ends = tokenizer.eos_token_id if tokenizer.eos_token_id is not None else 0
    if tokenizer.is_fast:
        try:
            return from_tokenizer(tokenizer, eos_token=ends)
        except ValueError:
            pass  # a decoder that llguidance does not know
    return LLTokenizer(TokenizerWrapper(_Plain(tokenizer, ends)))


class _Plain:
    """A tokenizer of pieces in which a mark stands for the space, as llguidance asks for one."""

    def __init__(self, tokenizer: Any, end: int) -> None:
        self._tokenizer = tokenizer
        self.eos_token_id, self.bos_token_id = end, tokenizer.bos_token_id
        self.special_token_ids = sorted(set(tokenizer.all_special_ids))
        pieces = tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))
        self.tokens = [_bytes_of(str(piece)) for piece in pieces]

    def __call__(self, text: str) -> list[int]:
        return ids_inside(self._tokenizer, text)  # without a space that is put in front of whole texts


def _bytes_of(piece: str) -> bytes:
    if len(piece) == 6 and piece.startswith("<0x") and piece.endswith(">"):
        return bytes([int(piece[3:5], 16)])
    return piece.replace(SPACE, " ").encode(errors="replace")
