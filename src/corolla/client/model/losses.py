"""Cross-entropy without the logits: the head and the loss together, some rows at a time.

Invariant: what comes out equals what the family's own head, its scaling and its cross-entropy give; but of the
logits of a batch [n, V] no more than `CHUNK_ROWS` rows exist at a time, and the gradient for the hidden states
is made while they do. Whoever reads the logits all the same finds them: they are computed then.

The head and the loss in one: Hsu et al. 2024 (Liger kernels, arXiv:2410.10989).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils._pytree import tree_map
from transformers.loss.loss_utils import ForCausalLMLoss

from corolla.models.guard import IGNORED
from corolla.models.kernels.linear import Backends, product, product_back

# Of 50,000 words in float32 25 MB: the most that the C library keeps for the next chunk and need not ask for anew.
CHUNK_ROWS = 128
LEAST_LEFT = 1e-6

Product = Callable[[Tensor], Tensor]
# Functions, with what they are given behind logits.
Steps = tuple[tuple[Callable[..., Tensor], tuple[Any, ...]], ...]
Plain = tuple[Tensor, Backends]  # a weight [V, H], and how it is multiplied

# What can be said of logits without having them.
_KNOWN: frozenset[Any] = frozenset(
    {
        Tensor.shape.__get__,  # type: ignore[attr-defined]
        Tensor.dtype.__get__,  # type: ignore[attr-defined]
        Tensor.device.__get__,
        Tensor.layout.__get__,  # type: ignore[attr-defined]
        Tensor.ndim.__get__,  # type: ignore[attr-defined]
        Tensor.size,
        Tensor.dim,
        Tensor.numel,
        Tensor.is_floating_point,
        torch.is_floating_point,
    }
)
# What families do to each logit by itself (gemma2's cap, cohere's and granite's scale): noted, done later.
_ELEMENTWISE: frozenset[Any] = frozenset(
    {
        Tensor.__mul__,
        Tensor.__rmul__,
        Tensor.__truediv__,
        Tensor.mul,
        Tensor.div,
        torch.mul,
        torch.div,
        Tensor.tanh,
        torch.tanh,
        Tensor.float,
        Tensor.contiguous,
    }
)


class LazyLogits(Tensor):
    """Logits [..., V] that are computed when somebody looks at them, from hidden states [..., H].

    For all other code a tensor like any other: the first operation on it, but for those that treat each
    number by itself and alike, computes the whole, with the gradient that it would have had.
    """

    hidden: Tensor
    _product: Product
    _steps: Steps
    _with_grad: bool
    _whole: Tensor | None
    _plain: Callable[[], Plain] | None

    @staticmethod
    def __new__(
        cls,
        hidden: Tensor,
        product: Product,
        width: int,
        *,
        plain: Callable[[], Plain] | None = None,
        dtype: torch.dtype | None = None,
        steps: Steps = (),
        with_grad: bool = True,
    ) -> LazyLogits:
        """`product` gives the logits [n, V], V = `width`, of hidden states [n, H]; differentiable.

        `plain` gives the weight where the product is nothing but the one with it; `steps` come behind it.
        """

        def make() -> LazyLogits:
            made = Tensor._make_wrapper_subclass(
                cls, (*hidden.shape[:-1], width), dtype=dtype or hidden.dtype, device=hidden.device
            )
            made.hidden, made._product, made._steps, made._whole = hidden, product, steps, None
            made._plain = plain
            made._with_grad = with_grad and torch.is_grad_enabled()
            result: LazyLogits = made
            return result

        if not (with_grad and torch.is_grad_enabled() and hidden.requires_grad):
            return make()
        attached: LazyLogits = _FromHidden.apply(hidden, make, partial(_logits_of, product, steps))  # type: ignore[no-untyped-call]
        return attached

    def of(self, hidden: Tensor) -> Tensor:
        """The logits [n, V] of other hidden states [n, H]."""
        return _logits_of(self._product, self._steps, hidden)

    @property
    def plain(self) -> Plain | None:
        """The weight where these logits are `hidden @ weight.T` and nothing else, in float32 or float64."""
        if self._plain is None or self._steps or self.dtype not in (torch.float32, torch.float64):
            return None
        plain = self._plain()
        return plain if plain[0].dtype == self.hidden.dtype == self.dtype else None

    def whole(self) -> Tensor:
        """All logits, as an ordinary tensor."""
        if self._whole is None:
            with torch.set_grad_enabled(self._with_grad):
                self._whole = self.of(self.hidden)
        return self._whole

    def _then(self, function: Callable[..., Tensor], arguments: tuple[Any, ...]) -> LazyLogits:
        dtype = torch.float32 if function is Tensor.float else self.dtype
        steps = (*self._steps, (function, arguments))
        return LazyLogits(
            self.hidden,
            self._product,
            self.shape[-1],
            dtype=dtype,
            steps=steps,
            with_grad=self._with_grad,
        )

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        first = args[0] if args else None
        if func in _KNOWN:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **(kwargs or {}))
        if func is Tensor.requires_grad.__get__ and isinstance(first, cls):  # type: ignore[attr-defined]
            return first._with_grad and first.hidden.requires_grad
        simple = all(isinstance(argument, (int, float)) for argument in args[1:]) and not kwargs
        if func in _ELEMENTWISE and isinstance(first, cls) and first._whole is None and simple:
            return first._then(func, args[1:])
        real_args, real_kwargs = tree_map(_real, (args, kwargs or {}))
        return func(*real_args, **real_kwargs)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        real_args, real_kwargs = tree_map(_real, (args, kwargs or {}))
        return func(*real_args, **real_kwargs)


def _logits_of(product: Product, steps: Steps, hidden: Tensor) -> Tensor:
    logits = product(hidden)
    for function, arguments in steps:
        logits = function(logits, *arguments)
    return logits


class _FromHidden(torch.autograd.Function):
    """Has lazy logits come from hidden states in torch's own graph, too.

    Who takes them without an operation on them (another `autograd.Function`, backward hooks, DDP) looks there.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, make: Callable[[], LazyLogits], of: Product) -> LazyLogits:
        ctx.set_materialize_grads(False)
        ctx.hidden, ctx.of = hidden.detach(), of
        with torch.enable_grad():
            return make()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor | None) -> tuple[Tensor | None, None, None]:
        if grad is None:
            return None, None, None
        with torch.enable_grad():
            leaf = ctx.hidden.detach().requires_grad_()
            logits = ctx.of(leaf)
        return torch.autograd.grad(logits, leaf, grad.to(logits.dtype))[0], None, None


