"""Work that is cut into pieces: others come in between and inside its operators, and it stays what it was."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from tests.reference import relative
from torch import Tensor
from torch.nn.functional import linear, scaled_dot_product_attention

from corolla.models.kernels.linear import PackedLinear, is_packable
from corolla.server.scheduler.execution import CUTS, Preemptible, cut_of

ROWS = 37


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pieces of a few rows, and others before each of them."""
    sizes = {"PIECE_SECONDS": 0.0, "LEAST_SHARE": 0.0, "ROWS": 8, "SCORES": 8 * ROWS, "FEWEST_QUERIES": 8}
    for name, value in sizes.items():
        monkeypatch.setattr(f"corolla.server.scheduler.execution.{name}", value)


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float32)


def plain(value: Tensor) -> Tensor:
    return linear(value, noise(6, 16, seed=1), noise(6, seed=2))


def packed(width: int) -> Callable[[Tensor], Tensor]:
    layer = PackedLinear(noise(6, width, seed=1), noise(6, seed=2))
    return lambda value: layer(value.repeat_interleave(width // 16, dim=-1))


def attention(mask: Tensor | None, causal: bool = False) -> Callable[[Tensor], Tensor]:
    def attend(value: Tensor) -> Tensor:
        query = value.view(1, ROWS, 4, 4).transpose(1, 2)
        key, other = (part.contiguous() for part in query.tensor_split(2, dim=1))
        return scaled_dot_product_attention(
            query, key, other, attn_mask=mask, is_causal=causal, enable_gqa=True
        )

    return attend


seen = torch.ones(ROWS, ROWS, dtype=torch.bool).tril()
WORK = {
    "linear": (plain, True),
    "packed": (packed(16), True),
    "packed, long sums": (packed(2048), True),
    "attention": (attention(seen), True),
    "attention to all": (attention(None), True),
    "causal attention": (attention(None, causal=True), False),
}


@pytest.mark.parametrize("gradient", [False, True], ids=["forward", "backward"])
@pytest.mark.parametrize("name", WORK)
def test_cut_work_equals_itself(name: str, gradient: bool) -> None:
    if "packed" in name and not is_packable(torch.device("cpu"), torch.float32):
        pytest.skip("needs oneDNN")
    work, is_cut = WORK[name]
    came = 0

    def between(seconds: float) -> Callable[[], float]:
        def come() -> float:
            nonlocal came
            came += 1
            return seconds

        return come

    def computed(seconds: float) -> list[Tensor]:
        nonlocal came
        value = noise(1, ROWS, 16, seed=3).requires_grad_(gradient)
        with torch.inference_mode(not gradient), Preemptible(between(seconds)):
            came = 0
            result = work(value)
            if not gradient:
                return [result]
            return [result.detach(), torch.autograd.grad(result, value, noise(*result.shape, seed=4))[0]]

    whole, operators = computed(0.0), came  # counted before the other run
    pieces, all_pieces = computed(1.0), came
    assert operators > 0
    assert (all_pieces > operators) is is_cut  # nobody came, or somebody: then it is cut
    for one, other in zip(whole, pieces, strict=True):
        assert one.shape == other.shape
        assert relative(one, other) < 1e-5


def test_operators_are_known_by_their_names() -> None:
    """Those that this torch has; a misspelt argument would keep one from being cut."""
    found = 0
    for name in CUTS:
        namespace, operator, overload = name.split(".")
        packet = getattr(getattr(torch.ops, namespace), operator, None)
        if packet is not None and overload in packet.overloads():
            found += 1
            assert cut_of(getattr(packet, overload)) is not None, name
    assert found >= 3
