"""The loss in chunks equals the plain one, its gradient too; deferred logits are like any others."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tests.client.conftest import Pair, random_ids
from tests.tiny_models import FAMILIES, tiny_config, tiny_model
from torch import Tensor

from corolla.client.model import losses
from corolla.client.model.heads import SharedHead, lazy_logits, share_head
from corolla.client.model.losses import LazyLogits, summed_cross_entropy, token_losses
from corolla.models.kernels.linear import Backends

PairOf = Callable[..., Pair]
CHANGES: dict[str, dict[str, Any]] = {
    "cohere": {"logit_scale": 0.3},
    "granite": {"logits_scaling": 5.0},
    "gemma2": {"final_logit_softcapping": 3.0},
}


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that several chunks are needed, the last one not full."""
    monkeypatch.setattr(losses, "CHUNK_ROWS", 5)


# Their mixtures of experts are not computed in float64.
ONLY_FP32 = ("mixtral", "gpt_oss")


def both(family: str, dtype: torch.dtype = torch.float64) -> tuple[Any, Any]:
    """The family's own whole model, frozen, and a copy with the head in question."""
    plain = tiny_model(tiny_config(family, layers=1, **CHANGES.get(family, {})), dtype=dtype)
    plain.requires_grad_(False)
    fused = copy.deepcopy(plain)
    share_head(fused)
    return plain, fused


def embedded(model: Any, rows: int = 3, length: int = 7) -> tuple[Tensor, Tensor]:
    """Embeddings that want a gradient, and labels with holes."""
    ids = random_ids(rows, length)
    labels = ids.clone()
    labels[0, :4] = -100
    labels[2, 5] = -100
    vectors = model.get_input_embeddings()(ids)
    return vectors.detach().requires_grad_(), labels


def computed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """A list that grows by the rows of every product of a head."""
    rows: list[int] = []
    plain = SharedHead._product

    def counted(self: SharedHead, hidden: Tensor) -> Tensor:
        rows.append(hidden.numel() // hidden.shape[-1])
        return plain(self, hidden)

    def by_hand(weight: Tensor, ways: Backends, count: int) -> Any:
        chunk = plain_head(weight, ways, count)

        def run(hidden: Tensor, *others: Any) -> Any:
            rows.append(len(hidden))
            return chunk(hidden, *others)

        return run

    plain_head = losses._plain_head
    monkeypatch.setattr(losses, "_plain_head", by_hand)
    monkeypatch.setattr(SharedHead, "_product", counted)
    return rows


@pytest.mark.parametrize("family", FAMILIES)
def test_loss_and_gradient_of_every_family(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    exact = family not in ONLY_FP32
    close = {"rtol": 1e-10, "atol": 1e-14} if exact else {"rtol": 1e-4, "atol": 1e-6}
    plain, fused = both(family, torch.float64 if exact else torch.float32)
    vectors, labels = embedded(plain)
    rows = computed(monkeypatch)
    found = fused(inputs_embeds=vectors, labels=labels, use_cache=False)
    assert max(rows) <= losses.CHUNK_ROWS
    assert sum(rows) == int((labels[:, 1:] != -100).sum())
    (own,) = torch.autograd.grad(found.loss, vectors)
    # transformers would compute the loss in float32 and, with it, its gradient.
    logits = plain(inputs_embeds=vectors, use_cache=False).logits[:, :-1]
    expected = F.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten())
    (wanted,) = torch.autograd.grad(expected, vectors)
    torch.testing.assert_close(found.loss, expected, **close)
    torch.testing.assert_close(own, wanted, **close)
    theirs = plain(inputs_embeds=vectors, labels=labels, use_cache=False)
    torch.testing.assert_close(found.loss.float(), theirs.loss, rtol=1e-6, atol=0.0)
    assert type(found) is type(theirs)
    assert found.logits.shape == theirs.logits.shape
    torch.testing.assert_close(found.logits + 0, theirs.logits, **close)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ["llama", "gemma2", "granite"])
def test_lower_precisions(family: str, dtype: torch.dtype) -> None:
    plain, fused = both(family, dtype)
    vectors, labels = embedded(plain)
    found = fused(inputs_embeds=vectors, labels=labels, use_cache=False)
    (own,) = torch.autograd.grad(found.loss, vectors)
    theirs = plain(inputs_embeds=vectors, labels=labels, use_cache=False)
    (wanted,) = torch.autograd.grad(theirs.loss, vectors)
    assert (found.loss.dtype, own.dtype) == (theirs.loss.dtype, wanted.dtype)
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(found.loss, theirs.loss, rtol=tolerance, atol=0.0)
    assert float((own - wanted).norm() / wanted.norm()) < tolerance


