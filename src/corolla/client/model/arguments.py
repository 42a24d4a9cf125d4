"""What people write after `from_pretrained`, in transformers' and Petals' words.

Invariant: every argument of transformers' own `from_pretrained`, and of Petals' client, either means the same here, or
asks for what is done anyway, or is refused in one sentence that says what to do; so is a name that nobody knows.
What was asked for is checked before anything is downloaded.
"""

from __future__ import annotations

import difflib
import inspect
import math
import os
import warnings
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, get_args

import torch

from corolla.config import LORA_RANK, SwarmConfig, TuningMode, check_kinds
from corolla.errors import UnexpectedArgument, UsageError
from corolla.models.numerics import DTYPES

_OWN_CONFIG = (
    "the checkpoint's own is used, since the servers compute with it: change model.config afterwards"
)
_OWN_BLOCKS = "the blocks are on the servers, which choose that themselves"
_QUANTIZED = (
    'the servers choose how blocks are quantized, and quantization="int8" or "bfloat16" does it for the client\'s '
    "embedding and head"
)
_ADAPTER = "load the adapter afterwards, with PeftModel.from_pretrained(model, …)"
_NOT_HERE = "it is for models whose blocks are on this machine"
_PAUSES = "servers say when they are busy, and show signs of life while they work"
_PETALS_TIMES = {
    "min_backoff": 1,
    "max_backoff": 60,
    "ban_timeout": 15,
    "connect_timeout": 5,
    "request_timeout": 180,
    "ping_timeout": 2,
    "max_pinged": 3,
    "update_period": 60,
    "daemon_startup_timeout": 60,
}
# By name: the values that ask for nothing special, and why others are refused.
_THEIRS: dict[str, tuple[tuple[Any, ...], str]] = {
    "trust_remote_code": ((None, False), "Corolla never runs the Python code of a model's repository"),
    "use_safetensors": ((None, True), "Corolla reads safetensors only, since pickled weights can run code"),
    "weights_only": ((None, True), "Corolla reads safetensors only, since pickled weights can run code"),
    "attn_implementation": ((None,), _OWN_BLOCKS),
    "experts_implementation": ((None,), _OWN_BLOCKS),
    "load_in_8bit": ((None, False), _QUANTIZED),
    "load_in_4bit": ((None, False), _QUANTIZED),
    "quantization_config": ((None,), _QUANTIZED),
    "config": ((None,), _OWN_CONFIG),
    "generation_config": ((None,), "change model.generation_config afterwards"),
    "state_dict": ((None,), "the checkpoint's own weights are used: call model.load_state_dict afterwards"),
    "local_files_only": ((None, False), "set HF_HUB_OFFLINE=1 in the environment to stay off the network"),
    "force_download": ((None, False), "remove the files from the hub's cache to have them fetched again"),
    "subfolder": ((None, "", "."), "download the checkpoint and give the path of that folder as its name"),
    "variant": ((None,), "only a checkpoint's main weights are read"),
    "gguf_file": ((None,), "give the path of the .gguf file as the model's name"),
    "use_auth_token": ((None,), "it is called token"),
    "proxies": ((None,), "set HTTPS_PROXY in the environment"),
    "output_loading_info": ((None, False), "a checkpoint that lacks a tensor is refused, so there is none"),
    "ignore_mismatched_sizes": ((None, False), "a checkpoint whose sizes do not fit is refused"),
    "adapter_kwargs": ((None,), _ADAPTER),
    "adapter_name": ((None, "default"), _ADAPTER),
    **dict.fromkeys(
        ("max_memory", "offload_folder", "tp_plan", "tp_size", "device_mesh", "distributed_config"),
        ((None,), _NOT_HERE),
    ),
    **dict.fromkeys(("fusion_config", "kernel_config", "key_mapping"), ((None,), _NOT_HERE)),
    **dict.fromkeys(
        ("offload_state_dict", "offload_buffers", "use_kernels", "allow_all_kernels"),
        ((None, False), _NOT_HERE),
    ),
    "disable_mmap": ((None, False, True), _NOT_HERE),
    # Petals'
    "max_retries": ((None,), "patience says for how many seconds the client tries again"),
    **{name: ((None, default), _PAUSES) for name, default in _PETALS_TIMES.items()},
    "dht_prefix": ((None,), "servers are found by the identity of the checkpoint's weights"),
    "active_adapter": ((None,), _ADAPTER),
    "show_route": ((None, False, "inference"), "corolla status shows who serves what"),
    "use_server_to_server": ((None, True, False), _PAUSES),
}
_IGNORED = frozenset({"low_cpu_mem_usage", "torchscript", "tqdm_class"})  # whatever they say, it is so
_DEVICES = ("auto", "balanced", "balanced_low_0", "sequential")  # all of them one device here