def _real(value: Any) -> Any:
    return value.whole() if isinstance(value, LazyLogits) else value


def causal_lm_loss(
    logits: Tensor,
    labels: Tensor | None,
    vocab_size: int,
    num_items_in_batch: Tensor | int | None = None,
    ignore_index: int = IGNORED,
    shift_labels: Tensor | None = None,
    **kwargs: Any,
) -> Tensor:
    """As `transformers`' `ForCausalLMLoss`, rows without a label left out and the others in chunks.

    A scalar, float32 (float64 for a model in float64).
    """
    targets = None if labels is None else F.pad(labels, (0, 1), value=ignore_index)[..., 1:]
    targets = shift_labels if shift_labels is not None else targets
    lazy = isinstance(logits, LazyLogits)
    if not lazy or targets is None or targets.numel() != logits.shape[:-1].numel():
        loss: Tensor = ForCausalLMLoss(
            logits, labels, vocab_size, num_items_in_batch, ignore_index, shift_labels, **kwargs
        )
        return loss
    targets = targets.reshape(-1).to(logits.device)
    count = (targets != ignore_index).sum() if num_items_in_batch is None else num_items_in_batch
    if isinstance(count, Tensor):
        count = count.to(logits.device)
    return summed_cross_entropy(logits, targets, ignore_index) / count


