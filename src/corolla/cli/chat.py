"""`corolla chat`: talk with a model, or with a bundle's tuned one, through the swarm.

Invariant: a bundle is talked with as it was trained, unless a flag says otherwise; what is wrong with the
arguments is said before a server is started or asked.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from corolla.cli.common import (
    AuditOption,
    ClientOptions,
    LocalBlocksOption,
    MixedOption,
    PatienceOption,
    PeersOption,
    WireOption,
    clean_text,
    quiet_libraries,
    typed,
)
from corolla.cli.kept import KeptSwarm, is_local, where
from corolla.cli.members import (
    InviteOption,
    MemberOption,
    TrustOption,
    client_identity,
    trusted_servers,
)
from corolla.cli.terminal import console
from corolla.errors import UsageError

if TYPE_CHECKING:
    from corolla.chat.repl import Repl
    from corolla.chat.sampling import SamplingSettings
    from corolla.chat.transcript import ChatInfo, SavedChat, Transcript
    from corolla.data.render import Renderer, RenderSettings

STYLES = ("auto", "delimiter", "template")


@dataclass(frozen=True)
class Partner:
    """Whom to talk with: a model, and a prompt with how it was trained."""

    model: str
    revision: str | None = None
    prompts: Path | None = None
    rendering: RenderSettings | None = None  # None: the tokenizer's chat template if it has one
    sampling: Mapping[str, Any] = field(default_factory=dict)
    about: str = ""
    swarm: Mapping[str, Any] = field(default_factory=dict)  # where a bundle was trained


def chat(
    partner: Annotated[
        str | None,
        typer.Argument(
            metavar="BUNDLE|MODEL",
            help="Folder of a bundle, or a model as for corolla serve (default: smollm2).",
        ),
    ] = None,
    peers: PeersOption = None,
    temperature: Annotated[float | None, typer.Option(help="0: the likeliest token (default: 0.6).")] = None,
    top_k: Annotated[
        int | None, typer.Option(help="Choose among so many tokens; 0: all (default: 100).")
    ] = None,
    top_p: Annotated[float | None, typer.Option(help="Among this share of likelihood (default: 1).")] = None,
    repetition_penalty: Annotated[
        float | None, typer.Option(help="Above 1: fewer repetitions (default: 1).")
    ] = None,
    max_new_tokens: Annotated[
        int | None, typer.Option(help="Longest reply, in tokens (default: 128).")
    ] = None,
    max_length: Annotated[
        int | None,
        typer.Option(help="Tokens of conversation that are kept (default: what the model can read)."),
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Makes replies repeatable.")] = None,
    allow_empty: Annotated[
        bool | None,
        typer.Option("--allow-empty/--no-allow-empty", help="Whether a reply may be empty (default: no)."),
    ] = None,
    style: Annotated[
        str | None, typer.Option(help="auto, delimiter, or template: the tokenizer's own chat format.")
    ] = None,
    system: Annotated[
        str | None, typer.Option(callback=clean_text, help="A text that stands before the conversation.")
    ] = None,
    revision: Annotated[str | None, typer.Option(help="Revision of a hub model.")] = None,
    token: Annotated[str | None, typer.Option(envvar="HF_TOKEN", help="Token for the hub.")] = None,
    quantization: Annotated[
        str, typer.Option(help="Of the embedding and the head, here: none, bfloat16 or int8.")
    ] = "none",
    wire: WireOption = "compute",
    mixed: MixedOption = False,
    audit: AuditOption = 0.0,
    patience: PatienceOption = 600.0,
    local_blocks: LocalBlocksOption = 0,
    identity: MemberOption = None,
    invite: InviteOption = None,
    trust: TrustOption = None,
    dtype: Annotated[str, typer.Option(help="Of the client's part: auto, float32, bfloat16 …")] = "auto",
    cache_dir: Annotated[Path | None, typer.Option(help="Folder for downloaded and converted files.")] = None,
    go_on: Annotated[
        bool, typer.Option("--continue", help="Go on with the latest chat, or that in --transcript.")
    ] = False,
    transcript: Annotated[
        Path | None, typer.Option(help="File that keeps the chat (default: in the user's data directory).")
    ] = None,
    save: Annotated[bool, typer.Option("--save/--no-save", help="Keep the chat on disk as it goes.")] = True,
    context: typer.Context = None,  # type: ignore[assignment]  # where it is called as a function
) -> None:
    """Chat through the swarm. Without --peers, two servers run on this machine meanwhile."""
    quiet_libraries()
    from corolla.chat.repl import notice
    from corolla.chat.sampling import SamplingSettings

    if style is not None and style not in STYLES:
        raise UsageError(f"--style is {style!r}; it must be auto, delimiter or template.")
    client = ClientOptions(
        wire,
        mixed,
        quantization,
        trust=trusted_servers(trust),
        audit=audit,
        patience=patience,
        local_blocks=local_blocks,
    )
    saved = saved_chat(transcript, fixed=(style, system), save=save) if go_on else None
    whom = find_partner(partner or (saved.info.partner if saved else "smollm2"), revision)
    flags = {
        "temperature": temperature,
        "top_k": top_k,
        "top_p": top_p,
        "repetition_penalty": repetition_penalty,
        "max_new_tokens": max_new_tokens,
        "seed": seed,
        "allow_empty": allow_empty,
    }
    given: dict[str, Any] = {name: value for name, value in flags.items() if value is not None}
    sampling = replace(SamplingSettings.from_dict(whom.sampling), **given)
    if saved is not None:
        sampling = replace(SamplingSettings.from_dict(saved.info.sampling), **given)
        whom = as_saved(whom, saved)
        system = saved.info.system
    prepared = prepare(
        whom, sampling, style=style, max_length=max_length, token=token, dtype=dtype, cache_dir=cache_dir
    )
    if saved is not None:
        saved.check_same(prepared.info(system))
        prepared = replace(prepared, max_context=max_length or saved.info.max_context)
    client = replace(client, identity=client_identity(identity, invite))
    addresses, client = where(peers, client, whom, saved, partial(typed, context))
    with contextlib.ExitStack() as chat:
        swarm = KeptSwarm.of(None if is_local(addresses) else addresses, client)
        journal = chat.enter_context(kept(prepared, system, transcript, saved, swarm)) if save else None
        addresses = chat.enter_context(joined(addresses, whom, cache_dir))
        repl = chat.enter_context(
            opened(prepared, addresses, client, system=system, journal=journal, saved=saved)
        )
        notice(console, f"Talking with {whom.about}. /help lists the commands.")
        if prepared.template_unusable:
            notice(console, f"Turns are joined by {prepared.renderer.about_style}.")
        if journal is not None and console.is_terminal:
            notice(console, f"The chat is kept in {journal.path}; --continue goes on with it.")
        repl.run()


def saved_chat(path: Path | None, *, fixed: tuple[str | None, ...], save: bool) -> SavedChat:
    """The chat to go on with. Raises `TranscriptError`, or `UsageError` for what belongs to its beginning."""
    from corolla.chat.repl import notice
    from corolla.chat.transcript import latest_chat, read_chat

    if fixed != (None, None) or not save:
        raise UsageError("--style, --system and --no-save belong to a chat's beginning, not to --continue.")
    saved = read_chat(path or latest_chat())
    count = len(saved.exchanges)
    notice(console, f"Going on with {saved.path}: {count} exchange{'' if count == 1 else 's'}.")
    if saved.cut_off:
        notice(console, "Its last line was cut off and is left out.")
    return saved


def as_saved(partner: Partner, saved: SavedChat) -> Partner:
    """`partner`, talked with as it was."""
    from corolla.data.render import RenderSettings

    return replace(
        partner,
        rendering=RenderSettings.from_dict(saved.info.rendering),
        revision=partner.revision or saved.info.revision,
    )


def kept(
    prepared: Prepared, system: str | None, path: Path | None, saved: SavedChat | None, swarm: KeptSwarm
) -> Transcript:
    """The transcript that the chat is written to. Raises `TranscriptError`."""
    from corolla.chat.transcript import Transcript

    if saved is not None:
        return Transcript.go_on(saved)
    return Transcript.begin(replace(prepared.info(system), swarm=swarm.to_dict()), path)


def find_partner(name: str, revision: str | None = None) -> Partner:
    """A bundle's folder, a folder with a saved prompt only, or a model's name. Raises `BundleError`."""
    from corolla.models.checkpoints.prompt_files import PROMPT_FILE, read_prompt_info
    from corolla.tuning.bundle import BUNDLE_FILE, load_bundle

    folder = Path(name)
    if (folder / BUNDLE_FILE).is_file():
        bundle = load_bundle(folder)
        return Partner(
            bundle.model.name,
            revision or bundle.model.revision,
            folder,
            bundle.rendering,
            bundle.sampling,
            f"{bundle.model.name}, tuned ({bundle.mode}, {bundle.prompt_tokens} prompt tokens)",
            bundle.training.get("swarm") or {},
        )
    if (folder / PROMPT_FILE).is_file():
        about = read_prompt_info(folder)
        words = f"{about['model']}, tuned ({about['mode']}, {about['prompt_tokens']} prompt tokens)"
        return Partner(about["model"], revision, folder, about=words)
    return Partner(name, revision, about=name)


@dataclass(frozen=True)
class Prepared:
    """All of a chat but the swarm."""

    partner: Partner
    renderer: Renderer
    sampling: SamplingSettings
    max_context: int
    identity: str  # the checkpoint's
    token: str | None = field(default=None, repr=False)
    dtype: str = "auto"
    cache_dir: Path | None = None

    @property
    def template_unusable(self) -> bool:
        """Whether a delimiter had to be chosen though the tokenizer has a template."""
        renderer = self.renderer
        chosen = renderer.requested_style == "auto" and renderer.settings.style == "delimiter"
        return chosen and bool(renderer.tokenizer.chat_template)

    def info(self, system: str | None) -> ChatInfo:
        """For the transcript."""
        from corolla.chat.transcript import ChatInfo, prompt_digest

        partner, rendering = self.partner, self.renderer.settings
        place = partner.prompts
        named = Path(partner.model) if place is None else place
        return ChatInfo(
            partner=str(named.resolve()) if named.exists() else partner.model,
            model=self.identity,
            prompt=None if place is None else prompt_digest(place),
            rendering=rendering.to_dict(),
            sampling={name: value for name, value in asdict(self.sampling).items() if value is not None},
            system=system,
            max_context=self.max_context,
            revision=partner.revision,
        )


def prepare(
    partner: Partner,
    sampling: SamplingSettings,
    *,
    style: str | None = None,
    max_length: int | None = None,
    token: str | None = None,
    dtype: str = "auto",
    cache_dir: Path | None = None,
) -> Prepared:
    """Read what there is to read without the swarm. Raises `UsageError` for what does not go together."""
    from corolla.chat.engine import check_context
    from corolla.chat.window import Window
    from corolla.data.render import Renderer, RenderSettings
    from corolla.models.checkpoints.checkpoint import open_checkpoint
    from corolla.models.checkpoints.pretrained import load_tokenizer
    from corolla.models.checkpoints.prompt_files import load_prompt
    from corolla.models.limits import check_tokens, context_limit

    checkpoint = open_checkpoint(partner.model, revision=partner.revision, token=token, cache_dir=cache_dir)
    prompt_tokens = 0
    if partner.prompts is not None:
        prompt = load_prompt(partner.prompts, model_name=checkpoint.name, identity=checkpoint.identity)
        prompt_tokens = prompt.length
    limit = context_limit(checkpoint.config, prompt_tokens)
    if max_length is not None and not 1 < max_length <= limit:
        raise UsageError(f"--max-length is {max_length}; {partner.model} can keep 2 to {limit} tokens.")
    check_context(sampling, max_length or limit)
    tokenizer = load_tokenizer(checkpoint)
    rendering = partner.rendering or RenderSettings(style="auto")
    if style is not None:
        rendering = replace(rendering, style=style)
    renderer = Renderer(tokenizer, rendering)
    check_tokens(Window(renderer, None).prompted("Hello"), tokenizer, checkpoint.config, checkpoint.name)
    return Prepared(
        partner,
        renderer,
        sampling,
        max_length or limit,
        checkpoint.identity,
        token,
        dtype,
        cache_dir,
    )


@contextlib.contextmanager
def joined(
    peers: Sequence[str] | None, partner: Partner, cache_dir: Path | None = None
) -> Iterator[Sequence[str]]:
    """The addresses to join through; without any, a swarm on this machine for as long as the block lasts."""
    if peers is not None and not is_local(peers):
        yield peers
        return
    from corolla.cli.local_swarm import local_swarm

    options = [] if partner.revision is None else ["--revision", partner.revision]
    with contextlib.ExitStack() as swarm:
        with console.status("starting two servers here (the first time takes some minutes) …"):
            addresses = swarm.enter_context(
                local_swarm(partner.model, options=options, cache_dir=cache_dir)
            ).peers
        yield addresses


@contextlib.contextmanager
def opened(
    prepared: Prepared,
    peers: Sequence[str],
    client: ClientOptions | None = None,
    *,
    system: str | None = None,
    journal: Transcript | None = None,
    saved: SavedChat | None = None,
) -> Iterator[Repl]:
    """A chat over the swarm at `peers`."""
    from corolla.chat.engine import ChatEngine
    from corolla.chat.repl import Repl, notice
    from corolla.client.model.causal_lm import AutoDistributedModelForCausalLM

    partner = prepared.partner
    with AutoDistributedModelForCausalLM.from_pretrained(
        partner.model,
        initial_peers=list(peers),
        prompts=partner.prompts,
        revision=partner.revision,
        token=prepared.token,
        dtype=prepared.dtype,
        cache_dir=prepared.cache_dir,
        **asdict(client or ClientOptions()),
    ) as model:
        engine = ChatEngine(
            model,
            prepared.renderer,
            sampling=prepared.sampling,
            max_context=prepared.max_context,
            system=system,
            notify=lambda text: notice(console, text),
            journal=journal,
        )
        with engine:
            if saved is not None:
                engine.restore(saved.exchanges, saved.kept)
            if console.is_terminal:
                notice(console, pace(model, client or ClientOptions(), prepared.sampling.max_new_tokens))
            yield Repl(engine, console)


def pace(model: Any, client: ClientOptions, tokens: int) -> str:
    """How fast replies will come, from what the servers say that they can do."""
    from corolla.tuning.plan import in_words

    connection = model.blocks.connection
    view = connection.view
    seconds = connection.run(view.token_seconds(client.local_blocks, view.num_blocks))
    return (
        f"About {1 / seconds:.3g} tokens a second: a reply of {tokens} (--max-new-tokens) takes "
        f"{in_words(tokens * seconds)}."
    )