@dataclass(frozen=True)
class LoadRequest:
    """A model that was asked for: see `from_pretrained`. Raises `UsageError` for a prompt that cannot be made."""

    name: str
    swarm: SwarmConfig
    tuning_mode: str | None
    pre_seq_len: int
    prompt_init: str
    prompt_text: str | None
    seed: int
    prompts: Path | None
    dtype: str | torch.dtype
    device: torch.device | None
    revision: str | None
    token: str | bool | None
    cache_dir: str | Path | None
    # Fields of the checkpoint's config that are the client's own affair.
    config_changes: Mapping[str, Any] = field(default_factory=dict)
    lora_rank: int = LORA_RANK
    lora_alpha: float | None = None
    target_modules: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        check_kinds(self)
        mode, length, init = self.tuning_mode, self.pre_seq_len, self.prompt_init
        *modes, last = get_args(TuningMode)
        if mode not in (None, *modes, last):
            raise UsageError(
                f"tuning_mode is {mode!r}; it must be None, {', '.join(map(repr, modes))} or {last!r}."
            )
        if mode is not None and length < 1:
            raise UsageError(
                f"tuning_mode={mode!r} needs at least one prompt token, but pre_seq_len is {length}."
            )
        if init not in ("vocab", "text", "random"):
            raise UsageError(f"prompt_init is {init!r}; it must be 'vocab', 'text' or 'random'.")
        if self.lora_rank < 1:
            raise UsageError(f"lora_rank is {self.lora_rank}; an adapter has a rank of at least 1.")
        if self.lora_alpha is not None and not 0 < self.lora_alpha < math.inf:
            raise UsageError(f"lora_alpha is {self.lora_alpha}; it must be a number above 0.")
        if not -(2**63) <= self.seed < 2**64:  # torch takes no other
            raise UsageError(f"seed is {self.seed}; it must be from {-(2**63)} to {2**64 - 1}.")
        if mode == "prefix" and length < 2:
            raise UsageError(
                "tuning_mode='prefix' keeps its first token as it is, so it needs at least 2, but pre_seq_len is "
                f"{length}."
            )
        if mode == "prefix" and init == "random":
            raise UsageError(
                "A prefix of random keys and values is hardly trained: give prompt_init='text' with a prompt_text, or "
                "'vocab'."
            )
        if mode is not None and self.prompts is not None:
            raise UsageError("Give either tuning_mode, for a new prompt, or prompts, for a saved one.")


def _target_modules(asked: str | Collection[str] | None) -> Any:
    """Names of layers; None for all, which peft calls so."""
    if isinstance(asked, str):
        return None if asked == "all-linear" else (asked,)
    return asked


