"""Small tokenizers made in memory, and chat templates of several habits."""

from __future__ import annotations

from typing import Any

from tokenizers import Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

# Merges nothing, trims its texts, and leaves it to the model to say the space before a reply.
INST = (
    "{{ bos_token }}{% for m in messages %}"
    "{% if m.role == 'system' %}{{ '<<' + m.content.strip() + '>>' }}"
    "{% elif m.role == 'user' %}{{ '[I]' + m.content.strip() + '[/I]' }}"
    "{% else %}{{ ' ' + m.content.strip() + eos_token }}{% endif %}{% endfor %}"
)
# Begins with the user and alternates, as Gemma's and Mistral's do; a system's turn alone is refused.
STRICT = (
    "{{ bos_token }}{% set rest = messages %}"
    "{% if messages[0].role == 'system' %}{{ '<' + messages[0].content + '>' }}{% set rest = messages[1:] %}"
    "{% endif %}"
    "{% if not rest %}{{ raise_exception('nobody says anything') }}{% endif %}"
    "{% for m in rest %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}"
    "{{ '|' + m.role + '|' + m.content + eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '|assistant|' }}{% endif %}"
)
# Says something of the last reply only, as templates of thinking models do.
LAST_DIFFERS = (
    "{% for m in messages %}{{ '|' + m.role + '|' }}"
    "{% if loop.last and m.role == 'assistant' %}{{ '<think></think>' }}{% endif %}"
    "{{ m.content + eos_token }}{% endfor %}{% if add_generation_prompt %}{{ '|assistant|' }}{% endif %}"
)
# Leaves out the beginning of a long conversation.
FORGETS = (
    "{% for m in messages[-4:] %}{{ '|' + m.role + '|' + m.content + eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '|assistant|' }}{% endif %}"
)
NO_END = (
    "{% for m in messages %}{{ '|' + m.role + '|' + m.content }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '|assistant|' }}{% endif %}"
)


def with_bos(template: str | None = None) -> Any:
    """A tokenizer of bytes that puts `<s>` in front, with this chat template."""
    alphabet = sorted(ByteLevel.alphabet())
    vocabulary = {piece: index for index, piece in enumerate(["<s>", "</s>", *alphabet])}
    core = Tokenizer(BPE(vocab=vocabulary, merges=[]))
    core.pre_tokenizer = ByteLevel(add_prefix_space=False)
    core.decoder = ByteLevelDecoder()
    core.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>")
    tokenizer.chat_template = template
    return tokenizer
