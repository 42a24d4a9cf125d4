"""A bundle reads back whole, peft loads it, and a damaged one says what is wrong."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from tests.covering import every_time
from tests.swarm_fixture import MemorySwarm
from tests.tuning.test_resume import largest_file
from tests.tuning.tiny_setup import ABOUT, conversations, local_model, plain_model, prompt_for, settings

from corolla.chat.sampling import SamplingSettings
from corolla.cli.partner import find_partner
from corolla.data.render import RenderSettings
from corolla.errors import BundleError, UsageError
from corolla.tuning.batches import prepare
from corolla.tuning.bundle import Bundle, ModelInfo, load_bundle, save_bundle
from corolla.tuning.tune import TuneResult, tune

HISTORY = [
    {"step": 0, "eval_loss": 3.0},
    {"step": 1, "loss": 2.9},
    {"step": 2, "loss": 2.5},
    {"step": 2, "eval_loss": 2.6},
]


def described(mode: str = "ptune") -> Bundle:
    return Bundle(
        model=ABOUT,
        mode=mode,
        prompt_tokens=4,
        rendering=RenderSettings(delimiter="|", max_length=32),
        stop={"ids": [7], "text": "|"},
        training={"learning_rate": 0.01},
        metrics={"after": {"eval_loss": 2.6}},
    )


def saved(folder: Path, out: Path, mode: str = "ptune", **options: Any) -> Path:
    model = plain_model(folder)
    save_bundle(
        out, described(mode), prompt_for(model, mode), config=model.config, history=HISTORY, **options
    )
    return out


@pytest.mark.parametrize("mode", ["ptune", "deep_ptune"])
def test_a_bundle_reads_back_as_it_was_written(tiny_folder: Path, tmp_path: Path, mode: str) -> None:
    out = saved(tiny_folder, tmp_path / "deeper" / "out", mode)
    read = load_bundle(out)
    assert read.to_dict() == described(mode).to_dict()
    assert read.sampling == {"temperature": 0.6, "top_k": 100, "max_new_tokens": 64}
    assert [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()] == HISTORY
    assert (out / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert os.listdir(out.parent) == ["out"]


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # peft
def test_peft_loads_a_trained_bundle_and_gives_the_same_logits(
    tiny_folder: Path, tokenizer: Any, tmp_path: Path
) -> None:
    model = local_model(tiny_folder)
    prepared = prepare(tokenizer, settings(), conversations())
    assert isinstance(tune(model, settings(), prepared, tmp_path / "out", ABOUT), TuneResult)
    theirs = PeftModel.from_pretrained(plain_model(tiny_folder), tmp_path / "out").eval()
    batch = prepared.batches(prepared.held_out[:3])
    arguments = {name: batch[name] for name in ("input_ids", "attention_mask")}
    with torch.no_grad():
        mine = model(**arguments).logits
        peft_logits = theirs(**arguments).logits[:, 4:]
    torch.testing.assert_close(mine, peft_logits, atol=1e-5, rtol=1e-5)
    untrained = local_model(tiny_folder)
    with torch.no_grad():
        assert (untrained(**arguments).logits - mine).abs().max() > 0.1


@pytest.mark.parametrize(
    "mode", every_time(["deep_ptune", "prefix", "lora"], of=["ptune", "deep_ptune", "prefix", "lora"])
)
def test_a_distributed_model_loads_a_bundle_trained_through_the_swarm(
    tiny_folder: Path, tokenizer: Any, tmp_path: Path, mode: str
) -> None:
    prepared = prepare(tokenizer, settings(), conversations())
    ids = torch.tensor([prepared.held_out[0].input_ids])
    with MemorySwarm(tiny_folder, [(0, 2), (2, 4)]) as swarm, torch.no_grad():
        about = ModelInfo(str(tiny_folder), swarm.checkpoint.identity)
        model = swarm.model(tuning_mode=mode, pre_seq_len=4)
        with torch.enable_grad():
            tune(model, settings(), prepared, tmp_path / "out", about)
        expected = model(ids).logits
        again = swarm.model(prompts=tmp_path / "out")
        torch.testing.assert_close(again(ids).logits, expected, atol=1e-5, rtol=1e-5)
        other = ModelInfo("another", "f" * 32)
        config = model.config
        save_bundle(tmp_path / "other", described_for(other), model.prompts, config=config, history=[])
        with pytest.raises(BundleError, match=rf"another.*{tiny_folder}"):
            swarm.model(prompts=tmp_path / "other")


def described_for(model: ModelInfo) -> Bundle:
    return Bundle(model, "ptune", 4, RenderSettings(), {}, {}, {})


def test_an_existing_folder_is_replaced_only_when_asked(tiny_folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine.txt").write_text("precious")
    with pytest.raises(UsageError, match="--overwrite"):
        saved(tiny_folder, out)
    assert (out / "mine.txt").read_text() == "precious"
    saved(tiny_folder, out, overwrite=True)
    assert load_bundle(out).mode == "ptune"
    assert os.listdir(tmp_path) == ["out"]


def test_a_full_disk_leaves_nothing_half_written(tiny_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="could not be saved"), largest_file(5_000):
        saved(tiny_folder, tmp_path / "out")  # the picture is larger
    assert os.listdir(tmp_path) == []


def garble(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda out: (out / "bundle.json").unlink(), "no bundle.json"),
        (lambda out: (out / "bundle.json").write_text("{"), "cannot be read"),
        (lambda out: (out / "bundle.json").write_text("[1]"), "cannot be read"),
        (lambda out: garble(out / "bundle.json", format=99), "format 99"),
        (lambda out: garble(out / "bundle.json", model={"name": "x"}), "garbles"),
        (lambda out: garble(out / "bundle.json", rendering={"style": "?"}), "garbles"),
        (lambda out: garble(out / "bundle.json", mode="deep_ptune"), "mixed"),
        (lambda out: garble(out / "prompt.json", identity="f" * 32), "mixed"),
        (lambda out: (out / "prompt.json").unlink(), r"prompt\.json"),
        (lambda out: (out / "adapter_model.safetensors").unlink(), r"lacks adapter_model\.safetensors"),
    ],
)
def test_a_damaged_bundle_is_one_sentence(tiny_folder: Path, tmp_path: Path, damage: Any, words: str) -> None:
    out = saved(tiny_folder, tmp_path / "out")
    damage(out)
    with pytest.raises(BundleError, match=words) as caught:
        load_bundle(out)
    assert "\n" not in str(caught.value)


def test_a_path_that_is_no_folder_is_no_bundle(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="is no folder and no bundle"):
        load_bundle(tmp_path / "nothing")


def test_the_prompt_on_disk_is_what_was_trained(tiny_folder: Path, tokenizer: Any, tmp_path: Path) -> None:
    model = local_model(tiny_folder)
    tune(model, settings(), prepare(tokenizer, settings(), conversations()), tmp_path / "out", ABOUT)
    on_disk = load_file(tmp_path / "out" / "adapter_model.safetensors")["prompt_embeddings"]
    assert torch.equal(on_disk, model.prompts.input.detach())


@pytest.mark.parametrize("allow_empty", [False, True])
def test_a_bundle_says_what_was_chosen(
    tiny_folder: Path, tokenizer: Any, tmp_path: Path, allow_empty: bool
) -> None:
    chosen = settings(
        steps=1, allow_empty=allow_empty, rendering=RenderSettings(style="auto", delimiter="|", max_length=64)
    )
    prepared = prepare(tokenizer, chosen, conversations())
    tune(local_model(tiny_folder), chosen, prepared, tmp_path / "out", ABOUT)
    bundle = load_bundle(tmp_path / "out")
    assert bundle.rendering.style == bundle.training["rendering"]["style"] == "delimiter"
    assert SamplingSettings.from_dict(bundle.sampling).allow_empty is allow_empty


def test_a_folder_of_pefts_is_a_bundle(tmp_path: Path) -> None:
    about = {"peft_type": "LORA", "r": 4, "base_model_name_or_path": "some/model"}
    (tmp_path / "adapter_config.json").write_text(json.dumps(about))
    bundle = load_bundle(tmp_path)
    assert (bundle.model.name, bundle.model.identity, bundle.what) == ("some/model", "", "lora, rank 4")
    assert find_partner(str(tmp_path)).about == "some/model, tuned (lora, rank 4)"
    for change, sentence in (
        ({"peft_type": "IA3"}, "peft's IA3"),
        ({"base_model_name_or_path": None}, "which model"),
    ):
        (tmp_path / "adapter_config.json").write_text(json.dumps(about | change))
        with pytest.raises(BundleError, match=sentence):
            find_partner(str(tmp_path))
