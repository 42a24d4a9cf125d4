"""What is recorded computes what torch does, for any number of rows; what is not understood is refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from corolla.models.compiled.operators import NotCompilable
from corolla.models.compiled.program import KINDS, Program
from corolla.models.compiled.record import record
from corolla.models.kernels.native import library

pytestmark = pytest.mark.skipif(library() is None, reason="there is no C compiler here")

WIDTH = 40  # no multiple of any vector
ROWS = (3, 5)
WEIGHT = torch.linspace(0.5, 1.5, WIDTH)
TALL = torch.stack([WEIGHT] * 3)
MATRIX = torch.linspace(-0.5, 1.5, WIDTH * WIDTH).view(WIDTH, WIDTH)

Run = Callable[[Tensor, Tensor], Tensor]


def compiled(run: Run) -> Callable[[Tensor, Tensor], Tensor]:
    def whole(hidden: Tensor, positions: Tensor, _batch: Any) -> Tensor:
        return run(hidden, positions)

    program = Program([record(whole, *inputs(rows)) for rows in ROWS], ROWS, most=64)
    return lambda hidden, positions: program.for_rows(len(hidden)).run(hidden, positions, [])


def inputs(rows: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(rows)
    return 3 * torch.randn(rows, WIDTH, generator=generator), torch.arange(7, 7 + rows)


def rotated(hidden: Tensor, positions: Tensor) -> Tensor:
    """As the families write rotary embeddings."""
    frequencies = torch.linspace(1.0, 0.01, WIDTH // 4)
    angles = positions[None, :, None].float() * frequencies
    angles = torch.cat((angles, angles), dim=-1)
    heads = hidden.view(1, -1, 2, WIDTH // 2).transpose(1, 2)
    half = heads.shape[-1] // 2
    turned = torch.cat((-heads[..., half:], heads[..., :half]), dim=-1)
    result = heads * angles.cos().unsqueeze(1) + turned * angles.sin().unsqueeze(1)
    return result.transpose(1, 2).reshape(hidden.shape)


def interleaved(hidden: Tensor, _positions: Tensor) -> Tensor:
    turned = torch.stack([-hidden[..., 1::2], hidden[..., ::2]], dim=-1).flatten(-2)
    return turned + 1


def normalized(hidden: Tensor, _positions: Tensor) -> Tensor:
    return WEIGHT * (hidden * torch.rsqrt(hidden.pow(2).mean(-1, keepdim=True) + 1e-6))


def in_place(hidden: Tensor, _positions: Tensor) -> Tensor:
    result = hidden.clone()
    result[:, 3:7].mul_(2)
    return result.add_(WEIGHT).neg_()


def unused(hidden: Tensor, positions: Tensor) -> Tensor:
    positions.cumsum(0)
    torch.ones(len(hidden), len(hidden)).tril()
    return hidden * 2


def marked(hidden: Tensor, _positions: Tensor) -> Tensor:
    """As some families choose groups of experts."""
    groups = hidden.view(-1, 5, 8)
    chosen = torch.topk(groups.topk(2)[0].sum(-1), 2, sorted=False)[1]
    mask = (
        torch.zeros_like(groups[..., 0]).scatter_(1, chosen, 1).unsqueeze(-1).expand(-1, 5, 8).reshape(-1, 40)
    )
    return hidden.masked_fill(~mask.bool(), -1.5)


def put_together(hidden: Tensor, _positions: Tensor) -> Tensor:
    result = hidden.new_empty(hidden.shape)
    result[:, :7], result[:, 7:] = hidden[:, 33:], hidden[:, :33]
    return torch.empty_like(result).copy_(result)


def remembered(hidden: Tensor, _positions: Tensor) -> Tensor:
    """As the delta rule reads and writes a state."""
    keys, values = (hidden / 4).view(-1, 2, 4, 5).unbind(1)
    state = keys.unsqueeze(-1) * values.unsqueeze(-2)
    read = (state * keys.unsqueeze(-1)).sum(dim=-2)
    state = state + keys.unsqueeze(-1) * (values - read).unsqueeze(-2)
    return torch.cat([read, (state * values.unsqueeze(-1)).sum(2, keepdim=True).squeeze(2)], 1).flatten(1)


def convolved(hidden: Tensor, _positions: Tensor) -> Tensor:
    """Each channel by itself, with a bias and without."""
    value = hidden.view(-1, 8, 5)
    weight = MATRIX[:8, :4].unsqueeze(1)
    once = functional.conv1d(value, weight, MATRIX[1, :8], groups=8)
    other = functional.conv1d(value, MATRIX[:8, None, :3], groups=8)
    return torch.cat([once, other], -1).flatten(1)


def multiplied(hidden: Tensor, _positions: Tensor) -> Tensor:
    """Matrices of each row's own."""
    one, other = hidden.view(-1, 2, 4, 5).unbind(1)
    return torch.cat([torch.bmm(one, other.transpose(1, 2)).flatten(1), hidden[:, 16:]], 1)


