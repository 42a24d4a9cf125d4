"""A tiny model of every family that transformers knows, by one rule, and what Corolla makes of it.

    python -m tests.models.every_family [family …]

tries those that are named, or all, and then writes docs/models.md.
"""

from __future__ import annotations

import copy
import logging
import signal
import sys
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import cycle, islice, pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tests.swarm_fixture import MemorySwarm
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForMultimodalLM, PretrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from corolla.errors import UnsupportedFamily, UsageError
from corolla.models.cache import take_cache
from corolla.models.checkpoints.names import text_part
from corolla.models.checks.miniature import miniature, random_model
from corolla.models.checks.padding import known_in_front
from corolla.models.checks.selfcheck import check_family
from corolla.models.checks.tracing import MEASURED, without_values
from corolla.models.families import depth_of, is_per_layer, layer_overrides, layers_of_block, structure

FAMILIES = tuple(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
GOOD = {"exact", "refused", "not compared"}
SECONDS = 240.0  # for one family
LAYERS, TOKENS, PADDED = 5, 11, 3
LARGEST = 1024  # of a model that is made; a config that nobody could make small is of the published size
ROUNDING = 1e-7  # of a float32
CONTEXT, SECONDS_OF_MEMORY = 1000, 30.0
SHARED = 2  # layers that take keys and values from earlier ones, where a family's do
REPORT = Path(__file__).parents[2] / "docs" / "models.md"

# Sizes whose ratios are no whole numbers where a family allows it; a window is shorter than what is tried.
UNEQUAL: dict[str, int] = {
    "hidden_size": 48,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "num_kv_heads": 2,
    "head_dim": 12,
    "intermediate_size": 80,
    "ffn_dim": 80,
    "ffn_hidden_size": 80,
    "n_inner": 80,
    "inner_hidden_size": 80,
    "moe_intermediate_size": 40,
    "shared_expert_intermediate_size": 56,
    "shared_intermediate_size": 56,
    "moe_shared_expert_intermediate_size": 56,
    "word_embed_proj_dim": 48,
    "vocab_size": 96,
    "unpadded_vocab_size": 96,
    "vocab_size_per_layer_input": 96,
    "hidden_size_per_layer_input": 7,
    "laurel_rank": 5,
    "num_local_experts": 5,
    "num_experts": 5,
    "n_routed_experts": 5,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
    "sliding_window": 6,
    "attention_chunk_size": 6,
    "q_lora_rank": 28,
    "kv_lora_rank": 20,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 12,
    "qk_head_dim": 20,
    "zero_expert_num": 3,
    "v_head_dim": 10,
    "index_n_heads": 16,
    "index_head_dim": 24,
    "index_topk": 5,
    "indexer_n_heads": 16,
    "indexer_head_dim": 24,
    "indexer_budget": 6,
    "indexer_compress_ratio": 3,
    "ple_embed_dim": 48,
    "ngram_vocab_size_base": 96,
    "split_ngram_parts": 1,
    "hc_lowrank": 20,
    "linear_num_heads": 3,
    "linear_head_dim": 12,
    "linear_num_key_heads": 3,
    "linear_num_value_heads": 6,
    "linear_key_head_dim": 12,
    "linear_value_head_dim": 10,
    "mamba_n_heads": 8,
    "mamba_d_head": 12,
    "mamba_num_heads": 8,
    "mamba_head_dim": 12,
    "mamba_d_ssm": 96,
    "mamba_d_state": 14,
    "ssm_state_size": 14,
    "state_size": 14,
    "n_groups": 2,
    "time_step_rank": 6,
    "mamba_chunk_size": 4,
    "chunk_size": 4,
    "rotary_dim": 4,
}
HYBRID = ["linear_attention", "full_attention", "linear_attention", "linear_attention", "full_attention"]
CONVOLVED = [kind.replace("linear_attention", "conv") for kind in HYBRID]
QWEN4: dict[str, Any] = {
    "eos_token_id": 2,
    "indexer_n_heads": 4,
    "indexer_kv_heads": 1,
    "indexer_head_dim": 128,
    "indexer_budget": 2048,
    "indexer_compress_ratio": 16,
    "ple_layer_ids": [1, 3],
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e7, "partial_rotary_factor": 0.5},
}
# What a family's config does not have by itself, although every checkpoint of it does.
GIVEN: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [1, 3]},
    "granitemoehybrid": {"num_hidden_layers": 5, "layer_types": HYBRID},
    "hunyuan_v1_dense": {"head_dim": 12},
    "hunyuan_v1_moe": {"head_dim": 12},
    "lfm2": {"num_hidden_layers": 5, "layer_types": CONVOLVED},
    "lfm2_moe": {"num_hidden_layers": 5, "layer_types": CONVOLVED},
    "cohere_compass_text": {
        "num_hidden_layers": 5,
        "layer_types": [
            "sliding_attention",
            "sliding_attention",
            "full_attention",
            "sliding_attention",
            "full_attention",
        ],
        "rope_parameters": {
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
            "full_attention": None,
        },
    },
    "dbrx": {"attn_config": {"rope_theta": 1e4, "kv_n_heads": 2, "clip_qkv": 0.5}},
    "qwen4_exp_text": QWEN4,
    "qwen4_exp": {"text_config": QWEN4},
    "reformer": {"is_decoder": True},
    "deepseek_v2": {"num_experts_per_tok": 2},
    "dots1": {"n_routed_experts": 5, "num_experts_per_tok": 2, "n_shared_experts": 1},
    "gemma4_text": {"num_kv_shared_layers": 12},
    "ministral": {"head_dim": 12},
    "nemotron": {"num_key_value_heads": 2},
    "olmo": {"clip_qkv": 0.5},
    "olmoe": {"clip_qkv": 0.5},
}


