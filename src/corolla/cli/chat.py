"""`corolla chat`: talk with a model, or with a bundle's tuned one, through the swarm.

Invariant: a bundle is talked with as it was trained, unless a flag says otherwise; what is wrong with the
arguments is said before a server is started or asked.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from corolla.chat.sampling import SamplingSettings
from corolla.cli.common import set_up_libraries, typed
from corolla.cli.fields import Fields, clean_text, with_fields
from corolla.cli.members import ClientOptions
from corolla.cli.partner import Partner, Prepared, find_partner, prepare
from corolla.cli.saved_swarm import LOCAL, going_on, read_saved, to_saved
from corolla.cli.terminal import console, notice
from corolla.config import SwarmConfig
from corolla.errors import UsageError

if TYPE_CHECKING:
    from corolla.chat.repl import Repl
    from corolla.chat.transcript import SavedChat, Transcript

STYLES = ("auto", "delimiter", "template")


@with_fields
def chat(
    *,
    context: typer.Context,
    partner: Annotated[
        str | None,
        typer.Argument(
            metavar="BUNDLE|MODEL",
            help="Folder of a bundle, or a model as for corolla serve (default: smollm2).",
        ),
    ] = None,
    sampling: Annotated[dict[str, Any], Fields(SamplingSettings, only_given=True)],
    max_length: Annotated[
        int | None,
        typer.Option(help="Tokens of conversation that are kept (default: what the model can read)."),
    ] = None,
    style: Annotated[
        str | None, typer.Option(help="auto, delimiter, or template: the tokenizer's own chat format.")
    ] = None,
    system: Annotated[
        str | None, typer.Option(callback=clean_text, help="A text that stands before the conversation.")
    ] = None,
    member: Annotated[dict[str, Any], Fields(ClientOptions)],
    client: Annotated[dict[str, Any], Fields(SwarmConfig)],
    go_on: Annotated[
        bool, typer.Option("--continue", help="Go on with the latest chat, or that in --transcript.")
    ] = False,
    transcript: Annotated[
        Path | None, typer.Option(help="File that keeps the chat (default: in the user's data directory).")
    ] = None,
    save: Annotated[bool, typer.Option("--save/--no-save", help="Keep the chat on disk as it goes.")] = True,
) -> None:
    """Chat through the swarm. Without --peers, two servers run on this machine meanwhile."""
    set_up_libraries()
    from corolla.chat.transcript import Transcript
    from corolla.cli.local_swarm import joined
    from corolla.data.render import RenderSettings

    if style is not None and style not in STYLES:
        raise UsageError(f"--style is {style!r}; it must be auto, delimiter or template.")
    joining = ClientOptions(**member)
    options = joining.swarm(client)
    saved = saved_chat(transcript, fixed=(style, system), save=save) if go_on else None
    whom = find_partner(partner or (saved.info.partner if saved else "smollm2"), **joining.source())
    chosen = replace(SamplingSettings.from_dict(whom.sampling), **sampling)
    if saved is not None:
        chosen = replace(SamplingSettings.from_dict(saved.info.sampling), **sampling)
        rendering = RenderSettings.from_dict(saved.info.rendering)
        whom = replace(whom, rendering=rendering, revision=whom.revision or saved.info.revision)
        system = saved.info.system
    prepared = prepare(
        whom,
        chosen,
        options,
        style=style,
        max_length=max_length,
        token=joining.token,
        dtype=joining.dtype,
        cache_dir=joining.cache_dir,
    )
    if saved is not None:
        saved.check_same(prepared.info(system))
        prepared = replace(prepared, max_context=max_length or saved.info.max_context)
    options = joining.identified(options)
    options = chosen_swarm(options, whom, saved, partial(typed, context))
    with contextlib.ExitStack() as stack:
        journal = None
        if saved is not None:
            journal = stack.enter_context(Transcript.go_on(saved))
        elif save:
            info = replace(prepared.info(system), swarm=to_saved(options))
            journal = stack.enter_context(Transcript.begin(info, transcript))
        addresses = stack.enter_context(joined(options.peers, whom.model, whom.revision, joining.cache_dir))
        options = replace(options, peers=tuple(addresses))
        repl = stack.enter_context(opened(prepared, options, system=system, journal=journal, saved=saved))
        notice(f"Talking with {whom.about}. /help lists the commands.")
        if prepared.template_unusable:
            notice(f"Turns are joined by {prepared.renderer.about_style}.")
        if journal is not None and console.is_terminal:
            notice(f"The chat is kept in {journal.path}; --continue goes on with it.")
        repl.run()


def saved_chat(path: Path | None, *, fixed: tuple[str | None, ...], save: bool) -> SavedChat:
    """The chat to go on with. Raises `TranscriptError`, or `UsageError` for what belongs to its beginning."""
    from corolla.chat.transcript import latest_chat, read_chat

    if fixed != (None, None) or not save:
        raise UsageError("--style, --system and --no-save belong to a chat's beginning, not to --continue.")
    saved = read_chat(path or latest_chat())
    count = len(saved.exchanges)
    notice(f"Going on with {saved.path}: {count} exchange{'' if count == 1 else 's'}.")
    if saved.cut_off:
        notice("Its last line was cut off and is left out.")
    return saved


def chosen_swarm(
    given: SwarmConfig, partner: Partner, saved: SavedChat | None, typed: Callable[[str], bool]
) -> SwarmConfig:
    """The swarm to talk through: the one given, else that of the chat or of the bundle. Raises `UsageError`."""
    if saved is not None and saved.info.swarm:
        return going_on(read_saved(saved.info.swarm, saved.path), given, typed)
    if given.peers or not partner.swarm or partner.prompts is None:
        return given
    found = read_saved(partner.swarm, partner.prompts)
    if found.peers:
        notice(f"Joining the swarm that the bundle was trained in: {found.peers[0]}")
        notice(f"(--peers {LOCAL} would run the model on this machine)")
    return replace(given, peers=found.peers, trust=found.trust if given.trust is None else given.trust)


@contextlib.contextmanager
def opened(
    prepared: Prepared,
    options: SwarmConfig,
    *,
    system: str | None = None,
    journal: Transcript | None = None,
    saved: SavedChat | None = None,
) -> Iterator[Repl]:
    """A chat over the swarm at `options.peers`."""
    from corolla.chat.engine import ChatEngine
    from corolla.chat.repl import Repl
    from corolla.client.model.causal_lm import AutoDistributedModelForCausalLM

    partner = prepared.partner
    with AutoDistributedModelForCausalLM.from_pretrained(
        partner.model,
        prompts=partner.prompts,
        revision=partner.revision,
        token=prepared.token,
        dtype=prepared.dtype,
        cache_dir=prepared.cache_dir,
        **options.arguments(),
    ) as model:
        engine = ChatEngine(
            model,
            prepared.renderer,
            sampling=prepared.sampling,
            max_context=prepared.max_context,
            system=system,
            notify=notice,
            journal=journal,
        )
        with engine:
            if saved is not None:
                engine.restore(saved.exchanges, saved.kept)
            if console.is_terminal:
                notice(pace(model, options.local_blocks, prepared.sampling.max_new_tokens))
            yield Repl(engine, console)


def pace(model: Any, local_blocks: int, tokens: int) -> str:
    """How fast replies will come, from what the servers say that they can do."""
    from corolla.tuning.progress import in_words

    connection = model.blocks.connection
    view = connection.view
    seconds = connection.run(view.token_seconds(local_blocks, view.num_blocks))
    return (
        f"About {1 / seconds:.3g} tokens a second: a reply of {tokens} (--max-new-tokens) takes "
        f"{in_words(tokens * seconds)}."
    )
