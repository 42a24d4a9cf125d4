"""Each kernel against `F.linear` in the same arithmetic: values, gradients, shapes, strangers, memory."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from corolla.errors import UsageError
from corolla.models.kernels import int8
from corolla.models.kernels.int8 import Int8Linear, activation_levels, has_int8
from corolla.models.kernels.linear import FrozenLinear, PackedLinear, is_packable
from corolla.models.kernels.native import library

SIZES = [(7, 5), (64, 48), (1, 33), (130, 1), (80, 64)]  # [out, in]
KINDS = [
    pytest.param(
        PackedLinear,
        marks=pytest.mark.skipif(
            not is_packable(torch.device("cpu"), torch.float32), reason="torch without oneDNN"
        ),
    ),
    pytest.param(Int8Linear, marks=pytest.mark.skipif(not has_int8(), reason="torch without fbgemm")),
]
Kind = type[PackedLinear] | type[Int8Linear]


def plain(out: int, width: int, *, bias: bool = True) -> nn.Linear:
    torch.manual_seed(out * 1000 + width)
    return nn.Linear(width, out, bias=bias).requires_grad_(False)


def made(kind: Kind, layer: nn.Linear) -> FrozenLinear:
    return kind(layer.weight, layer.bias)


def expected(kind: Kind, value: Tensor, layer: nn.Linear, own: bool = library() is not None) -> Tensor:
    """In the kernel's own arithmetic: for int8, rows and channels rounded to their steps, in float64."""
    if kind is PackedLinear:
        return F.linear(value, layer.weight, layer.bias)
    levels = 127 if own else activation_levels()
    step = value.abs().amax(dim=-1, keepdim=True).clamp_min(1e-30) / levels
    rounded = torch.round(value / step)
    if levels != 127:  # two pieces
        rounded = rounded + torch.round((value / step - rounded) * 2 * levels) / (2 * levels)
    bias = None if layer.bias is None else layer.bias.double()
    return F.linear(rounded.double() * step.double(), stored(layer).double(), bias).float()


