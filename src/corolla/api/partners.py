"""Whom a request can be for: the base model, and every bundle in a folder, over one connection and one head.

Invariant: a partner is made when it is first asked for, shares all of the base model but its prompt, and is forgotten
when its folder is gone or has changed. What a folder holds that is no bundle for this model is not offered.
"""

from __future__ import annotations

import copy
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from corolla.api.failures import ApiFailure
from corolla.api.grammar import Vocabulary
from corolla.api.prompting import Prompting
from corolla.chat.sampling import SamplingSettings
from corolla.client.model import saving
from corolla.data.render import Renderer, RenderSettings
from corolla.data.replies import reply_ends
from corolla.errors import CorollaError, UsageError
from corolla.models.checkpoints.prompt_files import PEFT_CONFIG, is_pefts
from corolla.models.limits import context_limit
from corolla.text import get_logger, one_line
from corolla.tuning.bundle import BUNDLE_FILE, Bundle, load_bundle

log = get_logger(__name__)


@dataclass(frozen=True)
class Partner:
    """A model that can be asked for by its `name`."""

    name: str
    model: Any
    prompting: Prompting
    vocabulary: Vocabulary
    max_context: int  # tokens of a request and its reply
    made: int  # seconds since 1970
    sampling: Mapping[str, Any] = field(default_factory=dict)  # where a request says nothing
    bundle: Bundle | None = None

    @property
    def tokenizer(self) -> Any:
        """Of the model."""
        return self.prompting.renderer.tokenizer

    @cached_property
    def chat_ends(self) -> frozenset[int]:
        """Tokens that end a reply in a chat."""
        return reply_ends(self.model, self.prompting.renderer)

    @cached_property
    def text_ends(self) -> frozenset[int]:
        """Tokens that end a text."""
        named = self.model.generation_config.eos_token_id
        ids = {*(named if isinstance(named, list) else [named]), self.tokenizer.eos_token_id}
        return frozenset(ids - {None})


Stamp = tuple[int, ...]


