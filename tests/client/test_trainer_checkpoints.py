"""Trainers save and load what was trained at the client, by their own means; nothing that was changed is dropped."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tests.client.conftest import Pair, random_ids
from tests.client.test_ecosystem import Rows, word_tokenizer
from tests.covering import covering
from tests.tiny_models import write_tiny
from torch import Tensor
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

from corolla.client.model.losses import LazyLogits
from corolla.errors import BundleError, UsageError
from corolla.models.checkpoints.checkpoint import open_checkpoint
from corolla.models.checkpoints.prompt_files import save_prompt

PairOf = Callable[..., Pair]
in_turn = pytest.mark.parametrize(
    ("kind", "name"), covering(["ptune", "deep_ptune", "peft"], ["plain", "trl"], together=1)
)
pytestmark = pytest.mark.filterwarnings("ignore")  # peft, TRL and accelerate warn about their own choices


def settings(folder: Path, **changes: Any) -> dict[str, Any]:
    return {
        "output_dir": str(folder),
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-2,
        "max_steps": 6,
        "logging_steps": 1,
        "save_steps": 2,
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
    } | changes


def losses(trainer: Trainer) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def logits(model: Any, ids: Tensor) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(input_ids=ids).logits
    return found


def prompted(pair: Pair, kind: str) -> Any:
    """A distributed model with a prompt to train, Corolla's or peft's."""
    torch.manual_seed(1)
    if kind != "peft":
        return pair.model(tuning_mode=kind, pre_seq_len=3)
    from peft import PromptTuningConfig, get_peft_model

    return get_peft_model(pair.model(), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3))


def trainer_of(name: str, model: Any, folder: Path, **changes: Any) -> Trainer:
    if name == "plain":
        arguments = TrainingArguments(**settings(folder, **changes))
        return Trainer(model, arguments, train_dataset=Rows(), eval_dataset=Rows())
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    data = Dataset.from_list([{"input_ids": Rows()[index]["input_ids"].tolist()} for index in range(12)])
    config = SFTConfig(**settings(folder, bf16=False, gradient_checkpointing=False, **changes))
    return SFTTrainer(model, config, train_dataset=data, eval_dataset=data, processing_class=word_tokenizer())


def vectors(model: Any) -> list[Tensor]:
    return [one.detach().clone() for one in model.parameters() if one.requires_grad]


@in_turn
def test_a_resumed_run_is_the_run_that_was_not_interrupted(
    pair_of: PairOf, tmp_path: Path, kind: str, name: str
) -> None:
    pair = pair_of("llama")
    whole = trainer_of(name, prompted(pair, kind), tmp_path)
    whole.train()
    for checkpoint in (True, str(tmp_path / "checkpoint-4")):
        model = prompted(pair, kind)
        resumed = trainer_of(name, model, tmp_path)
        for one in model.parameters():
            if one.requires_grad:  # what is trained is what was loaded, not what it began with
                one.data.add_(1.0)
        if checkpoint is True:
            (tmp_path / "checkpoint-6").rename(tmp_path / "ended")
        resumed.train(resume_from_checkpoint=checkpoint)
        assert losses(resumed)[-2:] == pytest.approx(losses(whole)[-2:], abs=1e-5)
        for found, expected in zip(vectors(model), vectors(whole.model), strict=True):
            torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)


@in_turn
def test_the_best_model_is_loaded_at_the_end(pair_of: PairOf, tmp_path: Path, kind: str, name: str) -> None:
    model = prompted(pair_of("llama"), kind)
    trainer = trainer_of(
        name,
        model,
        tmp_path,
        greater_is_better=True,  # so that the first is the best
        eval_strategy="steps",
        eval_steps=2,
        save_only_model=kind == "deep_ptune",
        load_best_model_at_end=True,
        metric_for_best_model="eval_loss",
    )
    trainer.train()
    found = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    assert found[0] == max(found) > found[-1] + 1e-2
    assert trainer.evaluate()["eval_loss"] == pytest.approx(found[0], abs=1e-4)


@pytest.mark.parametrize("kind", ["ptune", "deep_ptune"])
def test_a_trainers_checkpoint_holds_the_prompt_and_looks_like_no_whole_model(
    pair_of: PairOf, tmp_path: Path, kind: str
) -> None:
    pair = pair_of("llama")
    model = prompted(pair, kind)
    trainer_of("plain", model, tmp_path, max_steps=2).train()
    folder = tmp_path / "checkpoint-2"
    names = {"prompts.input", "prompts.deep"} if kind == "deep_ptune" else {"prompts.input"}
    assert set(load_file(folder / "model.safetensors")) == names
    assert not (folder / "config.json").exists()
    with pytest.raises((OSError, ValueError)):
        AutoModelForCausalLM.from_pretrained(folder)
    again = pair.model(prompts=folder)
    assert torch.equal(logits(again, random_ids(1, 5)), logits(model, random_ids(1, 5)))


def test_nobody_but_the_main_process_writes(pair_of: PairOf, tmp_path: Path) -> None:
    model = prompted(pair_of("llama"), "ptune")
    model.save_pretrained(tmp_path / "other", is_main_process=False)
    assert not (tmp_path / "other").exists()
    with pytest.raises(UsageError, match=r"model\.push_to_hub"):
        model.save_pretrained(tmp_path / "other", push_to_hub=True)


def test_adapters_of_pefts_are_saved_by_it_and_never_beside_a_prompt(pair_of: PairOf, tmp_path: Path) -> None:
    from peft import LoraConfig

    model = pair_of("llama").model()
    try:
        model.add_adapter(LoraConfig(target_modules=["lm_head"], init_lora_weights=False))
    except ValueError as error:  # transformers 5.24 wants a newer peft than there is
        pytest.skip(str(error))
    model.save_pretrained(tmp_path)
    assert {"adapter_config.json", "adapter_model.safetensors"} <= {path.name for path in tmp_path.iterdir()}
    assert not (tmp_path / "config.json").exists()
    model.prompts = prompted(pair_of("llama"), "ptune").prompts
    with pytest.raises(UsageError, match="a prompt and adapters of peft's"):
        model.save_pretrained(tmp_path / "other")


# --- what else was changed -----------------------------------------------------------------------------------


def resized(model: Any) -> None:
    model.resize_token_embeddings(264, mean_resizing=False)


def trained_head(model: Any) -> None:
    head = model.get_output_embeddings()
    head.weight.requires_grad_(True)
    ids = random_ids(2, 6)
    optimizer = torch.optim.SGD([head.weight], lr=0.5)
    model(ids, labels=ids).loss.backward()
    optimizer.step()
    head.weight.requires_grad_(False)


def edited_norm(model: Any) -> None:
    model.model.norm.weight.data.mul_(1.5)


def other_head(model: Any) -> None:
    torch.manual_seed(3)
    model.set_output_embeddings(torch.nn.Linear(32, 256, bias=False))


@pytest.mark.parametrize("quantization", ["none", "bfloat16"])
@pytest.mark.parametrize("change", [resized, trained_head, edited_norm, other_head])
def test_what_was_changed_at_the_client_comes_back(
    pair_of: PairOf, tmp_path: Path, change: Callable[[Any], None], quantization: str
) -> None:
    pair = pair_of("llama")
    model = pair.model(tuning_mode="ptune", pre_seq_len=3, quantization=quantization)
    change(model)
    model.save_pretrained(tmp_path)
    again = pair.model(prompts=tmp_path, quantization=quantization)
    ids = torch.tensor([[3, 4, 263 if change is resized else 255]])
    tolerance = 1e-4 if quantization == "none" else 0.1
    torch.testing.assert_close(logits(again, ids), logits(model, ids), atol=tolerance, rtol=0)
    assert not any(one.requires_grad for name, one in again.named_parameters() if name != "prompts.input")
    again.save_pretrained(tmp_path / "again")
    third = pair.model(prompts=tmp_path / "again", quantization=quantization)
    torch.testing.assert_close(logits(third, ids), logits(again, ids), atol=1e-6, rtol=0)


def test_a_resized_model_keeps_its_ways(pair_of: PairOf) -> None:
    """Frozen stays frozen, and the loss needs no logits."""
    model = pair_of("llama").model(tuning_mode="ptune")
    resized(model)
    assert [name for name, one in model.named_parameters() if one.requires_grad] == ["prompts.input"]
    ids = torch.tensor([[3, 4, 263]])
    assert type(model(ids, labels=ids).logits) is LazyLogits


def test_what_was_only_moved_or_converted_is_not_written(pair_of: PairOf, tmp_path: Path) -> None:
    for index, quantization in enumerate(("none", "bfloat16", "int8")):
        model = pair_of("llama").model(tuning_mode="ptune", quantization=quantization)
        model.to("cpu").double().float().train()
        model.requires_grad_(True).requires_grad_(False)
        model(random_ids(1, 4))
        model.save_pretrained(tmp_path / str(index))
        assert not list((tmp_path / str(index)).glob("model*"))


def test_a_head_without_a_prompt_is_written_and_an_untouched_model_refused(
    pair_of: PairOf, tmp_path: Path
) -> None:
    pair = pair_of("llama")
    model = pair.model()
    with pytest.raises(UsageError, match="no prompt was trained"):
        model.save_pretrained(tmp_path)
    trained_head(model)
    model.save_pretrained(tmp_path)
    again, ids = pair.model(), random_ids(1, 5)
    again.load_state_dict(load_file(tmp_path / "model.safetensors"), strict=False)
    torch.testing.assert_close(logits(again, ids), logits(model, ids), atol=1e-5, rtol=0)


def test_tables_of_another_model_are_refused(pair_of: PairOf, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    pair = pair_of("llama")
    model = pair.model(tuning_mode="ptune")
    model.save_pretrained(tmp_path)
    for tensors in (
        {"model.norm.weight": torch.ones(31)},
        {"lm_head.weight": torch.ones(256, 16)},
        {"x": torch.ones(1)},
    ):
        save_file(tensors, tmp_path / "model.safetensors")
        with pytest.raises(BundleError, match="does not fit this model"):
            pair.model(prompts=tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"1234567890")
    with pytest.raises(BundleError, match="missing or truncated"):
        pair.model(prompts=tmp_path)


# --- peft's folders ------------------------------------------------------------------------------------------


def test_a_prompt_that_peft_wrote_is_read(pair_of: PairOf, tmp_path: Path) -> None:
    pair = pair_of("llama")
    adapted = prompted(pair, "peft")
    adapted.save_pretrained(tmp_path)
    model, ids = pair.model(prompts=tmp_path), random_ids(2, 6)
    torch.testing.assert_close(logits(model, ids), logits(adapted, ids)[:, 3:], atol=1e-4, rtol=0)


@pytest.mark.parametrize("kind", ["IA3", "P_TUNING"])
def test_what_else_peft_writes_is_refused_by_its_name(pair_of: PairOf, tmp_path: Path, kind: str) -> None:
    from peft import IA3Config, PromptEncoderConfig, get_peft_model

    configs: dict[str, Any] = {
        "IA3": IA3Config(target_modules=["k_proj"], feedforward_modules=[]),
        "P_TUNING": PromptEncoderConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
    }
    pair = pair_of("llama")
    get_peft_model(AutoModelForCausalLM.from_config(pair.local.config), configs[kind]).save_pretrained(
        tmp_path
    )
    with pytest.raises(BundleError, match=rf"holds peft's {kind}, and prompts= takes PROMPT_TUNING"):
        pair.model(prompts=tmp_path)


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        (lambda folder: (folder / "adapter_config.json").write_text("{}"), "cannot be read"),
        (lambda folder: (folder / "adapter_config.json").write_text("[" * 100_000), "cannot be read"),
        (lambda folder: (folder / "adapter_model.safetensors").unlink(), "lacks adapter_model"),
        (lambda folder: (folder / "adapter_model.safetensors").write_bytes(b"12345"), "missing or truncated"),
    ],
)
def test_a_damaged_folder_of_pefts_is_one_sentence(
    pair_of: PairOf, tmp_path: Path, damage: Callable[[Path], Any], sentence: str
) -> None:
    pair = pair_of("llama")
    prompted(pair, "peft").save_pretrained(tmp_path)
    damage(tmp_path)
    with pytest.raises(BundleError, match=sentence):
        pair.model(prompts=tmp_path)


def test_a_prompt_of_another_width_is_refused(pair_of: PairOf, tmp_path: Path) -> None:
    prompted(pair_of("llama"), "peft").save_pretrained(tmp_path)
    about = json.loads((tmp_path / "adapter_config.json").read_text())
    assert about["num_virtual_tokens"] == 3
    with pytest.raises(BundleError, match=r"of width 32.* has 16"):
        pair_of("opt").model(prompts=tmp_path)


def test_peft_finds_the_model_of_a_prompt_by_itself(
    pair_of: PairOf, tmp_path: Path, monkeypatch: Any
) -> None:
    """Also where its name is one that only Corolla knows, or a path that is no path elsewhere."""
    from peft import AutoPeftModelForCausalLM

    monkeypatch.chdir(write_tiny("llama", tmp_path / "here" / "tiny").parent)
    checkpoint = open_checkpoint("tiny")
    prompt = prompted(pair_of("llama"), "ptune").prompts
    save_prompt(
        tmp_path / "saved", prompt, config=checkpoint.config, model_name="tiny", identity=checkpoint.identity
    )
    monkeypatch.chdir(tmp_path)
    local = AutoModelForCausalLM.from_pretrained(tmp_path / "here" / "tiny")
    adapted: Any = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "saved")
    assert torch.equal(adapted.base_model.lm_head.weight, local.lm_head.weight)
    assert torch.equal(adapted.prompt_encoder.default.embedding.weight, prompt.input)
