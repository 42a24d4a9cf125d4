"""What crosses the cuts between a family's blocks, found by watching its own loop.

Invariant: an argument of the blocks counts where it changes with the tokens, and what it is made of is seen, not
assumed: other tokens, and a first block that gives something else. Which arguments these are is seen in a miniature at
work; how large they are, in the model itself on the meta device, where nothing is computed.
"""

from __future__ import annotations

import copy
import inspect
from collections import UserDict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx.experimental import _config as fx_config
from transformers import PretrainedConfig, PreTrainedModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from corolla.errors import UnsupportedFamily
from corolla.models.checks.miniature import BY_LENGTH, rotary_parts
from corolla.models.cut_layout import CutLayout, PassedOn, SharedTensor, SideInput, TokenLayout
from corolla.models.families import blocks_prefix, structure
from corolla.models.limits import UNLIMITED_CONTEXT

MEASURED = "corolla_measured"  # attention of which only the shapes are of interest
ALL_NONZERO = "meta_nonzero_assume_all_nonzero"  # of torch, for tensors without values
SHAPES = ((2, 5), (3, 7))  # rows and tokens


def _shape_only(_module: nn.Module, query: Tensor, _key: Tensor, value: Tensor, *_: Any, **__: Any) -> Any:
    return query.new_empty(query.shape[0], query.shape[2], query.shape[1], value.shape[3]), None


ALL_ATTENTION_FUNCTIONS.register(MEASURED, _shape_only)


def _mask_shape(batch_size: int, q_length: int, kv_length: int, *_: Any, **__: Any) -> Tensor:
    return torch.ones(batch_size, 1, q_length, kv_length, dtype=torch.bool, device="meta")


ALL_MASK_ATTENTION_FUNCTIONS.register(MEASURED, _mask_shape)


@dataclass
class Call:
    """What one block was called with, but for the hidden states, and what it gave."""

    hidden: Tensor
    given: dict[str, Any]
    output: Any = None


@dataclass(frozen=True)
class Arguments:
    """Of all blocks: the names of those that are made of the tokens, and of the one that is a dictionary, if any."""

    sides: tuple[tuple[str, bool], ...] = ()  # and whether each block has its own
    store: str | None = None
    passed: tuple[
        tuple[str, int], ...
    ] = ()  # those that the block before has returned, and which of its values
    counted: str | None = None  # the one that is the block's own index
    left_out: tuple[str, ...] = ()  # those that blocks need and that cannot be sent
    stream: bool = True  # one hidden state a token passes from block to block

    @property
    def plain(self) -> bool:
        """Whether blocks are given hidden states and nothing else that is made of the tokens."""
        return self.stream and not self.sides and not self.passed and self.store is None


@dataclass
class _Put:
    """What a block has put into the dictionary, and the last one that has read it."""

    key: Any
    tensors: tuple[Tensor, ...]
    made_by: int
    last_read_by: int = -1


class _Watched(UserDict[Any, Any]):
    """The dictionary that blocks are given, which notes who puts and who reads what."""

    def __init__(self, content: Mapping[Any, Any]) -> None:
        self.block = 0
        self.found: list[_Put] = []
        super().__init__(content)

    def __setitem__(self, key: Any, item: Any) -> None:
        self.found.append(_Put(key, tuple(item), self.block))
        super().__setitem__(key, item)

    def __getitem__(self, key: Any) -> Any:
        for one in [one for one in self.found if one.key == key][-1:]:
            one.last_read_by = self.block
        return super().__getitem__(key)


