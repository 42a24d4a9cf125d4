"""The head of a distributed model: one for all its users, and no logits that nobody looks at.

Invariant: a `SharedHead` is the family's `nn.Linear` to all who look at it (weight, bias, keys of the state
dict, tied weights), and gives its logits. Two things differ, both unseen: rows that several threads bring at
the same time are multiplied together, since a product of many rows costs little more than that of one (the
weights are read once); and in training logits are lazy (`client/model/losses.py`).
"""

from __future__ import annotations

import contextlib
import copy
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Self, cast, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.loss.loss_utils import ForCausalLMLoss

from corolla.client.model.losses import LazyLogits, causal_lm_loss, wants_lazy
from corolla.client.model.watched import State, same_parameters, state_of, watch
from corolla.config import ClientQuantization
from corolla.errors import UsageError
from corolla.models.kernels.client import HalfLinear, quantize_client

FEW_ROWS = 64  # what one caller may bring to a common product; more gain nothing by it
MOST_ROWS = 256  # of one product

Product = Callable[[Tensor], Tensor]


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


def using_head(model: PreTrainedModel) -> contextlib.AbstractContextManager[None]:
    """Within the block the caller is one of those whom the shared head may wait for."""
    head = model.get_output_embeddings()
    return head.queue.user() if isinstance(head, SharedHead) else contextlib.nullcontext()


@dataclass(frozen=True)
class _Kernel:
    """A faster product with the weights as they were when it was made."""

    product: Product
    exact: bool
    tables: tuple[Tensor, Tensor | None]
    states: tuple[State | None, ...]


class SharedHead(nn.Linear):
    """Hidden states [..., H] to logits [..., V]; to be called from any number of threads."""

    def __init__(
        self, in_features: int, out_features: int, bias: bool = True, device: Any = None, dtype: Any = None
    ) -> None:
        super().__init__(in_features, out_features, bias, device, dtype)
        self._queue = RowQueue()
        self._kernel: _Kernel | None = None
        self.widens = False

    @classmethod
    def like(cls, head: nn.Linear) -> Self:
        """One with the very parameters of `head`."""
        made = cls(head.in_features, head.out_features, head.bias is not None, device="meta")
        made.weight, made.bias = head.weight, head.bias
        return made.train(head.training)

    def use_kernel(self, kernel: Product | None, *, exact: bool = False) -> None:
        """Compute logits by `kernel`, float32 [n, H] to [n, V]; None: by the weights as they are.

        It must be differentiable for hidden states, must not change with the weights, and is used while these are
        frozen and as they are now: once they were changed, they are multiplied themselves. `exact` says that it
        computes the product with the weights, only faster for few rows: losses, which have many, are then
        computed with the weights themselves.
        """
        self._kernel = None
        if kernel is None:
            return
        if all(watch(one) for one in self.parameters()):
            tables = self._tables
            self._kernel = _Kernel(kernel, exact, tables, tuple(map(state_of, tables)))

    @property
    def _tables(self) -> tuple[Tensor, Tensor | None]:
        return self.weight, self.bias

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
        if same_parameters(self._tables, kernel.tables, kernel.states):
            return kernel
        self._kernel = None
        return None

    @property
    def queue(self) -> RowQueue:
        """Where callers meet; `queue.gather` is how long the first waits for the others, 0 unless it is set."""
        return self._queue

    @property
    def frozen(self) -> bool:
        """Whether no parameter wants a gradient."""
        return not self.weight.requires_grad and (self.bias is None or not self.bias.requires_grad)

    def forward(self, hidden: Tensor) -> Tensor:
        """As `nn.Linear`; lazily where a loss is likely to follow."""
        if not self.frozen:
            return self._product(hidden)
        if wants_lazy(hidden):
            later = _Later(self)
            kernel = self._current()
            exact = not self._halved if kernel is None else kernel.exact
            bias: Tensor | None = self.bias
            plain = exact and bias is None and not _autocasting(hidden)
            return LazyLogits(hidden, later, self.out_features, weight=later.weight if plain else None)
        if not self._may_share(hidden):
            return self._product(hidden)
        rows = hidden.reshape(-1, self.in_features)
        return self._queue.run(rows, self._product).reshape(*hidden.shape[:-1], self.out_features)

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
        return {**self.__dict__, "_kernel": None}

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        made = type(self).__new__(type(self))
        memo[id(self)] = made
        made.__setstate__(copy.deepcopy(self.__getstate__(), memo))  # type: ignore[no-untyped-call]
        if (kernel := self._current()) is not None:
            made.use_kernel(kernel.product, exact=kernel.exact)
        return made


class _Later:
    """A head's product for logits that are computed later, with the weights that it has now or not at all."""

    def __init__(self, head: SharedHead) -> None:
        self._head = head
        self._tables = head._tables
        self._states = tuple(map(state_of, self._tables))

    def __call__(self, hidden: Tensor) -> Tensor:
        self._check()
        return self._head._product(hidden)

    def weight(self) -> Tensor:
        """[V, H]."""
        self._check()
        return self._head.weight.detach()

    def _check(self) -> None:
        if not same_parameters(self._head._tables, self._tables, self._states):
            raise UsageError(
                "The head was changed between the forward and the reading of its logits: read the logits, or "
                "compute the loss, before you change its weight."
            )


