"""What a client has to know of a family's code: seen in a miniature at work, once a process."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from inspect import Parameter, signature
from typing import Any, get_args

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import nn
from transformers import Cache, PretrainedConfig

from corolla.errors import CorollaError, UnsupportedFamily
from corolla.models.cache import cache_argument
from corolla.models.checkpoints.identity import canonical_config
from corolla.models.checks.miniature import close, miniature, random_model, undisturbed
from corolla.models.checks.tracing import Arguments, arguments_of, measured
from corolla.models.cut_layout import CutLayout, TokenLayout
from corolla.models.families import blocks_prefix, depth_of, refuse_what_cannot_be_built, structure
from corolla.shortage import exhausted

_seen: dict[bytes, tuple[Arguments, int]] = {}
_cuts: dict[bytes, CutLayout] = {}
_flat_rows: dict[type[PretrainedConfig], bool] = {}
_needing_ids: dict[bytes, bool] = {}
_padded_in_front: dict[bytes, bool] = {}

IN_FRONT = 3  # tokens of padding


def values_returned(config: PretrainedConfig) -> int:
    """How many values the family's blocks return in a tuple, hidden states first; 0 where they return these alone.

    Raises `UnsupportedFamily` when there is no miniature to look at, or when its blocks cannot be split.
    """
    return _look(config)[1]


def cuts_of(config: PretrainedConfig) -> CutLayout:
    """What crosses the cuts between the blocks. Raises as `values_returned`."""
    arguments, _ = _look(config)
    if arguments.plain:
        return CutLayout(TokenLayout(0, 1, (int(config.hidden_size),)), depth_of(config))
    refuse_what_is_left_out(config)
    key = canonical_config(config.to_dict())
    if key not in _cuts:
        with refusing(config, "used: a miniature of this one does not run"), undisturbed():
            _cuts[key] = measured(config, arguments)
    return _cuts[key]


def refuse_what_is_left_out(config: PretrainedConfig) -> None:
    """Raises `UnsupportedFamily` where blocks have arguments that cannot be sent; else as `values_returned`."""
    if _look(config)[0].left_out:
        raise UnsupportedFamily(
            f"Models of type {config.model_type} cannot be split yet: besides hidden states their blocks take what "
            "earlier blocks have made, in a form that is not passed from server to server."
        )


def refuse_states_in_blocks(config: PretrainedConfig) -> None:
    """Raises `UnsupportedFamily` where a pass with a cache leaves tensors in the blocks' own modules."""
    found: set[tuple[int, str]] = set()
    with undisturbed(), torch.no_grad(), suppress(Exception):  # of which others say more
        small = miniature(config)
        whole = random_model(structure(config).causal_lm, small)
        parts = list(whole.get_submodule(blocks_prefix(config)).modules())
        before = _own_tensors(parts)
        try:
            whole(input_ids=torch.tensor([[3, 4, 5]]), use_cache=True)
        finally:
            found = _own_tensors(parts) - before
    if found:
        raise UnsupportedFamily(
            f"Models of type {config.model_type} cannot be served: their blocks keep what they know of a sequence in "
            "themselves, not in a cache, and a server's blocks compute many sequences in turns."
        )


def _own_tensors(parts: Sequence[nn.Module]) -> set[tuple[int, str]]:
    """Which modules have which tensors that are neither weights nor buffers."""
    return {
        (at, name)
        for at, part in enumerate(parts)
        for name, one in vars(part).items()
        if isinstance(one, torch.Tensor)
    }


def _look(config: PretrainedConfig) -> tuple[Arguments, int]:
    """Seen in a miniature at work, once a process and config."""
    found = structure(config)
    _check_cache(config, found.holder.forward)
    with refusing(config, "used: a miniature of this one does not run", refuse_what_cannot_be_built):
        small = miniature(config)
        key = canonical_config(small.to_dict())
        if key not in _seen:
            with undisturbed():
                _seen[key] = arguments_of(random_model(found.causal_lm, small))
    return _seen[key]


def _check_cache(config: PretrainedConfig, forward: Callable[..., Any]) -> None:
    """Raises `UnsupportedFamily` where the family's code keeps no cache that a session can hold."""
    taken = signature(forward).parameters.get(cache_argument(forward))
    if taken is None:
        raise UnsupportedFamily(
            f"Models of type {config.model_type} cannot be served: transformers keeps no cache of keys and values for "
            "them, which sessions are made of."
        )
    named = [one for one in get_args(taken.annotation) or (taken.annotation,) if isinstance(one, type)]
    kinds = [one for one in named if one not in (type(None), Parameter.empty)]
    if kinds and not any(issubclass(one, Cache) for one in kinds):
        raise UnsupportedFamily(
            f"Models of type {config.model_type} cannot be served: transformers keeps what they know of a sequence in "
            f"a cache of their own kind ({kinds[0].__name__}), which no session can hold."
        )


