"""The distributed models: each family's own `…ForCausalLM`, with its blocks in the swarm.

Invariant: whatever the local model can do (generate, train, be wrapped by peft or a trainer) the
distributed one inherits; the overrides below only bring in the session and the prompts, and keep a
checkpoint without blocks from being written as if it were whole.
"""

from __future__ import annotations

import weakref
from collections.abc import Collection
from contextvars import ContextVar
from functools import cache as memoize
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
import transformers
from torch import Tensor
from transformers import GenerationConfig, PretrainedConfig, PreTrainedModel

from corolla.client.auditor import check_share
from corolla.client.connection import SwarmConnection
from corolla.client.heads import share_head, use_head_kernel, using_head
from corolla.client.local_blocks import check_local, load_local
from corolla.client.own_blocks import OwnBlocks
from corolla.client.remote_blocks import RemoteBlocks
from corolla.client.retry import DEFAULT_PATIENCE
from corolla.client.session import InferenceSession, sequences_of
from corolla.errors import CheckpointError, UnsupportedFamily, UsageError
from corolla.models import families
from corolla.models import prompts as prompt_math
from corolla.models.cache import RemoteCache
from corolla.models.checkpoint import Checkpoint, open_checkpoint
from corolla.models.limits import check_tokens
from corolla.models.numerics import choose_dtype
from corolla.models.pretrained import load_generation_config, load_parts, load_tokenizer
from corolla.models.prompt_files import load_prompt, save_prompt
from corolla.models.prompts import SoftPrompt
from corolla.models.shell import BaseModelHooks, BlocksLayer, replace_blocks
from corolla.text import well_formed
from corolla.wire.compression import check_format

TUNING_MODES = (None, "ptune", "deep_ptune")