OPERATIONS: dict[str, Run] = {
    "a state that is read and written": remembered,
    "a convolution": convolved,
    "matrices by matrices": multiplied,
    "a sum of products that lie apart": lambda h, p: torch.cat(
        [(h.view(-1, 4, 10).transpose(1, 2) * WEIGHT[:4]).sum(-1)] * 4, 1
    ),
    "softplus": lambda h, p: functional.softplus(10 * h),
    "rotary": rotated,
    "interleaved": interleaved,
    "rms norm": normalized,
    "in place": in_place,
    "what is not needed": unused,
    "add and sub": lambda h, p: 3 - (h + WEIGHT) - h[:, :1] + h.t().contiguous().t(),
    "mul and div": lambda h, p: h * WEIGHT / (h.abs() + 1) * 0.5 / h.square().add(1).mean(-1, True),
    "powers": lambda h, p: h**2 + h**3 + (h.abs() + 1) ** 0.5 + (h.abs() + 1) ** -0.5 + (h.abs() + 1) ** -1,
    "roots": lambda h, p: torch.sqrt(h.abs()) + torch.rsqrt(h.abs() + 1) + torch.reciprocal(h.abs() + 1),
    "silu": lambda h, p: functional.silu(10 * h),
    "sigmoid": lambda h, p: torch.sigmoid(10 * h),
    "tanh": lambda h, p: torch.tanh(h),
    "relu": lambda h, p: torch.relu(h),
    "gelu": lambda h, p: functional.gelu(h),
    "gelu by tanh": lambda h, p: functional.gelu(h, approximate="tanh"),
    "exp": lambda h, p: torch.exp(h),
    "sin and cos": lambda h, p: torch.sin(h) + torch.cos(h),
    "silu of what is scattered": lambda h, p: torch.cat([functional.silu(h[:, ::2])] * 2, 1) + h,
    "layer norm": lambda h, p: functional.layer_norm(h, (WIDTH,), WEIGHT, WEIGHT - 1, 1e-5),
    "plain layer norm": lambda h, p: functional.layer_norm(h, (WIDTH,)),
    "bounds": lambda h, p: h.clamp(-1, 2) + h.clamp(max=0.5) + h.clamp_min(0) + torch.maximum(h, h[:, :1]),
    "what is true": lambda h, p: (
        torch.where(h > 0.5, torch.expm1(h.clamp(max=3)), h) + (h < h[:, :1]).float()
    ),
    "places that are marked": marked,
    "memory that is filled": put_together,
    "softmax": lambda h, p: functional.softmax(20 * h, -1) + functional.softmax(h[:, :3], 1).sum(1, True),
    "sum": lambda h, p: h.view(-1, 4, WIDTH // 4).sum(-1).repeat_interleave(WIDTH // 4, -1),
    "the greatest": lambda h, p: torch.cat([*h.view(-1, 2, WIDTH // 2).topk(WIDTH // 2, -1)[:1]], 2).flatten(
        1
    ),
    "numbers at places": lambda h, p: torch.gather(h, 1, torch.topk(-h, WIDTH)[1]),
    "the greatest in any order": lambda h, p: h + torch.topk(h / 64, 3, sorted=False)[0].sum(1, True),
    "a product that no kernel takes": lambda h, p: h + functional.linear(h / 64, TALL).sum(-1, True),
    "a product and a bias": lambda h, p: functional.linear(h, MATRIX, WEIGHT),
    "scaled by positions": lambda h, p: h * (1 + 0.1 * torch.log(1 + torch.floor(p / 8)))[:, None],
    "positions": lambda h, p: h + p[:, None].float(),
}


@pytest.mark.parametrize("name", OPERATIONS)
def test_operators_compute_what_torch_does(name: str) -> None:
    run = OPERATIONS[name]
    own = compiled(run)
    for rows in (1, 2, 3, 8, 64):
        hidden, positions = inputs(rows)
        wanted = run(hidden.clone(), positions)
        for _ in range(2):  # memory is used over again
            torch.testing.assert_close(own(hidden, positions), wanted, rtol=5e-6, atol=5e-6)


def test_large_operators_are_shared_by_threads() -> None:
    before = torch.get_num_threads()
    own = compiled(normalized)
    hidden, positions = 3 * torch.randn(2000, WIDTH), torch.arange(2000)
    try:
        torch.set_num_threads(2)
        torch.testing.assert_close(
            own(hidden, positions), normalized(hidden, positions), rtol=2e-6, atol=2e-6
        )
    finally:
        torch.set_num_threads(before)


def test_what_is_no_number_and_what_is_equal_are_chosen_as_torch_does() -> None:
    def run(hidden: Tensor, _positions: Tensor) -> Tensor:
        return torch.cat([hidden.clamp(-1, 1)[:, :2], hidden.topk(2)[0], hidden.topk(WIDTH)[0][:, 2:-2]], 1)

    own = compiled(run)
    for special in (torch.nan, torch.inf, -torch.inf, 0.0):
        hidden, positions = inputs(4)
        hidden[1, :3] = hidden[2, 7] = special
        torch.testing.assert_close(own(hidden, positions), run(hidden, positions), equal_nan=True)


def test_every_operator_is_among_these() -> None:
    tried: set[str] = set()
    for run in OPERATIONS.values():
        tried |= {op.kind for op in record(lambda h, p, _, run=run: run(h, p), *inputs(3)).ops}
    others = {"product", "attend", "route", "pick", "experts", "combine"}
    assert set(KINDS) - tried == others  # those are in test_compile.py


REFUSED: dict[str, tuple[Run, str]] = {
    "an operator": (lambda h, p: h.cumsum(0), "cumsum"),
    "another dtype": (lambda h, p: h.double().float(), "another dtype"),
    "whole numbers": (lambda h, p: h + (p + 1)[:, None].float(), "another dtype"),
    "values": (lambda h, p: h * 2 if h[0, 0].item() > 0 else h, "asks what a tensor holds"),
    "a power": (lambda h, p: h**5, "pow"),
    "a share of a sum": (lambda h, p: torch.add(h, h, alpha=2), "add"),
    "a mean over rows": (lambda h, p: h - h.mean(0), "mean"),
    "rows that are counted": (lambda h, p: h * len(h), "depends on the number of rows"),
    "rows squared": (lambda h, p: (h[:, None, :] + h[None, :, :])[:, 0], "proportion"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_understood_is_refused(name: str) -> None:
    run, reason = REFUSED[name]
    with pytest.raises(NotCompilable, match=reason):
        compiled(run)(*inputs(1))


def test_weights_are_not_written_to() -> None:
    buffer = torch.zeros(WIDTH)
    with pytest.raises(NotCompilable, match="written"):
        compiled(lambda h, p: h + buffer.copy_(h[0]))


def test_memory_is_shared_by_all_numbers_of_rows() -> None:
    def whole(hidden: Tensor, positions: Tensor, _batch: Any) -> Tensor:
        return rotated(hidden, positions)

    program = Program([record(whole, *inputs(rows)) for rows in ROWS], ROWS, most=64)
    layouts = [program.for_rows(rows) for rows in (1, 64, 2, 33, 7)]
    assert len({layout._hidden.untyped_storage().data_ptr() for layout in layouts}) == 1
    for layout, rows in zip(layouts, (1, 64, 2, 33, 7), strict=True):
        hidden, positions = inputs(rows)
        torch.testing.assert_close(layout.run(hidden, positions, []), rotated(hidden, positions))