def stored(layer: nn.Linear) -> Tensor:
    """The weight after rounding to 127 steps a channel."""
    scales = layer.weight.abs().amax(dim=1, keepdim=True) / 127
    return torch.round(layer.weight / scales) * scales


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("shape", [(1,), (9,), (0,), (2, 3), (2, 0), (1, 1), (70,)], ids=str)
def test_values(kind: Kind, size: tuple[int, int], bias: bool, shape: tuple[int, ...]) -> None:
    layer = plain(*size, bias=bias)
    value = torch.randn(*shape, size[1])
    for mode in (torch.inference_mode, torch.no_grad, torch.enable_grad):
        with mode():
            result = made(kind, layer)(value)
        assert result.shape == (*shape, size[0])
        torch.testing.assert_close(result, expected(kind, value, layer), atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("shape", [(1,), (0,), (2, 3), (40,)], ids=str)
def test_the_gradient_is_that_of_the_weight_that_is_stored(
    kind: Kind, size: tuple[int, int], shape: tuple[int, ...]
) -> None:
    layer = plain(*size)
    packed = made(kind, layer)
    value = torch.randn(*shape, size[1], requires_grad=True)
    output = packed(value)
    # A gradient with strides of its own, as an expanded or transposed one has.
    outer = torch.randn(*reversed((*shape, size[0]))).permute(*reversed(range(len(shape) + 1)))
    (found,) = torch.autograd.grad(output, value, outer)
    weight = layer.weight if kind is PackedLinear else stored(layer)
    torch.testing.assert_close(found, outer @ weight, atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_numbers_say_the_same_as_the_gradient(kind: Kind) -> None:
    """Finite differences along the gradient, so that forward and backward are about the same function."""
    layer = plain(48, 64)
    packed = made(kind, layer)
    value = torch.randn(5, 64, requires_grad=True)
    (gradient,) = torch.autograd.grad(packed(value).square().sum(), value)
    step = 0.5 * gradient / gradient.norm()  # wide, so that int8's steps average out
    with torch.no_grad():
        above = packed(value + step).double().square().sum()
        below = packed(value - step).double().square().sum()
    tolerance = 1e-4 if kind is PackedLinear else 2e-2
    assert float(above - below) == pytest.approx(float(gradient.norm()), rel=tolerance)


@pytest.mark.parametrize("kind", KINDS)
def test_a_chain_of_layers_passes_gradients_on(kind: Kind) -> None:
    first, second = plain(48, 64), plain(7, 48)
    value = torch.randn(3, 64, requires_grad=True)
    hidden = made(kind, first)(value)
    made(kind, second)(torch.tanh(hidden)).sum().backward()
    assert value.grad is not None
    assert float(value.grad.norm()) > 0
    assert hidden.grad_fn is not None


@pytest.mark.parametrize("kind", KINDS)
def test_strides_do_not_matter(kind: Kind) -> None:
    layer = plain(64, 48)
    packed = made(kind, layer)
    wide = torch.randn(6, 8, 96)
    for view in (wide[:, ::3, ::2], wide[..., :48].transpose(0, 1), torch.randn(48, 5).t()):
        torch.testing.assert_close(packed(view), packed(view.contiguous()), atol=0, rtol=0)
    turned = nn.Linear(48, 64).requires_grad_(False)
    turned.weight = nn.Parameter(layer.weight.t().contiguous().t(), requires_grad=False)
    torch.testing.assert_close(kind(turned.weight).weight, kind(layer.weight).weight, atol=0, rtol=0)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rows", [2, 8, 33])
def test_a_row_is_the_same_alone_and_among_strangers(kind: Kind, rows: int) -> None:
    packed = made(kind, plain(130, 96))
    crowd = torch.randn(rows, 96) * torch.logspace(-3, 3, rows)[:, None]  # loud strangers
    together = packed(crowd)
    for index in range(rows):
        alone = packed(crowd[index : index + 1])
        tolerance = 0.0 if kind is Int8Linear else 3e-6 * float(crowd[index].abs().max())
        torch.testing.assert_close(together[index : index + 1], alone, atol=tolerance, rtol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_the_plain_weight_is_freed(kind: Kind) -> None:
    layer = plain(64, 48)
    weight = weakref.ref(layer.weight)
    packed = made(kind, layer)
    packed(torch.randn(2, 48, requires_grad=True)).sum().backward()
    del layer
    gc.collect()
    assert weight() is None
    assert packed.weight_bytes() <= 64 * 48 * 4 + 64 * 4


@pytest.mark.parametrize("kind", KINDS)
def test_weight_reads_as_a_plain_tensor(kind: Kind) -> None:
    layer = plain(64, 48)
    packed = made(kind, layer)
    assert (packed.weight.shape, packed.weight.dtype, packed.weight.device) == (
        layer.weight.shape,
        torch.float32,
        torch.device("cpu"),
    )
    torch.testing.assert_close(packed.weight, layer.weight if kind is PackedLinear else stored(layer))
    assert list(packed.state_dict()) == list(layer.state_dict())


@pytest.mark.parametrize("kind", KINDS)
def test_another_dtype_is_refused(kind: Kind) -> None:
    packed = made(kind, plain(64, 48))
    for wrong in (torch.randn(2, 48, dtype=torch.float64), torch.randn(2, 48).bfloat16(), torch.randn(2, 47)):
        with pytest.raises(UsageError, match=r"takes float32 \[..., 48\]"):
            packed(wrong)
    for move in (packed.double, packed.bfloat16, lambda: packed.to("meta")):
        with pytest.raises(UsageError, match="stays in float32"):
            move()
    assert packed.float() is packed
    assert packed.to("cpu") is packed


@pytest.mark.skipif(not has_int8(), reason="torch without fbgemm")
def test_int8_does_not_saturate() -> None:
    """The worst case: every product at its largest, on both ends of the range."""
    width = 576
    weight = torch.ones(16, width)
    weight[8:] = -1
    packed = Int8Linear(weight)
    for sign in (1.0, -1.0):
        found = packed(torch.full((3, width), sign))
        torch.testing.assert_close(found, weight.sum(dim=1).expand(3, -1) * sign)


@pytest.mark.skipif(not has_int8(), reason="torch without fbgemm")
def test_int8_keeps_zeros_and_extremes() -> None:
    packed = Int8Linear(torch.zeros(4, 8))
    assert torch.equal(packed(torch.randn(2, 8)), torch.zeros(2, 4))
    packed = Int8Linear(torch.eye(8), torch.ones(8))
    assert torch.equal(packed(torch.zeros(1, 8)), torch.ones(1, 8))
    tiny, huge = torch.full((1, 8), 1e-20), torch.full((1, 8), 1e20)
    torch.testing.assert_close(packed(huge), huge)
    torch.testing.assert_close(Int8Linear(torch.eye(8))(tiny), tiny)


@pytest.mark.skipif(not has_int8(), reason="torch without fbgemm")
@pytest.mark.parametrize("levels", [63, 127])
def test_two_pieces_leave_only_the_weights_error(levels: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(int8, "activation_levels", lambda: min(levels, activation_levels()))
    layer = plain(130, 96)
    value = torch.randn(9, 96)
    value[:, 5] *= 100  # an outlier, which makes one piece coarse
    exact = F.linear(value, stored(layer), layer.bias)
    one, two = (Int8Linear(layer.weight, layer.bias, pieces=count)(value) for count in (1, 2))
    assert float((two - exact).norm() / exact.norm()) < 6e-4
    assert float((one - exact).norm() / exact.norm()) > 1e-3
    assert torch.equal(Int8Linear(layer.weight, layer.bias, pieces=2)(value[3:4]), two[3:4])


@pytest.mark.parametrize("rows", [1, 7])
def test_long_sums_are_cut_and_stay_true(rows: int) -> None:
    """2,500 products a sum: three packed pieces, value, gradient and readable weight as one."""
    generator = torch.Generator().manual_seed(0)
    weight, bias = torch.randn(40, 2500, generator=generator), torch.randn(40, generator=generator)
    layer = PackedLinear(weight, bias)
    assert len(layer.parts) == 3
    assert torch.equal(layer.weight, weight)
    value = torch.randn(rows, 2500, generator=generator, requires_grad=True)
    found = layer(value)
    torch.testing.assert_close(
        found.double(), value.double() @ weight.double().t() + bias, rtol=1e-5, atol=1e-4
    )
    (gradient,) = torch.autograd.grad(found.sum(), value)
    torch.testing.assert_close(gradient, weight.sum(0).expand(rows, -1), rtol=1e-4, atol=1e-4)


def without_kernels(layer: nn.Linear) -> Int8Linear:
    """On a machine without a C compiler."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(int8, "library", lambda: None)
        return Int8Linear(layer.weight, layer.bias)


@pytest.mark.skipif(library() is None or not activation_levels(), reason="only one of the int8 kernels")
@pytest.mark.parametrize("rows", [1, 3, 8, 13, 70])
def test_both_int8_kernels_agree(rows: int) -> None:
    """To one step of an activation: fbgemm adds 128 before it rounds, so it sees ties where there are none."""
    layer, value = plain(80, 64), torch.randn(rows, 64)
    ours, theirs = Int8Linear(layer.weight, layer.bias), without_kernels(layer)
    assert type(ours.kept) is not type(theirs.kept)
    assert torch.equal(ours.weight, theirs.weight)
    assert torch.equal(ours.weight, stored(layer))
    found, other = ours(value), theirs(value)
    one_step = float(value.abs().max() * layer.weight.abs().max()) / 127
    if activation_levels() == 127:  # else theirs has activations in two pieces
        torch.testing.assert_close(found, other, atol=one_step, rtol=0)
    torch.testing.assert_close(found, expected(Int8Linear, value, layer), atol=one_step, rtol=0)
    torch.testing.assert_close(other, expected(Int8Linear, value, layer, own=False), atol=one_step, rtol=0)


@pytest.mark.usefixtures("instruction_set")
class TestEveryInstructionSet:
    """Sums of bytes are exact, so there is one right result, to the bit."""

    @pytest.mark.parametrize("size", [*SIZES, (176, 64), (48, 1040)], ids=str)
    @pytest.mark.parametrize("rows", [0, 1, 2, 3, 4, 7, 8, 21, 70])
    @pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
    def test_the_bits_are_those_of_whole_numbers(self, size: tuple[int, int], rows: int, bias: bool) -> None:
        layer = plain(*size, bias=bias)
        value = torch.randn(rows, size[1], generator=torch.Generator().manual_seed(rows))
        steps = layer.weight.abs().amax(dim=1) / 127
        own = value.abs().amax(dim=1, keepdim=True).clamp_min(int8.TINY) / 127
        sums = torch.round(value / own).double() @ torch.round(layer.weight / steps[:, None]).double().t()
        wanted = sums.float() * steps * own
        packed = Int8Linear(layer.weight, layer.bias)
        assert torch.equal(packed(value), wanted if layer.bias is None else wanted + layer.bias)
        assert torch.equal(packed.weight, stored(layer))

    def test_threads_change_no_bit(self) -> None:
        layer, value = plain(176, 64), torch.randn(21, 64)
        packed, before = Int8Linear(layer.weight, layer.bias), torch.get_num_threads()
        try:
            torch.set_num_threads(1)
            one = packed(value)
            torch.set_num_threads(2)
            assert torch.equal(packed(value), one)
        finally:
            torch.set_num_threads(before)

    @pytest.mark.parametrize("rows", [1, 5, 9])
    def test_the_widest_sums_fit(self, rows: int) -> None:
        """Every product at its largest, with either sign, in as many columns as there may be."""
        width = int8.MOST_COLUMNS
        weight = torch.ones(16, width)
        weight[8:] = -1
        for sign in (1.0, -1.0):
            found = Int8Linear(weight)(torch.full((rows, width), sign))
            torch.testing.assert_close(found, sign * weight.sum(1).expand(rows, -1))
        assert not int8._Native.takes(torch.empty(16, width + 16, device="meta"))

    def test_what_is_no_number_stays_in_its_row(self) -> None:
        packed, value = Int8Linear(plain(32, 48).weight), torch.randn(6, 48)
        right = packed(value)
        value[2, 5], value[4, 7] = float("nan"), float("inf")
        found = packed(value)
        kept = [0, 1, 3, 5]
        assert torch.equal(found[kept], right[kept])
        assert not bool(found[4].isfinite().any())
