"""Only what can be seen without a CUDA device: the refusals."""

from __future__ import annotations

import sys

import pytest
import torch
from torch import nn

from corolla.errors import UsageError
from corolla.models.kernels.cuda import quantize_linears


def test_no_device_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UsageError, match="needs a CUDA device"):
        quantize_linears(nn.Sequential(nn.Linear(4, 4)), "nf4")


def test_no_library_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(UsageError, match="pip install bitsandbytes"):
        quantize_linears(nn.Sequential(nn.Linear(4, 4)), "int8")


def test_an_unknown_name_is_refused() -> None:
    with pytest.raises(UsageError, match="on CUDA use nf4 or int8"):
        quantize_linears(nn.Sequential(nn.Linear(4, 4)), "none")