@memoize
def distributed_class(architecture: str) -> type[PreTrainedModel]:
    """The distributed form of a `transformers` class such as `LlamaForCausalLM`.

    Raises `UnsupportedFamily` for anything but a causal language model.
    """
    family: Any = getattr(transformers, architecture, None)
    if family is None or not architecture.endswith(("ForCausalLM", "LMHeadModel")):
        raise UnsupportedFamily(
            f"{architecture} is not a causal language model of transformers; Corolla serves those (…ForCausalLM)."
        )

    class Distributed(family):  # type: ignore[misc]
        """See `AutoDistributedModelForCausalLM`."""

        def __init__(self, config: PretrainedConfig, *, connection: SwarmConnection) -> None:
            super().__init__(config)
            self.prompts: SoftPrompt | None = None
            self._blocks = RemoteBlocks(connection, 0, config.num_hidden_layers)
            self._active_session: ContextVar[InferenceSession | None] = ContextVar("session", default=None)
            layer = BlocksLayer(self._blocks.run, returns_tuple=families.returns_tuple(config))
            holder = replace_blocks(self, families.blocks_prefix(config), layer)
            BaseModelHooks(holder, prompts=self._get_prompts, default_cache=self._default_cache)
            weakref.finalize(self, connection.close)

        # --- blocks, prompts, sessions ------------------------------------------------------------------

        @property
        def blocks(self) -> RemoteBlocks:
            """The blocks in the swarm; `model.blocks[i:j](hidden)` runs some of them."""
            return self._blocks

        def _get_prompts(self) -> SoftPrompt | None:
            return self.prompts

        def inference_session(self, max_length: int | None = None) -> InferenceSession:
            """A session for up to `max_length` of the user's tokens a row; prompts come on top."""
            return InferenceSession(self._blocks, self.prompts, self._active_session, max_length=max_length)

        @property
        def active_session(self) -> InferenceSession | None:
            """The innermost session whose `with` block we are in."""
            return self._active_session.get()

        def _default_cache(self, use_cache: bool) -> RemoteCache | None:
            if self.training:
                return None
            if self.active_session is not None:
                return self.active_session.cache
            return self.inference_session().cache if use_cache and not torch.is_grad_enabled() else None

        # --- generation ---------------------------------------------------------------------------------

        def generate(
            self,
            inputs: Tensor | None = None,
            *args: Any,
            session: InferenceSession | None = None,
            **kwargs: Any,
        ) -> Any:
            """As `transformers`' generate; with a session, goes on after what it holds.

            `inputs` [R, T] are then the new tokens (None: none), and only what came after the earlier
            calls' output is returned. Raises `SessionLimit` before anything is computed.
            """
            session = session or self.active_session
            given = kwargs.get("past_key_values")
            if given is not None or kwargs.get("use_cache") is False:
                return super().generate(inputs, *args, **kwargs)
            if session is not None:
                with using_head(self):
                    return self._generate_in(session, inputs, *args, **kwargs)
            own = InferenceSession(self._blocks, self.prompts, ContextVar("unused"), max_length=None)
            with own, using_head(self):
                return self._generate_in(own, inputs, *args, **kwargs)

        def _generate_in(
            self, session: InferenceSession, inputs: Tensor | None, *args: Any, **kwargs: Any
        ) -> Any:
            inputs = kwargs.pop("input_ids", None) if inputs is None else inputs
            if kwargs.get("inputs_embeds") is not None:
                return super().generate(inputs, *args, past_key_values=session.cache, **kwargs)
            before = 0 if session.output_ids is None else int(session.output_ids.shape[1])
            ids, mask = session.begin(inputs, kwargs.pop("attention_mask", None))
            if mask is not None:
                kwargs["attention_mask"] = mask
            result = super().generate(ids, *args, past_key_values=session.cache, **kwargs)
            newer = session.keep(sequences_of(result), before)
            if isinstance(result, Tensor):
                return newer
            result.sequences = newer
            return result

        def _prepare_cache_for_generation(
            self,
            generation_config: Any,
            model_kwargs: dict[str, Any],
            generation_mode: Any,
            batch_size: int,
            max_cache_length: int,
        ) -> None:
            """Where `generate` knows how far it may go: the room is reserved before anything is computed."""
            cache = model_kwargs.get("past_key_values")
            if isinstance(cache, RemoteCache):
                generation_config.cache_implementation = None  # some checkpoints ask for a local kind
                cache.reserve(max_cache_length)
            super()._prepare_cache_for_generation(
                generation_config, model_kwargs, generation_mode, batch_size, max_cache_length
            )

        # --- saving and ending --------------------------------------------------------------------------

        def save_pretrained(self, save_directory: str | Path, *_args: Any, **_kwargs: Any) -> None:
            """Write the prompt, the only thing that was trained; never a checkpoint without its blocks."""
            if self.prompts is None:
                raise UsageError(
                    "A distributed model has no blocks to save and no prompt was trained: load it with "
                    "tuning_mode='ptune' to train one, or use the original checkpoint."
                )
            view = self._blocks.connection.view
            save_prompt(
                Path(save_directory),
                self.prompts,
                config=self.config,
                model_name=view.model_name,
                identity=view.model,
            )

        def close(self) -> None:
            """Leave the swarm; the model cannot be used afterwards."""
            self._blocks.connection.close()

        def __enter__(self) -> Self:
            return self

        def __exit__(
            self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
        ) -> None:
            self.close()

        @classmethod
        def from_pretrained(cls, name: str | Path, *args: Any, **kwargs: Any) -> PreTrainedModel:
            """See `AutoDistributedModelForCausalLM.from_pretrained`; the checkpoint must be of this family."""
            if "connection" in kwargs:  # the inner call, from `load_shell`
                return super().from_pretrained(name, *args, **kwargs)
            return load_distributed(name, *args, only=architecture, **kwargs)

    # transformers looks conversions of weights up by the class's name, and refuses them to classes that are
    # not its own; so the class carries the family's name and module.
    Distributed.__name__, Distributed.__module__ = architecture, family.__module__
    Distributed.__qualname__ = f"Distributed{architecture}"
    return Distributed


