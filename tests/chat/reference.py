"""What a chat must say, computed the plain way: the whole text, locally, anew for every single token.

Knows nothing of sessions, caches or Corolla's prompt arithmetic.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import takewhile
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

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


class LocalReference:
    """A plain Hugging Face model with a prompt in front of every text, and one added in every layer."""

    def __init__(self, model: Any, prompts: Any = None) -> None:
        self.model = model
        self._input = None if prompts is None else prompts.input.detach()
        deep = None if prompts is None or prompts.deep is None else prompts.deep.detach()
        if deep is not None:
            decoder = model.get_decoder()
            layers = decoder.h if hasattr(decoder, "h") else decoder.layers
            for layer, vectors in zip(layers, deep, strict=True):
                layer.register_forward_pre_hook(_adding(vectors), with_kwargs=True)

    @torch.no_grad()
    def logits(self, ids: Sequence[int]) -> torch.Tensor:
        """Of the token after `ids`, [V]."""
        embeddings = self.model.get_input_embeddings()(torch.tensor([list(ids)]))
        if self._input is not None:
            embeddings = torch.cat([self._input[None].to(embeddings.dtype), embeddings], dim=1)
        return self.model(inputs_embeds=embeddings, use_cache=False).logits[0, -1]

    def greedy(self, ids: Sequence[int], *, most: int, stop: Sequence[int], ends: Sequence[int]) -> list[int]:
        """What the model says after `ids`, with what ends it. Ties would make a test blind."""
        said: list[int] = []
        while (
            len(said) < most and said[-len(stop) :] != list(stop) and said[-1:] not in [[end] for end in ends]
        ):
            best = self.logits([*ids, *said]).topk(2)
            assert float(best.values[0] - best.values[1]) > TIE, "a tie: choose another seed"
            said.append(int(best.indices[0]))
        return said


def _adding(vectors: torch.Tensor) -> Any:
    def hook(_layer: Any, args: Any, kwargs: Any) -> Any:
        hidden = args[0] if args else kwargs.pop("hidden_states")
        hidden = hidden.clone()
        hidden[:, : len(vectors)] += vectors.to(hidden.dtype)
        return (hidden, *args[1:]), kwargs

    return hook


class Expected:
    """The conversation as it must go, and what its turns cost a server; renders without Corolla's renderer."""

    def __init__(self, reference: LocalReference, tokenizer: Any, style: str, delimiter: str) -> None:
        self._reference = reference
        self._tokenizer = tokenizer
        template = style == "template"
        self._fed = "<|user|>{}</s>\n<|assistant|>" if template else "{}" + delimiter.replace("{", "{{")
        self._closing = self._ids("</s>\n" if template else delimiter)
        self._stop = [END] if template else self._closing
        self.ids: list[int] = []
        self.cached = 0  # of `ids`, by the servers

    def turn(self, text: str, most: int) -> tuple[list[int], int, bool]:
        """The reply's tokens, how many tokens a server computes for it, and whether it ended by itself."""
        prompt = [*self.ids, *self._ids(self._fed.format(text))]
        said = self._reference.greedy(prompt, most=most, stop=self._stop, ends=[END])
        held = [*prompt, *said[:-1]]  # what was said last has not been computed
        cost = len(held) - self.cached
        ended = said[-len(self._stop) :] == self._stop or said[-1] == END
        reply = without_end(said, self._stop)
        self.ids = [*prompt, *reply, *self._closing]
        self.cached = len(list(takewhile(lambda pair: pair[0] == pair[1], zip(held, self.ids, strict=False))))
        return reply, cost, ended

    def undo(self, ids: Sequence[int]) -> None:
        """Go back to where the conversation was `ids`."""
        self.ids = list(ids)
        self.cached = min(self.cached, len(self.ids))

    def _ids(self, text: str) -> list[int]:
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
