"""What the commands that train, or evaluate what was trained, have in common.

Invariant: whatever ends a run before its bundle is there (Ctrl-C, an error), the last lines say what is kept and what
to type to go on.
"""

from __future__ import annotations

import contextlib
import math
import shlex
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from corolla.cli.saved_swarm import to_saved
from corolla.cli.terminal import console, say_plainly
from corolla.config import SwarmConfig
from corolla.errors import BundleError, CorollaError, NonFiniteLoss, UsageError

if TYPE_CHECKING:
    from corolla.data.conversation import Conversation
    from corolla.tuning.evaluate import Difference, Evaluation
    from corolla.tuning.tune import TuneResult, TuneStopped


@dataclass(frozen=True)
class DataOptions:
    """Which conversations."""

    data: Annotated[
        str | None,
        "chitchat, a json/jsonl/csv/parquet file, or a hub name (default: what training held out).",
    ] = None
    speaker: Annotated[str | None, "chitchat: the person whose turns are the replies."] = None
    persona: Annotated[bool, "PersonaChat: put the personality in front."] = False
    split: Annotated[str | None, "Which split of hub data, or list of a json file, such as train."] = None

    def read(self, token: str | None) -> list[Conversation]:
        """All of them; says what became of the rows. Raises `DataError`."""
        from corolla.data.sources import load_conversations

        conversations, report = load_conversations(
            self.data or "", speaker=self.speaker, persona=self.persona, split=self.split, token=token
        )
        for line in report.lines():
            say_plainly(line)
        return conversations


@dataclass(frozen=True)
class TrainJob:
    """The model whose prompt is trained, the swarm that runs it, and where the bundle goes."""

    out: Path = Path("bundle")
    model: str = "smollm2"
    prompt_tokens: int = 16
    revision: str | None = None
    token: str | None = field(default=None, repr=False)
    cache_dir: Path | None = None
    dtype: str = "auto"
    client: SwarmConfig = field(default_factory=SwarmConfig)

    @property
    def size(self) -> str:
        """Of what is trained, for people."""
        return f"{self.prompt_tokens} prompt tokens"

    def notes(self) -> dict[str, Any]:
        """For the bundle."""
        swarm = to_saved(SwarmConfig(peers=self.client.peers, trust=self.client.trust))
        return {"dtype": self.dtype, "swarm": swarm}


def trained(
    job: TrainJob,
    run: Callable[..., TuneResult | TuneStopped],
    peers: Sequence[str],
    *,
    resume: bool,
    overwrite: bool,
    again: str | None,
    **prompt: Any,
) -> TuneResult:
    """Load the model with a `prompt` to train, through the swarm at `peers`, and `run` the training.

    `run` is `tune` or `study` with all arguments of its own. Exits with 130 when it was interrupted; `again` is the
    command that goes on.
    """
    from corolla.client.model.causal_lm import AutoDistributedModelForCausalLM
    from corolla.tuning.bundle import ModelInfo
    from corolla.tuning.tune import TuneStopped

    with AutoDistributedModelForCausalLM.from_pretrained(
        job.model,
        pre_seq_len=job.prompt_tokens,
        dtype=job.dtype,
        revision=job.revision,
        token=job.token,
        cache_dir=job.cache_dir,
        **prompt,
        **replace(job.client, peers=tuple(peers)).arguments(),
    ) as model:
        trainable = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
        say_plainly(f"Training {trainable:,} numbers: {model.prompts.mode}, {job.size}")
        result = run(
            model,
            out=job.out,
            about=ModelInfo(job.model, model.blocks.connection.view.model, job.revision),
            notes=job.notes(),
            resume=resume,
            overwrite=overwrite,
            console=console,
        )
    if isinstance(result, TuneStopped):
        say_plainly(f"Stopped after step {result.step} of {result.total}.")
        if again is not None:
            say_plainly(f"Go on with\n  {again}")
        raise typer.Exit(130)
    words = f"{result.steps} steps in {result.seconds:.0f} s"
    if result.best_step != result.steps:
        words = f"after step {result.best_step}, the best of {words}"
    console.print(result_table(result.before, result.after, result.difference, words))
    return result


@contextlib.contextmanager
def stopped_by_ctrl_c(out: Path) -> Iterator[None]:
    """Says what is kept of a run that Ctrl-C or an error has ended at once, and how to go on with it.

    Not where the run was refused: the same command once more would be refused as well.
    """
    from corolla.tuning.checkpoints import RunFolder

    try:
        yield
    except typer.Exit:
        raise
    except (KeyboardInterrupt, CorollaError, OSError, RuntimeError) as error:
        last = RunFolder(out).latest()
        stopped = isinstance(error, KeyboardInterrupt)
        if last is not None and not is_refusal(error):
            say_plainly(f"{last} is kept; go on with\n  {resume_command()}")
        elif stopped:
            say_plainly("Stopped before anything was saved.")
        if stopped:
            raise typer.Exit(130) from None
        raise


def is_refusal(error: BaseException) -> bool:
    """Whether an error is about what was typed, and not about what befell a run."""
    return isinstance(error, UsageError) and not isinstance(error, BundleError | NonFiniteLoss)


def result_table(before: Evaluation, after: Evaluation, change: Difference, words: str) -> RenderableType:
    """Held-out losses of the base model and the tuned one, with the interval of their difference; `words` below."""
    table = Table(title="Held-out conversations", title_justify="left", title_style="bold")
    for name in ("", "before", "after", "change"):
        table.add_column(name, justify="left" if not name else "right")
    rows = (
        ("loss of replies (nats a token)", before.reply_loss, after.reply_loss, ".3f"),
        ("perplexity of replies", before.perplexity, after.perplexity, ".1f"),
        ("loss of delimiters and ends", before.marker_loss, after.marker_loss, ".3f"),
    )
    for name, old, new, form in rows:
        if math.isnan(old) and math.isnan(new):
            continue  # there are none, such as ends of answers that were all cut off
        table.add_row(name, format(old, form), format(new, form), format(new - old, "+" + form))
    words += f", {before.conversations} held-out conversations"
    if change.low is not None and change.high is not None:
        words += (
            f"; change of the replies' loss, paired 95 % interval: {change.low:+.3f} to {change.high:+.3f}"
        )
    return Group(table, Text(words, style="dim"))


def show_next_step(out: Path, peers: Sequence[str] | None) -> None:
    """Where the bundle is, and how to chat with it."""
    from corolla.tuning.report import REPORT_FILE

    say_plainly(f"Bundle: {out}   what came of it: {out / REPORT_FILE}")
    join = [part for address in peers or () for part in ("--peers", address)]
    say_plainly(f"Chat with it:\n  {shlex.join(['corolla', 'chat', str(out), *join])}")


def resume_command() -> str:
    """What was typed, to be typed again so that it goes on."""
    words = sys.argv[1:]
    more = [] if "--resume" in words else ["--resume"]
    end = words.index("--") if "--" in words else len(words)  # what follows that is no option
    return shlex.join(["corolla", *words[:end], *more, *words[end:]])
