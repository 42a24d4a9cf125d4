"""`transformers.Trainer` for prompts alone.

Invariant: only the prompt is optimized and only the prompt is written; a step's loss is the mean over all
label tokens of all its batches, whatever their sizes.
"""

from __future__ import annotations

import math
import signal
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME

from corolla.client.model.losses import summed_cross_entropy, summed_distillation
from corolla.models.checkpoints.prompt_files import load_prompt, save_prompt
from corolla.tuning.batches import TEACHER, Prepared
from corolla.tuning.bundle import ModelInfo
from corolla.tuning.checkpoints import CHECKPOINT, RunFolder
from corolla.tuning.course import Course, rate_factor
from corolla.tuning.evaluate import Evaluation, evaluate, flat_targets
from corolla.tuning.progress import planned_steps
from corolla.tuning.settings import TuneSettings


class PromptTrainer(Trainer):  # type: ignore[misc]
    """Trains `model.prompts` on `prepared.train`; `evaluations` maps steps to held-out losses."""

    control: TrainerControl
    lr_scheduler: Any

    def __init__(
        self,
        model: Any,
        settings: TuneSettings,
        prepared: Prepared,
        folder: RunFolder,
        about: ModelInfo,
        callbacks: Sequence[TrainerCallback] = (),
        say: Callable[[str], None] = lambda line: None,
    ) -> None:
        """`say` is told when the run goes back."""
        model.requires_grad_(False)
        model.prompts.requires_grad_(True)
        rate = settings.for_mode(model.prompts.mode).learning_rate
        assert rate is not None
        optimizer = torch.optim.AdamW(model.prompts.parameters(), lr=rate, weight_decay=settings.weight_decay)
        self.course = Course(model.prompts, patience=settings.stop_after, say=say)
        self._settings = settings
        self._prepared = prepared
        self._folder = folder
        self._output = folder.path  # where a checkpoint is written
        self._about = about
        self.evaluations: dict[int, Evaluation] = {}
        super().__init__(
            model=model,
            args=training_arguments(settings, folder, len(prepared.train), on_cpu=model.device.type == "cpu"),
            data_collator=prepared.batches,
            train_dataset=prepared.train,
            eval_dataset=prepared.held_out,
            optimizers=(optimizer, None),
            compute_loss_func=summed_loss,
            callbacks=[self.course, *callbacks],
        )

    def go_on(self, checkpoint: Path | None) -> None:
        """Train from there, or from the start; to the end, or for as long as patience lasts."""
        if checkpoint is not None:
            self.course.load(checkpoint)
        self.args.eval_on_start = checkpoint is None
        if checkpoint is None or not self.course.exhausted:
            self.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
        else:
            self.state = TrainerState.load_from_json(str(checkpoint / TRAINER_STATE_NAME))
            self._load_from_checkpoint(str(checkpoint))

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        """As the Trainer's; the course is told the loss, and the Trainer's sum only what can be taken off it again."""
        loss: Tensor = super().training_step(model, inputs, num_items_in_batch)
        self.course.add(loss.item())
        return loss if bool(torch.isfinite(loss)) else torch.zeros_like(loss)

    def compute_loss(self, model: Any, inputs: Any, *args: Any, num_items_in_batch: Any = None) -> Any:
        """As the Trainer's; where a batch has a teacher, all that it might have said is learnt, not what it said."""
        teacher = inputs.pop(TEACHER, None)
        if teacher is None:
            return super().compute_loss(model, inputs, *args, num_items_in_batch=num_items_in_batch)
        count = len(teacher.ids) if num_items_in_batch is None else num_items_in_batch
        del inputs["labels"]
        return summed_distillation(model(**inputs).logits, teacher) / count

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """The rate rises, then falls to 0; half of it each time that the run has gone back."""
        if self.lr_scheduler is None:
            warmup = self._settings.warmup_steps(num_training_steps)
            self.lr_scheduler = LambdaLR(
                optimizer or self.optimizer,
                lambda step: self.course.scale * rate_factor(step, num_training_steps, warmup),
            )
            self._created_lr_scheduler = True
        return self.lr_scheduler

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """As the Trainer's, without what is no number: files are JSON, and curves have points."""
        if "loss" in logs and not math.isfinite(self.course.loss):
            logs = logs | {"loss": math.nan}
        finite = {key: one for key, one in logs.items() if not isinstance(one, float) or math.isfinite(one)}
        super().log(finite, *args, **kwargs)

    def evaluate(self, *_args: Any, **_kwargs: Any) -> dict[str, float]:
        """Held-out losses now; they are logged, and kept in `evaluations`."""
        step = self.state.global_step
        result = evaluate(
            self.model, self._prepared.held_out, self._prepared.batches, self.args.per_device_eval_batch_size
        )
        if step == 0:
            self._folder.note_before(result)
        metrics = result.metrics()
        self.log(dict(metrics))
        self.evaluations[step] = self.course.evaluated(step, result, self.optimizer)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        if self.course.exhausted:
            self.control.should_training_stop = True
        return metrics

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write the prompt; a model without its blocks is never written as if it were whole."""
        save_prompt(
            Path(output_dir or self.args.output_dir),
            self.model.prompts,
            config=self.model.config,
            model_name=self._about.name,
            identity=self._about.identity,
            revision=self._about.revision,
        )

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        with self._folder.saving(self.state.global_step) as self._output:
            super()._save_checkpoint(model, trial)
            self.course.save(self._output / f"{CHECKPOINT}{self.state.global_step}")

    def _get_output_dir(self, trial: Any) -> str:
        return str(self._output)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        saved = load_prompt(
            Path(resume_from_checkpoint),
            model_name=self._about.name,
            identity=self._about.identity,
            config=self.model.config,
        )
        self.model.prompts.load_state_dict(saved.state_dict())  # in place: the optimizer keeps hold of it


def summed_loss(outputs: Any, labels: Tensor, num_items_in_batch: Tensor | int | None = None) -> Tensor:
    """Cross-entropy of the kept positions, summed and divided by the step's count of label tokens.

    `outputs.logits` [n, V] stand where `logits_to_keep` is true, in the order of `flat_targets(labels)`.
    """
    targets = flat_targets(labels)
    count = targets.numel() if num_items_in_batch is None else num_items_in_batch
    return summed_cross_entropy(outputs.logits, targets) / count


class StopOnInterrupt(TrainerCallback):  # type: ignore[misc]
    """Ctrl-C inside the block: the step under way is finished and saved, a second one stops at once.

    `announce` is told so in one line; the signal's earlier handler is back afterwards.
    """

    def __init__(self, announce: Callable[[str], None]) -> None:
        self.requested = False
        self._announce = announce
        self._earlier: Any = None
        self._training = False
        self._announcer: threading.Thread | None = None

    def __enter__(self) -> StopOnInterrupt:
        # Python allows signal handlers on the main thread only; elsewhere the caller has its own way to stop.
        if threading.current_thread() is threading.main_thread():
            self._earlier = signal.signal(signal.SIGINT, self._interrupt)
        return self

    def __exit__(self, *_error: object) -> None:
        if self._earlier is not None:
            signal.signal(signal.SIGINT, self._earlier)
        if self._announcer is not None:
            self._announcer.join()

    def _interrupt(self, _number: int, _frame: FrameType | None) -> None:
        if self.requested or not self._training:
            raise KeyboardInterrupt
        self.requested = True
        # On a thread: the signal may have come in the middle of a line that the main thread is writing.
        line = "Stopping after this step; Ctrl-C again to stop at once without saving it."
        self._announcer = threading.Thread(target=self._announce, args=(line,))
        self._announcer.start()

    def on_step_begin(self, *_args: Any, **_kwargs: Any) -> None:
        self._training = True  # only from here on is there something to finish and save

    def on_step_end(self, _args: Any, state: TrainerState, control: TrainerControl, **_kwargs: Any) -> None:
        if self.requested and state.global_step < state.max_steps:
            control.should_save = True
            control.should_training_stop = True
            control.should_evaluate = False


def training_arguments(
    settings: TuneSettings, folder: RunFolder, examples: int, *, on_cpu: bool
) -> TrainingArguments:
    """The settings as the Trainer takes them, for so many examples; the rate's course is not among them."""
    return TrainingArguments(
        output_dir=str(folder.path),
        run_name=folder.out.name,
        learning_rate=settings.learning_rate,
        lr_scheduler_type="linear",
        max_grad_norm=settings.max_grad_norm,
        per_device_train_batch_size=settings.batch_size,
        per_device_eval_batch_size=settings.batch_size,
        gradient_accumulation_steps=settings.accumulate,
        num_train_epochs=settings.epochs,
        max_steps=settings.steps or -1,
        eval_strategy="steps",
        eval_steps=settings.evaluation_steps(planned_steps(settings, examples)),
        eval_on_start=True,
        save_strategy="steps",
        save_steps=settings.save_every,
        logging_strategy="steps",
        logging_steps=1,
        logging_nan_inf_filter=False,
        include_num_input_tokens_seen="non_padding",
        report_to=settings.report_to,
        seed=settings.seed,
        data_seed=settings.seed,
        remove_unused_columns=False,
        label_names=["labels"],
        dataloader_pin_memory=False,
        disable_tqdm=True,
        # The client's part stays on the device that its user chose.
        use_cpu=on_cpu,
    )
