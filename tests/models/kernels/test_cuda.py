"""Quantized layers on a CUDA device: the refusals everywhere, the products where there is such a device."""

from __future__ import annotations

import sys
from importlib.util import find_spec
from typing import Literal

import pytest
import torch
from torch import nn

from corolla.errors import UsageError
from corolla.models.kernels.apply import quantize_on_cuda


def test_no_device_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UsageError, match="needs a CUDA device"):
        quantize_on_cuda(nn.Sequential(nn.Linear(4, 4)), "nf4")


def test_no_library_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(UsageError, match="pip install bitsandbytes"):
        quantize_on_cuda(nn.Sequential(nn.Linear(4, 4)), "int8")


@pytest.mark.skipif(
    not torch.cuda.is_available() or find_spec("bitsandbytes") is None,
    reason="no CUDA device, or no bitsandbytes",
)
@pytest.mark.parametrize(("quantization", "tolerance"), [("int8", 0.03), ("nf4", 0.2)])
@pytest.mark.parametrize("bias", [True, False])
def test_products_are_near(quantization: Literal["int8", "nf4"], tolerance: float, bias: bool) -> None:
    plain = nn.Linear(256, 128, bias=bias, device="cuda", dtype=torch.float16).requires_grad_(False)
    model = nn.Sequential(plain)
    rows = torch.randn(5, 256, device="cuda", dtype=torch.float16)
    wanted = model(rows)
    assert quantize_on_cuda(model, quantization) == 1
    assert (model(rows) - wanted).norm() < tolerance * wanted.norm()
    assert torch.equal(model(rows)[:1], model(rows[:1]))  # whoever is beside it
