"""The head of a distributed model: one for all its users, and no logits that nobody looks at.

Invariant: a `SharedHead` is the family's `nn.Linear` to all who look at it (weight, bias, keys of the state
dict, tied weights), and gives its logits. Two things differ, both unseen: rows that several threads bring at
the same time are multiplied together (`row_queue.py`); and in training logits are lazy (`losses.py`).
What is done to a watched parameter from Python shows in its `state_of`: an edit in place (torch counts those),
other memory, dtype or shape, and a look at `.data` or at the parameter by NumPy or DLPack, through which it can be
edited uncounted ever after. Not seen is an edit in the memory of another tensor that was made of it
(`weight.detach().numpy()`, `state_dict()["weight"].data`): to give the kernel up for every detached tensor would be
to give it up for every saved model.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Collection, Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from operator import is_
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.loss.loss_utils import ForCausalLMLoss

from corolla.client.model.losses import LazyLogits, Plain, causal_lm_loss
from corolla.client.model.row_queue import Product, RowQueue
from corolla.errors import UsageError
from corolla.models.kernels.autotune import backends_for
from corolla.models.kernels.client import HalfLinear, product_for, quantize_client
from corolla.models.kernels.linear import Backends, FrozenLinear

FEW_ROWS = 64  # what one caller may bring to a common product; more gain nothing by it

State = tuple[Any, ...]
Tables = tuple[Tensor, Tensor | None]
_lazily: ContextVar[bool] = ContextVar("corolla_lazy_logits", default=False)


def share_head(model: PreTrainedModel) -> None:
    """Put a `SharedHead` in the place of the model's head, and the loss that goes with it.

    A head that is no plain `nn.Linear`, or a loss other than the usual one, is left as it is.
    """
    head: Any = model.get_output_embeddings()
    if type(head) is nn.Linear:
        model.set_output_embeddings(SharedHead.like(head))
    if model.loss_function is ForCausalLMLoss:
        model.loss_function = causal_lm_loss


@contextlib.contextmanager
def kept_head(model: PreTrainedModel) -> Iterator[None]:
    """Where transformers makes a new head within the block, a `SharedHead` stays one, and frozen if it was."""
    before: Any = model.get_output_embeddings()
    yield
    after: Any = model.get_output_embeddings()
    if isinstance(before, SharedHead) and type(after) is nn.Linear:
        shared = SharedHead.like(after)
        shared.widens = before.widens
        if before.frozen:
            shared.requires_grad_(False)
        model.set_output_embeddings(shared)


@contextlib.contextmanager
def lazy_logits() -> Iterator[None]:
    """Within the block a distributed model's logits are lazy without gradients, too."""
    token = _lazily.set(True)
    try:
        yield
    finally:
        _lazily.reset(token)


def wants_lazy(hidden: Tensor) -> bool:
    """Whether the logits of these hidden states should be lazy: a loss is likely to follow."""
    return _lazily.get() or (torch.is_grad_enabled() and hidden.requires_grad)


class WatchedParameter(nn.Parameter):
    """See the module. Made by `watch`."""

    _aliases: int  # how often somebody got hold of the numbers behind torch's back
    _mark: object  # its own; `torch.utils.swap_tensors`, which refuses what has weak references, swaps it too

    @property
    def data(self) -> Tensor:
        """As `Tensor.data`."""
        self._aliases += 1
        found: Tensor = Tensor.data.__get__(self)  # type: ignore[attr-defined]
        return found

    @data.setter
    def data(self, value: Tensor) -> None:
        if value.data_ptr() != self.data_ptr() or value.dtype != self.dtype:
            self._aliases += 1
        Tensor.data.__set__(self, value)  # type: ignore[attr-defined]

    def numpy(self, *, force: bool = False) -> Any:
        """As `Tensor.numpy`."""
        self._aliases += 1
        return super().numpy(force=force)

    def __array__(self, *args: Any, **options: Any) -> Any:
        self._aliases += 1
        return super().__array__(*args, **options)  # type: ignore[no-untyped-call]

    def __dlpack__(self, *args: Any, **options: Any) -> Any:
        self._aliases += 1
        return super().__dlpack__(*args, **options)

    def __deepcopy__(self, memo: dict[int, Any]) -> nn.Parameter:
        if id(self) not in memo:
            memo[id(self)] = nn.Parameter(self.detach().clone(), self.requires_grad)
        found: nn.Parameter = memo[id(self)]
        return found

    def __reduce_ex__(self, protocol: Any) -> Any:
        return nn.Parameter(self.detach(), self.requires_grad).__reduce_ex__(protocol)  # type: ignore[no-untyped-call]


