"""What a span's blocks compute, as a list of operators: found out by watching the family's own code at work.

Invariant: carried out in order, on tensors that lie as they did here, the operators give what the family's code gave.
What is not understood is refused, never left out: an unknown operator, another dtype, or code that asks what a tensor
holds. Frozen products and attention are operators of their own.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import (
    register_module_forward_hook,
    register_module_forward_pre_hook,
)
from torch.utils._python_dispatch import TorchDispatchMode

from corolla.models.attention.one_token_rows import Rules
from corolla.models.kernels.fused import FusedPart
from corolla.models.kernels.packed import FrozenLinear

UNKNOWN = "unknown"  # an operator that is not understood; `what` says why
HIDDEN, POSITIONS = 0, 1  # storages of what goes in

# Of aten's operators, without the underscore of those that write in place.
UNARY = (
    "abs", "cos", "exp", "neg", "reciprocal", "relu", "rsqrt", "sigmoid", "silu", "sin", "sqrt", "tanh"
)  # fmt: skip
BINARY = ("add", "div", "mul", "sub")
POWERS = {2.0: "square", 3.0: "cube", 0.5: "sqrt", -0.5: "rsqrt", -1.0: "reciprocal"}


class NotCompilable(Exception):
    """The blocks do something that cannot be recorded; they are run by the family's code alone."""


@dataclass(frozen=True)
class View:
    """A tensor as it lies in a storage, in elements."""

    storage: int
    offset: int
    sizes: tuple[int, ...]
    strides: tuple[int, ...]


@dataclass(frozen=True)
class Op:
    """One operator. `number` and `what` are its own: an epsilon, a frozen layer, a block and its rules."""

    kind: str
    output: View
    inputs: tuple[View, ...]
    number: float = 0.0
    what: Any = None


@dataclass
class Recording:
    """The operators of one pass over some rows."""

    ops: list[Op] = field(default_factory=list)
    # By storage: weights, and what came of them alone.
    constants: dict[int, Tensor] = field(default_factory=dict)
    lengths: list[int] = field(default_factory=list)  # of each storage, in elements
    output: View | None = None


def record(run: Callable[[Tensor, Tensor, Any], Tensor], hidden: Tensor, positions: Tensor) -> Recording:
    """The pass `run(hidden [N, H], positions int64 [N], batch)`, where `batch` takes the place of a `PackedBatch`.

    What `run` computes is of no meaning. Raises `NotCompilable`.
    """
    recorder = _Recorder()
    recorder.begin(hidden, positions)
    with torch.inference_mode(), recorder.watching_products(), recorder:
        output = run(hidden, positions, recorder)
    recorder.found.output = recorder.view(output)
    return recorder.found


