"""What a checkpoint's tensors are called in the model of the family, and which part of a checkpoint that is.

Invariant: names are those that the family's own loader gives. Of a checkpoint that also takes images or sound the text
part is used: its config is one of a causal model, and its tensors stand below `language_model`, or are called as those
of the causal model alone.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from transformers import AutoModelForCausalLM, PretrainedConfig
from transformers.conversion_mapping import get_checkpoint_conversion_mapping
from transformers.core_model_loading import WeightRenaming
from transformers.models.auto.modeling_auto import MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES

from corolla.models.families import structure

TEXT, BASE, HEAD = "language_model.", "model.", "lm_head."


def text_part(config: PretrainedConfig) -> PretrainedConfig:
    """The config of the part that reads and writes text; `config` itself where that is all."""
    text: Any = config.get_text_config(decoder=True)
    if (
        text is config
        or config.model_type not in MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES
        or type(text) not in AutoModelForCausalLM._model_mapping
    ):
        return config
    text.tie_word_embeddings = getattr(config, "tie_word_embeddings", text.tie_word_embeddings)
    text.dtype = text.dtype or config.dtype
    return text


def names_of(config: PretrainedConfig) -> Callable[[str], str | None]:
    """What gives a checkpoint's key its name in the causal model; None for a tensor of another part."""
    text = text_part(config)
    known: list[Any] = get_checkpoint_conversion_mapping(text.model_type) or []
    renamings = [one for one in known if isinstance(one, WeightRenaming)]
    outside, blocks = frozenset[str](), ""
    if renamings or text is not config:
        outside, blocks = structure(text).outside, f"{structure(text).prefix}."

    def name_of(key: str) -> str | None:
        if text is not config and TEXT in key:
            key = key.partition(TEXT)[2]
            key = key if key.startswith((BASE, HEAD)) else BASE + key
        elif text is not config and not key.startswith((HEAD, blocks)) and key not in outside:
            return None
        name = key
        for one in renamings:
            name, _ = one.rename_source_key(name)
        # As the loader does: what a checkpoint already calls as the model does keeps its name.
        return key if key in outside and name not in outside else name

    return name_of
