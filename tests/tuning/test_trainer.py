"""A run's steps equal a loop written with torch alone, locally and through a swarm."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.swarm_fixture import MemorySwarm
from tests.tuning.tiny_setup import ABOUT, conversations, local_model, plain_model, prompt_for, settings

from corolla.errors import NonFiniteLoss, UsageError
from corolla.tuning.batches import Prepared, prepare
from corolla.tuning.checkpoints import RunFolder
from corolla.tuning.settings import TuneSettings
from corolla.tuning.trainer import PromptTrainer
from corolla.tuning.tune import TuneResult, tune

STEPS = 4


class Seen:
    """Makes batches as usual and keeps them, in the order in which the Trainer draws them."""

    def __init__(self, prepared: Prepared) -> None:
        self.batches: list[dict[str, torch.Tensor]] = []
        self._make = prepared.batches

    def __call__(self, examples: Any) -> dict[str, torch.Tensor]:
        self.batches.append(self._make(examples))
        return self.batches[-1]


def reference_run(
    folder: Path, mode: str, micro_batches: list[dict[str, torch.Tensor]], chosen: TuneSettings
) -> tuple[list[float], list[torch.Tensor]]:
    """Losses and the final prompt: AdamW, clipping and the rate's course by hand, on the plain model."""
    model = plain_model(folder).requires_grad_(False)
    prompt = prompt_for(model, mode)
    parameters = list(prompt.parameters())
    for index, layer in enumerate(model.model.layers):
        if prompt.deep is not None:
            layer.register_forward_pre_hook(add_to_first_positions(prompt.deep, index))
    rate, warmup = chosen.learning_rate, int(chosen.warmup)
    assert rate is not None
    optimizer = torch.optim.AdamW(parameters, lr=rate, weight_decay=0.0)
    losses = []
    for step in range(STEPS):
        for group in optimizer.param_groups:
            rising, falling = (step + 1) / (warmup + 1), (STEPS - step) / (STEPS - warmup)
            group["lr"] = rate * min(rising, falling)
        micro = micro_batches[step * chosen.accumulate : (step + 1) * chosen.accumulate]
        total = torch.zeros(())
        count = 0
        for batch in micro:
            logits = prompted_logits(model, prompt.input, batch)
            labels = batch["labels"][:, 1:]
            total = total + torch.nn.functional.cross_entropy(
                logits[:, :-1][labels != -100], labels[labels != -100], reduction="sum"
            )
            count += int((labels != -100).sum())
        loss = total / count
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, chosen.max_grad_norm)
        optimizer.step()
        losses.append(loss.item())
    return losses, [parameter.detach() for parameter in parameters]