class _Recorder(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Sees every operator, and stands for the batch to which the blocks' attention goes."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.found = Recording()
        self._seen: list[Tensor] = []  # kept, so that no storage's place is taken by another
        self._storages: dict[int, int] = {}
        self._inside = 0  # a product or attention, whose own operators are not ours

    def begin(self, hidden: Tensor, positions: Tensor) -> None:
        """These are what goes in."""
        for tensor in (hidden, positions):
            self._new(tensor)

    def view(self, tensor: Tensor) -> View:
        """How a tensor lies; one that nothing has computed is a constant."""
        key = tensor.untyped_storage()._cdata
        if key not in self._storages:
            self.found.constants[self._new(tensor)] = tensor
        return View(
            self._storages[key], int(tensor.storage_offset()), tuple(tensor.shape), tuple(tensor.stride())
        )

    def _new(self, tensor: Tensor) -> int:
        storage = tensor.untyped_storage()
        self._seen.append(tensor)
        self._storages[storage._cdata] = number = len(self.found.lengths)
        self.found.lengths.append(storage.nbytes() // tensor.itemsize)
        return number

    def _is_constant(self, tensor: Tensor) -> bool:
        key = tensor.untyped_storage()._cdata
        return key not in self._storages or self._storages[key] in self.found.constants

    # --- what is watched ------------------------------------------------------------------------------------

    @contextmanager
    def watching_products(self) -> Iterator[None]:
        """Frozen layers are operators of their own; what they do inside is theirs."""

        # torch tells of the layers of all threads; other spans may be at work on theirs.
        own = threading.get_ident()

        def begins(layer: nn.Module, _arguments: tuple[Any, ...]) -> None:
            self._inside += _is_product(layer) and threading.get_ident() == own

        def ends(layer: nn.Module, arguments: tuple[Any, ...], output: Any) -> None:
            if _is_product(layer) and threading.get_ident() == own:
                self._inside -= 1
                self._add("product", output, [arguments[0]], what=layer)

        handles = [register_module_forward_pre_hook(begins), register_module_forward_hook(ends)]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def attend(self, block: int, query: Tensor, key: Tensor, value: Tensor, rules: Rules) -> Tensor:
        """See `PackedBatch.attend`."""
        if value.shape[-1] != query.shape[-1]:
            raise NotCompilable("values that are not as wide as keys")
        self._inside += 1
        result = torch.zeros_like(query.transpose(1, 2), memory_format=torch.contiguous_format)
        self._inside -= 1
        self._add("attend", result, [query, key, value], what=(block, rules))
        return result

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if self._inside:
            return func(*args, **kwargs)
        with self:
            parts = func.decompose(*args, **kwargs)
        if parts is not NotImplemented:
            return parts
        if func is torch.ops.aten._local_scalar_dense.default and not self._is_constant(args[0]):
            raise NotCompilable("the code asks what a tensor holds")
        result = func(*args, **kwargs)
        self._note(func, args, kwargs, result)
        return result

    def _note(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> None:
        tensors = [one for one in _flat([*args, *kwargs.values()]) if isinstance(one, Tensor)]
        outputs = [one for one in _flat([result]) if isinstance(one, Tensor)]
        writes = func._schema.is_mutable
        if not writes and all(one.untyped_storage()._cdata in self._storages for one in outputs):
            return  # another view of what is known
        if all(map(self._is_constant, tensors)):
            for one in outputs:
                self.view(one)
            return
        if writes and any(map(self._is_constant, outputs)):
            raise NotCompilable("a weight is written to")
        name = func._schema.name.removeprefix("aten::")
        try:
            self._understood(name.removesuffix("_") if writes else name, args, kwargs, result)
        except NotCompilable as reason:
            self._unknown(str(reason), outputs, tensors)

    def _unknown(self, reason: str, outputs: Sequence[Tensor], inputs: Sequence[Tensor]) -> None:
        """An operator that must turn out not to be needed."""
        views = tuple(map(self.view, inputs))
        for one in outputs:
            if one.untyped_storage()._cdata not in self._storages:
                self._new(one)
            self.found.ops.append(Op(UNKNOWN, self.view(one), views, what=reason))

    def _understood(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> None:
        if name == "_to_copy":
            self._converted(args[0], result)
        elif name in UNARY:
            self._add(name, result, [args[0]])
        elif name == "clone":
            self._add("copy", result, [args[0]])
        elif name == "copy":
            self._add("copy", result, [args[1]])
        elif name == "gelu":
            kind = "gelu_tanh" if kwargs.get("approximate", "none") == "tanh" else "gelu"
            self._add(kind, result, [args[0]])
        elif name in BINARY and len(args) == 2 and not kwargs:
            self._add(name, result, [self._tensor(one) for one in args])
        elif name == "rsub" and len(args) == 2 and not kwargs:
            self._add("sub", result, [self._tensor(one) for one in reversed(args)])
        elif name == "pow" and isinstance(args[1], int | float) and float(args[1]) in POWERS:
            self._add(POWERS[float(args[1])], result, [args[0]])
        elif name == "cat":
            dim = args[1] if len(args) > 1 else 0
            sizes = [part.shape[dim] for part in args[0]]
            self._joined(args[0], torch.split(result, sizes, dim))
        elif name == "stack":
            self._joined(args[0], result.unbind(args[1] if len(args) > 1 else 0))
        elif name == "mean" and list(args[1]) in ([-1], [args[0].dim() - 1]) and not kwargs.get("dtype"):
            self._add("mean", result, [args[0]])
        elif name == "native_layer_norm" and len(args[1]) == 1:
            scale, shift = (self._or_plain(one, args[0], at) for at, one in enumerate(args[2:4]))
            self._add("layer_norm", result[0], [args[0], scale, shift], number=float(args[4]))
        else:
            raise NotCompilable(f"the operator {name}")

    # --- what becomes of it ---------------------------------------------------------------------------------

    def _add(
        self, kind: str, output: Tensor, inputs: Sequence[Tensor], *, number: float = 0.0, what: Any = None
    ) -> None:
        if any(one.dtype != torch.float32 for one in (output, *inputs)):
            raise NotCompilable(f"{kind} in another dtype than float32")
        views = tuple(map(self.view, inputs))
        if output.untyped_storage()._cdata not in self._storages:
            self._new(output)
        self.found.ops.append(Op(kind, self.view(output), views, number, what))

    def _converted(self, given: Tensor, result: Tensor) -> None:
        if given.dtype == torch.int64 and result.dtype == torch.float32:
            view = self.view(given)
            self._new(result)
            self.found.ops.append(Op("from_int", self.view(result), (view,)))
        else:
            self._add("copy", result, [given])

    def _joined(self, parts: Sequence[Tensor], places: Sequence[Tensor]) -> None:
        for part, place in zip(parts, places, strict=True):
            self._add("copy", place, [part])

    def _tensor(self, value: Tensor | float) -> Tensor:
        if not isinstance(value, Tensor):
            return torch.tensor(float(value), dtype=torch.float32)
        return value.float() if self._is_constant(value) else value

    def _or_plain(self, given: Tensor | None, like: Tensor, plain: int) -> Tensor:
        """A layer norm's scale (0) or shift (1)."""
        if given is not None:
            return given
        return torch.full(like.shape[-1:], 1.0 - plain)


def _is_product(layer: nn.Module) -> bool:
    return isinstance(layer, FrozenLinear) and not isinstance(layer, FusedPart)


def _flat(values: Sequence[Any]) -> Iterator[Any]:
    for one in values:
        if isinstance(one, list | tuple):
            yield from _flat(one)
        else:
            yield one