@contextmanager
def watched(
    blocks: nn.ModuleList, *, store: str | None = None, noise: bool = False
) -> Iterator[tuple[list[Call], list[_Watched]]]:
    """The calls of all blocks inside; `store` is watched closer; with `noise` the first block gives something else."""
    calls: list[Call] = []
    stores: list[_Watched] = []

    def before(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        names = argument_names(block)
        given = dict(zip(names, args, strict=False)) | kwargs
        if store is not None and given.get(store) is not None:
            if not stores:
                stores.append(_Watched(given[store]))
            stores[0].block = len(calls)
            given[store] = stores[0]
            args, kwargs = replaced(args, kwargs, store, names.index(store), stores[0])
        hidden = given.pop(names[0])
        calls.append(Call(hidden, {name: _kept(value) for name, value in given.items()}))
        return args, kwargs

    def after(_block: nn.Module, _args: tuple[Any, ...], output: Any) -> Any:
        calls[-1].output = output
        if not noise or len(calls) > 1:
            return None
        parts = output if isinstance(output, tuple | list) else (output,)
        other = parts[0] + torch.randn_like(parts[0])
        return (other, *parts[1:]) if isinstance(output, tuple | list) else other

    handles = [one.register_forward_pre_hook(before, with_kwargs=True) for one in blocks]
    handles += [one.register_forward_hook(after) for one in blocks]
    try:
        yield calls, stores
    finally:
        for handle in handles:
            handle.remove()


def argument_names(block: nn.Module) -> list[str]:
    """Of a block's forward, hidden states first."""
    return [name for name in inspect.signature(block.forward).parameters if name != "self"]


def replaced(
    args: tuple[Any, ...], kwargs: dict[str, Any], name: str, place: int, value: Any
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """A call's arguments with another value for the one of that name."""
    if place < len(args):
        return (*args[:place], value, *args[place + 1 :]), kwargs
    return args, kwargs | {name: value}


def arguments_of(model: PreTrainedModel) -> tuple[Arguments, int]:
    """What the blocks of a miniature are given; how many values they return in a tuple, 0 for hidden states alone."""
    ids = torch.tensor([[3, 4, 5, 6, 7], [8, 9, 5, 4, 3]])
    first = _calls(model, ids)
    output = first[0].output
    returned = len(output) if isinstance(output, tuple | list) else 0
    stream = first[0].hidden.shape == (*ids.shape, model.config.hidden_size)
    changing = _differing(first, _calls(model, ids + 2))
    if not changing:
        return Arguments(stream=stream), returned
    later = _differing(first, _calls(model, ids, noise=True))
    stores = [name for name in changing if isinstance(first[0].given[name], Mapping)]
    sides, passed, left_out = [], [], []
    for name in changing:
        if name in stores:
            continue
        values = [call.given.get(name) for call in first]
        index = _returned_before(first, name)
        if name not in later and (_same_form(values) or all(_same(value, ids) for value in values)):
            sides.append((name, not all(_same(value, values[0]) for value in values)))
        elif _same(first[-1].output, _without(model, ids, name)):
            continue
        elif index is not None:
            passed.append((name, index))
        else:
            left_out.append(name)
    return Arguments(
        tuple(sides),
        stores[0] if stores else None,
        tuple(passed),
        next((name for name in first[0].given if _counts(first, name)), None),
        tuple(left_out + stores[1:]),
        stream,
    ), returned


def _returned_before(calls: Sequence[Call], name: str) -> int | None:
    """Which of the values that a block returns the next one is given by this name, if that is so of all."""
    given, tokens = [call.given.get(name) for call in calls], calls[0].hidden.shape[1]
    if given[0] is not None or not all(
        isinstance(one, Tensor) and (one.is_floating_point() or _are_places(one, tokens)) for one in given[1:]
    ):
        return None
    returned = min(len(call.output) if isinstance(call.output, tuple) else 0 for call in calls)
    for index in range(1, returned):
        if all(_same(one, call.output[index]) for one, call in zip(given[1:], calls, strict=False)):
            return index
    return None


def _are_places(value: Tensor, tokens: int) -> bool:
    """Whether these are whole numbers that say of each token which of all tokens were chosen for it."""
    whole = value.ndim == 3 and value.dtype in (torch.int32, torch.int64)
    return whole and value.shape[1] == tokens and int(value.min()) >= 0 and int(value.max()) < tokens


def _counts(calls: Sequence[Call], name: str) -> bool:
    """Whether each block is given its own index by this name."""
    given = [call.given.get(name) for call in calls]
    return all(type(one) is int for one in given) and given == list(range(len(calls))) and len(calls) > 1


def _calls(model: PreTrainedModel, ids: Tensor, *, noise: bool = False) -> list[Call]:
    """Of a new copy, since a model may remember passes."""
    twin = copy.deepcopy(model)
    blocks: Any = twin.get_submodule(blocks_prefix(model.config))
    with torch.no_grad(), watched(blocks, noise=noise) as (calls, _):
        twin(input_ids=ids, use_cache=False)
    if len(calls) != len(blocks):
        raise UnsupportedFamily(
            f"Models of type {model.config.model_type} cannot be split: their blocks do not run once each in a pass, "
            "one behind the other."
        )
    return calls


def _without(model: PreTrainedModel, ids: Tensor, name: str) -> Any:
    """What leaves the last block where no block is given this argument; None where they do not run without."""

    def take_away(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return replaced(args, kwargs, name, argument_names(block).index(name), None)

    twin = copy.deepcopy(model)
    blocks: Any = twin.get_submodule(blocks_prefix(model.config))
    for block in blocks:
        block.register_forward_pre_hook(take_away, with_kwargs=True)
    try:
        with torch.no_grad(), watched(blocks) as (calls, _):
            twin(input_ids=ids, use_cache=False)
    except Exception:  # whatever the family's code makes of it
        return None
    return calls[-1].output


def _differing(one: Sequence[Call], other: Sequence[Call]) -> list[str]:
    """Names of the arguments that differ in some block."""
    names = dict.fromkeys(name for call in one for name in call.given)
    return [
        name
        for name in names
        if any(not _same(a.given.get(name), b.given.get(name)) for a, b in zip(one, other, strict=True))
    ]


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return one.shape == other.shape and bool(((one == other) | ((one != one) & (other != other))).all())
    if isinstance(one, Mapping) and isinstance(other, Mapping):
        return one.keys() == other.keys() and all(_same(one[key], other[key]) for key in one)
    if isinstance(one, tuple | list) and isinstance(other, tuple | list):
        return len(one) == len(other) and all(map(_same, one, other))
    return type(one) is type(other)


def _same_form(values: Sequence[Any]) -> bool:
    """Whether all blocks are given numbers with a point, as many of them."""
    return all(
        isinstance(one, Tensor) and one.is_floating_point() and one.shape == values[0].shape for one in values
    )


def _kept(value: Any) -> Any:
    """As it is now."""
    if isinstance(value, Tensor):
        return value.detach().clone()
    if isinstance(value, Mapping):
        return {key: _kept(one) for key, one in value.items()}
    return [_kept(one) for one in value] if isinstance(value, tuple | list) else value


# --- sizes --------------------------------------------------------------------------------------------------


def measured(config: PretrainedConfig, arguments: Arguments) -> CutLayout:
    """What crosses the cuts of the model of this config, whose blocks have these arguments. Takes no memory.

    Raises whatever the family's code raises on the meta device.
    """
    found = structure(config)
    config = copy.deepcopy(config)
    config._attn_implementation = MEASURED
    for part in rotary_parts(config).values():
        if part.get("rope_type") in BY_LENGTH:  # which looks at positions; as wide as any other kind
            part["rope_type"] = "default"
    config._experts_implementation = "batched_mm"  # the others ask for a router's values, or for 16 bits
    config.return_dict = True
    with torch.device("meta"):
        holder: Any = found.holder(config)
    blocks: Any = getattr(holder, found.blocks)
    passes = [_measured_pass(holder, blocks, shape, arguments.store) for shape in SHAPES]
    names = argument_names(blocks[0])
    first = [calls[0] for calls, _ in passes]
    sides = [
        SideInput(
            name, names.index(name), _layout([call.given[name] for call in first], config.vocab_size), each
        )
        for name, each in arguments.sides
    ]
    longest = int(getattr(config, "max_position_embeddings", None) or UNLIMITED_CONTEXT)
    passed = []
    for name, at in arguments.passed if len(blocks) > 1 else ():
        values = [calls[1].given[name] for calls, _ in passes]
        layout = _layout(values)
        if not values[0].is_floating_point():  # of a few tokens, fewer can be chosen
            calls, _ = _measured_pass(holder, blocks, (1, longest), arguments.store)
            layout = TokenLayout(0, 1, (int(calls[1].given[name].shape[-1]),), longest)
        passed.append(PassedOn(name, names.index(name), at, len(blocks), layout))
    shared = [
        SharedTensor(one.key, index, one.made_by, one.last_read_by, _layout([tensor, other.tensors[index]]))
        for one, other in zip(*(puts for _, puts in passes), strict=True)
        for index, tensor in enumerate(one.tensors)
        if one.last_read_by > one.made_by
    ]
    store, counted = (
        None if name is None else (name, names.index(name)) for name in (arguments.store, arguments.counted)
    )
    hidden = _layout([call.hidden for call in first])
    return CutLayout(
        hidden,
        len(blocks),
        tuple(sides),
        store,
        tuple(shared),
        tuple(passed),
        counted,
        hidden.width // config.hidden_size,
    )


def _measured_pass(
    holder: Any, blocks: nn.ModuleList, shape: tuple[int, int], store: str | None
) -> tuple[list[Call], list[_Put]]:
    """The calls of all blocks for so many rows of so many tokens, and what they put into the dictionary."""
    with (
        torch.device("meta"),
        torch.no_grad(),
        without_values(),
        watched(blocks, store=store) as (calls, stores),
    ):
        # With a cache nobody looks for several sequences in a row, which takes values.
        holder(input_ids=torch.zeros(shape, dtype=torch.long), use_cache=True)
    return calls, stores[0].found if stores else []


@contextmanager
def without_values() -> Iterator[None]:
    """Nobody looks at values inside, since there are none: none is zero, and distributions check none."""
    kind: Any = torch.distributions.Distribution
    fakes: Any = fx_config
    before = kind._validate_args
    kind.set_default_validate_args(False)
    try:
        known = hasattr(fakes, ALL_NONZERO)  # not in the oldest torch
        with fakes.patch({ALL_NONZERO: True}) if known else nullcontext():
            yield
    finally:
        kind.set_default_validate_args(before)


def _layout(tensors: Sequence[Tensor], below: int = 0) -> TokenLayout:
    """How a tensor lies, given one of each of `SHAPES`; whole numbers are less than `below`."""
    sizes = list(zip(*(tensor.shape for tensor in tensors), strict=True))
    rows, tokens = (sizes.index(one) for one in zip(*SHAPES, strict=True))
    rest = tuple(size for at, (size, _) in enumerate(sizes) if at not in (rows, tokens))
    return TokenLayout(rows, tokens, rest, 0 if tensors[0].is_floating_point() else below)