@pytest.mark.parametrize("count", [None, 40, torch.tensor(40)], ids=["mean", "int", "tensor"])
def test_the_ways_that_trainers_call_it(count: Any) -> None:
    plain, fused = both("llama", torch.float32)
    vectors, labels = embedded(plain)
    shifted = F.pad(labels, (0, 1), value=-100)[:, 1:].contiguous()
    keep = shifted != -100
    ways: list[dict[str, Any]] = [
        {"labels": labels},
        {"labels": labels, "shift_labels": shifted},
        {"labels": labels, "shift_labels": shifted[keep], "logits_to_keep": keep},
        {"labels": labels, "shift_labels": shifted[:, -4:].contiguous(), "logits_to_keep": 4},
    ]
    for way in ways:
        arguments = {"inputs_embeds": vectors, "use_cache": False, "num_items_in_batch": count, **way}
        found, expected = fused(**arguments), plain(**arguments)
        torch.testing.assert_close(found.loss, expected.loss)
        (own,) = torch.autograd.grad(found.loss, vectors)
        (wanted,) = torch.autograd.grad(expected.loss, vectors)
        torch.testing.assert_close(own, wanted)
        assert found[1].shape == expected[1].shape


def test_no_label_at_all_and_labels_that_do_not_fit() -> None:
    plain, fused = both("llama", torch.float32)
    vectors, labels = embedded(plain)
    nothing = torch.full_like(labels, -100)
    assert fused(inputs_embeds=vectors, labels=nothing).loss.isnan()
    zero = fused(inputs_embeds=vectors, labels=nothing, num_items_in_batch=3).loss
    (gradient,) = torch.autograd.grad(zero, vectors)
    assert (float(zero.detach()), float(gradient.abs().max())) == (0.0, 0.0)
    for model in (plain, fused):
        with pytest.raises(ValueError, match="batch_size"):
            model(inputs_embeds=vectors, labels=labels, logits_to_keep=2)


def test_a_kernel_and_a_bias_are_part_of_the_loss() -> None:
    head = torch.nn.Linear(8, 30).requires_grad_(False)
    rows, targets = torch.randn(12, 8, requires_grad=True), torch.arange(12)
    for kernel in (None, lambda hidden: F.linear(hidden, head.weight * 2, head.bias)):
        shared = SharedHead.like(head)
        shared.use_kernel(kernel)
        logits = F.linear(rows, head.weight * (2 if kernel else 1), head.bias)
        expected = F.cross_entropy(logits, targets, reduction="sum")
        found = summed_cross_entropy(shared(rows), targets)
        torch.testing.assert_close(found, expected)
        own, wanted = (torch.autograd.grad(loss, rows)[0] for loss in (found, expected))
        torch.testing.assert_close(own, wanted)


def test_a_head_that_is_trained_goes_the_plain_way() -> None:
    plain, fused = both("llama", torch.float32)
    vectors, labels = embedded(plain)
    gradients = []
    for model in (plain, fused):
        model.get_output_embeddings().weight.requires_grad_(True)
        output = model(inputs_embeds=vectors, labels=labels, use_cache=False)
        assert type(output.logits) is Tensor
        gradients.append(torch.autograd.grad(output.loss, [model.get_output_embeddings().weight, vectors]))
    torch.testing.assert_close(gradients[0], gradients[1])


def test_without_gradients_logits_are_there_at_once() -> None:
    plain, fused = both("llama", torch.float32)
    vectors, labels = embedded(plain)
    with torch.no_grad():
        found = fused(inputs_embeds=vectors, labels=labels, use_cache=False)
        expected = plain(inputs_embeds=vectors, labels=labels, use_cache=False)
    assert type(found.logits) is Tensor
    assert torch.equal(found.logits, expected.logits)
    assert torch.equal(found.loss, expected.loss)


