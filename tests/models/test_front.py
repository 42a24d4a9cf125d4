"""What stands before the blocks, run without them: the same bits as in the whole model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.covering import covering
from tests.reference import blocks_of, local_model
from tests.tiny_models import FAMILIES, write_tiny

from corolla.errors import CheckpointError
from corolla.models.checkpoints.checkpoint import open_checkpoint
from corolla.models.front import entering
from corolla.models.prompts import SoftPrompt, digest


def entered(folder: Path, prompt: SoftPrompt, dtype: torch.dtype) -> torch.Tensor:
    """What the whole model's first block is given for the prompt, with two tokens behind it."""
    model = local_model(folder, dtype)
    seen: list[torch.Tensor] = []

    def note(_block: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen.append(args[0] if args else kwargs["hidden_states"])

    blocks_of(model)[0].register_forward_pre_hook(note, with_kwargs=True)
    tokens = model.get_input_embeddings()(torch.tensor([[7, 8]]))
    model(inputs_embeds=torch.cat([prompt.input.detach().to(dtype)[None], tokens], 1))
    return seen[0][0, : prompt.length]


@pytest.mark.parametrize(
    ("family", "dtype"),
    covering(FAMILIES, {"float32": torch.float32, "bfloat16": torch.bfloat16}, together=1),
)
def test_bit_for_bit(tmp_path: Path, family: str, dtype: torch.dtype) -> None:
    checkpoint = open_checkpoint(str(write_tiny(family, tmp_path)))
    width = getattr(checkpoint.config, "word_embed_proj_dim", checkpoint.config.hidden_size)
    noise = torch.Generator().manual_seed(1)
    prompts = [SoftPrompt(torch.randn(length, width, generator=noise)) for length in (5, 1, 9)]
    for prompt, found in zip(prompts, entering(checkpoint, prompts, dtype), strict=True):
        assert found.dtype == dtype
        expected = entered(tmp_path, prompt, dtype)
        if family == "opt":  # a matrix product, which is summed otherwise for other numbers of rows
            torch.testing.assert_close(found, expected)
        else:
            assert torch.equal(found, expected)


def test_only_what_is_needed_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = open_checkpoint(str(write_tiny("gpt2", tmp_path)))
    read, tensors = [], checkpoint.tensors

    def noting(wanted: Any, **options: Any) -> Any:
        found = tensors(wanted, **options)
        read.extend(found)
        return found

    monkeypatch.setattr(checkpoint, "tensors", noting)
    entering(checkpoint, [SoftPrompt(torch.ones(2, 32))], torch.float32)
    assert sorted(read) == ["transformer.ln_f.bias", "transformer.ln_f.weight", "transformer.wpe.weight"]


def test_a_tensor_that_is_missing(tmp_path: Path) -> None:
    path = write_tiny("gpt2", tmp_path) / "model.safetensors"
    tensors = load_file(path)
    del tensors["transformer.wpe.weight"]
    save_file(tensors, path, {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"wpe\.weight"):
        entering(open_checkpoint(str(tmp_path)), [SoftPrompt(torch.ones(2, 32))], torch.float32)


def test_a_name_is_of_the_numbers_the_mode_and_the_dtype() -> None:
    vectors, deep = torch.randn(3, 4), torch.randn(2, 3, 4)
    names = [
        digest(vectors, None, torch.float32),
        digest(vectors, None, torch.bfloat16),
        digest(vectors.reshape(4, 3), None, torch.float32),
        digest(vectors + 1e-6, None, torch.float32),
        digest(vectors, deep, torch.float32),
        digest(vectors, deep * 0, torch.float32),
        digest(vectors, deep.transpose(1, 2).reshape(2, 3, 4), torch.float32),
    ]
    assert len(set(names)) == len(names)
    assert all(len(name) == 64 for name in names)
    assert digest(vectors.double(), deep.clone().requires_grad_(), torch.float32) == names[4]
