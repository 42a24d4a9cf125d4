"""The one door to transformers' loaders: everything of ours that is `from_pretrained` comes through here.

Invariant: no file of a model's repository is ever run, and nothing is asked on stdin: what cannot be read
without the repository's own code is refused in one sentence, and so is whatever a loader raises.
"""

from __future__ import annotations

import contextlib
import copy
import io
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
from transformers import AutoConfig, GenerationConfig, PretrainedConfig, PreTrainedModel
from transformers.utils import logging as transformers_logging

from corolla.errors import CheckpointError, UnsupportedFamily
from corolla.json_files import read_object
from corolla.models.checkpoints.source import Source
from corolla.text import one_line

TOKENIZER_CONFIG = "tokenizer_config.json"

T = TypeVar("T")


class Opened(Protocol):
    """What the loaders ask of a checkpoint (`checkpoint.py: Checkpoint`)."""

    name: str  # as the user gave it
    config: PretrainedConfig
    source: Source


def load_config(name: str, path: Path, raw: Mapping[str, Any]) -> PretrainedConfig:
    """The config in `path`, whose content is `raw`. Raises `UnsupportedFamily`."""
    try:
        return _read(lambda: AutoConfig.from_pretrained(path.parent, trust_remote_code=False))
    except _Unreadable as error:
        kind = one_line(raw.get("model_type", "unknown"))
        code = "; its repository brings code for it, which is never run" if raw.get("auto_map") else ""
        raise UnsupportedFamily(
            f"The config of {name} (model type {kind}) is not one that Corolla knows{code}."
        ) from error.__cause__


def load_tokenizer(checkpoint: Opened) -> Any:
    """The checkpoint's tokenizer. Raises `CheckpointError` when it has none, or none that can be read."""
    from transformers import AutoTokenizer

    refuse_tokenizer_code(checkpoint)
    source = checkpoint.source
    try:
        tokenizer = _read(
            lambda: AutoTokenizer.from_pretrained(
                source.location, **source.loader_arguments(), trust_remote_code=False
            )
        )
    except _Unreadable as error:
        raise CheckpointError(
            f"{checkpoint.name} has no tokenizer that can be read ({error}); chatting and tuning need one: copy the "
            "model's tokenizer files beside it."
        ) from error.__cause__
    # Families without their files get an empty one.
    if len(set(tokenizer.get_vocab().values()) - set(tokenizer.all_special_ids)) < 2:
        raise CheckpointError(
            f"{checkpoint.name} has no tokenizer: copy the model's tokenizer.json and {TOKENIZER_CONFIG} beside it."
        )
    return tokenizer


def refuse_tokenizer_code(checkpoint: Opened) -> None:
    """Raises `CheckpointError` for a tokenizer whose class is Python code in the model's repository."""
    path = checkpoint.source.optional(TOKENIZER_CONFIG)
    if path is None:
        return
    content = read_object(path, CheckpointError, "download or copy it again")
    named = content.get("auto_map")
    code = named.get("AutoTokenizer") if isinstance(named, dict) else named
    if not code:
        return
    kind = content.get("tokenizer_class")
    if isinstance(kind, str) and _is_known(kind):  # which is then used, and the repository's is not
        return
    raise CheckpointError(
        f"The tokenizer of {checkpoint.name} is Python code of its repository ({one_line(code)}), which Corolla "
        "never runs: use a model whose tokenizer transformers itself has, or save one beside a copy of it."
    )


def load_generation_config(checkpoint: Opened, default: GenerationConfig) -> GenerationConfig:
    """The checkpoint's own settings for generation, or `default` where it has none."""
    path = checkpoint.source.optional("generation_config.json")
    if path is None:
        return default
    try:
        return _read(lambda: GenerationConfig.from_pretrained(path.parent))
    except _Unreadable as error:
        raise CheckpointError(
            f"The generation_config.json of {checkpoint.name} cannot be read ({error}); copy it again, or delete it."
        ) from error.__cause__


def load_whole(checkpoint: Opened, dtype: torch.dtype) -> PreTrainedModel:
    """The whole model, as transformers itself loads it: what others are compared with. Raises `CheckpointError`."""
    from transformers import AutoModelForCausalLM

    source = checkpoint.source
    try:
        model: PreTrainedModel = _read(
            lambda: AutoModelForCausalLM.from_pretrained(
                source.location, **source.loader_arguments(), dtype=dtype, trust_remote_code=False
            )
        )
    except _Unreadable as error:
        raise CheckpointError(
            f"transformers itself cannot load {checkpoint.name} ({error})."
        ) from error.__cause__
    return model


