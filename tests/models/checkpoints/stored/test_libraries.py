"""The formats' own libraries, through transformers, read the same weights; where they are installed."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.stored_models import FORMS, write_stored
from transformers import AutoModelForCausalLM, CompressedTensorsConfig

from corolla.models.checkpoints.checkpoint import open_checkpoint

pytestmark = pytest.mark.nightly

needs_ct = pytest.mark.skipif(find_spec("compressed_tensors") is None, reason="needs compressed-tensors")
needs_bnb = pytest.mark.skipif(find_spec("bitsandbytes") is None, reason="needs bitsandbytes")


def agree(folder: Path, theirs: dict[str, torch.Tensor], rounding: float) -> None:
    ours = open_checkpoint(str(folder)).tensors(lambda _name: True, widen_to=torch.float32)
    assert set(ours) == set(theirs)
    for name, tensor in ours.items():
        torch.testing.assert_close(tensor, theirs[name].float(), rtol=rounding, atol=1e-6, msg=name)


@needs_ct
@pytest.mark.parametrize("form", [one for one in FORMS if one.startswith("ct-")])
@pytest.mark.filterwarnings("ignore")
def test_compressed_tensors(tmp_path: Path, form: str) -> None:
    stored, _ = write_stored(form, tmp_path, layers=2)
    config = CompressedTensorsConfig(dequantize=True)
    model = AutoModelForCausalLM.from_pretrained(stored, dtype=torch.float32, quantization_config=config)
    agree(stored, model.state_dict(), 2**-7)  # it multiplies in 16 bits here and there


@needs_bnb
@pytest.mark.parametrize("form", ["nf4", "nf4-double", "fp4", "bnb-int8"])
@pytest.mark.filterwarnings("ignore")
def test_bitsandbytes(tmp_path: Path, form: str) -> None:
    # Its products on CPUs are wrong where a block of 64 numbers is longer than a row.
    stored, _ = write_stored(form, tmp_path, layers=2, hidden_size=64, num_attention_heads=4, head_dim=16)
    model: Any = AutoModelForCausalLM.from_pretrained(stored, dtype=torch.bfloat16)
    agree(stored, model.dequantize().state_dict(), 2**-7)