# Of the parts of a model that look at images or hear, which are never used.
OTHER_PARTS: dict[str, int] = {
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "depth": 1,
    "num_attention_heads": 2,
    "num_heads": 2,
    "intermediate_size": 24,
    "image_size": 28,
    "patch_size": 14,
    "d_model": 16,
    "encoder_layers": 1,
    "encoder_attention_heads": 2,
    "encoder_ffn_dim": 24,
    "adapter_in_dim": 16,
    "adapter_input_size": 16,
}
OUT_OF_THEM = ("out_hidden_size", "adapter_out_dim")  # as wide as text


def tiny(family: str) -> PretrainedConfig:
    """By one rule, or the miniature that Corolla itself makes where a family does not allow such ratios."""
    try:
        config = AutoConfig.for_model(family, **GIVEN.get(family, {}))
    except Exception as error:
        raise OwnFailure(f"no config of it can be made without a checkpoint's: {error}") from error
    text = text_part(config)
    if text is config:
        return _small(config)
    small = _small(text)
    parts: dict[str, Any] = {"text_config": small.to_dict()}
    marks = [name for name in config.to_dict() if name.endswith(("token_id", "token_index"))]
    parts |= {name: at % 3 for at, name in enumerate(marks)}  # tokens that no text has
    parts |= _other_parts(config, small.hidden_size)
    try:
        return type(config)(**parts)
    except Exception:  # as above
        return config


def _other_parts(config: PretrainedConfig, width: int) -> dict[str, dict[str, Any]]:
    found = {}
    for name in ("vision_config", "audio_config"):
        if getattr(config, name, None) is not None:
            part = getattr(config, name).to_dict()
            part.pop("per_layer_config", None)  # of layers that it does not have any more
            sizes = OTHER_PARTS | dict.fromkeys(OUT_OF_THEM, width)
            found[name] = part | {one: size for one, size in sizes.items() if one in part}
    return found


def _small(config: PretrainedConfig) -> PretrainedConfig:
    try:
        structure(config)
    except UnsupportedFamily:
        return config
    for make in (_unequal, miniature):
        try:
            small = make(config)
            with torch.no_grad():
                structure(small).causal_lm(small)(torch.tensor([[3, 4]]), use_cache=False)
            return small
        except Exception:  # whatever the family's own code makes of such ratios
            continue
    return config


