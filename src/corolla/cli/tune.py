"""`corolla tune`: train a prompt through the swarm and save it as a bundle.

Invariant: what is wrong with the arguments or the data is said before a server is started or asked.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_args

import typer
from rich.console import Group, RenderableType
from rich.panel import Panel
from rich.text import Text

from corolla.cli.common import set_up_libraries
from corolla.cli.fields import Fields, clean_text, with_fields
from corolla.cli.members import MemberOptions
from corolla.cli.terminal import console, say_plainly
from corolla.cli.training import (
    DataOptions,
    TrainJob,
    resume_command,
    show_next_step,
    stopped_by_ctrl_c,
    trained,
)
from corolla.config import LORA_RANK, SwarmConfig, TuningMode
from corolla.data.render import NO_LOSS, Example, RenderSettings
from corolla.errors import UsageError
from corolla.files import read_bounded_text
from corolla.text import printable
from corolla.tuning.settings import TuneSettings

if TYPE_CHECKING:
    from corolla.tuning.batches import Prepared
    from corolla.tuning.tune import TuneResult

MODES = get_args(TuningMode)
INITS = ("vocab", "text", "random", "conversations")


@dataclass(frozen=True)
class TuneJob(TrainJob, DataOptions):
    """What to train and on what; the settings say how. Raises `UsageError`."""

    data: Annotated[str, "chitchat, a json/jsonl/csv/parquet file, or a hub name."] = "chitchat"
    out: Annotated[Path, "Where the bundle goes."] = Path("bundle")
    mode: Annotated[
        str,
        "ptune, deep_ptune (a prompt for each block besides), prefix (keys and values for each block) or lora.",
    ] = "ptune"
    prompt_tokens: Annotated[int, "Trainable prompt tokens."] = 16
    rank: Annotated[
        int | None, f"Of lora: numbers that each changed layer goes through (default: {LORA_RANK})."
    ] = None
    prompt_init: Annotated[
        str | None,
        "Start from vocab, text, random or conversations (default: vocab, of a prefix conversations).",
    ] = None
    prompt_text: Annotated[
        str | None, "--prompt-text", "--init-text", "The text to start from, or a file that holds it."
    ] = None
    push: Annotated[str | None, "Share the bundle on the hub under this name, such as me/my-bot."] = None
    private: Annotated[bool, "--private", "Share it in a private repository."] = False

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise UsageError(f"--mode is {self.mode!r}; it must be one of {', '.join(MODES)}.")
        if self.prompt_tokens < 1:
            raise UsageError(f"--prompt-tokens is {self.prompt_tokens}; a prompt needs at least 1 token.")
        if self.rank is not None and self.rank < 1:
            raise UsageError(f"--rank is {self.rank}; an adapter has a rank of at least 1.")
        if self.rank is not None and self.mode != "lora":
            raise UsageError(f"--rank is of adapters, and --mode {self.mode} has none: leave it out.")
        if self.prompt_init not in (None, *INITS):
            raise UsageError(f"--prompt-init is {self.prompt_init!r}; it must be one of {', '.join(INITS)}.")
        if self.prompt_init is not None and (self.prompt_init == "text") != bool(self.prompt_text):
            raise UsageError("--prompt-init text and --prompt-text TEXT go together.")
        if self.mode == "lora" and (self.prompt_init or self.prompt_text):
            raise UsageError("--mode lora has no prompt to start: leave out --prompt-init and --prompt-text.")

    @property
    def begins_with(self) -> str:
        """What the prompt is started from, one of `INITS`."""
        if self.prompt_init is None:
            return "text" if self.prompt_text else "conversations" if self.mode == "prefix" else "vocab"
        return self.prompt_init

    @property
    def size(self) -> str:
        """See `TrainJob.size`."""
        return f"rank {self.rank or LORA_RANK}" if self.mode == "lora" else super().size

    def first_text(self, prepared: Prepared, seed: int) -> str | None:
        """The text that the prompt is started from, if it is a text. Raises `UsageError`."""
        if self.begins_with == "conversations":
            return conversations_text(prepared, self.prompt_tokens, seed)
        if self.prompt_text is None or not _is_file(self.prompt_text):
            return self.prompt_text
        try:
            return read_bounded_text(Path(self.prompt_text))
        except (OSError, ValueError) as error:
            raise UsageError(f"{self.prompt_text} cannot be read as text (UTF-8).") from error

    def notes(self) -> dict[str, Any]:
        """For the bundle."""
        names = ("data", "speaker", "persona", "split", "prompt_text")
        own = {name: getattr(self, name) for name in names}
        return {**super().notes(), **own, "prompt_init": self.begins_with}


@with_fields
def tune(
    *,
    model: Annotated[
        str, typer.Argument(help="Hub name, folder, .gguf file (here or on the hub) or smollm2.")
    ] = "smollm2",
    job: Annotated[dict[str, Any], Fields(TuneJob)],
    max_length: Annotated[int, typer.Option(help="Longest example, in tokens.")] = 256,
    style: Annotated[
        str,
        typer.Option(
            help="Join turns by the chat template, by a delimiter, or auto: by a template if there is one."
        ),
    ] = "auto",
    delimiter: Annotated[
        str | None,
        typer.Option(
            callback=clean_text, help=r"What stands between turns; means --style delimiter. [\n-----\n]"
        ),
    ] = None,
    loss_on: Annotated[str, typer.Option(help="Learn replies or all tokens.")] = "replies",
    settings: Annotated[dict[str, Any], Fields(TuneSettings)],
    resume: Annotated[bool, typer.Option("--resume", help="Go on with an unfinished run.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace what is at --out.")] = False,
    member: Annotated[dict[str, Any], Fields(MemberOptions)],
    client: Annotated[dict[str, Any], Fields(SwarmConfig)],
) -> None:
    """Train a prompt on conversations, through the swarm, and save it as a bundle to chat with."""
    set_up_libraries()
    from corolla.cli.local_swarm import joined
    from corolla.tuning.checkpoints import RunFolder

    joining = MemberOptions(**member)
    options = joining.swarm(client)
    to_do = TuneJob(**job, **joining.source(), model=model, dtype=joining.dtype, client=options)
    rendering = RenderSettings(
        style="delimiter" if style == "auto" and delimiter is not None else style,
        delimiter=_unescaped(RenderSettings.delimiter if delimiter is None else delimiter),
        loss_on=loss_on,
        max_length=max_length,
    )
    how = TuneSettings(**settings, rendering=rendering)
    if to_do.push is not None:
        from corolla.tuning.sharing import check_push

        check_push(to_do.push, to_do.token)
    RunFolder(to_do.out).check(resume=resume, overwrite=overwrite)
    with stopped_by_ctrl_c(to_do.out):
        prepared = prepare_data(to_do, how)
        options = joining.identified(options)
        with joined(options.peers, model, to_do.revision, to_do.cache_dir) as addresses:
            train_and_report(
                replace(to_do, client=options),
                how,
                prepared,
                addresses,
                resume=resume,
                overwrite=overwrite,
                again=resume_command(),
            )
    show_next_step(to_do.out, joining.peers)
    if to_do.push is not None:
        from corolla.tuning.bundle import load_bundle

        bundle = load_bundle(to_do.out)
        say_plainly(f"Shared: {bundle.push_to_hub(to_do.push, token=to_do.token, private=to_do.private)}")


def prepare_data(job: TuneJob, settings: TuneSettings, *, shown: int = 3) -> Prepared:
    """Read and render the conversations; shows the report and `shown` examples."""
    from corolla.models.checkpoints.checkpoint import open_checkpoint
    from corolla.models.checkpoints.pretrained import load_tokenizer
    from corolla.models.limits import check_length, check_tokens
    from corolla.tuning.batches import prepare
    from corolla.tuning.progress import planned_steps

    checkpoint = open_checkpoint(job.model, revision=job.revision, token=job.token, cache_dir=job.cache_dir)
    job.client.check_local(checkpoint.num_blocks)
    tokens = 0 if job.mode == "lora" else job.prompt_tokens
    check_length(checkpoint.config, tokens, settings.rendering.max_length, job.model)
    conversations = job.read(job.token)
    tokenizer = load_tokenizer(checkpoint)
    prepared = prepare(tokenizer, settings, conversations)
    rendered = (index for example in prepared.train + prepared.held_out for index in example.input_ids)
    check_tokens(rendered, tokenizer, checkpoint.config, job.model)
    for note in prepared.notes:
        say_plainly(note)
    people = len({example.conversation for example in prepared.held_out})
    say_plainly(
        f"{len(prepared.train):,} examples to train on; {len(prepared.held_out):,} from {people} other "
        "conversations held out"
    )
    steps = planned_steps(settings, len(prepared.train))
    say_plainly(
        f"{steps:,} steps of {settings.batch_size * settings.accumulate} examples; a first evaluation tells how "
        "long they will take"
    )
    say_plainly(f"Turns are joined by {prepared.renderer.about_style}")
    console.print(preview(prepared.train, tokenizer, shown))
    return prepared


def preview(examples: Sequence[Example], tokenizer: Any, count: int = 3) -> RenderableType:
    """The first `count` examples: ⟦…⟧, and colour where there is some, mark exactly the tokens that carry loss."""
    return Group(*(_panel(example, tokenizer, number) for number, example in enumerate(examples[:count], 1)))


def _panel(example: Example, tokenizer: Any, number: int) -> RenderableType:
    from corolla.tuning.batches import stretches

    text = Text()
    for piece, learnt in stretches(example, tokenizer):
        piece = printable(piece.replace("\x1b", "␛"))
        text.append(f"⟦{piece}⟧" if learnt else piece, style="bold green" if learnt else "dim")
    learnt_count = sum(label != NO_LOSS for label in example.labels)
    title = f"example {number}: {len(example.input_ids)} tokens, ⟦{learnt_count} carry loss⟧"
    return Panel(text, title=title, title_align="left", border_style="dim")


def train_and_report(
    job: TuneJob,
    settings: TuneSettings,
    prepared: Prepared,
    peers: Sequence[str],
    *,
    resume: bool = False,
    overwrite: bool = False,
    again: str | None = None,
) -> TuneResult:
    """Train through the swarm at `peers`; as `trained`."""
    from corolla.tuning.tune import tune as run

    return trained(
        job,
        partial(run, settings=settings, prepared=prepared),
        peers,
        resume=resume,
        overwrite=overwrite,
        again=again,
        tuning_mode=job.mode,
        lora_rank=job.rank,
        prompt_init="text" if job.begins_with == "conversations" else job.begins_with,
        prompt_text=job.first_text(prepared, settings.seed),
        seed=settings.seed,
    )


def conversations_text(prepared: Prepared, tokens: int, seed: int) -> str:
    """Rendered examples of the training split, chosen by the seed, of so many tokens or as many as there are."""
    ids: list[int] = []
    for example in random.Random(seed).sample(prepared.train, len(prepared.train)):
        ids += example.input_ids
        if len(ids) >= tokens:
            break
    return str(prepared.renderer.tokenizer.decode(ids))


def _is_file(text: str) -> bool:
    try:
        return Path(text).is_file()
    except (OSError, ValueError):  # too long for a name, or no name at all
        return False


def _unescaped(text: str) -> str:
    """Line breaks are hard to type on a command line."""
    return text.replace("\\n", "\n").replace("\\t", "\t")
