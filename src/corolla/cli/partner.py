"""Whom a chat is with: a model, or a bundle's tuned one, with all that can be read and checked without the swarm."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from corolla.config import SwarmConfig
from corolla.errors import BundleError, UsageError

if TYPE_CHECKING:
    from corolla.chat.sampling import SamplingSettings
    from corolla.chat.transcript import ChatInfo
    from corolla.data.render import Renderer, RenderSettings


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


def find_partner(
    name: str, revision: str | None = None, *, token: str | None = None, cache_dir: Path | None = None
) -> Partner:
    """A bundle's folder or its name on the hub, a folder with a saved prompt only, or a model's name.

    Raises `BundleError`.
    """
    from corolla.models.checkpoints.prompt_files import PROMPT_FILE, is_pefts, read_prompt_info
    from corolla.tuning.bundle import BUNDLE_FILE, load_bundle
    from corolla.tuning.sharing import fetch_bundle

    folder = Path(name)
    if not folder.exists():
        folder = fetch_bundle(name, revision=revision, token=token, cache_dir=cache_dir) or folder
    if (folder / BUNDLE_FILE).is_file() or is_pefts(folder):
        bundle = load_bundle(folder)
        if not bundle.model.name:
            raise BundleError(
                f"{folder} does not say for which model it is; write base_model_name_or_path into it."
            )
        return Partner(
            bundle.model.name,
            (revision if name == str(folder) else None) or bundle.model.revision,
            folder,
            bundle.rendering,
            bundle.sampling,
            f"{bundle.model.name}, tuned ({bundle.what})",
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
    client: SwarmConfig,
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
    client.check_local(checkpoint.num_blocks)
    prompt_tokens = 0
    if partner.prompts is not None:
        prompt = load_prompt(
            partner.prompts,
            model_name=checkpoint.name,
            identity=checkpoint.identity,
            config=checkpoint.config,
        )
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
