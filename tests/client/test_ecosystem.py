"""peft and TRL on top of the distributed model do what they do on the local one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tests.client.conftest import Pair, random_ids
from tests.covering import every_time
from tests.reference import Prompted, local_model, relative, with_old_names
from tests.tiny_models import FAMILIES
from transformers import PreTrainedModel

from corolla.errors import UsageError

PairOf = Callable[..., Pair]


def peft_pair(pair: Pair) -> tuple[Any, Any]:
    """peft's prompt tuning on the distributed and on the local model, with the same vectors."""
    from peft import PromptTuningConfig, get_peft_model

    settings = {"task_type": "CAUSAL_LM", "num_virtual_tokens": 4}
    remote = get_peft_model(pair.model(), PromptTuningConfig(**settings))
    whole = local_model(pair.swarm.checkpoint.name)
    whole.generation_config = pair.local.generation_config
    local = get_peft_model(with_old_names(whole), PromptTuningConfig(**settings))
    vectors = torch.randn(4, pair.local.config.hidden_size, generator=torch.Generator().manual_seed(2))
    for model in (remote, local):
        parameters = [one for one in model.parameters() if one.requires_grad]
        assert len(parameters) == 1
        parameters[0].data.copy_(vectors)
    return remote, local


@pytest.mark.filterwarnings("ignore:Position ids are not supported")
@pytest.mark.filterwarnings("ignore:`past_key_values` is deprecated")  # by peft, to transformers 5.24
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`")
# peft's prompt is embeddings to us, and the families' own ways with those are in `test_exactness.py`.
@pytest.mark.parametrize(
    "family",
    every_time(
        ("llama", "bloom", "gpt2", "gemma2", "gpt_oss"),
        [family for family in FAMILIES if family != "opt"],  # peft: equal widths only
    ),
)
def test_peft_prompt_tuning(pair_of: PairOf, family: str) -> None:
    remote, local = peft_pair(pair_of(family))
    ids, mask = random_ids(3, 9), torch.ones(3, 9, dtype=torch.long)
    mask[1, 6:] = 0
    labels = ids.masked_fill(mask == 0, -100)
    losses = []
    for model in (remote, local):
        loss = model(input_ids=ids, attention_mask=mask, labels=labels).loss
        loss.backward()
        losses.append(loss.item())
    assert abs(losses[0] - losses[1]) < 1e-4
    found, expected = (
        next(one.grad for one in model.parameters() if one.requires_grad) for model in (remote, local)
    )
    assert relative(found, expected) < 1e-4
    remote.eval()
    local.eval()
    settings: dict[str, Any] = {"attention_mask": mask[:1], "max_new_tokens": 8, "do_sample": False}
    assert torch.equal(
        remote.generate(input_ids=ids[:1], **settings), local.generate(input_ids=ids[:1], **settings)
    )


def word_tokenizer() -> Any:
    """A tokenizer whose words are the numbers of a tiny model's tokens."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = models.WordLevel({str(index): index for index in range(256)}, unk_token="0")
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(words), pad_token="0", eos_token="2")


@pytest.mark.filterwarnings("ignore")  # TRL and accelerate warn about their own choices
@pytest.mark.parametrize("checkpointing", [False, True])
def test_trl_prints_the_local_runs_losses(pair_of: PairOf, tmp_path: Path, checkpointing: bool) -> None:
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    data = Dataset.from_list([{"input_ids": random_ids(1, 5 + n % 4, seed=n)[0].tolist()} for n in range(16)])

    def losses(model: Any, name: str) -> list[float]:
        settings = SFTConfig(
            output_dir=str(tmp_path / name),
            per_device_train_batch_size=4,
            gradient_accumulation_steps=2,
            max_steps=3,
            logging_steps=1,
            learning_rate=1e-2,
            gradient_checkpointing=checkpointing,
            report_to="none",
            use_cpu=True,
            bf16=False,
            save_strategy="no",
            disable_tqdm=True,
        )
        trainer = SFTTrainer(model, args=settings, train_dataset=data, processing_class=word_tokenizer())
        trainer.train()
        return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]

    remote, local = peft_pair(pair_of("qwen2"))
    found, expected = losses(remote, "remote"), losses(local, "local")
    assert len(found) == 3
    assert len(set(found)) > 1
    assert found == pytest.approx(expected, abs=1e-4)


class Rows(torch.utils.data.Dataset[dict[str, torch.Tensor]]):
    """Sequences with their labels."""

    def __len__(self) -> int:
        return 12

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        ids = random_ids(1, 9, seed=index)[0]
        return {"input_ids": ids, "labels": ids}


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_the_plain_trainer_trains_a_prompt(pair_of: PairOf, tmp_path: Path) -> None:
    from transformers import Trainer, TrainingArguments

    pair = pair_of("llama")
    model = pair.model(tuning_mode="ptune", pre_seq_len=3)
    local = Prompted(pair.local, model.prompts.input)
    settings = TrainingArguments(
        output_dir=str(tmp_path),
        per_device_train_batch_size=4,
        learning_rate=1e-2,
        lr_scheduler_type="constant",
        max_grad_norm=0.0,
        num_train_epochs=2,
        logging_steps=1,
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
        save_steps=3,
        train_sampling_strategy="sequential",
    )
    trainer = Trainer(model, settings, train_dataset=Rows())
    trainer.train()
    found = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]

    optimizer, expected = torch.optim.AdamW([local.vectors], lr=1e-2, weight_decay=0.0), []
    for start in (0, 4, 8) * 2:
        ids = torch.stack([Rows()[index]["input_ids"] for index in range(start, start + 4)])
        loss = local.loss(ids, ids)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        expected.append(loss.item())
    assert found == pytest.approx(expected, abs=1e-3)
    assert (model.prompts.input - local.vectors).abs().max() < 1e-4
    checkpoint = tmp_path / "checkpoint-3"
    assert (checkpoint / "adapter_model.safetensors").is_file()
    assert set(load_file(checkpoint / "model.safetensors")) == {"prompts.input"}
    assert not (checkpoint / "config.json").exists()


def test_it_is_a_plain_pretrained_model(pair_of: PairOf, tmp_path: Path) -> None:
    pair = pair_of("llama")
    model = pair.model(tuning_mode="ptune", pre_seq_len=3)
    assert isinstance(model, PreTrainedModel)
    assert isinstance(model, type(pair.local))
    assert set(model.state_dict()) == {
        "model.embed_tokens.weight",
        "model.norm.weight",
        "lm_head.weight",
        "prompts.input",
    }
    assert model.to("cpu").train().training
    assert not model.eval().training
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    model(random_ids(1, 5), labels=random_ids(1, 5)).loss.backward()
    optimizer.step()
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == {"prompts.input"}
    model.save_pretrained(tmp_path)
    assert not list(tmp_path.glob("model*"))
    again = pair.model(prompts=tmp_path)
    assert torch.equal(again.prompts.input, model.prompts.input)
    with pytest.raises(UsageError, match="no blocks to save"):
        pair.model().save_pretrained(tmp_path / "other")


@pytest.mark.filterwarnings("ignore")
def test_a_saved_prompt_is_what_peft_loads(pair_of: PairOf, tmp_path: Path) -> None:
    from peft import PeftModel

    pair = pair_of("llama")
    model = pair.model(tuning_mode="ptune", pre_seq_len=3)
    model.save_pretrained(tmp_path)
    adapted = PeftModel.from_pretrained(pair.local, tmp_path)
    ids = random_ids(2, 6)
    # peft keeps the prompt's positions in its output.
    assert (adapted(input_ids=ids).logits[:, 3:] - model(ids).logits).abs().max() < 1e-4