class OwnFailure(Exception):
    """The family's own config or model cannot be made, or does not run, in this release."""


def _unequal(config: PretrainedConfig) -> PretrainedConfig:
    given = config.to_dict()
    plain = copy.deepcopy(config)
    if layer_overrides(config):
        plain.per_layer_config = None
    for name, size in UNEQUAL.items():
        value = getattr(plain, name, None)
        known = config.attribute_map.get(name, name)
        if isinstance(value, list) and name == "intermediate_size":
            given[known] = [size - 8 * (at % 2) for at in range(len(value))]
        if isinstance(value, int) and not isinstance(value, bool) and known in given:
            given[known] = min(size, value) if name == "num_experts_per_tok" else size
    rotated = getattr(config, "qk_rope_head_dim", None)
    if rotated is not None and getattr(config, "head_dim", None) == rotated and "head_dim" in given:
        given["head_dim"] = UNEQUAL["qk_rope_head_dim"]
    for name, value in given.items():
        if is_per_layer(config, name, value):
            kinds = list(dict.fromkeys(value)) if isinstance(value[0], str) else value
            given[name] = list(islice(cycle(kinds), LAYERS))
    given[config.attribute_map.get("num_hidden_layers", "num_hidden_layers")] = LAYERS * layers_of_block(
        config
    )
    if layer_overrides(config):
        given["per_layer_config"] = overrides(config, given)
    if getattr(config, "num_kv_shared_layers", None):
        given["num_kv_shared_layers"] = SHARED
    given |= _other_parts(config, UNEQUAL["hidden_size"])
    given |= {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "dtype": "float32"}
    return type(config)(**given)


