"""Small tokenizers of every habit, and the chat templates of well-known models."""

from __future__ import annotations

from functools import cache
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from tokenizers import trainers as made_by
from transformers import ByT5Tokenizer, PreTrainedTokenizerFast

MARKS = [
    *("<|im_start|>", "<|im_end|>", "<|user|>", "<|assistant|>", "<|system|>", "<|end|>"),
    *("[INST]", "[/INST]", "<start_of_turn>", "<end_of_turn>"),
    *("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
]
CORPUS = [
    "".join(chr(code) for code in range(32, 127)) + "\n",
    "user assistant system model user\nassistant\nsystem\nmodel\n",
    *["The quick brown fox jumps over the lazy dog. And then what? He said: I do not know, do you?\n"] * 8,
    *["Where do you live? By the river, near the old mill!\n- one\n- two\n\n1. three <b>four</b>\n"] * 4,
    *["So: The one. The two. The end.\n"] * 8,
]
SPECIAL = ["<unk>", "<s>", "</s>"]
GPT2 = r"""'(?:s|t|re|ve|m|ll|d)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"""
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)

TEMPLATES = {
    "chatml": (
        "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n' }}"
        "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    ),
    "chatml with a system turn of its own": (
        "{% for m in messages %}{% if loop.first and m['role'] != 'system' %}"
        "{{ '<|im_start|>system\nYou are helpful.<|im_end|>\n' }}{% endif %}"
        "{{ '<|im_start|>' + m['role'] + '\n' + m['content'] | trim + '<|im_end|>' + '\n' }}"
        "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    ),
    "zephyr": (
        "{% for m in messages %}{{ '<|' + m['role'] + '|>\n' + m['content'] + eos_token + '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
    ),
    "mistral": (
        "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{% set system = messages[0]['content'] + '\n\n' %}"
        "{% set messages = messages[1:] %}{% else %}{% set system = '' %}{% endif %}"
        "{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
        "{{ raise_exception('roles must alternate') }}{% endif %}"
        "{% if m['role'] == 'user' %}{{ '[INST] ' + (system if loop.first else '') + m['content'] + ' [/INST]' }}"
        "{% else %}{{ ' ' + m['content'] | trim + eos_token }}{% endif %}{% endfor %}"
    ),
    "llama 3": (
        "{{ bos_token }}{% for m in messages %}"
        "{{ '<|start_header_id|>' + m['role'] + '<|end_header_id|>\n\n' + m['content'] | trim + '<|eot_id|>' }}"
        "{% endfor %}{% if add_generation_prompt %}"
        "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
    ),
    "gemma": (
        "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{% set first = messages[0]['content'] + '\n\n' %}"
        "{% set messages = messages[1:] %}{% else %}{% set first = '' %}{% endif %}"
        "{% for m in messages %}{% set role = 'model' if m['role'] == 'assistant' else m['role'] %}"
        "{{ '<start_of_turn>' + role + '\n' + (first if loop.first else '') + m['content'] | trim"
        " + '<end_of_turn>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
    ),
    "phi 3": (
        "{% for m in messages %}{{ '<|' + m['role'] + '|>\n' + m['content'] + '<|end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
    ),
    "vicuna": (
        "{% if messages[0]['role'] == 'system' %}{{ messages[0]['content'] + ' ' }}"
        "{% set messages = messages[1:] %}{% endif %}"
        "{% for m in messages %}{% if m['role'] == 'user' %}{{ 'USER: ' + m['content'] + ' ' }}"
        "{% else %}{{ 'ASSISTANT: ' + m['content'] + eos_token }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
    ),
}
# Ends its prompt with a space, which most tokenizers put into the reply's first token.
SPACE_AT_THE_END = TEMPLATES["vicuna"].replace("{{ 'ASSISTANT:' }}", "{{ 'ASSISTANT: ' }}")


def _metaspace(scheme: str) -> Tokenizer:
    """Llama's kind: a mark for the space, bytes for what is not in the vocabulary."""
    core = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme)
    core.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(content=" ", left=1),
        ]
    )
    trained = _trained_bpe(core, [f"<0x{byte:02X}>" for byte in range(256)])
    trained.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)
    return trained


def _legacy() -> Tokenizer:
    """Llama 2's kind: the space is put in front by a normalizer."""
    core = _metaspace("never")
    core.pre_tokenizer = None
    core.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    return core


def _byte_level(regex: str, *, trim: bool) -> Tokenizer:
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(regex), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    core.decoder = decoders.ByteLevel()
    trained = _trained_bpe(core, [], alphabet=pre_tokenizers.ByteLevel.alphabet())
    trained.post_processor = processors.ByteLevel(trim_offsets=trim)
    return trained


def _trained_bpe(core: Tokenizer, more: list[str], alphabet: list[str] | None = None) -> Tokenizer:
    trainer = made_by.BpeTrainer(
        vocab_size=700,
        special_tokens=[*SPECIAL, *more],
        initial_alphabet=alphabet or [],
        show_progress=False,
    )
    # Line by line: no token of a real vocabulary spans a line break and a letter.
    core.train_from_iterator([line for text in CORPUS for line in text.splitlines()], trainer)
    return core


def _unigram() -> Tokenizer:
    core = Tokenizer(models.Unigram())
    core.normalizer = normalizers.NFKC()
    core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    core.decoder = decoders.Metaspace(prepend_scheme="always")
    trainer = made_by.UnigramTrainer(
        vocab_size=300, special_tokens=SPECIAL, unk_token="<unk>", show_progress=False
    )
    core.train_from_iterator(CORPUS, trainer)
    return core


def _word_piece() -> Tokenizer:
    core = Tokenizer(models.WordPiece(unk_token="<unk>"))
    core.normalizer = normalizers.BertNormalizer(lowercase=False)
    core.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    core.decoder = decoders.WordPiece()
    trainer = made_by.WordPieceTrainer(vocab_size=400, special_tokens=SPECIAL, show_progress=False)
    core.train_from_iterator(CORPUS, trainer)
    return core


MAKERS = {
    "metaspace first": lambda: _metaspace("first"),
    "metaspace always": lambda: _metaspace("always"),
    "llama 2": _legacy,
    "gpt2": lambda: _byte_level(GPT2, trim=False),
    "llama 3": lambda: _byte_level(LLAMA3, trim=True),
    "unigram": _unigram,
    "word piece": _word_piece,
}
FAST = list(MAKERS)
KINDS = [*FAST, "slow"]


@cache
def _core(kind: str) -> str:
    return str(MAKERS[kind]().to_str())


@cache
def tokenizer_of(kind: str, template: str | None = None, *, marked: bool = True) -> Any:
    """A tokenizer with one of `TEMPLATES` (or this text); `marked`: the templates' marks are tokens of it."""
    if kind == "slow":  # bytes, in Python, without offsets
        made: Any = ByT5Tokenizer(extra_ids=0)
        made.add_special_tokens({"bos_token": "<s>"})
    else:
        made = PreTrainedTokenizerFast(
            tokenizer_object=Tokenizer.from_str(_core(kind)),
            unk_token="<unk>",
            bos_token="<s>",
            eos_token="</s>",
        )
    if marked:
        # Phi-3's marks take the white space after them along.
        made.add_special_tokens(
            {"additional_special_tokens": [AddedToken(mark, rstrip=mark == "<|end|>") for mark in MARKS]}
        )
    made.chat_template = TEMPLATES.get(template or "", template)
    return made
