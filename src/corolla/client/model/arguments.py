"""What people write after `from_pretrained`, in transformers' words, for a model whose blocks are elsewhere.

Invariant: every argument of transformers' own `from_pretrained` either means the same here, or asks for what is
done anyway, or is refused in one sentence that says what to do; so is a name that nobody knows.
"""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch

from corolla.errors import UsageError
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
    "max_memory": ((None,), _NOT_HERE),
    "offload_folder": ((None,), _NOT_HERE),
    "offload_state_dict": ((None, False), _NOT_HERE),
    "offload_buffers": ((None, False), _NOT_HERE),
    "tp_plan": ((None,), _NOT_HERE),
    "tp_size": ((None,), _NOT_HERE),
    "device_mesh": ((None,), _NOT_HERE),
    "distributed_config": ((None,), _NOT_HERE),
    "fusion_config": ((None,), _NOT_HERE),
    "use_kernels": ((None, False), _NOT_HERE),
    "kernel_config": ((None,), _NOT_HERE),
    "allow_all_kernels": ((None, False), _NOT_HERE),
    "key_mapping": ((None,), _NOT_HERE),
    "disable_mmap": ((None, False, True), _NOT_HERE),
}
_INNER = frozenset({"connection", "only"})
_IGNORED = frozenset({"low_cpu_mem_usage", "torchscript", "tqdm_class"})  # whatever they say, it is so
_DEVICES = ("auto", "balanced", "balanced_low_0", "sequential")  # all of them one device here


def check_others(others: dict[str, Any], own: Sequence[str]) -> None:
    """Raises `UsageError` for arguments that are none of Corolla's `own`, unless they ask for nothing special."""
    for name, value in others.items():
        if name in _IGNORED:
            continue
        if name not in _THEIRS:
            near = difflib.get_close_matches(name, own, 1)
            hint = f"did you mean {near[0]}?" if near else f"it takes {', '.join(sorted(own))}."
            raise UsageError(f"from_pretrained has no argument {name}: {hint}")
        harmless, reason = _THEIRS[name]
        if not any(value is one or (isinstance(one, str) and value == one) for one in harmless):
            raise UsageError(f"Leave out from_pretrained's argument {name}={value!r:.60}: {reason}.")


def own_arguments(function: Callable[..., Any]) -> list[str]:
    """The names that `function` takes by keyword, but for what only Corolla itself gives."""
    parameters = inspect.signature(function).parameters.values()
    return [one.name for one in parameters if one.kind is one.KEYWORD_ONLY and one.name not in _INNER]


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