def overrides(config: PretrainedConfig, given: dict[str, Any]) -> dict[int, dict[str, Any]]:
    """What layers have of their own by their kind, in the ratio to the others."""
    own, plain = layer_overrides(config), copy.deepcopy(config)
    plain.per_layer_config = None
    last = given["layer_types"][-1] = config.layer_types[-1]
    of_kind = {kind: own.get(at, {}) for at, kind in enumerate(config.layer_types)}
    assert last in of_kind
    return {
        at: {
            name: max(1, value * given[name] // getattr(plain, name)) for name, value in of_kind[kind].items()
        }
        for at, kind in enumerate(given["layer_types"])
        if of_kind[kind]
    }


def verdict(family: str) -> tuple[str, str]:
    """What becomes of a tiny model: `exact`, `refused`, `wrong`, `traceback`, `hang`, …; and how or why."""
    try:
        with _limited(SECONDS), tempfile.TemporaryDirectory() as folder:
            config = tiny(family)
            packed = check_family(text_part(config))
            if text_part(config).hidden_size > LARGEST:
                raise OwnFailure("no small config of it can be made")
            compare(config, Path(folder))
            return "exact", "packed" if packed else "by request"
    except UnsupportedFamily as error:
        return "refused", str(error)
    except _TooLong:
        return "hang", f"no answer for {SECONDS:.0f} s"
    except OwnFailure as error:
        return "not compared", " ".join(str(error).split())
    except AssertionError as error:
        return "wrong", str(error).strip().split("\n")[0]
    except Exception as error:
        return "traceback", f"{type(error).__name__}: {' '.join(str(error).split()):.160}"


class _TooLong(BaseException):
    """A family takes for ever."""


@contextmanager
def _limited(seconds: float) -> Iterator[None]:
    def ring(*_args: Any) -> None:
        raise _TooLong

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


# --- through a swarm, beside the local model --------------------------------------------------------------------


def compare(config: PretrainedConfig, folder: Path) -> None:
    """A random model of this config, cut in three uneven spans, with the local one. Raises `AssertionError`."""
    torch.set_num_threads(1)
    with torch.random.fork_rng():
        torch.manual_seed(3)
        text = text_part(config)
        loader = AutoModelForCausalLM if text is config else AutoModelForMultimodalLM
        try:
            whole = random_model(loader.from_config, config)
        except ImportError as error:
            raise OwnFailure("its part for images needs a library that is not installed") from error
        ids = torch.randint(3, text.vocab_size, (2, TOKENS))
    whole.save_pretrained(folder)
    local = loader.from_pretrained(folder).eval().requires_grad_(False)
    try:
        local(ids)
    except Exception as error:
        raise OwnFailure(f"transformers' own model fails: {error}") from error
    last = depth_of(text)
    cuts = sorted({0, 1, min(3, last), last})
    with MemorySwarm(folder, list(pairwise(cuts))) as swarm:
        model = swarm.model()
        for one in (model, local):
            one.generation_config.eos_token_id = None  # no reply ends early
            if text is not config:
                one.generation_config.suppress_tokens = [0, 1, 2]  # what stands for images, see `tiny`
        same_passes(model, local, ids)
        same_replies(model, local, ids)


def same_passes(model: Any, local: Any, ids: Tensor) -> None:
    masks = torch.ones(3, *ids.shape, dtype=torch.long)
    masks[1, 0, :PADDED] = 0
    masks[2, 0, -PADDED:] = 0
    if not known_in_front(text_part(local.config)):
        with pytest.raises(UsageError, match="Padding before a row's tokens"):
            model(ids, attention_mask=masks[1])
        masks[1] = 1
    for mask in masks:
        with torch.no_grad():
            found, wanted = (one(ids, attention_mask=mask, use_cache=False).logits for one in (model, local))
        torch.testing.assert_close(found[mask.bool()], wanted[mask.bool()], atol=1e-4, rtol=1e-4)
    labels = ids.masked_fill(masks[2] == 0, -100)
    found, wanted = (_gradient(one, ids, masks[2], labels, 0.0) for one in (model, local))
    if torch.allclose(found, wanted, atol=1e-5, rtol=1e-3):
        return
    # Routers and recurrences make much of little: what the local model itself makes of rounding is no difference.
    moved = _gradient(local, ids, masks[2], labels, ROUNDING)
    unsure = 2 * float((moved - wanted).abs().max())
    torch.testing.assert_close(found, wanted, atol=1e-5 + unsure, rtol=1e-3)


def _gradient(model: Any, ids: Tensor, mask: Tensor, labels: Tensor, noise: float) -> Tensor:
    """Of the loss, for embeddings that are changed by so much of themselves."""
    seen: list[Tensor] = []

    def changed(_embedding: Any, _args: Any, output: Tensor) -> Tensor:
        drawn = torch.randn(output.shape, generator=torch.Generator().manual_seed(1))
        seen.append((output.detach() * (1 + noise * drawn)).requires_grad_())
        return seen[-1].clone()

    handle = model.get_input_embeddings().register_forward_hook(changed)  # some blocks are given the ids too
    loss = model(ids, attention_mask=mask, labels=labels, use_cache=False).loss
    handle.remove()
    return torch.autograd.grad(loss, [seen[0]])[0]


def same_replies(model: Any, local: Any, ids: Tensor) -> None:
    mask = torch.ones_like(ids)
    mask[0, : PADDED * known_in_front(text_part(local.config))] = 0
    for options in ({"num_beams": 1}, {"num_beams": 2}):
        options |= {"max_new_tokens": 5, "do_sample": False}
        try:
            found = model.generate(ids, attention_mask=mask, **options)
        except UsageError as refusal:
            if "beam search" in str(refusal):  # which goes wrong in the local model
                continue
            raise
        wanted = local.generate(ids, attention_mask=mask, **options)
        assert torch.equal(found, wanted), "other tokens in a batch"
    first, second = ids[1:, :5], ids[1:, 5:]
    with model.inference_session(max_length=40) as session:
        reply = model.generate(first, max_new_tokens=4, do_sample=False, session=session)
        found = model.generate(second, max_new_tokens=4, do_sample=False, session=session)
        whole = torch.cat([first, reply[:, -4:], second], 1)
        wanted = _local_reply(local, whole)
        assert torch.equal(found[:, -4:], wanted), "other tokens in a session's second turn"
        session.position = 7
        found = model.generate(second[:, :2], max_new_tokens=4, do_sample=False, session=session)
    wanted = _local_reply(local, torch.cat([whole[:, :7], second[:, :2]], 1))
    assert torch.equal(found[:, -4:], wanted), "other tokens after a rollback"


def _local_reply(local: Any, ids: Tensor) -> Tensor:
    options = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 4, "do_sample": False}
    reply: Tensor = local.generate(ids, **options)[:, -4:]
    return reply