def watch(parameter: nn.Parameter) -> bool:
    """Have `parameter` watched from now on; it stays the same object to all who hold it.

    False where that cannot be: it was made in inference mode, or is of another class of its own.
    """
    if type(parameter) is nn.Parameter:
        parameter.__class__ = WatchedParameter
        parameter._aliases, parameter._mark = 0, object()  # type: ignore[attr-defined]
    return isinstance(parameter, WatchedParameter) and not parameter.is_inference()


def state_of(parameter: Tensor | None) -> State | None:
    """What is equal later only if the numbers of a watched parameter are still the same."""
    if parameter is None:
        return None
    version = None if parameter.is_inference() else parameter._version
    aliases = getattr(parameter, "_aliases", 0)
    return version, aliases, parameter.data_ptr(), parameter.dtype, parameter.shape, parameter.stride()


class HeadState:
    """A head's weight and bias as they were at some moment."""

    def __init__(self, tables: Tables) -> None:
        self._tables, self._states = tables, [*map(state_of, tables)]

    def still(self, now: Tables) -> bool:
        """Whether these are the same parameters, and no number of them can have changed."""
        return all(map(is_, now, self._tables)) and [*map(state_of, now)] == self._states


class ChangeTracker:
    """Which parameters of a model are still as they were when they were noted."""

    def __init__(self) -> None:
        self._known: dict[int, State] = {}

    def note(self, model: nn.Module, but: Collection[str] = ()) -> None:
        """Take all parameters as they are now for unchanged, `but` for those of these names."""
        self._known = {}
        for name, one in model.named_parameters():
            if name not in but and watch(one):
                self._known[id(one)] = _edits(one)

    def changed(self, model: nn.Module) -> dict[str, nn.Parameter]:
        """The others, by name; a table that is tied under one of its names."""
        return {name: one for name, one in model.named_parameters() if not self._is_as_noted(one)}

    def _is_as_noted(self, one: nn.Parameter) -> bool:
        return self._known.get(id(one)) == _edits(one) or one.is_inference()


def _edits(parameter: nn.Parameter) -> State:
    version = None if parameter.is_inference() else parameter._version
    return version, getattr(parameter, "_aliases", 0), getattr(parameter, "_mark", None)


@dataclass(frozen=True)
class _Kernel:
    """A faster product with the weights as they were when it was made."""

    product: Product
    exact: bool
    seen: HeadState


