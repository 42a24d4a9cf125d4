"""What a model's folder says besides its prompt, and what is said of a file that is another model's."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from tests.tiny_models import tiny_config
from transformers import AutoModelForCausalLM

from corolla.client.model.saving import TABLES, read_tables, take_tables
from corolla.errors import BundleError
from corolla.models.checkpoints.prompt_files import PEFT_BASE, PEFT_WEIGHTS


@pytest.mark.parametrize(("name", "start"), [(TABLES, ""), (PEFT_WEIGHTS, PEFT_BASE)])
def test_the_file_of_a_table_that_does_not_fit_is_named(tmp_path: Path, name: str, start: str) -> None:
    model = AutoModelForCausalLM.from_config(tiny_config("llama"))
    save_file({f"{start}score.weight": torch.zeros(2, 3)}, tmp_path / name)
    with pytest.raises(BundleError, match=rf"/{name} holds score\.weight"):
        take_tables(model, read_tables(tmp_path, with_head=True))