@contextmanager
def refusing(
    config: PretrainedConfig, words: str, before: Callable[[PretrainedConfig], None] | None = None
) -> Iterator[None]:
    """Whatever a family's code makes of its miniature is a reason not to serve it, and no more.

    `words` say what cannot be done; `before` may raise a better sentence. Where the machine has run out of room, or of
    open files, the family is not to blame, and a plain `CorollaError` says so.
    """
    try:
        yield
    except UnsupportedFamily:
        raise
    except Exception as error:
        if shortage := exhausted(error):
            raise CorollaError(shortage) from error
        if before is not None:
            before(config)
        reason = " ".join(str(error).split())
        if isinstance(error, StrictDataclassError):
            raise UnsupportedFamily(
                f"Models of type {config.model_type} cannot be split yet: models are proved in small, and the "
                "small config that is made of this one is none that transformers takes."
            ) from error
        raise UnsupportedFamily(
            f"Models of type {config.model_type} cannot be {words} ({type(error).__name__}: {reason:.120}); what no "
            "miniature proves is not served, which says nothing against the model."
        ) from error


def needs_ids(config: PretrainedConfig) -> bool:
    """Whether the family's code finds no inputs of its blocks for embeddings that are not those of tokens."""
    if not cuts_of(config).sides:
        return False
    small = miniature(config)
    key = canonical_config(small.to_dict())
    if key not in _needing_ids:
        _needing_ids[key] = _fails_without_ids(small)
    return _needing_ids[key]


def _fails_without_ids(small: PretrainedConfig) -> bool:
    with undisturbed(), torch.no_grad():
        whole = random_model(structure(small).causal_lm, small)
        try:
            whole(inputs_embeds=torch.randn(1, 2, small.hidden_size), use_cache=False)
        except Exception:  # whatever the family's own code makes of ids that are not there
            return True
    return False


def takes_padding_in_front(config: PretrainedConfig) -> bool:
    """Whether padding before a row's tokens changes nothing of what transformers itself computes of them.

    It does where tokens are put together by their places in the row (deepseek_v4), or go into a state one and all.
    """
    small = miniature(config)
    key = canonical_config(small.to_dict())
    if key not in _padded_in_front:
        _padded_in_front[key] = _same_behind_padding(small)
    return _padded_in_front[key]


def _same_behind_padding(small: PretrainedConfig) -> bool:
    small._attn_implementation = "eager"  # at a client the config names one that computes nothing
    with undisturbed(), torch.no_grad():
        whole = random_model(structure(small).causal_lm, small)
        ids = torch.tensor([[5, 3, 4, 3, 4, 5, 6, 7], [8, 9, 10, 11, 5, 4, 12, 3]])
        mask = torch.ones_like(ids)
        mask[0, :IN_FRONT] = 0
        padded = whole(input_ids=ids, attention_mask=mask, use_cache=False).logits[0, IN_FRONT:]
        alone = [whole(input_ids=ids[:1, IN_FRONT:], use_cache=False).logits[0]]
        if (
            "position_ids" in signature(whole.forward).parameters
        ):  # padding has places of its own, or it has none
            places = torch.arange(IN_FRONT, ids.shape[1])[None]
            alone += [whole(input_ids=ids[:1, IN_FRONT:], position_ids=places, use_cache=False).logits[0]]
        return any(close(one, padded) for one in alone)


def reads_flat_rows(config: PretrainedConfig) -> bool:
    """Whether the family tells the sequences of a row without padding apart by their position ids.

    Most do; those with positions of another kind (bloom, opt, …) read such a row as one sequence.
    """
    known = _flat_rows.get(type(config))
    if known is None:
        known = _flat_rows[type(config)] = _tried(config)
    return known


def _tried(config: PretrainedConfig) -> bool:
    small = miniature(config)
    small._attn_implementation = "eager"  # at a client the config names one that computes nothing
    with undisturbed(), torch.no_grad():
        whole = random_model(structure(config).causal_lm, small)
        ids = torch.tensor([[3, 4, 5, 6], [7, 8, 5, 6]])
        positions = torch.tensor([[0, 1, 0, 1]]).expand(2, -1)
        logits = whole(input_ids=ids, position_ids=positions, use_cache=False).logits
    return close(logits[0, -1], logits[1, -1])  # rows of one product may be rounded in different ways
