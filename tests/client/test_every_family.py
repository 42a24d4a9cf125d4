"""Every family of transformers is exact through a swarm, or refused in one sentence before it is served."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tests.swarm_fixture import MemorySwarm
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from corolla.errors import UnsupportedFamily
from corolla.models.checks.miniature import miniature, random_model
from corolla.models.checks.selfcheck import check_family
from corolla.models.families import structure

TOKENS, PADDED = 9, 3

# Blocks that return tuples, norms without weights, positions that are added before the blocks, alibi, heads whose
# keys and values are of unlike widths, projections that are clipped in place.
SAMPLE: dict[str, dict[str, Any]] = {
    "gptj": {},
    "codegen": {},
    "olmo": {"clip_qkv": 0.5},
    "nanochat": {},
    "mpt": {"use_cache": True},
    "gpt_neox_japanese": {},
    "biogpt": {},
    "deepseek_v3": {},
}
REFUSED = {
    "doge": "without the padding that it was given",
    "blt": "not causal language models",
    "dots3_note": "not causal language models",
    "mamba": "keep a state besides",
    "xlm": "not one list of layers",
}


@pytest.mark.parametrize("family", SAMPLE)
def test_a_family_is_exact(family: str, tmp_path: Path) -> None:
    compare(AutoConfig.for_model(family, **SAMPLE[family]), tmp_path)


@pytest.mark.parametrize("family", REFUSED)
def test_a_family_is_refused(family: str) -> None:
    with pytest.raises(UnsupportedFamily, match=REFUSED[family]) as error:
        check_family(AutoConfig.for_model(family))
    assert "\n" not in str(error.value)


@pytest.mark.nightly
@pytest.mark.parametrize("family", MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
@pytest.mark.filterwarnings("ignore")
def test_all_are_exact_or_refused(family: str, tmp_path: Path) -> None:
    try:
        config = AutoConfig.for_model(family)
    except Exception as error:
        pytest.skip(f"no config without more arguments: {error}")
    refusal = ""
    try:
        check_family(config)
    except UnsupportedFamily as error:
        refusal = str(error)
    assert "\n" not in refusal
    if not refusal:
        compare(config, tmp_path)


def compare(config: PretrainedConfig, folder: Path) -> None:
    """A miniature of this config through a swarm with the local one."""
    torch.set_num_threads(1)
    with torch.random.fork_rng():
        torch.manual_seed(3)
        whole = random_model(structure(config).causal_lm, miniature(config))
        ids = torch.randint(3, 64, (2, TOKENS))
    whole.save_pretrained(folder)
    local = AutoModelForCausalLM.from_pretrained(folder).eval().requires_grad_(False)
    last = local.config.num_hidden_layers
    with MemorySwarm(folder, sorted({(0, 1), (min(1, last - 1), last)})) as swarm:
        model = swarm.model()
        for one in (model, local):
            one.generation_config.eos_token_id = None  # no reply ends early
        same_passes(model, local, ids)
        same_replies(model, local, ids)


def same_passes(model: Any, local: Any, ids: Tensor) -> None:
    masks = torch.ones(3, *ids.shape, dtype=torch.long)
    masks[1, 0, :PADDED] = 0
    masks[2, 0, -PADDED:] = 0
    for mask in masks:
        with torch.no_grad():
            found, wanted = (one(ids, attention_mask=mask, use_cache=False).logits for one in (model, local))
        torch.testing.assert_close(found[mask.bool()], wanted[mask.bool()], atol=1e-4, rtol=1e-4)
    labels = ids.masked_fill(masks[2] == 0, -100)
    gradients = []
    for one in (model, local):
        embeddings = one.get_input_embeddings()(ids).detach().requires_grad_()
        loss = one(
            inputs_embeds=embeddings.clone(), attention_mask=masks[2], labels=labels, use_cache=False
        ).loss
        gradients += torch.autograd.grad(loss, [embeddings])
    torch.testing.assert_close(*gradients, atol=1e-5, rtol=1e-3)


def same_replies(model: Any, local: Any, ids: Tensor) -> None:
    mask = torch.ones_like(ids)
    mask[0, :PADDED] = 0
    for options in ({"num_beams": 1}, {"num_beams": 2}):
        options |= {"max_new_tokens": 5, "do_sample": False}
        found, wanted = (one.generate(ids, attention_mask=mask, **options) for one in (model, local))
        assert torch.equal(found, wanted)
    first, second = ids[1:, :5], ids[1:, 5:]
    with model.inference_session(max_length=40) as session:
        reply = model.generate(first, max_new_tokens=4, do_sample=False, session=session)
        found = model.generate(second, max_new_tokens=4, do_sample=False, session=session)
    whole = torch.cat([first, reply[:, -4:], second], 1)
    wanted = local.generate(whole, attention_mask=torch.ones_like(whole), max_new_tokens=4, do_sample=False)
    assert torch.equal(found[:, -4:], wanted[:, -4:])