def summed_cross_entropy(logits: Tensor, targets: Tensor, ignore_index: int = IGNORED) -> Tensor:
    """Sum of the cross-entropies of logits [..., V] with `targets` int64 [n], those to ignore left out.

    A scalar, float32 or float64. In chunks where the logits are lazy.
    """
    if not isinstance(logits, LazyLogits):
        rows = _wide(logits.reshape(-1, logits.shape[-1]))
        return F.cross_entropy(rows, targets, reduction="sum", ignore_index=ignore_index)
    hidden = logits.hidden.reshape(-1, logits.hidden.shape[-1])
    kept = targets != ignore_index
    if not bool(kept.all()):
        hidden, targets = hidden[kept], targets[kept]
    total: Tensor = _ChunkedLoss.apply(hidden, Tokens(targets), logits)  # type: ignore[no-untyped-call]
    return total


def summed_distillation(logits: Tensor, teacher: TopTokens) -> Tensor:
    """Sum of the cross-entropies of logits [..., V], n rows in all, with a teacher's distributions.

    A scalar, float32 or float64. In chunks where the logits are lazy. Of what the teacher gives to tokens that are not
    among its likeliest only the sum counts (context distillation as in self-study, arXiv 2506.06266).
    """
    teacher = TopTokens(teacher.ids.to(logits.device), teacher.logprobs.to(logits.device))
    if not isinstance(logits, LazyLogits):
        rows = _wide(logits.reshape(-1, logits.shape[-1]))
        return teacher.loss(rows, torch.softmax(rows, dim=-1))
    hidden = logits.hidden.reshape(-1, logits.hidden.shape[-1])
    total: Tensor = _ChunkedLoss.apply(hidden, teacher, logits)  # type: ignore[no-untyped-call]
    return total


@dataclass(frozen=True)
class Tokens:
    """What is to be predicted, where it is known: token ids, int64 [n]."""

    ids: Tensor

    def rows(self, some: slice) -> Tokens:
        """Those of some rows."""
        return Tokens(self.ids[some])

    def loss(self, logits: Tensor, probabilities: Tensor) -> Tensor:
        """The summed loss: each row's logarithm of its sum of exponentials, less the target's logit.

        The former is read off the likeliest word, since torch's exponentials by themselves take as long as the
        product.
        """
        return (_log_sums(logits, probabilities) - logits.gather(1, self.ids[:, None])[:, 0]).sum()

    def errors(self, probabilities: Tensor) -> Tensor:
        """The loss's gradient for the logits, in the place of the probabilities [n, V]."""
        probabilities[torch.arange(len(self.ids), device=self.ids.device), self.ids] -= 1
        return probabilities


@dataclass(frozen=True)
class TopTokens:
    """What is to be predicted, as a teacher sees it: its likeliest tokens, int64 [n, k], and their logprobs."""

    ids: Tensor
    logprobs: Tensor

    def rows(self, some: slice) -> TopTokens:
        """Those of some rows."""
        return TopTokens(self.ids[some], self.logprobs[some])

    def loss(self, logits: Tensor, probabilities: Tensor) -> Tensor:
        """The summed loss; all other tokens are one, with what is left of the probability."""
        wanted, rest = self._wanted(logits)
        known = logits.gather(1, self.ids) - _log_sums(logits, probabilities)[:, None]
        other = _left(probabilities.gather(1, self.ids)).log()
        return -(wanted * known).sum() - (rest * other).sum()

    def errors(self, probabilities: Tensor) -> Tensor:
        """The loss's gradient for the logits, in the place of the probabilities [n, V]."""
        wanted, rest = self._wanted(probabilities)
        known = probabilities.gather(1, self.ids)
        probabilities *= (1 - rest / _left(known))[:, None]
        return probabilities.scatter_(1, self.ids, known - wanted)

    def _wanted(self, like: Tensor) -> tuple[Tensor, Tensor]:
        wanted = self.logprobs.to(like).exp()
        return wanted, (1 - wanted.sum(-1)).clamp(min=0)


