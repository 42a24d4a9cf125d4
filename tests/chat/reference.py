"""What a chat must say, computed the plain way: the whole text, locally, anew for every single token.

Knows nothing of sessions, of Corolla's renderer and prompt arithmetic.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from corolla.models.cache import cache_argument

SPECIALS = ["<pad>", "<s>", "</s>", "<|user|>", "<|assistant|>", "<|system|>"]
VOCABULARY = 256 + len(SPECIALS)
TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
TIE = 1e-4
END = 2


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte, and a chat template."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate([*SPECIALS, *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        additional_special_tokens=SPECIALS[3:],
    )
    fast.chat_template = TEMPLATE
    return fast


@dataclass(frozen=True)
class First:
    """A reply begins with something to read, not with what would end it."""

    tokenizer: Any
    delimiter: str  # "" where a token ends replies

    def has_begun(self, said: Sequence[int]) -> bool:
        """Whether there is something to read."""
        return any(one.isprintable() and not one.isspace() for one in self.tokenizer.decode(said, True))

    def may_come(self, token: int) -> bool:
        """Whether a reply that has not begun may go on with it."""
        text = self.tokenizer.decode([token], True)
        pieces = "" if not text.strip() and self.delimiter.strip() == self.delimiter else self.delimiter
        return token != END and not (pieces and text.strip() in pieces)


class LocalReference:
    """A plain Hugging Face model with a prompt in front of every text, and one added in every layer."""

    def __init__(self, model: Any, prompts: Any = None) -> None:
        self.model = model
        self.held_back = 0  # replies that would have been empty
        self._input = None if prompts is None else prompts.input.detach()
        deep = None if prompts is None or prompts.deep is None else prompts.deep.detach()
        if deep is not None:
            decoder = model.get_decoder()
            layers = decoder.h if hasattr(decoder, "h") else decoder.layers
            for layer, vectors in zip(layers, deep, strict=True):
                layer.register_forward_pre_hook(_adding(vectors), with_kwargs=True)

    @torch.no_grad()
    def greedy(self, ids: Sequence[int], first: First, *, most: int, stop: Sequence[int]) -> list[int]:
        """What the model says after `ids`, with what ends it. Ties would make a test blind."""
        said: list[int] = []
        while True:
            output = self.model(inputs_embeds=self._embeddings([*ids, *said]), use_cache=False)
            said.append(self._best(output.logits[0, -1], said, first))
            if len(said) == most or said[-len(stop) :] == list(stop) or said[-1] == END:
                return said

    def _best(self, logits: torch.Tensor, said: list[int], first: First) -> int:
        best = logits.topk(2)
        if not first.has_begun(said):
            ranked = (token for token in logits.topk(200).indices.tolist() if first.may_come(token))
            chosen = torch.tensor([next(ranked), next(ranked)])
            self.held_back += not said and chosen[0] != best.indices[0]
            best = type(best)((logits[chosen], chosen))
        assert float(best.values[0] - best.values[1]) > TIE, "a tie: choose another seed"
        return int(best.indices[0])

    def _embeddings(self, ids: Sequence[int]) -> torch.Tensor:
        embeddings = self.model.get_input_embeddings()(torch.tensor([list(ids)]))
        if self._input is None:
            return embeddings
        return torch.cat([self._input[None].to(embeddings.dtype), embeddings], dim=1)


class CachingReference(LocalReference):
    """Runs the whole text once a reply, and its tokens behind a local cache: for models of real size."""

    @torch.no_grad()
    def greedy(self, ids: Sequence[int], first: First, *, most: int, stop: Sequence[int]) -> list[int]:
        """As `LocalReference.greedy`."""
        said: list[int] = []
        cache = cache_argument(self.model.forward)
        output = self.model(inputs_embeds=self._embeddings(ids), use_cache=True)
        while True:
            said.append(self._best(output.logits[0, -1], said, first))
            if len(said) == most or said[-len(stop) :] == list(stop) or said[-1] == END:
                return said
            output = self.model(torch.tensor([said[-1:]]), **{cache: output[cache]})


def _adding(vectors: torch.Tensor) -> Any:
    def hook(_layer: Any, args: Any, kwargs: Any) -> Any:
        hidden = args[0] if args else kwargs.pop("hidden_states")
        if hidden.shape[1] > 1:  # not where one token is run behind a cache
            hidden = hidden.clone()
            hidden[:, : len(vectors)] += vectors.to(hidden.dtype)
        return (hidden, *args[1:]), kwargs

    return hook


@dataclass(frozen=True)
class Form:
    """How a conversation is written down; `fed` has TEXT where the user's text stands."""

    fed: str
    closing: str
    opening: str = ""
    stop: list[int] | None = None  # None: all of `closing`


def delimited(delimiter: str) -> Form:
    """Turns and replies, each followed by the delimiter."""
    return Form(fed="TEXT" + delimiter, closing=delimiter)


TEMPLATED = Form(fed="<|user|>TEXT</s>\n<|assistant|>", closing="</s>\n", stop=[END])


class Expected:
    """The conversation as it must go, and what its turns cost a server."""

    def __init__(self, reference: LocalReference, tokenizer: Any, form: Form) -> None:
        self._reference = reference
        self._tokenizer = tokenizer
        self._form = form
        self._closing = self._tokens(form.closing)
        self._stop = self._closing if form.stop is None else form.stop
        self._first = First(tokenizer, form.closing if form.stop is None else "")
        self.ids = self._tokens(form.opening)
        self.cached = 0  # of `ids`, by the servers

    def turn(self, text: str, most: int) -> tuple[list[int], int, bool]:
        """The reply's tokens, how many tokens a server computes for it, and whether it ended by itself."""
        prompt = [*self.ids, *self._tokens(self._form.fed.replace("TEXT", text))]
        said = self._reference.greedy(prompt, self._first, most=most, stop=self._stop)
        held = [*prompt, *said[:-1]]  # what was said last has not been computed
        cost = len(held) - self.cached
        ended = said[-len(self._stop) :] == self._stop or said[-1] == END
        reply = without_end(said, self._stop)
        self.ids = [*prompt, *reply, *self._closing]
        self.cached = len(list(takewhile(lambda pair: pair[0] == pair[1], zip(held, self.ids, strict=False))))
        return reply, cost, ended

    def go_back(self, ids: Sequence[int]) -> None:
        """To where the conversation was `ids`."""
        self.ids = list(ids)
        self.cached = min(self.cached, len(self.ids))

    def _tokens(self, text: str) -> list[int]:
        ids: list[int] = self._tokenizer(text, add_special_tokens=False).input_ids
        return ids


def without_end(said: list[int], stop: list[int]) -> list[int]:
    """A reply without what ended it, be it only the beginning of a delimiter."""
    if said[-len(stop) :] == stop:
        return said[: -len(stop)]
    if said[-1] == END:
        said = said[:-1]
    for size in range(len(stop) - 1, 0, -1):
        if said[-size:] == stop[:size]:
            return said[:-size]
    return said
