"""What a distributed model is made from: a connection, generation settings, a first prompt.

Invariant: what the user asked for is checked before anything is computed.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig

from corolla.client.audits.auditor import Auditor
from corolla.client.audits.own_blocks import OwnBlocks
from corolla.client.connection import SwarmConnection
from corolla.client.model import saving
from corolla.client.model.arguments import LoadRequest
from corolla.client.model.heads import share_head, use_head_kernel
from corolla.client.model.objects import SharedConnection
from corolla.client.view import SwarmView
from corolla.config import SwarmConfig
from corolla.errors import CheckpointError, UsageError
from corolla.models import families
from corolla.models import prompts as prompt_math
from corolla.models.checkpoints import pretrained
from corolla.models.checkpoints.checkpoint import Checkpoint, open_checkpoint
from corolla.models.checkpoints.pretrained import load_generation_config, load_parts
from corolla.models.checks.forms import cuts_of
from corolla.models.checks.lora import check_adapter
from corolla.models.checks.prefixes import check_prefix
from corolla.models.checks.steps import steps_differ
from corolla.models.guard import check_reach, position_limit, switch_off_outputs
from corolla.models.limits import check_tokens
from corolla.models.lora import initial
from corolla.models.numerics import choose_dtype
from corolla.models.prompts import KeyValuePrefix, Prompt, SoftPrompt
from corolla.models.shell import check_cached_length, what_enters
from corolla.swarm.loop import EventLoopThread
from corolla.swarm.node import Node
from corolla.text import get_logger, well_formed

log = get_logger(__name__)


def client_dtype_for(checkpoint: Checkpoint, wanted: str | torch.dtype) -> torch.dtype:
    """The dtype of the client's part, where "auto" asks the checkpoint and the machine."""
    return wanted if isinstance(wanted, torch.dtype) else choose_dtype(wanted, checkpoint.dtype, "cpu")


def connect(checkpoint: Checkpoint, config: SwarmConfig, dtype: torch.dtype) -> SwarmConnection:
    """Join the swarm. Raises `UsageError` (also for a malformed address), `NotAdmitted` or `SwarmUnavailable`."""
    if not config.peers:
        raise UsageError(
            "Give initial_peers: the address that `corolla bootstrap` or `corolla serve` printed."
        )
    loop = EventLoopThread()
    try:
        node = loop.run(Node.create(initial_peers=config.peers, identity=config.identity, client_only=True))
    except BaseException:
        loop.close()
        raise
    return SwarmConnection(
        loop,
        node,
        config,
        model=checkpoint.identity,
        model_name=checkpoint.name,
        num_blocks=checkpoint.num_blocks,
        cuts=cuts_of(checkpoint.config),
        steps_differ=steps_differ(checkpoint.config),
        observe=auditing(checkpoint, config.audit, dtype),
    )


def auditing(
    checkpoint: Checkpoint, share: float, dtype: torch.dtype
) -> Callable[[SwarmView], Auditor] | None:
    """What has `share` of all answers checked; the client, in `dtype`, computes what no second server can."""
    if not share:
        return None
    own, routed = OwnBlocks(checkpoint, dtype), families.has_experts(checkpoint.config)
    return lambda view: Auditor(view, share, own=own, routed=routed)


def generation_config(checkpoint: Checkpoint, default: GenerationConfig) -> GenerationConfig:
    """The checkpoint's own settings, but for a kind of cache that only a local model could have."""
    config = load_generation_config(checkpoint, default)
    config.cache_implementation = None
    return config


def first_prompt(model: Any, checkpoint: Checkpoint, request: LoadRequest) -> Prompt | None:
    """The saved prompt that was asked for, or one to start training from. Raises `BundleError`, `UsageError`."""
    if request.prompts is not None and not saving.is_only_a_head(request.prompts):
        saved = saving.saved_prompt(
            model, request.prompts, name=checkpoint.name, identity=checkpoint.identity
        )
        return saved.to(model.device)
    if request.tuning_mode is None:
        return None
    if request.tuning_mode == "prefix":
        return _first_prefix(model, checkpoint, request).to(model.device)
    if request.tuning_mode == "lora":
        if saving.head_names(model):
            raise UsageError("A classifier has no LoRA yet: train it with tuning_mode='prefix' or 'ptune'.")
        rank, most = request.lora_rank, model.config.hidden_size
        if rank > most:
            raise UsageError(f"lora_rank is {rank}; servers of this model take {most} at most.")
        names = check_adapter(model.config, request.target_modules)
        scaling = (2 * rank if request.lora_alpha is None else request.lora_alpha) / rank
        return initial(model.config, names, rank, scaling, request.seed).to(model.device)
    blocks = checkpoint.num_blocks if request.tuning_mode == "deep_ptune" else 0
    vectors = _first_vectors(model.get_input_embeddings(), checkpoint, request)
    return SoftPrompt(vectors, blocks, checkpoint.config.hidden_size).to(model.device)


