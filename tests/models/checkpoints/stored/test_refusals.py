"""What of a quantized checkpoint cannot be read is one sentence, before a weight is."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.stored_models import write_stored
from tests.tiny_models import write_tiny
from torch import Tensor

from corolla.errors import CheckpointError
from corolla.models.checkpoints.checkpoint import open_checkpoint
from corolla.models.span import load_span

CT = {"quant_method": "compressed-tensors", "config_groups": {"a": {"weights": {"num_bits": 4}}}}


def said(folder: Path) -> str:
    """The sentence, whether opening or reading ends in it."""
    with pytest.raises(CheckpointError) as error:
        load_span(open_checkpoint(str(folder)), 0, 2, dtype=torch.float32)
    text = str(error.value)
    assert "\n" not in text
    assert text.endswith(".")
    return text


@pytest.mark.parametrize(
    ("config", "named"),
    [
        ({"quant_method": "aqlm"}, "aqlm"),
        ({"quant_method": "hqq"}, "hqq"),
        ({"quant_method": "\x1b[31mred"}, "red"),
        ("int4", "some method"),
        ([1], "some method"),
        ({"bits": 4}, "some method"),
        ({"quant_method": "gptq", "bits": 4, "checkpoint_format": "marlin"}, "marlin"),
        ({"quant_method": "gptq", "bits": 4, "checkpoint_format": "gptq_p"}, "gptq_p"),
        ({"quant_method": "gptq", "bits": 5}, "5 bits"),
        ({"quant_method": "gptq", "bits": "many"}, "in a form of its own"),
        ({"quant_method": "awq", "bits": 4, "version": "gemv"}, "gemv"),
        ({"quant_method": "awq", "bits": 3}, "3 bits"),
        ({"quant_method": "fp8", "weight_block_size": [128]}, "in a form of its own"),
        ({"quant_method": "fp8", "weight_block_size": [0, 128]}, "blocks of 0"),
        ({"quant_method": "auto-round", "packing_format": "auto_round:marlin"}, "marlin"),
        ({"quant_method": "modelopt", "quant_algo": "W4A8_AWQ"}, "W4A8_AWQ"),
        ({**CT, "format": "marlin-24"}, "marlin-24"),
        ({**CT, "format": "pack-quantized", "config_groups": [1]}, "in a form of its own"),
        ({"quant_method": "gptq", "bits": float("inf")}, "in a form of its own"),
        (
            {"quant_method": "compressed-tensors", "config_groups": {"a": {"weights": {"num_bits": 33}}}},
            "33 bits",
        ),
        ({**CT, "format": "pack-quantized", "sparsity_config": {"format": "sparse-24-bitmask"}}, "sparse-24"),
        ({**CT, "format": "pack-quantized", "transform_config": {"config_groups": {}}}, "transforms"),
    ],
)
def test_methods_that_are_not_read(tmp_path: Path, config: Any, named: str) -> None:
    folder = write_tiny("llama", tmp_path, layers=2)
    content = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**content, "quantization_config": config}))
    with pytest.raises(CheckpointError) as error:
        open_checkpoint(str(folder))
    text = str(error.value)
    assert "stored quantized (" in text
    assert named in text
    assert "or an unquantized one." in text
    assert text.isprintable()


def test_layers_that_keep_their_inputs_first(tmp_path: Path) -> None:
    folder = write_tiny("gpt2", tmp_path, layers=2)
    content = json.loads((folder / "config.json").read_text())
    quantized = {"quant_method": "gptq", "bits": 4, "group_size": 16}
    (folder / "config.json").write_text(json.dumps({**content, "quantization_config": quantized}))
    assert "models of type gpt2" in said(folder)


Change = Callable[[dict[str, Tensor]], object]
UP = "model.layers.1.mlp.up_proj."


def _without(key: str) -> Change:
    return lambda tensors: tensors.pop(UP + key)


def _cut(key: str, dimension: int = 0) -> Change:
    def cut(tensors: dict[str, Tensor]) -> None:
        tensors[UP + key] = tensors[UP + key].narrow(dimension, 0, 1).contiguous()

    return cut


def _retyped(key: str, dtype: torch.dtype) -> Change:
    def retype(tensors: dict[str, Tensor]) -> None:
        tensors[UP + key] = tensors[UP + key].to(dtype)

    return retype


def _filled(key: str, value: int) -> Change:
    return lambda tensors: tensors[UP + key].fill_(value)


@pytest.mark.parametrize(
    ("form", "change", "parts"),
    [
        ("fp8", _without("weight_scale_inv"), ["F8_E4M3 without the scales", UP]),
        ("fp8", _without("weight"), ["lacks tensors of blocks", "up_proj.weight"]),
        ("fp8", _cut("weight_scale_inv"), ["fit no blocks", UP]),
        ("fp8", _retyped("weight", torch.float32), ["stored as F32", UP]),
        ("fp8", _cut("weight"), ["fit no blocks", UP]),
        ("gptq", _without("qzeros"), ["lacks " + UP + "qzeros", "copy it again"]),
        ("gptq", _cut("scales"), ["do not fit together", UP]),
        ("gptq", _cut("g_idx"), ["do not fit together", UP]),
        ("gptq", _retyped("qweight", torch.int64), ["not stored in 32-bit words", UP]),
        ("gptq", _filled("g_idx", 99), ["names group 99", UP]),
        ("gptq", _filled("g_idx", -1), ["names group -1", UP]),
        ("awq", _without("scales"), ["lacks " + UP + "scales"]),
        ("awq", _cut("qzeros", 1), ["do not fit together", UP]),
        ("awq", _cut("qweight", 1), ["do not fit together", UP]),
        ("ct-4", _without("weight_scale"), ["lacks " + UP + "weight_scale"]),
        ("ct-4", _cut("weight_scale"), ["fit no blocks", UP]),
        ("ct-4", _filled("weight_shape", 3), ["weight_shape says 3", UP]),
        ("ct-4", _cut("weight_packed", 1), ["do not fit", UP]),
        ("ct-4-zeros", _cut("weight_zero_point"), ["packed zeros", UP]),
        ("ct-int8-zeros", _cut("weight_zero_point"), ["zeros of shape", UP]),
        ("ct-nvfp4", _without("weight_global_scale"), ["weight_global_scale", UP]),
        ("ct-nvfp4", _cut("weight_scale"), ["fit no blocks", UP]),
        ("nf4", _without("weight.absmax"), ["lacks " + UP + "weight.absmax"]),
        ("nf4", _cut("weight.absmax"), ["scales for shape", UP]),
        ("nf4", _cut("weight"), ["scales for shape", UP]),
        ("nf4", _filled("weight.quant_state.bitsandbytes__nf4", 0), ["quant_state that cannot be read", UP]),
        ("nf4-double", _without("weight.nested_absmax"), ["8 bits without", UP]),
        ("nf4-double", _cut("weight.nested_quant_map"), ["scales of 8 bits", UP]),
        ("bnb-int8", _cut("SCB"), ["do not fit", UP]),
        ("bnb-int8", _filled("weight_format", 2), ["form of some graphics cards", UP]),
    ],
)
def test_tensors_that_do_not_belong_together(
    tmp_path: Path, form: str, change: Change, parts: list[str]
) -> None:
    folder, _ = write_stored(form, tmp_path, layers=2)
    load_span(open_checkpoint(str(folder)), 0, 2, dtype=torch.float32)
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")
    text = said(folder)
    for part in parts:
        assert part in text
    load_span(open_checkpoint(str(folder)), 0, 1, dtype=torch.float32)  # what is right is served


@pytest.mark.parametrize("key", ["down_proj_blocks", "down_proj_scales"])
def test_experts_without_one_of_their_two(tmp_path: Path, key: str) -> None:
    folder, _ = write_stored("mxfp4", tmp_path, family="gpt_oss", layers=2)
    tensors = load_file(folder / "model.safetensors")
    del tensors[f"model.layers.1.mlp.experts.{key}"]
    save_file(tensors, folder / "model.safetensors")
    text = said(folder)
    assert "lacks" in text
    assert "down_proj" in text


def test_activations_that_are_scaled(tmp_path: Path) -> None:
    """As AWQ has them in families without a gated layer; without the scales, another model would be served."""
    folder, _ = write_stored("awq", tmp_path, layers=2)
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.mlp.act.scales"] = torch.ones(4)
    save_file(tensors, folder / "model.safetensors")
    assert "(model.layers.1.mlp.act.scales)" in said(folder)


def test_a_file_that_ends_too_early(tmp_path: Path) -> None:
    folder, _ = write_stored("gptq", tmp_path, layers=2)
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-2000])
    assert "truncated" in said(folder)