def from_pretrained(
    name: str | Path,
    *,
    initial_peers: str | Collection[str] | None = (),
    tuning_mode: str | None = None,
    pre_seq_len: int | None = 16,
    lora_rank: int | None = LORA_RANK,
    lora_alpha: float | None = None,
    target_modules: str | Collection[str] | None = None,
    prompt_init: str | None = "vocab",
    prompt_text: str | None = None,
    seed: int | None = 0,
    prompts: str | Path | None = None,
    dtype: str | torch.dtype | None = "auto",
    torch_dtype: str | torch.dtype | None = None,
    device_map: Any = None,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | Path | None = None,
    quantization: str | None = None,
    local_blocks: int | None = None,
    patience: float | None = None,
    wire: str | None = None,
    mixed: bool | None = None,
    identity: str | Path | None = None,
    allowed_servers: str | Collection[str] | None = None,
    blocked_servers: str | Collection[str] | None = None,
    audit: float | None = None,
    **others: Any,
) -> LoadRequest:
    """A causal language model whose blocks run in the swarm. None stands for an argument's default.

    Args:
        name: A hub name, a local folder, a .gguf file (on the hub: `owner/repository/file.gguf`), or `smollm2`.
        initial_peers: The addresses to join through, which `corolla bootstrap` and `corolla serve` print.
        tuning_mode: None, "ptune" (a prompt before the input), "deep_ptune" (and one before each block), "prefix"
            (keys and values before those of each block, started from what the swarm computes for a text) or "lora".
        pre_seq_len: How many prompt tokens.
        lora_rank, lora_alpha, target_modules: As in peft's `LoraConfig`: the rank, what is divided by it for the scale
            (twice the rank), and the layers, all that can be changed.
        prompt_init: What a new prompt starts as: "vocab", "text" (with `prompt_text`) or "random", under `seed`.
        prompts: The folder of a saved prompt: a bundle, what a trainer wrote, or one of peft's prompt tuning.
        dtype: "auto" or a torch dtype, of the client's part; `torch_dtype` is its older name.
        device_map: One device for the client's part.
        revision, token, cache_dir: As in transformers.
        quantization: Of the client's embedding and head: "none", "bfloat16" or "int8".
        local_blocks: How many of the first blocks this machine runs itself. 0.
        patience: Seconds to wait, without any progress, for servers that are gone. 600.
        wire: How activations travel: "compute" (as they are), "float16" or "int8" (inexact, for slow lines).
        mixed: Whether servers of different dtype or quantization may work together, which is less exact.
        identity: The file of the peer id that guarded servers know this client by.
        allowed_servers, blocked_servers: Peer ids: use only these, or none of these.
        audit: The share of requests, such as 0.05, that are computed again: a server that this machine finds wrong is
            not used any more, and what it had a part in ends with a `LyingServer`. 0.
        others: Other arguments of transformers' and of Petals', where they ask for nothing special.

    Raises:
        UnexpectedArgument: A name that it does not have; also a `TypeError`.
        UsageError, UnknownModel, UnsupportedFamily, CheckpointError, BundleError: What was asked for cannot be had.
        NotAdmitted, SwarmUnavailable, MissingBlocks: The swarm lets nobody in, is not there, or lacks blocks.
    """
    if not isinstance(name, str | os.PathLike):
        raise UsageError(f"from_pretrained takes the name of a model, or its folder, not {name!r:.60}.")
    if os.path.exists(name):
        others.pop("local_files_only", None)
    if "trust" in others:
        warnings.warn("from_pretrained's trust is called allowed_servers now", FutureWarning, stacklevel=3)
        allowed_servers = others.pop("trust")
    _check_others(others)
    return LoadRequest(
        name=str(name),
        swarm=SwarmConfig.of(
            initial_peers,
            quantization=quantization,
            local_blocks=local_blocks,
            patience=patience,
            wire=wire,
            mixed=mixed,
            identity=identity,
            trust=allowed_servers,
            blocked=blocked_servers,
            audit=audit,
        ),
        tuning_mode=tuning_mode,
        pre_seq_len=16 if pre_seq_len is None else pre_seq_len,
        lora_rank=LORA_RANK if lora_rank is None else lora_rank,
        lora_alpha=lora_alpha,
        target_modules=_target_modules(target_modules),
        prompt_init="vocab" if prompt_init is None else prompt_init,
        prompt_text=prompt_text,
        seed=0 if seed is None else seed,
        prompts=Path(prompts) if isinstance(prompts, str | os.PathLike) else prompts,
        dtype=client_dtype(dtype, torch_dtype),
        device=client_device(device_map),
        revision=revision,
        token=token,
        cache_dir=cache_dir,
    )


PROBLEM_TYPES = (None, "single_label_classification", "multi_label_classification", "regression")