def _first_vectors(embedding: Any, checkpoint: Checkpoint, request: LoadRequest) -> Tensor:
    """A text's embeddings, sampled vocabulary, or noise of their scale; [P, H]."""
    length, seed = request.pre_seq_len, request.seed
    if request.prompt_init == "random":
        weight: Tensor = embedding.weight
        return prompt_math.random_vectors(length, weight.shape[1], std=float(weight.float().std()), seed=seed)
    if request.prompt_init == "vocab":
        return prompt_math.initial_vectors(
            embedding, length, vocab_size=checkpoint.config.vocab_size, seed=seed
        )
    return prompt_math.initial_vectors(embedding, length, token_ids=_text_ids(checkpoint, request))


def _text_ids(checkpoint: Checkpoint, request: LoadRequest) -> Tensor:
    """The tokens of the text to start from, int64 [1, n]. Raises `UsageError`."""
    if not request.prompt_text:
        raise UsageError("prompt_init='text' needs prompt_text, the text to start from.")
    tokenizer = pretrained.load_tokenizer(checkpoint)
    ids: Tensor = tokenizer(well_formed(request.prompt_text), return_tensors="pt").input_ids
    check_tokens(ids[0].tolist(), tokenizer, checkpoint.config, checkpoint.name)
    return ids


def _first_prefix(model: Any, checkpoint: Checkpoint, request: LoadRequest) -> KeyValuePrefix:
    """What the swarm's caches hold of a text's first tokens, or of sampled vocabulary."""
    check_prefix(checkpoint.config)
    ids = _text_ids(checkpoint, request) if request.prompt_init == "text" else None
    chosen = prompt_math.initial_ids(
        request.pre_seq_len, ids, vocab_size=checkpoint.config.vocab_size, seed=request.seed
    )
    holder = model.blocks_holder[0]
    check_reach(len(chosen), position_limit(holder, model.get_input_embeddings(), model.config))
    check_cached_length(model, len(chosen))
    chain = model.blocks.open_chain()
    try:
        return KeyValuePrefix(chain.caches_of(what_enters(holder, chosen[None].to(model.device))))
    finally:
        model.blocks.connection.run(chain.close())


def load_shell(
    part: Any, checkpoint: Checkpoint, shared: SharedConnection, dtype: torch.dtype, request: LoadRequest
) -> Any:
    """The client's part of a model: embeddings and head, frozen but for a classifier's head, in evaluation mode.

    `part` is the client's class for the model's family; a saved model may hold embeddings or a head of its own.
    Raises `CheckpointError` when one of their tensors is missing.
    """
    pattern = families.block_key_pattern(checkpoint.config)
    state = checkpoint.tensors(lambda key: pattern.match(key) is None, widen_to=dtype)
    changes = saving.labels_of(request.prompts, request.config_changes)
    pad, words = changes.get("pad_token_id", 0), checkpoint.config.get_text_config().vocab_size
    added = not -words <= pad < words  # with embeddings of its own, if at all
    if added:
        del changes["pad_token_id"]
    more: dict[str, Any] = {"changes": changes, "connection": shared}
    model, info = load_parts(part, checkpoint, state, dtype, seed=request.seed, **more)  # a new head's
    heads, missing = saving.head_names(model), set(info["missing_keys"])
    if missing - heads:
        raise CheckpointError(f"{checkpoint.name} lacks the tensor {min(missing - heads)}; copy it again.")
    # What others can load, unlike `smollm2`.
    model.name_or_path = model.config._name_or_path = checkpoint.source.location
    model._revision = checkpoint.revision
    configs = [model.config]
    if model.can_generate():
        model.generation_config = generation_config(checkpoint, model.generation_config)
        configs.append(model.generation_config)
    for option in switch_off_outputs(*configs):
        what = families.INNER_OUTPUTS[option]
        log.warning("%s asks for %s by default; these stay on the servers: off.", checkpoint.name, what)
    model.requires_grad_(False).eval().to(request.device)
    model._changes.note(model, but=missing)
    if request.prompts is not None:
        saving.take_tables(model, saving.read_tables(request.prompts, with_head=bool(heads)))
    if added:
        words = model.get_input_embeddings().num_embeddings
        if not 0 <= pad < words:
            raise UsageError(f"pad_token_id is {pad}; this model has {words} tokens, 0 to {words - 1}.")
        model.config.pad_token_id = pad
    changed = model._changes.changed(model)
    model.requires_grad_(False)
    if model.get_output_embeddings() is not None:
        share_head(model)
    use_head_kernel(model, request.swarm.quantization)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in heads)
    model._changes.note(model, but=changed)
    return model


def load_tokenizer(
    name: str | Path,
    *,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | Path | None = None,
) -> Any:
    """The tokenizer of whatever `from_pretrained` takes: a hub name, a local folder, a .gguf file or `smollm2`.

    Raises `UnknownModel`, `UnsupportedFamily`, or `CheckpointError` where there is no tokenizer that can be read.
    """
    return pretrained.load_tokenizer(
        open_checkpoint(str(name), revision=revision, token=token, cache_dir=cache_dir)
    )