def add_to_first_positions(deep: torch.Tensor, index: int) -> Any:
    def hook(_layer: Any, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
        added = torch.zeros_like(arguments[0])
        added[:, : deep.shape[1]] = 1.0
        padded = torch.nn.functional.pad(deep[index], (0, 0, 0, arguments[0].shape[1] - deep.shape[1]))
        return (arguments[0] + added * padded, *arguments[1:])

    return hook


def prompted_logits(model: Any, prompt: torch.Tensor, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    embedded = model.get_input_embeddings()(batch["input_ids"])
    rows = prompt.expand(len(embedded), -1, -1)
    mask = torch.nn.functional.pad(batch["attention_mask"], (len(prompt), 0), value=1)
    logits: torch.Tensor = model(
        inputs_embeds=torch.cat([rows, embedded], dim=1), attention_mask=mask, use_cache=False
    ).logits[:, len(prompt) :]
    return logits


def run_and_compare(
    model: Any, folder: Path, mode: str, chosen: TuneSettings, prepared: Prepared, out: Path, tolerance: float
) -> None:
    seen = Seen(prepared)
    watched = Prepared(prepared.train, prepared.held_out, seen, prepared.renderer)  # type: ignore[arg-type]
    result = tune(model, chosen, watched, out, ABOUT)
    assert isinstance(result, TuneResult)
    held_out_batches = -(-len(prepared.held_out) // chosen.batch_size)
    training = seen.batches[held_out_batches:-held_out_batches]
    losses, parameters = reference_run(folder, mode, training, chosen)
    assert result.losses == pytest.approx(losses, abs=tolerance)
    for mine, theirs in zip(model.prompts.parameters(), parameters, strict=True):
        torch.testing.assert_close(mine.detach(), theirs, atol=tolerance, rtol=1e-4)


@pytest.mark.parametrize(("accumulate", "warmup"), [(1, 0), (2, 2)])
def test_steps_equal_a_loop_written_with_torch_alone(
    tiny_folder: Path, tokenizer: Any, tmp_path: Path, accumulate: int, warmup: int
) -> None:
    chosen = settings(steps=STEPS, accumulate=accumulate, warmup=warmup)
    prepared = prepare(tokenizer, chosen, conversations())
    run_and_compare(
        local_model(tiny_folder), tiny_folder, "ptune", chosen, prepared, tmp_path / "out", tolerance=2e-5
    )


@pytest.mark.parametrize("mode", ["ptune", "deep_ptune"])
def test_steps_through_a_swarm_equal_the_same_loop(
    tiny_folder: Path, tokenizer: Any, tmp_path: Path, mode: str
) -> None:
    chosen = settings(steps=STEPS, accumulate=2)
    prepared = prepare(tokenizer, chosen, conversations())
    with MemorySwarm(tiny_folder, [(0, 1), (1, 4)]) as swarm:
        model = swarm.model(tuning_mode=mode, pre_seq_len=4)
        model.prompts = prompt_for(model, mode)
        run_and_compare(model, tiny_folder, mode, chosen, prepared, tmp_path / "out", tolerance=1e-4)


def test_only_the_prompt_is_trained_and_only_the_prompt_is_written(
    tiny_folder: Path, tokenizer: Any, tmp_path: Path
) -> None:
    model = local_model(tiny_folder)
    model.requires_grad_(True)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    prepared = prepare(tokenizer, settings(steps=2), conversations())
    folder = RunFolder(tmp_path / "out")
    folder.begin({}, resume=False, overwrite=False)
    trainer = PromptTrainer(model, settings(steps=2), prepared, folder, ABOUT)
    trainer.train()
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == {"prompts.input"}
    trainer.save_model(str(tmp_path / "saved"))
    for place in (tmp_path / "saved", folder.all()[-1]):
        names = set(os.listdir(place))
        assert "adapter_model.safetensors" in names
        assert not names & {"model.safetensors", "pytorch_model.bin", "config.json"}


def test_a_loss_that_is_not_finite_stops_the_run_and_leaves_no_bundle(
    tiny_folder: Path, tokenizer: Any, tmp_path: Path
) -> None:
    model = local_model(tiny_folder)
    with torch.no_grad():
        model.prompts.input[0, 0] = float("inf")
    prepared = prepare(tokenizer, settings(), conversations())
    with pytest.raises(NonFiniteLoss, match=r"step 1 is nan.*--lr"):
        tune(model, settings(), prepared, tmp_path / "out", ABOUT)
    assert not (tmp_path / "out").exists()


def test_a_gradient_that_is_not_finite_never_reaches_the_prompt(
    tiny_folder: Path, tokenizer: Any, tmp_path: Path
) -> None:
    model = local_model(tiny_folder)
    model.prompts.input.register_hook(lambda gradient: gradient * float("nan"))
    before = model.prompts.input.detach().clone()
    prepared = prepare(tokenizer, settings(), conversations())
    with pytest.raises(NonFiniteLoss, match="gradient of step 1"):
        tune(model, settings(), prepared, tmp_path / "out", ABOUT)
    assert torch.equal(model.prompts.input.detach(), before)


def test_a_model_without_a_prompt_is_refused(tiny_folder: Path, tokenizer: Any, tmp_path: Path) -> None:
    model = local_model(tiny_folder)
    model.prompts = None
    prepared = prepare(tokenizer, settings(), conversations())
    with pytest.raises(UsageError, match="tuning_mode"):
        tune(model, settings(), prepared, tmp_path / "out", ABOUT)
