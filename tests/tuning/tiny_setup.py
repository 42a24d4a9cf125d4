"""A tiny model with a byte tokenizer, conversations to learn from, and a local model with prompts.

The local model is the family's own, with `BaseModelHooks` around it: the same prompt arithmetic without a
swarm, so that runs can be compared bit by bit.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tests.tiny_models import VOCABULARY, write_tiny
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from corolla.data.conversation import Conversation, Turn
from corolla.data.render import RenderSettings
from corolla.models.prompts import SoftPrompt, initial_vectors
from corolla.models.shell import BaseModelHooks
from corolla.tuning.bundle import ModelInfo
from corolla.tuning.settings import TuneSettings

WORDS = [
    "rain",
    "tea",
    "moon",
    "river",
    "stone",
    "bread",
    "lamp",
    "wind",
    "garden",
    "letter",
    "harbour",
    "winter",
]
ABOUT = ModelInfo("tiny", "0" * 32)


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """Every byte one token, within the tiny models' vocabulary; 0, 1 and 2 are padding, start and end."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())[: VOCABULARY - 3]
    vocabulary = {"<pad>": 0, "<s>": 1, "</s>": 2} | {
        letter: index + 3 for index, letter in enumerate(letters)
    }
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    )


def write_model(folder: Path, family: str = "llama") -> Path:
    """A tiny checkpoint with its tokenizer."""
    write_tiny(family, folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


def conversations(count: int = 24) -> list[Conversation]:
    """Short talks of two to four turns, of different lengths."""
    found = []
    for index in range(count):
        one, two = WORDS[index % 12], WORDS[(index * 7 + 3) % 12]
        turns = [Turn("user", f"what of the {one}?"), Turn("assistant", f"{two} " * (1 + index % 3) + "!")]
        if index % 2:
            turns += [Turn("user", "and then?"), Turn("assistant", f"the {one} again")]
        found.append(Conversation(tuple(turns), id=f"talk-{index}"))
    return found


def settings(**changes: Any) -> TuneSettings:
    """A run of a second or two."""
    values: dict[str, Any] = {
        "steps": 6,
        "batch_size": 3,
        "save_every": 2,
        "held_out": 5,
        "learning_rate": 1e-2,
        "warmup": 0.0,
        "keep": "last",
        "rendering": RenderSettings(delimiter="|", max_length=64),
    }
    return TuneSettings(**values | changes)


def prompt_for(model: Any, mode: str = "ptune", length: int = 4) -> SoftPrompt:
    """A prompt from sampled vocabulary; deep ones with something in them."""
    vectors = initial_vectors(model.get_input_embeddings(), length, vocab_size=VOCABULARY, seed=5)
    prompt = SoftPrompt(vectors, model.config.num_hidden_layers if mode == "deep_ptune" else 0)
    if prompt.deep is not None:
        generator = torch.Generator().manual_seed(6)
        prompt.deep.data.copy_(torch.randn(prompt.deep.shape, generator=generator) * 0.1)
    return prompt


def plain_model(folder: Path) -> Any:
    """The family's own model as it is."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def local_model(folder: Path, prompt: SoftPrompt | None = None) -> Any:
    """The whole model here, with an input prompt in front."""
    model = plain_model(folder)
    model.prompts = prompt or prompt_for(model)
    BaseModelHooks(model.base_model, prompts=lambda: model.prompts, caches=None)
    return model
