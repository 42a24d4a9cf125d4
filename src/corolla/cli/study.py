"""`corolla study`: teach a prefix what some documents say, through the swarm, and save it as a bundle.

Invariant: what is wrong with the arguments or the documents is said before a server is started or asked.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from corolla.cli.common import DtypeOption, PeersOption, RevisionOption, TokenOption, set_up_libraries
from corolla.cli.fields import Fields, with_fields
from corolla.cli.members import InviteOption, MemberOption, TrustOption, client_identity, trusted_servers
from corolla.cli.saved_swarm import to_saved
from corolla.cli.terminal import console, say_plainly
from corolla.cli.tune import result_table, resume_command, show_next_step, stopped_by_ctrl_c
from corolla.config import SwarmConfig
from corolla.data.documents import Document, read_documents
from corolla.data.render import RenderSettings
from corolla.errors import CorollaError, UsageError
from corolla.tuning.settings import StudySettings

if TYPE_CHECKING:
    from corolla.data.conversation import Conversation


@dataclass(frozen=True)
class StudyJob:
    """What to study; the settings say how. Raises `UsageError`."""

    out: Annotated[Path, "Where the bundle goes; the questions go beside it, as OUT.questions.jsonl."] = Path(
        "my-notes"
    )
    model: Annotated[str, "Hub name, folder, .gguf file or smollm2."] = "smollm2"
    prompt_tokens: Annotated[int, "Tokens of the prefix."] = 128
    facts: Annotated[
        Path | None, "Questions and answers, as for corolla tune --data, to measure what is recalled."
    ] = None
    revision: str | None = None
    token: str | None = field(default=None, repr=False)
    dtype: str = "auto"
    client: SwarmConfig = field(default_factory=SwarmConfig)

    def __post_init__(self) -> None:
        if self.prompt_tokens < 2:
            raise UsageError(f"--prompt-tokens is {self.prompt_tokens}; a prefix needs at least 2 tokens.")

    def notes(self) -> dict[str, Any]:
        """For the bundle."""
        swarm = to_saved(SwarmConfig(peers=self.client.peers, trust=self.client.trust))
        return {"prompt_init": "text", "dtype": self.dtype, "swarm": swarm}


@with_fields
def study(
    *,
    documents: Annotated[list[Path], typer.Argument(help="Text files, .txt or .md.")],
    peers: PeersOption = None,
    job: Annotated[dict[str, Any], Fields(StudyJob)],
    max_length: Annotated[int, typer.Option(help="Longest question with its answer, in tokens.")] = 256,
    settings: Annotated[dict[str, Any], Fields(StudySettings)],
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with the questions there are, and an unfinished run.")
    ] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace what is at --out.")] = False,
    revision: RevisionOption = None,
    token: TokenOption = None,
    dtype: DtypeOption = "auto",
    client: Annotated[dict[str, Any], Fields(SwarmConfig)],
    identity: MemberOption = None,
    invite: InviteOption = None,
    trust: TrustOption = None,
) -> None:
    """Teach a prefix what documents say, through the swarm: the model asks itself, then answers without them."""
    options = SwarmConfig(**client, trust=trusted_servers(trust), peers=tuple(peers or ()))
    to_do = StudyJob(**job, revision=revision, token=token, dtype=dtype, client=options)
    how = StudySettings(**settings, rendering=RenderSettings(style="auto", max_length=max_length))
    texts = read_documents(documents)
    set_up_libraries()
    from corolla.cli.local_swarm import joined
    from corolla.data.render import Renderer
    from corolla.models.checkpoints.checkpoint import open_checkpoint
    from corolla.models.checkpoints.pretrained import load_tokenizer
    from corolla.models.limits import check_length
    from corolla.tuning.study import check_way, checked_chunks

    check_way(to_do.out, resume=resume, overwrite=overwrite, questions=how.questions)
    facts = _facts(to_do)
    checkpoint = open_checkpoint(to_do.model, revision=revision, token=token)
    options.check_local(checkpoint.num_blocks)
    check_length(checkpoint.config, to_do.prompt_tokens, max_length, to_do.model)
    renderer = Renderer(load_tokenizer(checkpoint), how.rendering)
    checked_chunks(checkpoint.config, renderer, texts, how, facts)
    with stopped_by_ctrl_c(to_do.out), _questions_kept(to_do.out):
        options = replace(options, identity=client_identity(identity, invite))
        with joined(options.peers, to_do.model, revision) as addresses:
            _study(
                replace(to_do, client=replace(options, peers=tuple(addresses))),
                how,
                texts,
                facts,
                resume=resume,
                overwrite=overwrite,
            )
    show_next_step(to_do.out, peers)


@contextlib.contextmanager
def _questions_kept(out: Path) -> Iterator[None]:
    """Says so, where Ctrl-C or an error has ended the asking."""
    from corolla.tuning.checkpoints import RunFolder
    from corolla.tuning.notebook import Notebook

    try:
        yield
    except (KeyboardInterrupt, CorollaError) as error:
        notebook = Notebook(out)
        if notebook.exchanges_kept() and RunFolder(out).latest() is None:
            say_plainly(
                f"{notebook.exchanges_kept():,} questions with their answers are kept in {notebook.path}; go on with\n"
                f"  {resume_command()}"
            )
            if isinstance(error, KeyboardInterrupt):
                raise typer.Exit(130) from None
        raise


def _facts(job: StudyJob) -> Sequence[Conversation]:
    if job.facts is None:
        return ()
    from corolla.data.sources import load_conversations

    talks, report = load_conversations(str(job.facts))
    for line in report.lines():
        say_plainly(line)
    return talks


def _study(
    job: StudyJob,
    settings: StudySettings,
    documents: Sequence[Document],
    facts: Sequence[Conversation],
    *,
    resume: bool,
    overwrite: bool,
) -> None:
    from corolla.client.model.causal_lm import AutoDistributedModelForCausalLM
    from corolla.client.model.loading import load_tokenizer
    from corolla.tuning.bundle import ModelInfo, load_bundle
    from corolla.tuning.study import study as run
    from corolla.tuning.tune import TuneStopped

    with AutoDistributedModelForCausalLM.from_pretrained(
        job.model,
        tuning_mode="prefix",
        pre_seq_len=job.prompt_tokens,
        prompt_init="text",
        prompt_text="\n\n".join(one.text for one in documents),
        dtype=job.dtype,
        revision=job.revision,
        token=job.token,
        seed=settings.seed,
        **job.client.arguments(),
    ) as model:
        result = run(
            model,
            load_tokenizer(job.model, revision=job.revision, token=job.token),
            documents,
            job.out,
            settings,
            ModelInfo(job.model, model.blocks.connection.view.model, job.revision),
            facts=facts,
            notes=job.notes(),
            resume=resume,
            overwrite=overwrite,
            console=console,
        )
    if isinstance(result, TuneStopped):
        say_plainly(f"Stopped after step {result.step} of {result.total}. Go on with\n  {resume_command()}")
        raise typer.Exit(130)
    console.print(result_table(result.before, result.after, result.difference, f"{result.steps} steps"))
    console.print(_recall_table(load_bundle(job.out).metrics))


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