def load_distributed(
    name: str | Path,
    *,
    initial_peers: list[str] | tuple[str, ...] | str = (),
    tuning_mode: str | None = None,
    pre_seq_len: int = 16,
    prompt_init: str = "vocab",
    prompt_text: str | None = None,
    prompts: str | Path | None = None,
    dtype: str | torch.dtype = "auto",
    revision: str | None = None,
    token: str | None = None,
    cache_dir: str | Path | None = None,
    seed: int = 0,
    patience: float | None = None,
    quantization: str = "none",
    wire: str = "compute",
    mixed: bool = False,
    identity: str | Path | None = None,
    trust: Collection[str] | None = None,
    audit: float = 0.0,
    local_blocks: int = 0,
    connection: SwarmConnection | None = None,
    only: str | None = None,
) -> PreTrainedModel:
    """See `AutoDistributedModelForCausalLM.from_pretrained`."""
    _check_tuning(tuning_mode, pre_seq_len, prompt_init, prompts)
    check_share(audit)
    checkpoint = open_checkpoint(str(name), revision=revision, token=token, cache_dir=cache_dir)
    if only is not None and checkpoint.architecture != only:
        raise UsageError(
            f"{name} is a {checkpoint.architecture}, not a {only}: use Distributed{checkpoint.architecture} "
            "or AutoDistributedModelForCausalLM."
        )
    connection = connection or _connect(checkpoint, initial_peers, patience, wire, mixed, identity, trust)
    try:
        connection.check_complete(check_local(local_blocks, checkpoint.num_blocks))
        model = load_shell(checkpoint, connection, dtype, quantization)
        model.blocks.local = load_local(checkpoint, local_blocks, model.dtype)
        own = OwnBlocks(checkpoint, model.dtype)
        connection.start_audits(audit, own, routed=families.has_experts(checkpoint.config))
        if prompts is not None:
            model.prompts = load_prompt(
                Path(prompts), model_name=checkpoint.name, identity=checkpoint.identity
            )
        elif tuning_mode is not None:
            model.prompts = initial_prompt(
                model, checkpoint, tuning_mode, pre_seq_len, prompt_init, prompt_text, seed
            )
    except BaseException:
        connection.close()
        raise
    return model


def _check_tuning(mode: str | None, length: int, init: str, prompts: str | Path | None) -> None:
    if mode not in TUNING_MODES:
        raise UsageError(f"tuning_mode is {mode!r}; it must be None, 'ptune' or 'deep_ptune'.")
    if mode is not None and length < 1:
        raise UsageError(
            f"tuning_mode={mode!r} needs at least one prompt token, but pre_seq_len is {length}."
        )
    if init not in ("vocab", "text", "random"):
        raise UsageError(f"prompt_init is {init!r}; it must be 'vocab', 'text' or 'random'.")
    if mode is not None and prompts is not None:
        raise UsageError("Give either tuning_mode, for a new prompt, or prompts, for a saved one.")


def _connect(
    checkpoint: Checkpoint,
    initial_peers: list[str] | tuple[str, ...] | str,
    patience: float | None,
    wire: str,
    mixed: bool,
    identity: str | Path | None,
    trust: Collection[str] | None,
) -> SwarmConnection:
    peers = [initial_peers] if isinstance(initial_peers, str) else list(initial_peers)
    if not peers:
        raise UsageError(
            "Give initial_peers: the address that `corolla bootstrap` or `corolla serve` printed."
        )
    return SwarmConnection.connect(
        peers,
        model=checkpoint.identity,
        model_name=checkpoint.name,
        num_blocks=checkpoint.num_blocks,
        patience=DEFAULT_PATIENCE if patience is None else patience,
        wire=check_format(wire),
        mixed=mixed,
        identity=None if identity is None else Path(identity),
        trust=trust,
    )


