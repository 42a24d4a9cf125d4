"""Narrow weights are the very weights, their products and gradients those of `F.linear`; others are left alone."""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable
from contextlib import AbstractContextManager

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from corolla.models.checkpoints.checkpoint import open_checkpoint
from corolla.models.checkpoints.gguf import EMBEDDED_ALIAS
from corolla.models.kernels import narrow
from corolla.models.kernels.apply import exact_linear
from corolla.models.kernels.autotune import Autotuner
from corolla.models.kernels.linear import BACKENDS, BOUNDS, Backend, Backends, NarrowLinear
from corolla.models.kernels.narrow import as_it_is, narrow_form
from corolla.models.kernels.native import library

pytestmark = [
    pytest.mark.skipif(library() is None, reason="no C compiler"),
    pytest.mark.usefixtures("lanes"),
]

OUT, IN = 24, 96


def quantized(levels: range, group: int, *, offset: bool, half: bool = True) -> Tensor:
    """Weights [OUT, IN] as a quantized file gives them back: whole numbers, with steps and offsets for groups."""
    shape = (OUT, IN // group, group)
    whole = torch.randint(levels.start, levels.stop, shape).float()
    whole[..., 0], whole[..., 1] = levels.start, levels.stop - 1  # as quantizers see to
    step = torch.rand(OUT, IN // group, 1) * 0.01 + 0.001
    least = torch.randn(OUT, IN // group, 1) * 0.1 if offset else torch.zeros(OUT, IN // group, 1)
    if half:
        step, least = step.half().float(), least.half().float()
    return (whole * step + least).view(OUT, IN)


def scaled(high: int) -> Tensor:
    """8-bit floats with a scale for each block of so many rows, as files of them have it."""
    numbers = (torch.randn(OUT, IN) * 100).to(torch.float8_e4m3fn).float()
    numbers[::5, ::7], numbers[1, :32] = 2.0**-9, 0.0
    return numbers * (torch.rand(OUT // high, 1) * 0.01 + 1e-4).repeat_interleave(high, 0)


WEIGHTS: dict[str, tuple[Callable[[], Tensor], str]] = {
    "float32": (lambda: torch.randn(OUT, IN), "float32"),
    "bfloat16": (lambda: torch.randn(OUT, IN).bfloat16().float(), "bfloat16"),
    "float16": (lambda: torch.randn(OUT, IN).half().float(), "float16"),
    "Q4_0": (lambda: quantized(range(-8, 8), 32, offset=False), "nibbles"),
    "Q4_1": (lambda: quantized(range(16), 32, offset=True), "nibbles"),
    "Q4_K": (lambda: quantized(range(16), 32, offset=True, half=False), "nibbles"),
    "Q5_1": (lambda: quantized(range(32), 32, offset=True), "bytes"),
    "Q6_K": (lambda: quantized(range(-32, 32), 16, offset=False, half=False), "bytes"),
    "Q8_0": (lambda: quantized(range(-127, 128), 32, offset=False), "bytes"),
    "fp8": (lambda: scaled(OUT), "float8"),
    "mxfp8": (lambda: (torch.randn(OUT, IN) * 100).to(torch.float8_e4m3fn).float() / 256, "float8"),
    "fp8 by rows": (lambda: scaled(1), "float8"),
    "constant groups": (lambda: torch.full((OUT, IN), 0.1), "nibbles"),
}


def assert_given_back(found: Tensor, weight: Tensor, offset: float = 0.0) -> None:
    """Each number on its own is right to rounding, of itself and of what was added to it."""
    assert bool(((found - weight).abs() <= 2 * narrow.ROUNDING * (weight.abs() + offset)).all())
    assert torch.equal(found == 0, weight == 0)


each_weight = pytest.mark.parametrize("name", WEIGHTS)


def made(name: str) -> tuple[Tensor, NarrowLinear]:
    torch.manual_seed(7)
    make, form = WEIGHTS[name]
    weight = make()
    found = narrow_form(weight) or as_it_is(weight)
    assert found.form == form
    return weight, NarrowLinear(found, torch.randn(OUT))


@each_weight
def test_the_weight_is_given_back(name: str) -> None:
    weight, layer = made(name)
    if name not in ("Q4_K", "Q6_K", "constant groups"):  # these have steps of more bits than any file
        assert torch.equal(layer.weight, weight)
    assert_given_back(layer.weight, weight, 0.3 if name == "Q4_K" else 0.0)
    assert layer.weight_bytes() < weight.nbytes * (1.1 if name == "float32" else 0.7)
    layer.weight.zero_()  # the reader's own
    assert bool(layer.weight.any())


@each_weight
@pytest.mark.parametrize("rows", [0, 1, 2, 3, 4, 5, 6, 7, 8, 33, 64, BOUNDS[-1] + 1])
def test_products(name: str, rows: int) -> None:
    weight, layer = made(name)
    value = torch.randn(rows, IN)
    torch.testing.assert_close(layer(value), F.linear(value, weight, layer.bias), atol=1e-5, rtol=1e-5)
    turned = torch.randn(IN, rows).T  # rows that do not lie together
    torch.testing.assert_close(layer(turned), F.linear(turned, weight, layer.bias), atol=1e-5, rtol=1e-5)


@each_weight
def test_a_row_has_the_same_bits_in_any_company(name: str) -> None:
    _, layer = made(name)
    layer.backends = Backends(("own",) * (len(BOUNDS) + 1), "torch")
    value = torch.randn(13, IN)
    whole = layer(value)
    # One row or two are multiplied by what is in groups as it is read, group by group: other sums, to rounding.
    for rows in range(3 if layer.narrow.steps is not None else 1, 13):
        assert torch.equal(layer(value[:rows]), whole[:rows])


@each_weight
@pytest.mark.parametrize("rows", [1, 5, BOUNDS[-1] + 1])
def test_gradients(name: str, rows: int) -> None:
    weight, layer = made(name)
    value = torch.randn(2, rows, IN, requires_grad=True)
    outer = torch.randn(2, rows, OUT)
    (found,) = torch.autograd.grad(layer(value), value, outer)
    torch.testing.assert_close(found, outer @ weight, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("rows", [1, 2, 5, 40])
def test_small_8_bit_floats_are_none_for_a_thread_that_flushes_subnormals(rows: int) -> None:
    """As servers' do: E4M3's own subnormals, which are none of float32's."""
    codes = torch.randint(-7, 8, (OUT, IN), generator=torch.Generator().manual_seed(rows)) / 512
    codes[0, ::32] = 448.0  # by which the scale is found
    weight, value = codes * 0.37, torch.randn(rows, IN)
    found = narrow_form(weight)
    assert found is not None
    assert found.form == "float8"
    wanted = F.linear(value, weight)[:, 1:]
    torch.set_flush_denormal(True)
    try:
        products, widened = NarrowLinear(found)(value)[:, 1:], found.widened()
    finally:
        torch.set_flush_denormal(False)
    torch.testing.assert_close(products, wanted, atol=1e-6, rtol=1e-5)
    assert torch.equal(widened, weight)


@each_weight
def test_it_is_float32_whatever_torch_makes_tensors_in(
    name: str, another_default: AbstractContextManager[None]
) -> None:
    make, form = WEIGHTS[name]
    torch.manual_seed(7)
    weight, value, gradient = make(), torch.randn(40, IN), torch.randn(40, OUT)
    wanted = F.linear(value, weight), gradient @ weight
    with another_default:
        found = narrow_form(weight) or as_it_is(weight)
        assert found.form == form
        layer = NarrowLinear(found, backends=Backends(("torch",) * (len(BOUNDS) + 1), "torch"))
        products = layer(value), layer.multiply_back(gradient)
    for one, own in zip(products, wanted, strict=True):
        torch.testing.assert_close(one, own, atol=1e-5, rtol=1e-5)


@each_weight
def test_threads_change_no_bit(name: str) -> None:
    _, layer = made(name)
    before = torch.get_num_threads()
    try:
        for rows in (1, 2, 9):
            value = torch.randn(rows, IN)
            results = []
            for threads in (1, 2, 3):
                torch.set_num_threads(threads)
                results.append(layer(value))
            assert torch.equal(results[0], results[1])
            assert torch.equal(results[0], results[2])
    finally:
        torch.set_num_threads(before)


@each_weight
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("rows", [1, 6, 200])
def test_each_backend_gives_the_product_and_its_gradient(name: str, backend: Backend, rows: int) -> None:
    weight, layer = made(name)
    back: Backend = "torch" if backend == "own" else backend
    layer = NarrowLinear(layer.narrow, layer.bias, Backends((backend,) * (len(BOUNDS) + 1), back))
    value = torch.randn(rows, IN, requires_grad=True)
    found = layer(value)
    torch.testing.assert_close(found, F.linear(value, weight, layer.bias), atol=1e-5, rtol=1e-5)
    outer = torch.randn(rows, OUT)
    torch.testing.assert_close(
        torch.autograd.grad(found, value, outer)[0], outer @ weight, atol=1e-5, rtol=1e-5
    )


def test_weights_without_a_narrow_form_are_kept_as_they_are_in_their_own_memory() -> None:
    weight = torch.randn(OUT, IN)
    assert narrow_form(weight) is None
    layer = exact_linear(weight, None, autotuner=Autotuner())
    assert isinstance(layer, NarrowLinear)
    assert layer.narrow.values.data_ptr() == weight.data_ptr()


@pytest.mark.parametrize("name", ["Q4_1", "Q8_0", "bfloat16", "fp8"])
def test_one_weight_that_does_not_fit_is_enough(name: str) -> None:
    """Wherever it stands, also in a row that was not sampled, and however little it is off."""
    weight, _ = made(name)
    weight[OUT - 1, IN - 3] *= 1.0001
    found = narrow_form(weight)
    if found is not None:
        assert_given_back(NarrowLinear(found).weight, weight)


@pytest.mark.parametrize("large", [3e7, -3e7, 1e30, -3e5, -70.0])
@pytest.mark.parametrize("small", ["ordinary", "one number", "close together", "a lattice"])
def test_what_is_small_beside_one_large_weight_is_not_lost(large: float, small: str) -> None:
    """Be it an activation that is 0 for the large ones: then the others are all that counts."""
    torch.manual_seed(2)
    weight = {
        "ordinary": torch.randn(OUT, IN) * 0.2,
        "one number": torch.full((OUT, IN), 4.001),
        "close together": 4 + torch.randn(OUT, IN) * 1e-3,
        "a lattice": torch.randint(-8, 8, (OUT, IN)) * 0.0123,
    }[small]
    weight[:, ::32] = large
    found = narrow_form(weight)
    if found is not None:
        assert_given_back(NarrowLinear(found).weight, weight)
        value = torch.randn(5, IN)
        value[:, ::32] = 0
        wanted = F.linear(value.double(), weight.double()).float()
        torch.testing.assert_close(NarrowLinear(found)(value), wanted, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("bits", [4, 5])
def test_steps_and_offsets_that_are_products_are_found_to_the_bit(bits: int) -> None:
    """As in Q4_K and Q5_K: float16 numbers times ones of 6 bits; numbers near zero show any error."""
    torch.manual_seed(5)
    whole = torch.randint(2**bits, (512, IN // 32, 32)).float()
    whole[..., 0], whole[..., 1] = 0, 2**bits - 1
    shape = (512, IN // 32, 1)
    step = (torch.rand(shape) * 1e-4).half().float() * torch.randint(1, 64, shape)
    least = (torch.rand(shape) * 1e-3).half().float() * torch.randint(0, 64, shape)
    weight = (step * whole - least).view(512, IN)
    found = narrow_form(weight)
    assert found is not None
    assert torch.equal(NarrowLinear(found).weight, weight)


@pytest.mark.parametrize("shape", [(OUT + 1, IN), (OUT, IN + 1), (OUT, 16)], ids=str)
def test_sizes_that_the_kernels_do_not_know(shape: tuple[int, int]) -> None:
    assert narrow_form(torch.zeros(shape)) is None


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_no_numbers_are_left_alone(value: float) -> None:
    weight = torch.zeros(OUT, IN)
    weight[3, 3] = value
    assert narrow_form(weight) is None


def test_without_a_compiler_torch_multiplies(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(narrow, "library", lambda: None)
    weight, value = torch.randn(OUT, IN).bfloat16().float(), torch.randn(3, IN)
    layer = exact_linear(weight, None, autotuner=Autotuner())
    assert layer.native() is None
    torch.testing.assert_close(layer(value), F.linear(value, weight))


def test_the_embedded_model_is_kept_as_its_file_has_it() -> None:
    checkpoint = open_checkpoint(EMBEDDED_ALIAS)
    names = (
        "model.embed_tokens.weight",
        "model.layers.3.mlp.down_proj.weight",
        "model.layers.7.self_attn.k_proj.weight",
    )
    tensors = checkpoint.tensors(lambda key: key in names, widen_to=torch.float32)
    assert len(tensors) == len(names)
    for name, weight in tensors.items():
        found = narrow_form(weight)
        assert found is not None
        assert found.form == ("bytes" if "embed" in name else "nibbles")
        assert torch.equal(NarrowLinear(found).weight, weight)


def test_a_copy_does_not_outlive_its_memory() -> None:
    layer = NarrowLinear(as_it_is(torch.randn(OUT, IN)), torch.randn(OUT))
    value = torch.randn(3, IN)
    wanted = layer(value)
    twin = copy.deepcopy(nn.Sequential(layer))
    del layer
    gc.collect()
    assert torch.equal(twin(value), wanted)