# --- the report ---------------------------------------------------------------------------------------------------

HEAD = """# Models

What becomes of every family of causal models that transformers {release} knows, as `make nightly` found it with a
tiny random model of each ({layers} layers in three uneven spans; head widths, experts and windows in unequal ratios):
logits with padding on either side, gradients, a batch of greedy replies and of beams, a chat of two turns, and one
that was set back. *Packed* families share a server's passes, others are computed request by request, but for steps of
one token of those with recurrences or convolutions (qwen3_next, falcon_h1, lfm2, …), which share passes too. Of models
that also take images or sound, the part that reads and writes text is used, from the checkpoint as it lies on the hub.

Where padding before a row's tokens changes what transformers itself computes of them (deepseek_v4, forms of lfm2,
mamba and other families with states), logits and replies are what it gives with that padding; a loss with it is
refused: pad on the right. Blocks of deepseek_v4 and qwen4_exp are given token ids, hy_v4's places of tokens, so `wire`
is not `int8`.

The last column is what the family's own cache holds of one sequence of {context} tokens in 16 bits, at the size that
its config has by default: keys and values, latents, states. That is what a session takes on the servers together;
families that are computed by request take up to four more copies of their states, to go back to.

| verdict | families |
|---|---|
{counts}

| family | verdict | | MB of {context} tokens |
|---|---|---|---|
{rows}
"""


def session_memory(family: str) -> str:
    """Megabytes of a sequence of `CONTEXT` tokens in 16 bits, at the published size; nothing where that fails."""
    try:
        with _limited(SECONDS_OF_MEMORY), torch.device("meta"), torch.no_grad(), without_values():
            config = text_part(AutoConfig.for_model(family, **GIVEN.get(family, {})))
            config._attn_implementation = MEASURED
            config._experts_implementation = "batched_mm"  # which asks no values of a router
            config.return_dict = True
            holder: Any = structure(config).holder(config)
            cache = take_cache(
                dict(holder(input_ids=torch.zeros(1, CONTEXT, dtype=torch.long), use_cache=True))
            )
            numbers = sum(one.numel() for layer in cache.layers for one in _tensors(vars(layer)))
    except (Exception, _TooLong):  # whatever the family's code makes of tensors without numbers
        return ""
    return f"{2 * numbers / 1e6:.1f}" if numbers else ""


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, list | dict):
        for one in value.values() if isinstance(value, dict) else value:
            yield from _tensors(one)


def report(verdicts: dict[str, tuple[str, str]], memory: dict[str, str]) -> str:
    kinds = [how if kind == "exact" else kind for kind, how in verdicts.values()]
    counts = [f"| {kind} | {kinds.count(kind)} |" for kind in sorted(set(kinds))]
    rows = [
        f"| {family} | {kind} | {how} | {memory.get(family, '')} |"
        for family, (kind, how) in sorted(verdicts.items())
    ]
    return HEAD.format(
        release=transformers.__version__,
        layers=LAYERS,
        context=f"{CONTEXT:,}",
        counts="\n".join(counts),
        rows="\n".join(rows),
    )


def main(families: list[str]) -> None:
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    verdicts, memory = {}, {}
    for family in families or FAMILIES:
        verdicts[family] = verdict(family)
        memory[family] = session_memory(family) if verdicts[family][0] == "exact" else ""
        print(family, *verdicts[family], memory[family], flush=True)
    if not families:
        REPORT.write_text(report(verdicts, memory))
    if not {kind for kind, _ in verdicts.values()} <= GOOD:
        sys.exit("Some families are neither exact nor refused.")


if __name__ == "__main__":
    main(sys.argv[1:])
