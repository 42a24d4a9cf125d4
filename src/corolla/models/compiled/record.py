"""What a span's blocks compute, as a list of operators: found out by watching the family's own code at work.

Invariant: carried out in order, on tensors that lie as they did here, the operators give what the family's code gave.
What is not understood is refused, never left out: an unknown operator, another dtype, or code that asks what a tensor
holds. Frozen products and attention are operators of their own.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import (
    register_module_forward_hook,
    register_module_forward_pre_hook,
)
from torch.utils._python_dispatch import TorchDispatchMode

from corolla.models.attention.latent import absorbed
from corolla.models.attention.one_token_rows import Rules
from corolla.models.compiled.operators import UNKNOWN, NotCompilable, Op, Recording, View
from corolla.models.compiled.products import sum_of_products
from corolla.models.kernels.experts import Experts
from corolla.models.kernels.fused import FusedPart
from corolla.models.kernels.int8 import Int8Linear
from corolla.models.kernels.linear import FrozenLinear, NarrowLinear
from corolla.models.kernels.narrow import as_it_is

# Of aten's operators, without the underscore of those that write in place.
UNARY = (
    "abs", "cos", "exp", "expm1", "floor", "log", "neg", "reciprocal", "relu", "rsqrt", "sigmoid", "silu", "sin",
    "softplus", "sqrt", "tanh"
)  # fmt: skip
BINARY = ("add", "div", "maximum", "minimum", "mul", "sub")
# Operators that read or write whole numbers.
WHOLE = ("from_int", "top", "gather", "scatter", "route", "pick", "experts", "combine")
# Operators that read or write what is true or false, which is kept as 1 or 0.
LOGIC = ("nonzero", "greater", "where", "copy", "sub")
FILLS = {"zeros_like": 0.0, "new_zeros": 0.0, "ones_like": 1.0, "new_ones": 1.0}
SMALL = 2**14  # weights that are multiplied one by one where no kernel takes them
SOFTPLUS = [1, 20]  # its beta and its threshold, where they are given
POWERS = {2.0: "square", 3.0: "cube", 0.5: "sqrt", -0.5: "rsqrt", -1.0: "reciprocal"}


def record(
    run: Callable[[Tensor, Tensor, Any], Tensor],
    hidden: Tensor,
    positions: Tensor,
    states: Callable[[], Sequence[Tensor]] = tuple,
) -> Recording:
    """The pass `run(hidden [N, H], positions int64 [N], batch)`, where `batch` takes the place of a `PackedBatch`.

    `states` are those of the rows, before the pass and after it. What `run` computes is of no meaning. Raises
    `NotCompilable`.
    """
    recorder = _Recorder()
    before = states()
    recorder.begin(hidden, positions, before)
    with torch.inference_mode(), recorder.watching_products(), recorder:
        output = run(hidden, positions, recorder)
    recorder.end(output, before, states())
    return recorder.found


class _Recorder(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Sees every operator, and stands for the batch to which the blocks' attention goes."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.found = Recording()
        self._seen: list[Tensor] = []  # kept, so that no storage's place is taken by another
        self._storages: dict[int, int] = {}
        self._latents: dict[int, tuple[Tensor, Tensor]] = {}  # the new tokens', by block
        self._inside = 0  # a product or attention, whose own operators are not ours

    def begin(self, hidden: Tensor, positions: Tensor, states: Sequence[Tensor]) -> None:
        """These are what goes in."""
        for tensor in (hidden, positions):
            self._new(tensor)
        self.found.states = [self._new(one) for one in states]

    def end(self, output: Tensor, before: Sequence[Tensor], after: Sequence[Tensor]) -> None:
        """What has come out; states are to lie where they did."""
        self.found.output = self.view(output)
        for was, now in zip(before, after, strict=True):
            if now is not was:
                self._add("copy", was, [now])

    def view(self, tensor: Tensor) -> View:
        """How a tensor lies; one that nothing has computed is a constant."""
        key = tensor.untyped_storage()._cdata
        if key not in self._storages:
            self.found.constants[self._new(tensor)] = tensor
        return View(
            self._storages[key], int(tensor.storage_offset()), tuple(tensor.shape), tuple(tensor.stride())
        )

    def made(self, tensor: Tensor) -> View:
        """How a tensor lies that an operator gives."""
        if tensor.untyped_storage()._cdata not in self._storages:
            self._new(tensor)
        return self.view(tensor)

    def _new(self, tensor: Tensor) -> int:
        storage = tensor.untyped_storage()
        self._seen.append(tensor)
        self._storages[storage._cdata] = number = len(self.found.lengths)
        self.found.lengths.append(storage.nbytes() // tensor.itemsize)
        if tensor.dtype == torch.int64:
            self.found.whole.add(number)
        return number

    def _is_constant(self, tensor: Tensor) -> bool:
        key = tensor.untyped_storage()._cdata
        return key not in self._storages or self._storages[key] in self.found.constants

    # --- what is watched ------------------------------------------------------------------------------------

    @contextmanager
    def watching_products(self) -> Iterator[None]:
        """Frozen layers and experts are operators of their own; what they do inside is theirs."""

        # torch tells of the layers of all threads; other spans may be at work on theirs.
        own = threading.get_ident()

        def begins(layer: nn.Module, _arguments: tuple[Any, ...]) -> None:
            self._inside += _is_ours(layer) and threading.get_ident() == own

        def ends(layer: nn.Module, arguments: tuple[Any, ...], output: Any) -> None:
            if _is_ours(layer) and threading.get_ident() == own:
                self._inside -= 1
                if self._inside:
                    return  # an expert
                if isinstance(layer, Experts):
                    self._experts(layer, arguments, output)
                elif isinstance(layer, FrozenLinear):
                    self._product(layer, arguments[0], output)

        handles = [register_module_forward_pre_hook(begins), register_module_forward_hook(ends)]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def attend(self, block: int, query: Tensor, key: Tensor, value: Tensor, rules: Rules) -> Tensor:
        """See `PackedBatch.attend`."""
        batch, heads, rows, _ = query.shape
        result = self._fresh(batch, rows, heads, value.shape[-1])
        self._add("attend", result, [query, key, value], what=(block, rules, False))
        return result

    def attend_each(self, block: int, query: Tensor, key: Tensor, value: Tensor, rules: Rules) -> Tensor:
        """See `StackedCaches.attend`, which does it; `key` and `value` are what was kept."""
        rows, heads, tokens, _ = query.shape
        result = self._fresh(rows, tokens, heads, value.shape[-1])
        self._add("attend_each", result, [query, key, value], what=(block, rules))
        return result

    # Of blocks whose attention keeps latents.
    goes_on = True

    def keep(self, block: int, latent: Tensor, rotary: Tensor) -> None:
        """See `PackedBatch.keep`."""
        self._latents[block] = latent, rotary

    def has_latents(self, block: int) -> bool:
        """See `PackedBatch.has_latents`."""
        return block in self._latents

    def attend_latents(
        self, attention: Any, query: Tensor, _new: tuple[Tensor, Tensor], rules: Rules
    ) -> Tensor:
        """See `PackedBatch.attend_latents`; in the absorbed form, with a product for each head."""
        block = int(attention.layer_idx)
        latent, rotary = self._latents[block]
        self._inside += 1
        try:
            short = absorbed(attention, latent, rotary)
            for_queries, for_mixtures = short.layers
            plain, turned = torch.split(query, [short.keys.shape[2], short.rotary], dim=-1)
            found = self._by_heads(plain, for_queries)
            asked = query.new_empty(*query.shape[:3], found.shape[-1] + short.rotary)
            for part, place in zip(
                (found, turned), torch.split(asked, [found.shape[-1], short.rotary], dim=-1), strict=True
            ):
                if part.numel():
                    self._add("copy", place, [part])
            mixed = query.new_empty(1, query.shape[2], query.shape[1], latent.shape[-1])
            rules = replace(rules, scale=query.shape[-1] ** -0.5 if rules.scale is None else rules.scale)
            self._add("attend", mixed, [asked, latent, rotary], what=(block, rules, True))
            made = self._by_heads(mixed.transpose(1, 2), for_mixtures)
            result = torch.empty_like(made.transpose(1, 2), memory_format=torch.contiguous_format)
            self._add("copy", result, [made.transpose(1, 2)])
            return result
        finally:
            self._inside -= 1

    def _by_heads(self, value: Tensor, layers: Sequence[NarrowLinear]) -> Tensor:
        """Each head's rows [1, heads, N, D] by a layer of its own, [1, heads, N, D']."""
        result = value.new_empty(*value.shape[:3], layers[0].out_features)
        for head, layer in enumerate(layers):
            self._add("product", result[0, head], [value[0, head]], what=layer)
        return result

    def _fresh(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """Memory for what an operator of ours gives."""
        self._inside += 1
        try:
            return torch.zeros(shape, dtype=dtype)
        finally:
            self._inside -= 1

    def _product(self, layer: FrozenLinear, value: Tensor, output: Tensor) -> None:
        """A frozen layer's product, by its kernel where it has one."""
        rounded = isinstance(layer, Int8Linear)
        if layer.native() is not None or rounded or layer.in_features * layer.out_features > SMALL:
            self._add("product", output, [value], what=layer)
            return
        terms = value.unsqueeze(-2) * layer.weight
        self._add("sum", output, [terms])
        if layer.bias is not None:
            self._add("add", output, [output, layer.bias])

    def _experts(self, layer: Experts, arguments: tuple[Any, ...], output: Tensor) -> None:
        """Tokens are put in the order of the experts that they are sent to, and each expert is read once."""
        if len(arguments) != 3:
            raise NotCompilable("experts that are called otherwise")
        rows, chosen, weights = arguments
        rows = rows.reshape(-1, rows.shape[-1])
        pairs, count, width = chosen.numel(), len(layer.down_proj), int(layer.gate_up_proj[0].out_features)  # type: ignore[arg-type]
        order = self._fresh(count + 1 + pairs, dtype=torch.int64)
        self._add("route", order, [chosen], number=count)
        picked = self._fresh(pairs, rows.shape[1])
        self._add("pick", picked, [rows, order], number=count)
        inner = self._fresh(pairs, width)
        self._add("experts", inner, [picked, order], number=count, what=layer.gate_up_proj)
        gated = layer.gate(inner)
        found = self._fresh(pairs, rows.shape[1])
        self._add("experts", found, [gated, order], number=count, what=layer.down_proj)
        self._add("combine", output, [found, order, weights], number=count)

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
            self.found.ops.append(Op(UNKNOWN, self.made(one), views, what=reason))

    def _understood(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> None:
        if name == "_to_copy":
            self._converted(args[0], result)
        elif name in UNARY and list(args[1:]) in ([], SOFTPLUS) and not kwargs:
            self._add(name, result, [args[0]])
        elif name == "clone":
            self._add("copy", result, [args[0]])
        elif name == "copy":
            self._add("copy", result, [args[1]])
        elif name == "gelu":
            kind = "gelu_tanh" if kwargs.get("approximate", "none") == "tanh" else "gelu"
            self._add(kind, result, [args[0]])
        elif parts := sum_of_products(name, args, kwargs, result, self, self.found.ops):
            self._sum(result, *parts)
        elif name in BINARY and len(args) == 2 and not kwargs:
            self._add(name, result, [self._tensor(one, result.dtype) for one in args])
        elif name in ("gt", "lt"):
            both = [self._tensor(one, torch.float32) for one in args]
            self._add("greater", result, both if name == "gt" else both[::-1])
        elif name in ("bitwise_not", "logical_not") and args[0].dtype == torch.bool:
            self._add("sub", result, [self._tensor(1.0), args[0]])
        elif name == "masked_fill":
            self._add("where", result, [self._tensor(args[one]) for one in (1, 2, 0)])
        elif name == "where" and len(args) == 3:
            self._add("where", result, [*map(self._tensor, args)])
        elif name in ("empty_like", "new_empty"):
            self._new(result)
        elif name in FILLS:
            self._add("copy", result, [self._tensor(FILLS[name])])
        elif (
            name == "scatter"
            and [args[1]] in _last(args[0])
            and not isinstance(args[3], Tensor)
            and not kwargs
        ):
            if result is not args[0]:
                self._add("copy", result, [args[0]])
            self._add("scatter", result, [self._tensor(args[3]), args[2]])
        elif name in ("clamp", "clamp_min", "clamp_max"):
            self._clamped(name, args, kwargs, result)
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
        elif name in ("mean", "sum") and list(*args[1:2]) in _last(args[0]) and not kwargs.get("dtype"):
            self._add(name, result, [args[0]])
        elif name == "_softmax" and [args[1]] in _last(args[0]) and not args[2]:
            self._add("softmax", result, [args[0]])
        elif name == "topk" and [*args[2:3], -1][:1] in _last(args[0]) and all(args[3:4]):
            self._add("top", result[1], [args[0]], number=args[1])
            self._add("gather", result[0], [args[0], result[1]])
        elif name == "gather" and [args[1]] in _last(args[0]) and args[0].shape[:-1] == args[2].shape[:-1]:
            self._add("gather", result, [args[0], args[2]])
        elif (
            name in ("mm", "addmm")
            and self._is_constant(args[-1])
            and args[-1].t().is_contiguous()
            and not kwargs
        ):
            layer = NarrowLinear(as_it_is(args[-1].t()), args[0] if name == "addmm" else None)
            with self:
                self._product(layer, args[-2], result)
        elif name == "native_layer_norm" and len(args[1]) == 1:
            scale, shift = (self._or_plain(one, args[0], at) for at, one in enumerate(args[2:4]))
            self._add("layer_norm", result[0], [args[0], scale, shift], number=float(args[4]))
        else:
            raise NotCompilable(f"the operator {name}")

    # --- what becomes of it ---------------------------------------------------------------------------------

    def _add(
        self, kind: str, output: Tensor, inputs: Sequence[Tensor], *, number: float = 0.0, what: Any = None
    ) -> None:
        other = torch.int64 if kind in WHOLE else torch.bool if kind in LOGIC else torch.float32
        if any(one.dtype not in (torch.float32, other) for one in (output, *inputs)):
            raise NotCompilable(f"{kind} in another dtype than float32")
        if any(one.dtype == torch.bool and self._is_constant(one) for one in inputs):
            raise NotCompilable(f"{kind} of what is true or false from the start")
        views = tuple(map(self.view, inputs))
        self.found.ops.append(Op(kind, self.made(output), views, number, what))

    def _sum(self, result: Tensor, op: Op, bias: Tensor | None) -> None:
        """Products that were added up, and what is added to each sum."""
        self.found.ops.append(op)
        if bias is not None:
            self._add("add", result, [result, bias])

    def _converted(self, given: Tensor, result: Tensor) -> None:
        if given.dtype == torch.int64 and result.dtype == torch.float32:
            self._add("from_int", result, [given])
        elif result.dtype == torch.bool:
            self._add("nonzero", result, [given])
        else:
            self._add("copy", result, [given])

    def _clamped(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any], result: Tensor) -> None:
        bounds = [kwargs.get("min"), kwargs.get("max")]
        if name == "clamp":
            bounds[: len(args) - 1] = args[1:]
        else:
            bounds[name == "clamp_max"] = args[1] if len(args) > 1 else bounds[name == "clamp_max"]
        given = args[0]
        for kind, bound in zip(("maximum", "minimum"), bounds, strict=True):
            if bound is not None:
                self._add(kind, result, [given, self._tensor(bound)])
                given = result

    def _joined(self, parts: Sequence[Tensor], places: Sequence[Tensor]) -> None:
        for part, place in zip(parts, places, strict=True):
            self._add("copy", place, [part])

    def _tensor(self, value: Tensor | float, wanted: torch.dtype = torch.float32) -> Tensor:
        if not isinstance(value, Tensor):
            return torch.tensor(float(value), dtype=torch.float32)
        if value.dtype == torch.int64 and wanted == torch.float32 and not self._is_constant(value):
            made = self._fresh(*value.shape)
            self._add("from_int", made, [value])
            return made
        return value.float() if self._is_constant(value) else value

    def _or_plain(self, given: Tensor | None, like: Tensor, plain: int) -> Tensor:
        """A layer norm's scale (0) or shift (1)."""
        if given is not None:
            return given
        return torch.full(like.shape[-1:], 1.0 - plain, dtype=torch.float32)


def _is_ours(layer: nn.Module) -> bool:
    return isinstance(layer, FrozenLinear | Experts) and not isinstance(layer, FusedPart)


def _last(tensor: Tensor) -> tuple[list[int], list[int]]:
    """Both names of a tensor's last dimension, as operators are given them."""
    return [-1], [tensor.dim() - 1]


def _flat(values: Sequence[Any]) -> Iterator[Any]:
    for one in values:
        if isinstance(one, list | tuple):
            yield from _flat(one)
        else:
            yield one
