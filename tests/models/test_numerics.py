"""Which dtype is chosen, and that `auto` believes the machine."""

from __future__ import annotations

import pytest
import torch

from corolla.errors import UsageError
from corolla.models.numerics import DTYPES, choose_dtype, dtype_name


@pytest.mark.parametrize("name", DTYPES)
def test_a_name_is_taken_at_its_word(name: str) -> None:
    assert choose_dtype(name, torch.float16, "cpu") == getattr(torch, name)
    assert dtype_name(DTYPES[name]) == name


def test_auto_keeps_full_precision() -> None:
    assert choose_dtype("auto", torch.float32, "cpu") == torch.float32
    assert choose_dtype("auto", torch.float64, "cpu") == torch.float64
    assert choose_dtype("auto", None, "cpu") == torch.float32


def test_auto_on_a_cpu_goes_by_its_instructions() -> None:
    capabilities = torch.cpu.get_capabilities()
    fast = capabilities.get("avx512_bf16", False) or capabilities.get("amx_tile", False)
    assert choose_dtype("auto", torch.bfloat16, "cpu") == (torch.bfloat16 if fast else torch.float32)
    assert choose_dtype("auto", torch.float16, "cpu") == torch.float32


def test_an_unknown_name_is_refused() -> None:
    with pytest.raises(UsageError, match="Unknown dtype 'int8'"):
        choose_dtype("int8", None, "cpu")