def _autocasting(tensor: Tensor) -> bool:
    return torch.is_autocast_enabled(tensor.device.type)


class _Call:
    """One caller's rows, and what becomes of them."""

    def __init__(self, rows: Tensor) -> None:
        self.rows = rows
        self.result: Tensor | None = None
        self.error: Exception | None = None
        self.woken = threading.Event()  # served, or to lead
        self.complete = threading.Event()  # to a leader: nobody else will come soon

    @property
    def served(self) -> bool:
        return self.result is not None or self.error is not None


class RowQueue:
    """Joins what threads bring while a product is being computed into the next product.

    Whoever comes when nobody is at work leads: takes its own rows and all that wait, multiplies, hands out the
    results and lets the next one lead. So one caller alone waits for nothing. An interrupt in one thread (they
    come at any point of the code) costs the others at most a second computation: calls leave the list when
    they are served and not before, and every caller puts things in order when it leaves.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._waiting: list[_Call] = []  # all that are not served, the leader among them
        self._leader: _Call | None = None
        self._users = 0  # who will come again and again
        self.gather = 0.0  # seconds that a leader waits at most until all users are there

    @contextlib.contextmanager
    def user(self) -> Iterator[None]:
        """Whoever brings rows again and again, as generation does, does so within this block."""
        with self._lock:
            self._users += 1
        try:
            yield
        finally:
            with self._lock:
                self._users -= 1
                self._note_complete()

    def __deepcopy__(self, _memo: Any) -> RowQueue:
        return RowQueue()

    def __reduce__(self) -> tuple[type[RowQueue], tuple[()]]:
        return RowQueue, ()

    @property
    def waiting(self) -> int:
        """Calls that are not served yet."""
        return len(self._waiting)

    def run(self, rows: Tensor, product: Product) -> Tensor:
        """`product(rows)`, [n, H] to [n, V], in one with other threads' rows; n > 0, no gradient.

        An error of the product is raised in all threads whose rows were in it.
        """
        call = _Call(rows)
        try:
            self._enter(call)
            if self._leader is not call:
                call.woken.wait()
            if not call.served:
                self._lead(call, product)
        finally:
            self._leave(call)
        if call.error is not None:
            raise call.error
        assert call.result is not None
        return call.result

    def _enter(self, call: _Call) -> None:
        with self._lock:
            self._waiting.append(call)
            if self._leader is None:
                self._leader = call
            self._note_complete()

    def _note_complete(self) -> None:
        if self._leader is not None and len(self._waiting) >= self._users:
            self._leader.complete.set()

    def _lead(self, call: _Call, product: Product) -> None:
        if self.gather > 0:
            call.complete.wait(self.gather)
        with self._lock:
            batch = self._batch_of(call)
        try:
            results = _multiply([member.rows for member in batch], product)
        except Exception as error:
            for member in batch:
                member.error = error
        else:
            for member, result in zip(batch, results, strict=True):
                member.result = result

    def _batch_of(self, leader: _Call) -> list[_Call]:
        """The leader and those that wait, first come first served, as many as fit."""
        batch, count = [leader], len(leader.rows)
        for call in self._waiting:
            if call is not leader and count + len(call.rows) <= MOST_ROWS:
                batch.append(call)
                count += len(call.rows)
        return batch

    def _leave(self, call: _Call) -> None:
        with self._lock:
            for other in self._waiting:
                if other.served:
                    other.woken.set()
            self._waiting = [other for other in self._waiting if other is not call and not other.served]
            if self._leader is call:
                self._leader = self._waiting[0] if self._waiting else None
            if self._leader is not None:
                self._leader.woken.set()
            self._note_complete()


def _multiply(parts: list[Tensor], product: Product) -> list[Tensor]:
    # Neither the leader's inference mode nor its gradients may come to strangers with the results.
    with torch.inference_mode(False), torch.no_grad():
        if len(parts) == 1:
            return [product(parts[0])]
        return list(torch.split(product(torch.cat(parts)), [len(part) for part in parts]))


def use_head_kernel(model: Any, quantization: str) -> None:
    """Have the head multiply in the way that is fastest here, or in fewer bits. Raises `UsageError`."""
    if quantization not in get_args(ClientQuantization):
        raise UsageError(
            f"quantization is {quantization!r}; it must be one of {', '.join(get_args(ClientQuantization))}."
        )
    product = quantize_client(model, cast(ClientQuantization, quantization))
    head = model.get_output_embeddings()
    if product is None or not isinstance(head, SharedHead):
        return
    if isinstance(product, HalfLinear):  # it is nothing but the weights, which the head reads by itself
        head.widens = True
        return
    head.widens = quantization != "none"
    head.use_kernel(product, exact=quantization == "none")