class Cubed(torch.autograd.Function):
    """As libraries write losses of their own."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor) -> Tensor:
        ctx.save_for_backward(logits)
        return logits**3

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (logits,) = ctx.saved_tensors
        return grad * 3 * logits**2


USES: dict[str, Callable[[Tensor], Any]] = {
    "another's function": Cubed.apply,
    "another's function, later": lambda logits: Cubed.apply((logits / 3.0).float()),
    "argmax": lambda logits: logits.argmax(-1),
    "slice": lambda logits: logits[:, :-1].contiguous().view(-1, logits.size(-1)),
    "own loss": lambda logits: F.cross_entropy(logits.float().flatten(0, 1), torch.ones(21).long()),
    "reflected": lambda logits: 2.0 * logits / 3.0 + 1.0,
    "between two": lambda logits: logits * logits,
    "in a list": lambda logits: torch.cat([logits, logits]),
    "in place": lambda logits: logits.mul_(2.0),
    "set": lambda logits: logits.__setitem__((0, 0), 0.0) or logits.sum(),
    "numpy": lambda logits: torch.from_numpy(logits.detach().numpy()),
    "pickled": lambda logits: pickle.loads(pickle.dumps(logits.detach())),
    "copied": lambda logits: copy.deepcopy(logits.detach()),
    "list": lambda logits: torch.tensor(logits.tolist()),
    "another dtype": lambda logits: logits.to(torch.float64),
    "text": lambda logits: torch.tensor([ord(letter) for letter in repr(logits.detach())]),
    "out": lambda logits: (
        torch.add(logits, 1.0, out=torch.empty(0)) if not logits.requires_grad else logits + 1
    ),
    "iterated": lambda logits: torch.stack(list(logits)),
}


@pytest.mark.parametrize("use", USES.values(), ids=USES.keys())
def test_lazy_logits_can_be_used_like_others(use: Callable[[Tensor], Any]) -> None:
    plain, fused = both("llama", torch.float32)
    vectors, _ = embedded(plain)
    found, expected = (model(inputs_embeds=vectors, use_cache=False).logits for model in (fused, plain))
    assert isinstance(found, LazyLogits)
    about = ("shape", "dtype", "device", "ndim", "requires_grad")
    assert [getattr(found, name) for name in about] == [getattr(expected, name) for name in about]
    mine, theirs = use(found), use(expected)
    assert isinstance(mine, Tensor)
    torch.testing.assert_close(mine + 0, theirs + 0)
    if theirs.requires_grad:
        scalars = [(value * torch.arange(value.numel()).view(value.shape)).sum() for value in (mine, theirs)]
        own, wanted = (torch.autograd.grad(scalar, vectors)[0] for scalar in scalars)
        torch.testing.assert_close(own, wanted)


def test_backward_hooks_see_the_gradients_of_logits() -> None:
    found, expected = (_seen_by_hooks(model) for model in both("gemma2", torch.float32)[::-1])
    assert len(found) == 2
    for mine, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, theirs)


def _seen_by_hooks(model: Any) -> list[Tensor]:
    """The gradients of the head's outputs, and of the embeddings."""
    seen: list[Tensor] = []

    def note(_part: Any, _into: Any, out: tuple[Tensor, ...]) -> None:
        seen.extend(one.clone() for one in out)

    vectors, labels = embedded(model)
    model.get_output_embeddings().register_full_backward_hook(note)
    loss, logits = model(inputs_embeds=vectors, labels=labels, use_cache=False, return_dict=False)
    (loss + logits.square().mean()).backward()
    assert vectors.grad is not None
    return [*seen, vectors.grad]


def test_logits_read_without_gradients_still_have_theirs() -> None:
    _, fused = both("gemma2", torch.float32)
    vectors, _ = embedded(fused)
    logits = fused(inputs_embeds=vectors, use_cache=False).logits
    with torch.no_grad():
        logits.argmax(-1)
    assert (logits + 0).requires_grad


@pytest.mark.parametrize("family", ["llama", "cohere"])
def test_losses_of_tokens(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    plain, fused = both(family)
    vectors, labels = embedded(plain)
    targets, keep = labels[:, 1:].reshape(-1).clamp(min=0), torch.ones_like(labels, dtype=torch.bool)
    keep[:, -1] = False
    with torch.no_grad():
        logits = plain(inputs_embeds=vectors, logits_to_keep=keep, use_cache=False).logits
        expected = F.cross_entropy(logits.reshape(-1, logits.shape[-1]), targets, reduction="none")
        rows = computed(monkeypatch)
        with lazy_logits():
            mine = fused(inputs_embeds=vectors, logits_to_keep=keep, use_cache=False).logits
        found = token_losses(mine, targets)
        assert sum(rows) == 18
        assert max(rows) == losses.CHUNK_ROWS
        torch.testing.assert_close(summed_cross_entropy(mine, targets), expected.sum())
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(token_losses(logits, targets), expected)
    torch.testing.assert_close(summed_cross_entropy(logits, targets), expected.sum())


@pytest.mark.parametrize("family", ["llama", "bloom", "gemma2"])
def test_a_users_own_loop_through_the_swarm(
    pair_of: PairOf, family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pair = pair_of(family)
    model = pair.model(tuning_mode="ptune", pre_seq_len=3)
    rows = computed(monkeypatch)
    ids = random_ids(2, 6)
    output = model(ids, labels=ids)
    output.loss.backward()
    assert sum(rows) == 10
    assert max(rows) <= losses.CHUNK_ROWS
    vectors = model.prompts.input.detach().clone().requires_grad_()
    embeddings = pair.local.get_input_embeddings()(ids)
    whole = torch.cat([vectors.expand(2, -1, -1), embeddings], 1)
    local = pair.local(inputs_embeds=whole, use_cache=False).logits[:, 3:]
    expected = F.cross_entropy(local[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    expected.backward()
    torch.testing.assert_close(output.loss, expected)
    torch.testing.assert_close(model.prompts.input.grad, vectors.grad, rtol=1e-4, atol=1e-5)
    assert (output.logits - local).abs().max() < 1e-4