def classifier(
    name: str | Path,
    *,
    num_labels: int | None = None,
    id2label: Mapping[int, str] | None = None,
    label2id: Mapping[str, int] | None = None,
    problem_type: str | None = None,
    pad_token_id: int | None = None,
    **options: Any,
) -> LoadRequest:
    """A classifier of sequences: its head is here, and trained together with the prompt.

    Args:
        name: As of `AutoDistributedModelForCausalLM.from_pretrained`, like all `options`.
        num_labels, id2label, label2id, problem_type, pad_token_id: As in the config of transformers' classifiers. A
            head that the checkpoint has not is new, drawn under `seed`; with `prompts`, that and these are as saved.
    """
    if num_labels is not None and not (isinstance(num_labels, int) and num_labels >= 1):
        raise UsageError(f"num_labels is {num_labels!r}; a classifier needs a number of at least 1.")
    if pad_token_id is not None and (isinstance(pad_token_id, bool) or not isinstance(pad_token_id, int)):
        raise UsageError(f"pad_token_id is {pad_token_id!r:.60}; give the number of a token.")
    for named, names in (("id2label", id2label), ("label2id", label2id)):
        if names is not None and not isinstance(names, Mapping):
            raise UsageError(f"{named} is {names!r:.60}; give a dictionary such as {{…}} of ids and names.")
    if num_labels is not None and id2label is not None and len(id2label) != num_labels:
        raise UsageError(f"num_labels is {num_labels}, and id2label names {len(id2label)}: give one of them.")
    if problem_type not in PROBLEM_TYPES:
        raise UsageError(
            f"problem_type is {problem_type!r}; it must be one of {', '.join(PROBLEM_TYPES[1:])}."
        )
    if id2label is not None and label2id is None:
        label2id = {label: index for index, label in id2label.items()}
    if label2id is not None and id2label is None:
        id2label = {index: label for label, index in label2id.items()}
    changes = {
        "num_labels": num_labels,
        "id2label": id2label,
        "label2id": label2id,
        "problem_type": problem_type,
        "pad_token_id": pad_token_id,
    }
    given = {key: value for key, value in changes.items() if value is not None}
    return replace(from_pretrained(name, **options), config_changes=given)


def own_arguments() -> list[str]:
    """The names that `from_pretrained` takes by keyword."""
    parameters = inspect.signature(from_pretrained).parameters.values()
    return [one.name for one in parameters if one.kind is one.KEYWORD_ONLY]


def _check_others(others: dict[str, Any]) -> None:
    """Raises `UsageError` for arguments that are none of Corolla's own, unless they ask for nothing special."""
    for name, value in others.items():
        if name in _IGNORED:
            continue
        if name not in _THEIRS:
            near = difflib.get_close_matches(name, own_arguments(), 1)
            hint = f"did you mean {near[0]}?" if near else f"it takes {', '.join(sorted(own_arguments()))}."
            raise UnexpectedArgument(f"from_pretrained has no argument {name}: {hint}")
        harmless, reason = _THEIRS[name]
        if not any(value is one or (isinstance(one, str) and value == one) for one in harmless):
            raise UsageError(f"Leave out from_pretrained's argument {name}={value!r:.60}: {reason}.")


def client_dtype(dtype: Any, torch_dtype: Any) -> str | torch.dtype:
    """The dtype of the client's part, or "auto"; `torch_dtype` is the older name. Raises `UsageError`."""
    wanted = torch_dtype if dtype in (None, "auto") and torch_dtype is not None else dtype
    if wanted is None:
        return "auto"
    named = wanted.removeprefix("torch.") if isinstance(wanted, str) else None
    if named not in ("auto", *DTYPES) and wanted not in DTYPES.values():
        raise UsageError(f"dtype is {wanted!r:.60}; it must be auto, {', '.join(DTYPES)}.")
    found: str | torch.dtype = wanted if named is None else named
    return found


def client_device(device_map: Any) -> torch.device | None:
    """Where `device_map` puts the client's part, which is one piece. Raises `UsageError`."""
    wanted = device_map
    if isinstance(wanted, dict) and len(set(map(str, wanted.values()))) == 1:
        wanted = next(iter(wanted.values()))
    if wanted is None:
        return None
    if isinstance(wanted, str) and wanted in _DEVICES:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(wanted)
        torch.empty(0, device=device)
    except (RuntimeError, TypeError, AssertionError, ValueError) as error:
        raise UsageError(
            f"device_map is {device_map!r}; the client's part is one piece, so give one device of this machine, "
            'such as "cpu" or "cuda:0", or "auto".'
        ) from error
    if device.type == "meta":
        raise UsageError("device_map is meta, where nothing can be computed; give cpu, cuda or auto.")
    return device