def _left(probabilities: Tensor) -> Tensor:
    """What these leave of 1, [n]; never nothing, whose logarithm is no number."""
    return (1 - probabilities.sum(-1)).clamp(min=LEAST_LEFT)


def _log_sums(logits: Tensor, probabilities: Tensor) -> Tensor:
    return logits.amax(-1) - probabilities.amax(-1).log()


Targets = Tokens | TopTokens


@torch.no_grad()
def token_losses(logits: Tensor, targets: Tensor) -> Tensor:
    """The cross-entropy of each row of logits [..., V] with `targets` int64 [n]; float32 or float64 [n].

    Not differentiable. In chunks where the logits are lazy.
    """
    if not isinstance(logits, LazyLogits):
        rows = _wide(logits.reshape(-1, logits.shape[-1]))
        return F.cross_entropy(rows, targets, reduction="none")
    hidden = logits.hidden.reshape(-1, logits.hidden.shape[-1])
    losses = [
        F.cross_entropy(_wide(logits.of(rows)), wanted, reduction="none")
        for rows, wanted in zip(
            torch.split(hidden, CHUNK_ROWS), torch.split(targets, CHUNK_ROWS), strict=True
        )
    ]
    return torch.cat(losses)


class _ChunkedLoss(torch.autograd.Function):
    """Hidden states [n, H] and n targets to the summed loss; the gradient is ready when the loss is."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, targets: Targets, logits: LazyLogits) -> Tensor:
        gradient = torch.empty_like(hidden) if hidden.requires_grad else None
        plain = logits.plain
        chunk = _any_head(logits.of) if plain is None else _plain_head(*plain, len(hidden))
        total = torch.zeros((), dtype=_at_least_float32(hidden.dtype), device=hidden.device)
        for start in range(0, len(hidden), CHUNK_ROWS):
            rows = slice(start, start + CHUNK_ROWS)
            total += chunk(hidden[rows], targets.rows(rows), None if gradient is None else gradient[rows])
        ctx.gradient = gradient
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        gradient: Tensor = ctx.gradient
        return gradient * grad.to(gradient.dtype), None, None


# Hidden states [n, H] and n targets to their summed loss; the gradient [n, H] is written where one is wanted.
_Chunk = Callable[[Tensor, Targets, Tensor | None], Tensor]


def _any_head(logits_of: Product) -> _Chunk:
    """By autograd, through whatever the family does to its logits."""

    def chunk(hidden: Tensor, targets: Targets, gradient: Tensor | None) -> Tensor:
        with torch.set_grad_enabled(gradient is not None):
            leaf = hidden.detach().requires_grad_(gradient is not None)
            logits = logits_of(leaf)
        wide = _wide(logits.detach())
        probabilities = torch.softmax(wide, dim=-1)
        loss = targets.loss(wide, probabilities)
        if gradient is not None:
            errors = targets.errors(probabilities).to(logits.dtype)
            gradient.copy_(torch.autograd.grad(logits, leaf, errors)[0])
        return loss

    return chunk


def _plain_head(weight: Tensor, backends: Backends, rows: int) -> _Chunk:
    """By hand, in the backends that are the quickest here."""
    # Used for all chunks: fresh memory of this size costs as much as what is done in it.
    probabilities = weight.new_empty(min(rows, CHUNK_ROWS), len(weight))

    def chunk(hidden: Tensor, targets: Targets, gradient: Tensor | None) -> Tensor:
        logits = product(hidden, weight, None, backends.of(len(hidden)))
        some = torch.softmax(logits, dim=-1, out=probabilities[: len(hidden)])
        loss = targets.loss(logits, some)
        if gradient is not None:
            errors = targets.errors(some)
            gradient.copy_(product_back(errors, weight, backends.backward))
        return loss

    return chunk


def _wide(logits: Tensor) -> Tensor:
    """As `transformers` computes losses."""
    return logits.to(_at_least_float32(logits.dtype))


def _at_least_float32(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)
