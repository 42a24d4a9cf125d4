"""Adapters of peft: on the client's part as on the local model, on blocks refused."""

from __future__ import annotations

import re
import tempfile
from typing import Any

import pytest
import torch
from tests.client.ways.table import GREEDY, OWN_CACHE, Case, Outcome, P, way
from tests.reference import Prompted, random_ids
from torch import Tensor

ADAPTERS = "peft's adapters"
NOT_TWICE = {"ptune": "", "deep_ptune": "", "prefix": "", "peft prompt": ""}
PROMPT_ONLY = {"none": "", "ptune": "", "deep_ptune": "", "prefix": ""}
CAUSAL: dict[str, Any] = {"task_type": "CAUSAL_LM"}


def _both(case: Case, made: Any) -> list[Any]:
    """What `made` makes of the distributed and of the local model, from the same random numbers."""
    found = []
    for model in (case.bare, case.whole):
        torch.manual_seed(7)
        found.append(made(model).eval())
    return found


def _head_and_table(model: Any) -> list[str]:
    """The names of the modules that are at the client in every family."""
    parts = (model.get_output_embeddings(), model.get_input_embeddings())
    return [name for name, part in model.named_modules() if any(part is one for one in parts)]


def _lora(model: Any, *targets: str, **options: Any) -> Any:
    from peft import LoraConfig, get_peft_model

    wanted = list(targets) or _head_and_table(model)
    settings = LoraConfig(**CAUSAL, target_modules=wanted, init_lora_weights=False, **options)
    return get_peft_model(model, settings)


def _said(model: Any) -> tuple[Tensor, Tensor]:
    """Its logits and its tokens."""
    ids = random_ids(2, 7)
    with torch.no_grad():
        logits = model(input_ids=ids).logits
    return logits, model.generate(input_ids=ids, max_new_tokens=6, **GREEDY)


@way(ADAPTERS, "LoRA on the head and the embeddings", refused=NOT_TWICE)
def _lora_around(case: Case) -> Outcome:
    found, expected = _both(case, _lora)
    return _said(found), _said(expected)


@way(ADAPTERS, "LoRA's gradients", refused=NOT_TWICE)
def _lora_gradients(case: Case) -> Outcome:
    found = []
    for model in _both(case, _lora):
        model(input_ids=random_ids(2, 7), labels=random_ids(2, 7)).loss.backward()
        found.append(tuple(one.grad for one in model.parameters() if one.requires_grad))
    return found[0], found[1]


@way(ADAPTERS, "LoRA switched off (`disable_adapter`)", refused=NOT_TWICE)
def _lora_off(case: Case) -> Outcome:
    said = []
    for model in _both(case, _lora):
        with model.disable_adapter():
            said.append(_said(model))
    return said[0], said[1]


@way(ADAPTERS, "LoRA merged (`merge_and_unload`)", refused=NOT_TWICE)
def _lora_merged(case: Case) -> Outcome:
    found, expected = _both(case, lambda model: _lora(model).merge_and_unload())
    return _said(found), _said(expected)


@way(ADAPTERS, "a head of one's own (`modules_to_save`)", refused=NOT_TWICE)
def _own_head(case: Case) -> Outcome:
    def made(model: Any) -> Any:
        head, table = _head_and_table(model)[::-1]
        wrapped = _lora(model, table, modules_to_save=[head.rpartition(".")[2]])
        for name, one in wrapped.named_parameters():
            if "modules_to_save" in name:
                one.data.mul_(1.5)
        return wrapped

    found, expected = _both(case, made)
    return _said(found), _said(expected)


@way(ADAPTERS, "transformers' own `model.add_adapter`", refused=NOT_TWICE)
def _added(case: Case) -> Outcome:
    from peft import LoraConfig

    def made(model: Any) -> Any:
        model.add_adapter(LoraConfig(target_modules=_head_and_table(model), init_lora_weights=False))
        return model

    try:
        expected = made(case.whole)
    except ValueError as error:  # transformers 5.24 wants a newer peft than there is
        with pytest.raises(ValueError, match=re.escape(str(error))):
            made(case.bare)
        return (), ()
    torch.manual_seed(7)
    found = made(case.bare).eval()
    torch.manual_seed(7)
    for one in (found, expected):
        for name, parameter in one.named_parameters():
            if "lora_" in name:
                parameter.data.normal_(generator=torch.Generator().manual_seed(len(name)))
    return _said(found), _said(expected.eval())


NOT_THERE = "Target modules"
IN_BLOCKS = "The adapter default is to change"