class SharedHead(nn.Linear):
    """Hidden states [..., H] to logits [..., V]; to be called from any number of threads."""

    def __init__(
        self, in_features: int, out_features: int, bias: bool = True, device: Any = None, dtype: Any = None
    ) -> None:
        super().__init__(in_features, out_features, bias, device, dtype)
        self.queue = RowQueue()  # where callers meet
        self._kernel: _Kernel | None = None
        self._backends: tuple[Any, Backends] | None = None  # and the kind of weight that they are for
        self.widens = False

    @classmethod
    def like(cls, head: nn.Linear) -> Self:
        """One with the very parameters of `head`."""
        made = cls(head.in_features, head.out_features, head.bias is not None, device="meta")
        made.weight, made.bias = head.weight, head.bias
        return made.train(head.training)

    def use_kernel(self, kernel: Product | None, *, exact: bool = False) -> None:
        """Compute logits by `kernel`, float32 [n, H] to [n, V]; None: by the weights as they are.

        It must be differentiable for hidden states, and is used while the weights are frozen and as they are now:
        once they were changed, they are multiplied themselves. `exact` says that it
        computes the product with the weights, only faster for few rows: losses, which have many, are then
        computed with the weights themselves.
        """
        self._kernel = None
        if kernel is None:
            return
        if all(watch(one) for one in self.parameters()):
            self._kernel = _Kernel(kernel, exact, HeadState(self._tables))

    @property
    def _tables(self) -> Tables:
        return self.weight, self.bias

    @property
    def backends(self) -> Backends:
        """How its weight is multiplied the quickest in a loss; found out by the first one."""
        kind = self.weight.shape, self.weight.dtype, self.weight.device
        if self._backends is None or self._backends[0] != kind:
            self._backends = kind, backends_for(self.weight)
        return self._backends[1]

    @property
    def kernel(self) -> Product | None:
        """What computes logits in the place of the weights, while they are as they were."""
        found = self._current()
        return None if found is None else found.product

    def _current(self) -> _Kernel | None:
        """The kernel if it is right now; it is given up for good once the weights have changed."""
        kernel = self._kernel
        if kernel is None or not self.frozen:
            return None
        if kernel.seen.still(self._tables):
            return kernel
        self._kernel = None
        return None

    @property
    def frozen(self) -> bool:
        """Whether no parameter wants a gradient."""
        return not self.weight.requires_grad and (self.bias is None or not self.bias.requires_grad)

    def forward(self, hidden: Tensor) -> Tensor:
        """As `nn.Linear`; lazily where a loss is likely to follow."""
        if not self.frozen:
            return self._product(hidden)
        if wants_lazy(hidden):
            later = _DeferredProduct(self)
            kernel = self._current()
            exact = not self._halved if kernel is None else kernel.exact
            bias: Tensor | None = self.bias
            plain = exact and bias is None and not _autocasting(hidden)
            return LazyLogits(hidden, later, self.out_features, plain=later.plain if plain else None)
        if not self._may_share(hidden):
            return self._product(hidden)
        rows = hidden.reshape(-1, self.in_features)
        return self.queue.run(rows, self._product).reshape(*hidden.shape[:-1], self.out_features)

    def _product(self, hidden: Tensor) -> Tensor:
        kernel = self._current()
        if kernel is not None and hidden.dtype == torch.float32:
            rows = kernel.product(hidden.reshape(-1, self.in_features))
            return rows.reshape(*hidden.shape[:-1], self.out_features)
        if not self._halved or hidden.dtype != torch.float32:
            return F.linear(hidden, self.weight, self.bias)
        if self.weight.requires_grad:
            return F.linear(hidden, self.weight.float(), self.bias)
        logits: Tensor = HalfLinear(self.weight)(hidden)
        return logits if self.bias is None else logits + self.bias

    @property
    def _halved(self) -> bool:
        """Whether the weight is kept in 16 bit, for products in float32."""
        return self.widens and self.weight.dtype == torch.bfloat16

    def _may_share(self, hidden: Tensor) -> bool:
        """What would raise, or compute otherwise than its neighbours, stays by itself."""
        wide = self._halved or self._current() is not None
        return (
            hidden.device.type == "cpu"
            and hidden.shape[-1] == self.in_features
            and hidden.dtype == (torch.float32 if wide else self.weight.dtype)
            and 0 < hidden.numel() <= FEW_ROWS * self.in_features
            and not _autocasting(hidden)
        )

    def __getstate__(self) -> dict[str, Any]:
        # A kernel is memory laid out for this machine, which no file can hold.
        return {**self.__dict__, "_kernel": None, "_backends": None}

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        made = type(self).__new__(type(self))
        memo[id(self)] = made
        made.__setstate__(copy.deepcopy(self.__getstate__(), memo))  # type: ignore[no-untyped-call]
        if (kernel := self._current()) is not None:
            product = kernel.product
            if isinstance(product, FrozenLinear):
                product = product_for(made, self, product)
            made.use_kernel(product, exact=kernel.exact)
        return made


class _DeferredProduct:
    """A head's product for logits that are computed later, with the weights that it has now or not at all."""

    def __init__(self, head: SharedHead) -> None:
        self._head = head
        self._seen = HeadState(head._tables)

    def __call__(self, hidden: Tensor) -> Tensor:
        self._check()
        return self._head._product(hidden)

    def plain(self) -> Plain:
        """The weight, where there is nothing else."""
        self._check()
        return self._head.weight.detach(), self._head.backends

    def _check(self) -> None:
        if not self._seen.still(self._head._tables):
            raise UsageError(
                "The head was changed between the forward and the reading of its logits: read the logits, or "
                "compute the loss, before you change its weight."
            )


def _autocasting(tensor: Tensor) -> bool:
    return torch.is_autocast_enabled(tensor.device.type)


def use_head_kernel(model: Any, quantization: str) -> None:
    """Have the head multiply in the way that is fastest here, or in fewer bits. Raises `UsageError`."""
    product = quantize_client(model, quantization)
    head = model.get_output_embeddings()
    if product is None or not isinstance(head, SharedHead):
        return
    if isinstance(product, HalfLinear):  # it is nothing but the weights, which the head reads by itself
        head.widens = True
        return
    head.widens = quantization != "none"
    head.use_kernel(product, exact=quantization == "none")