def load_parts(
    part: Any,
    checkpoint: Opened,
    state: Mapping[str, torch.Tensor],
    dtype: torch.dtype,
    *,
    changes: Mapping[str, Any] | None = None,
    seed: int = 0,
    **more: Any,
) -> tuple[Any, dict[str, Any]]:
    """The family's own loader on the class `part`: the model and what the loader says about it.

    `state` are its tensors by name; layouts are converted as for a whole checkpoint, and no file is looked for.
    `changes` are made to a copy of the checkpoint's config. What has no tensor is drawn by `seed` alone, and the
    caller's random numbers go on as if nothing had been. Raises `CheckpointError` when they do not fit the config.
    """
    config = copy.deepcopy(checkpoint.config)
    for name, value in (changes or {}).items():
        setattr(config, name, value)
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            # The one of transformers: on a client's class, its own name loads from a swarm.
            model, info = PreTrainedModel.from_pretrained.__func__(
                part,
                None,
                config=config,
                state_dict=state,
                dtype=dtype,
                output_loading_info=True,
                trust_remote_code=False,
                **more,
            )
    except (RuntimeError, ValueError) as error:
        raise CheckpointError(
            f"The tensors of {checkpoint.name} do not fit its config (vocabulary, sizes, layers): copy both again "
            "from where the model was saved."
        ) from error
    return model, info


def load_gguf_about(path: Path) -> tuple[PretrainedConfig, Any]:
    """What a GGUF file says of its model: the config and the tokenizer; of its tensors the names only are looked at.

    Raises `CheckpointError`.
    """
    from transformers import AutoTokenizer

    arguments: dict[str, Any] = {"gguf_file": path.name, "trust_remote_code": False}

    def load() -> tuple[PretrainedConfig, Any]:
        config = AutoConfig.from_pretrained(path.parent, **arguments)
        return config, AutoTokenizer.from_pretrained(path.parent, **arguments)

    try:
        return _read(load)
    except _Unreadable as error:
        raise CheckpointError(
            f"transformers cannot read {path.name} as a GGUF model ({error}): use a safetensors copy of the model."
        ) from error.__cause__


def load_gguf_tensors(
    path: Path, config: PretrainedConfig, name: str
) -> tuple[dict[str, torch.Tensor], set[str]]:
    """The tensors of a small GGUF file in float32, as transformers has them, and names that it lacks.

    `config` describes the model that it holds a part of; `name` is for messages. Raises `CheckpointError`.
    """
    from transformers import AutoModelForCausalLM
    from transformers.utils.quantization_config import GgufConfig

    def load() -> Any:
        return AutoModelForCausalLM.from_pretrained(
            path.parent,
            gguf_file=path.name,
            config=config,
            quantization_config=GgufConfig(dequantize=True),
            dtype=torch.float32,
            output_loading_info=True,
            trust_remote_code=False,
        )

    try:
        with torch.random.fork_rng(devices=[]), _silent():
            model, info = _read(load)
    except _Unreadable as error:
        raise CheckpointError(
            f"transformers cannot read the tensors of {name} ({error}): use a safetensors copy of the model."
        ) from error.__cause__
    return model.state_dict(), set(info["missing_keys"])


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    """Without a bar for each part, and without reports on what parts lack."""
    verbosity, bars = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity(transformers_logging.CRITICAL)
    transformers_logging.disable_progress_bar()
    try:
        with contextlib.redirect_stderr(io.StringIO()):  # a bar that nothing else keeps from showing
            yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if bars:
            transformers_logging.enable_progress_bar()


class _Unreadable(Exception):
    """A loader has failed; the text is the beginning of its reason, its `__cause__` the loader's own error."""


def _read(load: Callable[[], T]) -> T:
    """Whatever a loader raises on a stranger's files, as one error: libraries in other languages panic."""
    try:
        return load()
    except (KeyboardInterrupt, SystemExit, MemoryError):
        raise
    except BaseException as error:
        reason = str(error).strip().splitlines()
        raise _Unreadable(one_line(reason[0], characters=120) if reason else type(error).__name__) from error


def _is_known(kind: str) -> bool:
    """Whether transformers itself has a tokenizer class of this name."""
    import transformers
    from transformers.models.auto.tokenization_auto import tokenizer_class_from_name

    if kind in ("PreTrainedTokenizer", "PythonBackend"):  # bases of classes that are in a repository
        return False
    return hasattr(transformers, kind) or tokenizer_class_from_name(kind) is not None