def load_shell(
    checkpoint: Checkpoint,
    connection: SwarmConnection,
    dtype: str | torch.dtype,
    quantization: str = "none",
) -> Any:
    """The client's part of a model: embeddings and head, frozen, in evaluation mode.

    Raises `CheckpointError` when one of their tensors is missing.
    """
    pattern = families.block_key_pattern(checkpoint.config)
    if not isinstance(dtype, torch.dtype):
        dtype = choose_dtype(dtype, checkpoint.dtype, "cpu")
    state = checkpoint.tensors(lambda key: pattern.match(key) is None, widen_to=dtype)
    model: Any
    part = distributed_class(checkpoint.architecture)
    model, info = load_parts(part, checkpoint, state, dtype, connection=connection)
    if info["missing_keys"]:
        raise CheckpointError(
            f"{checkpoint.name} lacks the tensor {min(info['missing_keys'])}; copy it again."
        )
    model.config._name_or_path = model.name_or_path = checkpoint.name
    model.generation_config = _generation_config(checkpoint, model.generation_config)
    model.requires_grad_(False).eval()
    share_head(model)
    use_head_kernel(model, quantization)
    return model


def _generation_config(checkpoint: Checkpoint, default: GenerationConfig) -> GenerationConfig:
    """The checkpoint's own settings, but for a kind of cache that only a local model could have."""
    config = load_generation_config(checkpoint, default)
    config.cache_implementation = None
    return config


def initial_prompt(
    model: Any, checkpoint: Checkpoint, mode: str, length: int, init: str, text: str | None, seed: int
) -> SoftPrompt:
    """A prompt to start training from: a text's embeddings, sampled vocabulary, or noise of their scale."""
    embedding = model.get_input_embeddings()
    if init == "random":
        weight: Tensor = embedding.weight
        vectors = prompt_math.random_vectors(
            length, weight.shape[1], std=float(weight.float().std()), seed=seed
        )
    elif init == "text":
        if not text:
            raise UsageError("prompt_init='text' needs prompt_text, the text to start from.")
        tokenizer = load_tokenizer(checkpoint)
        ids = tokenizer(well_formed(text), return_tensors="pt").input_ids
        check_tokens(ids[0].tolist(), tokenizer, checkpoint.config, checkpoint.name)
        vectors = prompt_math.initial_vectors(embedding, length, token_ids=ids)
    else:
        vectors = prompt_math.initial_vectors(
            embedding, length, vocab_size=checkpoint.config.vocab_size, seed=seed
        )
    blocks = checkpoint.num_blocks if mode == "deep_ptune" else 0
    return SoftPrompt(vectors, blocks, checkpoint.config.hidden_size).to(model.device)


class AutoDistributedModelForCausalLM:
    """Loads any supported family by the checkpoint's own architecture."""

    def __init__(self) -> None:
        raise UsageError("Use AutoDistributedModelForCausalLM.from_pretrained(name, initial_peers=[…]).")

    @staticmethod
    def from_pretrained(name: str | Path, **kwargs: Any) -> Any:
        """A causal language model whose blocks run in the swarm.

        `name` is a hub name, a local folder, a .gguf file or `smollm2`; `initial_peers` the addresses to
        join through; `tuning_mode` None, "ptune" or "deep_ptune" with `pre_seq_len` prompt tokens, started
        by `prompt_init` ("vocab", "text" with `prompt_text`, or "random") under `seed`; `prompts` a saved
        bundle instead; `dtype` "auto" or a torch dtype for the client's part; `revision`, `token`,
        `cache_dir` as in transformers; `patience` the seconds to wait for servers that are gone;
        `quantization` of the client's embedding and head: "none", "bfloat16" or "int8"; `wire` how
        activations travel: "compute" (as they are), "float16" or "int8" (both inexact, for slow lines); `mixed`
        whether servers of different dtype or quantization may work together, which is less exact; `identity` the
        file of the peer id that guarded servers know this client by; `trust` the peer ids of the only servers to
        be used; `audit` the share of requests, such as 0.05, that others compute again: a server found wrong is
        not used any more, and what it had a part in ends with a `LyingServer`; `local_blocks` how many of the
        first blocks this machine runs itself.

        Raises `UnknownModel`, `UnsupportedFamily`, `CheckpointError`, `MissingBlocks`, `BundleError`,
        `NotAdmitted`.
        """
        return load_distributed(name, **kwargs)