def _first_block(case: Case) -> str:
    """The name of a linear module in the blocks."""
    from tests.reference import blocks_of

    parts = [name for name, part in blocks_of(case.whole)[0].named_modules() if hasattr(part, "weight")]
    return str(next(name for name in parts if "norm" not in name and "ln_" not in name))


@way(ADAPTERS, "LoRA on modules of blocks only", refused={"": NOT_THERE, **NOT_TWICE}, error=ValueError)
def _lora_blocks(case: Case) -> Outcome:
    return _said(_lora(case.bare, _first_block(case))), None


@way(ADAPTERS, "LoRA on some modules of blocks", refused={"": IN_BLOCKS, **NOT_TWICE})
def _lora_some(case: Case) -> Outcome:
    return _said(_lora(case.bare, _first_block(case), *_head_and_table(case.bare))), None


@way(ADAPTERS, "`modules_to_save` in blocks", refused={"": IN_BLOCKS, **NOT_TWICE})
def _saved_blocks(case: Case) -> Outcome:
    name = _first_block(case).partition(".")[0]
    return _said(_lora(case.bare, *_head_and_table(case.bare), modules_to_save=[name])), None


@way(
    ADAPTERS,
    "a second adapter on modules of blocks",
    refused={"": "The adapter more is to change", **NOT_TWICE},
)
def _lora_second(case: Case) -> Outcome:
    from peft import LoraConfig

    model = _lora(case.bare)
    _said(model)
    wanted = [_first_block(case), *_head_and_table(case.whole)]
    model.add_adapter("more", LoraConfig(**CAUSAL, target_modules=wanted))
    return _said(model), None


for _name in ("PrefixTuningConfig", "CartridgeConfig"):

    @way(ADAPTERS, f"`{_name}`, which fills caches", refused={"": OWN_CACHE, **NOT_TWICE})
    def _prefix(case: Case, name: str = _name) -> Outcome:
        import peft

        made = getattr(peft, name)(**CAUSAL, num_virtual_tokens=P)
        return _said(peft.get_peft_model(case.bare, made)), None

    @way(ADAPTERS, f"`{_name}` and `generate`", refused={"": OWN_CACHE, **NOT_TWICE})
    def _prefix_generates(case: Case, name: str = _name) -> Outcome:
        import peft

        made = peft.get_peft_model(case.bare, getattr(peft, name)(**CAUSAL, num_virtual_tokens=P))
        return made.generate(input_ids=random_ids(1, 5), max_new_tokens=2, **GREEDY), None


@way(ADAPTERS, "P-tuning (`PromptEncoderConfig`)", refused=NOT_TWICE)
def _encoder(case: Case) -> Outcome:
    from peft import PromptEncoderConfig, get_peft_model

    def made(model: Any) -> Any:
        settings = PromptEncoderConfig(**CAUSAL, num_virtual_tokens=P, encoder_hidden_size=16)
        return get_peft_model(model, settings)

    found, local = _both(case, made)
    # Not by the local model's own `generate`, which up to peft 0.21 is wrong with transformers 5.24.
    expected = Prompted(case.whole, local.get_prompt(1)[0])
    ids = random_ids(2, 7)
    with torch.no_grad():
        logits, tokens = _said(found)
        return (logits[:, P:], tokens), (expected.logits(ids), expected.greedy(ids, 6))


@way(ADAPTERS, "several prompts (`add_adapter`, `set_adapter`)", refused=PROMPT_ONLY)
def _several(case: Case) -> Outcome:
    from peft import PromptTuningConfig

    said: list[list[Tensor]] = [[], []]
    for model, into in ((case.model, said[0]), (case.local, said[1])):
        torch.manual_seed(11)
        model.add_adapter("second", PromptTuningConfig(**CAUSAL, num_virtual_tokens=P + 2))
        for name in ("second", "default", "second"):
            model.set_adapter(name)
            into += _said(model.eval())
    return tuple(said[0]), tuple(said[1])


@way(ADAPTERS, "a prompt switched off (`disable_adapter`)", refused=PROMPT_ONLY)
def _prompt_off(case: Case) -> Outcome:
    with case.model.disable_adapter(), case.local.disable_adapter():
        return _said(case.model), _said(case.local)


@way(ADAPTERS, "a prompt that peft saved and loads", refused=PROMPT_ONLY)
def _reloaded(case: Case) -> Outcome:
    from peft import PeftModel

    with tempfile.TemporaryDirectory() as folder:
        case.model.save_pretrained(folder)
        again = PeftModel.from_pretrained(case.other(), folder).eval()
    again.base_model.generation_config = case.bare.generation_config
    return _said(again), _said(case.local)
