"""`corolla eval`: how a bundle does on held-out conversations, beside the base model, on the terminal and on a page.

Invariant: of the data that a bundle was trained on, only what its training held out is evaluated.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from corolla.cli.chat import chosen_swarm
from corolla.cli.common import set_up_libraries, typed
from corolla.cli.fields import Fields, with_fields
from corolla.cli.members import MemberOptions
from corolla.cli.partner import find_partner
from corolla.cli.terminal import console, say_plainly
from corolla.cli.training import DataOptions, result_table
from corolla.config import SwarmConfig
from corolla.data.rows import USUAL_SPLIT
from corolla.errors import BundleError, UsageError

if TYPE_CHECKING:
    from corolla.tuning.batches import Prepared
    from corolla.tuning.bundle import Bundle
    from corolla.tuning.settings import TuneSettings


@dataclass(frozen=True)
class EvalJob(DataOptions):
    """On what, and how much of it. Raises `UsageError`."""

    examples: Annotated[int, "Examples to evaluate, at most."] = 64
    batch_size: Annotated[int, "Examples a batch."] = 8
    out: Annotated[Path, "Where the page goes."] = Path("report.html")
    overwrite: Annotated[bool, "--overwrite", "Replace what is at --out."] = False

    def __post_init__(self) -> None:
        for name in ("examples", "batch_size"):
            if getattr(self, name) < 1:
                raise UsageError(
                    f"--{name.replace('_', '-')} is {getattr(self, name)}; it must be at least 1."
                )
        if self.out.is_dir():
            raise UsageError(f"{self.out} is a folder: give --out the name of a file for the page.")
        if self.out.exists() and not self.overwrite:
            raise UsageError(f"{self.out} exists already: give another --out, or --overwrite to replace it.")


@with_fields
def evaluate(
    *,
    context: typer.Context,
    bundle: Annotated[str, typer.Argument(help="Folder of a bundle, or its name on the hub.")],
    job: Annotated[dict[str, Any], Fields(EvalJob)],
    member: Annotated[dict[str, Any], Fields(MemberOptions)],
    client: Annotated[dict[str, Any], Fields(SwarmConfig)],
) -> None:
    """Evaluate a bundle on conversations, beside the base model, and write a page about it."""
    set_up_libraries()
    from corolla.cli.local_swarm import joined
    from corolla.client.model.causal_lm import AutoDistributedModelForCausalLM
    from corolla.tuning.bundle import load_bundle
    from corolla.tuning.report import check_place

    to_do, joining = EvalJob(**job), MemberOptions(**member)
    check_place(to_do.out)
    described = load_bundle(bundle, revision=joining.revision, token=joining.token)
    folder = described.folder or Path(bundle)
    to_do, held_out_only = chosen_data(described, to_do)
    prepared = prepare_evaluated(
        described, to_do, joining.token, joining.cache_dir, held_out_only=held_out_only
    )
    options = joining.swarm(client)
    partner = find_partner(str(folder))
    options = joining.identified(options)
    options = chosen_swarm(options, partner, None, partial(typed, context))
    with (
        joined(options.peers, partner.model, partner.revision, joining.cache_dir) as addresses,
        AutoDistributedModelForCausalLM.from_pretrained(
            partner.model,
            prompts=folder,
            dtype=joining.dtype,
            **(joining.source() | {"revision": partner.revision}),
            **replace(options, peers=tuple(addresses)).arguments(),
        ) as model,
    ):
        evaluate_and_report(model, described, prepared, to_do, folder)


def evaluate_and_report(
    model: Any, described: Bundle, prepared: Prepared, job: EvalJob, folder: Path
) -> None:
    """Compare the model with its prompt and without, and say what came of it."""
    from corolla.tuning.evaluate import compare
    from corolla.tuning.evaluate import evaluate as losses
    from corolla.tuning.report import read_history, report_page, write_report
    from corolla.tuning.samples import base_model, sample_replies
    from corolla.tuning.tune import CHOICE, metrics_of

    after = losses(model, prepared.held_out, prepared.batches, job.batch_size)
    with base_model(model):
        before = losses(model, prepared.held_out, prepared.batches, job.batch_size)
    change = compare(before, after)
    samples = sample_replies(model, prepared.renderer, prepared.talks, **CHOICE)
    for line in [] if samples is None else samples.lines():
        say_plainly(line)
    console.print(result_table(before, after, change, f"{len(prepared.held_out)} examples"))
    kept = {name: described.metrics[name] for name in ("step", "fell_back") if name in described.metrics}
    found = replace(described, metrics=metrics_of(before, after, change, samples) | kept)
    on = job.data if job.split is None else f"{job.data} ({job.split})"
    page = report_page(found, read_history(folder), str(folder), evaluated_on=on)
    write_report(job.out, page)
    say_plainly(f"Page: {job.out}")


def chosen_data(bundle: Bundle, job: EvalJob) -> tuple[EvalJob, bool]:
    """What to read, and whether only what the training held out of it may be looked at. Raises `UsageError`."""
    trained: Mapping[str, Any] = bundle.training
    if job.data is not None and not _same_data(job.data, trained.get("data")):
        return job, False
    if not isinstance(trained.get("data"), str):
        raise UsageError("The bundle does not say what it was trained on: give --data.")
    for name in ("speaker", "persona"):
        if getattr(job, name) and getattr(job, name) != trained.get(name):
            raise UsageError(
                f"The bundle was trained without this --{name}, and who was held out depends on it: leave it out, or "
                "give other --data."
            )
    persona = bool(trained.get("persona"))
    same = replace(job, data=job.data or trained["data"], speaker=trained.get("speaker"), persona=persona)
    learnt = trained.get("split") or USUAL_SPLIT
    if job.split is not None and job.split != learnt:
        if _splits(job.split) & _splits(str(learnt)):
            raise UsageError(
                f"The bundle was trained on parts of --split {job.split}: give another, or leave it out."
            )
        return same, False
    return replace(same, split=trained.get("split")), True


def _splits(text: str) -> set[str]:
    """Which splits of hub data a text such as `train[:10%]+test` speaks of."""
    names = {part.partition("[")[0].strip() for part in text.split("+")}
    return names | {USUAL_SPLIT} if "all" in names else names


def _same_data(one: str, other: Any) -> bool:
    """Whether both names mean one source: a file has many, and a bundle from the hub says only the last part."""
    if not isinstance(other, str) or not Path(one).exists():
        return bool(one == other)
    return Path(one).samefile(other) if Path(other).exists() else Path(one).name == Path(other).name


def _settings_of(bundle: Bundle, job: EvalJob) -> TuneSettings:
    """Those that decide who is held out. Raises `BundleError`."""
    from corolla.tuning.settings import TuneSettings

    seed, held_out = bundle.training.get("seed", 0), bundle.training.get("held_out")
    if not isinstance(seed, int) or not isinstance(held_out, int | float | None):
        raise BundleError("The bundle does not say who was held out of its training: give other --data.")
    return TuneSettings(
        seed=seed,
        held_out=held_out,
        held_out_samples=job.examples,
        samples=1,  # training examples are not looked at
        rendering=bundle.rendering,
    )


def prepare_evaluated(
    bundle: Bundle, job: EvalJob, token: str | None, cache_dir: Path | None, *, held_out_only: bool
) -> Prepared:
    """Read and render the conversations; says what was found. Raises `DataError`."""
    from corolla.models.checkpoints.checkpoint import open_checkpoint
    from corolla.models.checkpoints.pretrained import load_tokenizer
    from corolla.models.limits import check_tokens
    from corolla.tuning.batches import prepare, prepare_evaluation

    checkpoint = open_checkpoint(
        bundle.model.name, revision=bundle.model.revision, token=token, cache_dir=cache_dir
    )
    conversations = job.read(token)
    tokenizer = load_tokenizer(checkpoint)
    settings = _settings_of(bundle, job)
    prepared = (prepare if held_out_only else prepare_evaluation)(tokenizer, settings, conversations)
    check_tokens(
        (index for one in prepared.held_out for index in one.input_ids),
        tokenizer,
        checkpoint.config,
        bundle.model.name,
    )
    for note in prepared.notes:
        say_plainly(note)
    people = len({one.conversation for one in prepared.held_out})
    which = " that the training held out" if held_out_only else ""
    say_plainly(f"{len(prepared.held_out):,} examples from {people} conversations{which}")
    return prepared