class Partners:
    """All that a process serves. For any thread."""

    def __init__(
        self,
        name: str,
        model: Any,
        tokenizer: Any,
        *,
        identity: str,
        folder: Path | None = None,
        rendering: RenderSettings | None = None,
        max_context: int | None = None,
        gone: Callable[[Partner], None] = lambda partner: None,
    ) -> None:
        """`model` is the base model's, `identity` its checkpoint's; `folder` is where bundles lie; `gone` is told of
        those that cannot be asked any more."""
        self._identity, self.folder, self._limit = identity, folder, max_context
        self._tokenizer = tokenizer
        self._vocabulary = Vocabulary(tokenizer)
        self._lock = threading.Lock()
        self._gone = gone
        self._bundles: dict[str, tuple[Stamp, Partner]] = {}
        self._refused: dict[str, Stamp] = {}
        renderer = Renderer(tokenizer, rendering or RenderSettings(style="auto"))
        self.base = self._partner(name, model, Prompting(renderer), int(time.time()))

    def _partner(self, name: str, model: Any, prompting: Prompting, made: int, **more: Any) -> Partner:
        prompt = 0 if model.prompts is None else model.prompts.length
        limit = context_limit(model.config, prompt)
        room = limit if self._limit is None else min(limit, self._limit)
        return Partner(name, model, prompting, self._vocabulary, room, made, **more)

    def names(self) -> list[tuple[str, int, Bundle | None]]:
        """What can be asked for: name, since when it is there, and the bundle if it is one."""
        found: list[tuple[str, int, Bundle | None]] = [(self.base.name, self.base.made, None)]
        stamps = self._stamps()
        self._let_go(stamps)
        for name, stamp in sorted(stamps.items()):
            bundle = self._described(name, stamp)
            if bundle is not None:
                found.append((name, stamp[0] // 10**9, bundle))
        return found

    def find(self, name: str) -> Partner:
        """The partner of that name. Raises `ApiFailure`, also for a bundle that cannot be read."""
        if name in (self.base.name, str(self.base.model.name_or_path)):
            return self.base
        stamps = self._stamps()
        self._let_go(stamps)
        with self._lock:
            stamp = stamps.get(name)
            if stamp is None:
                raise unknown(name)
            try:
                return self._known(name, stamp)
            except CorollaError as error:
                raise ApiFailure(404, str(error), param="model", code="model_not_found") from error

    def _known(self, name: str, stamp: Stamp) -> Partner:
        """The partner of a folder as it is now; the lock is held."""
        known = self._bundles.get(name)
        if known is None or known[0] != stamp:
            known = self._bundles[name] = (stamp, self._load(name, stamp))
        return known[1]

    def _let_go(self, stamps: Mapping[str, Stamp]) -> None:
        """Those whose folder is gone or has changed."""
        with self._lock:
            names = [name for name, (stamp, _) in self._bundles.items() if stamps.get(name) != stamp]
            leaving = [self._bundles.pop(name)[1] for name in names]
        for partner in leaving:
            self._gone(partner)

    def _load(self, name: str, stamp: Stamp) -> Partner:
        assert self.folder is not None
        folder = self.folder / name
        bundle = load_bundle(folder)
        prompt = saving.saved_prompt(self.base.model, folder, name=self.base.name, identity=self._identity)
        model = with_prompt(self.base.model, prompt, saving.read_tables(folder, with_head=False))
        renderer = Renderer(self._tokenizer, bundle.rendering)
        SamplingSettings.from_dict(bundle.sampling)  # says what is wrong with it
        return self._partner(
            name,
            model,
            Prompting(renderer, tuned=True),
            stamp[0] // 10**9,
            sampling=bundle.sampling,
            bundle=bundle,
        )

    def _stamps(self) -> dict[str, Stamp]:
        """The folders that look like bundles, each with what changes when it does."""
        if self.folder is None:
            return {}
        found: dict[str, Stamp] = {}
        try:
            for entry in self.folder.iterdir():
                if not entry.name.startswith(".") and entry.name != self.base.name:
                    about = _stamp(entry)
                    if about is not None:
                        found[entry.name] = about
        except OSError as error:
            log.warning("The folder of bundles %s cannot be read: %s", self.folder, error)
        return found

    def _described(self, name: str, stamp: Stamp) -> Bundle | None:
        """What a bundle says of itself; None for one that cannot be used here, and why is logged once."""
        assert self.folder is not None
        if self._refused.get(name) == stamp:
            return None
        try:
            bundle = load_bundle(self.folder / name)
            if not bundle.model.identity:  # of peft's own: whether it fits is seen when it is loaded
                with self._lock:
                    self._known(name, stamp)
            elif bundle.model.identity != self._identity:
                raise UsageError(f"The bundle {name} is for {bundle.model.name}, not for {self.base.name}.")
            return bundle
        except CorollaError as error:
            self._refused[name] = stamp
            log.warning("Not offered: %s", error)
            return None


def _stamp(folder: Path) -> Stamp | None:
    try:
        about = (folder / (PEFT_CONFIG if is_pefts(folder) else BUNDLE_FILE)).stat()
        inside = [one.stat() for one in folder.iterdir() if one.suffix in (".json", ".safetensors")]
    except OSError:
        return None
    newest = max((one.st_mtime_ns for one in inside), default=0)
    return about.st_mtime_ns, about.st_ino, newest, sum(one.st_size for one in inside)


def unknown(name: str) -> ApiFailure:
    """Nobody of that name."""
    return ApiFailure(
        404,
        f"There is no model {one_line(name, characters=100)!r} here; GET /v1/models lists those that there are.",
        param="model",
        code="model_not_found",
    )


def with_prompt(model: Any, prompt: Any, tables: saving.Tables) -> Any:
    """A model with a prompt of its own that shares everything else with `model`; `tables` are weights of its own.

    A copy that is told of all parts, so that none of them is copied: threads that ask for different prompts meet at
    the same head.
    """
    shared = {} if tables.tensors else {id(part): part for part in model.modules() if part is not model}
    twin = copy.deepcopy(model, dict(shared))
    twin.prompts = prompt.to(model.device).requires_grad_(False)
    saving.take_tables(twin, tables)
    twin.requires_grad_(False).eval()
    return twin
