"""`corolla study`: teach a prefix what some documents say, through the swarm, and save it as a bundle.

Invariant: what is wrong with the arguments or the documents is said before a server is started or asked.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from corolla.cli.common import set_up_libraries
from corolla.cli.fields import Fields, with_fields
from corolla.cli.members import MemberOptions
from corolla.cli.terminal import console, say_plainly
from corolla.cli.training import (
    DataOptions,
    TrainJob,
    is_refusal,
    resume_command,
    show_next_step,
    stopped_by_ctrl_c,
    trained,
)
from corolla.config import SwarmConfig
from corolla.data.documents import read_documents
from corolla.data.render import RenderSettings
from corolla.errors import CorollaError, UsageError
from corolla.tuning.settings import StudySettings

if TYPE_CHECKING:
    from corolla.data.conversation import Conversation


MAY_NOT_PAY = (
    "This takes long, and may not pay: what is learnt is what the model would say with the text before it, so it has "
    "to answer well with it. One of 135 million parameters recalled no more facts after a study (docs/study.md): take "
    "the largest that you can, and give questions of your own as --facts, which tell what came of it."
)


@dataclass(frozen=True)
class StudyJob(TrainJob):
    """What to study; the settings say how. Raises `UsageError`."""

    out: Annotated[Path, "Where the bundle goes; the questions go beside it, as OUT.questions.jsonl."] = Path(
        "my-notes"
    )
    model: Annotated[str, "Hub name, folder, .gguf file (here or on the hub) or smollm2."] = "smollm2"
    prompt_tokens: Annotated[int, "Tokens of the prefix."] = 128
    facts: Annotated[
        Path | None, "Questions and answers, as for corolla tune --data, to measure what is recalled."
    ] = None

    def __post_init__(self) -> None:
        if self.prompt_tokens < 2:
            raise UsageError(f"--prompt-tokens is {self.prompt_tokens}; a prefix needs at least 2 tokens.")

    def notes(self) -> dict[str, Any]:
        """For the bundle."""
        return {**super().notes(), "prompt_init": "text"}

    def asked(self) -> Sequence[Conversation]:
        """The facts, as they were given. Raises `DataError`."""
        return () if self.facts is None else DataOptions(str(self.facts)).read(self.token)


@with_fields
def study(
    *,
    documents: Annotated[list[Path], typer.Argument(help="Text files, .txt or .md.")],
    job: Annotated[dict[str, Any], Fields(StudyJob)],
    max_length: Annotated[int, typer.Option(help="Longest question with its answer, in tokens.")] = 256,
    settings: Annotated[dict[str, Any], Fields(StudySettings)],
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with the questions there are, and an unfinished run.")
    ] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace what is at --out.")] = False,
    member: Annotated[dict[str, Any], Fields(MemberOptions)],
    client: Annotated[dict[str, Any], Fields(SwarmConfig)],
) -> None:
    """Teach a prefix what documents say, through the swarm: the model asks itself, then answers without them."""
    joining = MemberOptions(**member)
    options = joining.swarm(client)
    to_do = StudyJob(**job, **joining.source(), dtype=joining.dtype, client=options)
    how = StudySettings(**settings, rendering=RenderSettings(style="auto", max_length=max_length))
    texts = read_documents(documents)
    set_up_libraries()
    from corolla.cli.local_swarm import joined
    from corolla.data.render import Renderer
    from corolla.models.checkpoints.checkpoint import open_checkpoint
    from corolla.models.checkpoints.pretrained import load_tokenizer
    from corolla.models.limits import check_length
    from corolla.tuning.bundle import load_bundle
    from corolla.tuning.report import recall_verdict
    from corolla.tuning.study import check_way, checked_chunks
    from corolla.tuning.study import study as run

    check_way(to_do.out, resume=resume, overwrite=overwrite, questions=how.questions)
    facts = to_do.asked()
    checkpoint = open_checkpoint(to_do.model, **joining.source())
    options.check_local(checkpoint.num_blocks)
    check_length(checkpoint.config, to_do.prompt_tokens, max_length, to_do.model)
    renderer = Renderer(load_tokenizer(checkpoint), how.rendering)
    checked_chunks(checkpoint.config, renderer, texts, how, facts)
    say_plainly(MAY_NOT_PAY)
    with stopped_by_ctrl_c(to_do.out), _questions_kept(to_do.out):
        options = joining.identified(options)
        with joined(options.peers, to_do.model, to_do.revision, to_do.cache_dir) as addresses:
            trained(
                replace(to_do, client=options),
                partial(run, tokenizer=renderer.tokenizer, documents=texts, settings=how, facts=facts),
                addresses,
                resume=resume,
                overwrite=overwrite,
                again=resume_command(),
                tuning_mode="prefix",
                prompt_init="text",
                prompt_text="\n\n".join(one.text for one in texts),
                seed=how.seed,
            )
    metrics = load_bundle(to_do.out).metrics
    console.print(_recall_table(metrics))
    verdict = recall_verdict(metrics)
    if verdict is not None:
        say_plainly(verdict)
    show_next_step(to_do.out, joining.peers)


@contextlib.contextmanager
def _questions_kept(out: Path) -> Iterator[None]:
    """Says so, where Ctrl-C or an error has ended the asking."""
    from corolla.tuning.checkpoints import RunFolder
    from corolla.tuning.notebook import Notebook

    try:
        yield
    except (KeyboardInterrupt, CorollaError) as error:
        notebook = Notebook(out)
        asking = notebook.exchanges_kept() and RunFolder(out).latest() is None
        if asking and not is_refusal(error):
            say_plainly(
                f"{notebook.exchanges_kept():,} questions with their answers are kept in {notebook.path}; go on with\n"
                f"  {resume_command()}"
            )
            if isinstance(error, KeyboardInterrupt):
                raise typer.Exit(130) from None
        raise


def _recall_table(metrics: dict[str, Any]) -> Table:
    from corolla.tuning.report import recall

    table = Table(
        title=f"What is recalled: {metrics['recall']['of']}", title_justify="left", title_style="bold"
    )
    for name in ("", "loss of answers", "facts recalled"):
        table.add_column(name, justify="left" if not name else "right")
    for row in recall(metrics):
        table.add_row(row["way"], row["loss"], row["recalled"])
    return table
