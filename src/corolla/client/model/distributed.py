"""A model of transformers with its blocks in the swarm, whatever stands around them: a head, another, or none.

Invariant: whatever the local model can do (train, be wrapped by peft or a trainer) the distributed one inherits; what
is overridden only brings in the session and the prompts, and keeps a checkpoint without blocks from being written as
if it were whole.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache as memoize
from functools import partial, wraps
from pathlib import Path
from types import TracebackType
from typing import Any, NoReturn, Self, cast

import torch
from transformers import PretrainedConfig

from corolla.client.model import saving
from corolla.client.model.heads import ChangeTracker, kept_head
from corolla.client.model.objects import (
    AdapterCheck,
    SharedConnection,
    copied,
    refuse_pickle,
    refuse_shallow_copy,
)
from corolla.client.remote_blocks import RemoteBlocks, close_soon
from corolla.client.sessions.chain import SessionChain
from corolla.client.sessions.session import ActiveSession, InferenceSession, forked
from corolla.errors import UsageError
from corolla.models import families, guard
from corolla.models.cache import RemoteCache, cache_argument
from corolla.models.checks.forms import cuts_of, needs_ids, reads_flat_rows, values_returned
from corolla.models.checks.padding import known_in_front, padding_changes_rows
from corolla.models.prompts import Prompt, prefix_length, sent_length
from corolla.models.shell import BaseModelHooks, BlocksLayer, replace_blocks, what_enters


class SessionCaches:
    """A model's sessions, as calls that name no cache find them."""

    def __init__(self, model: Any) -> None:
        self._model = weakref.ref(model)
        self.owner: object = model.blocks

    def active(self) -> RemoteCache | None:
        """See `models.shell.Caches`."""
        model = self._model()
        return None if model is None or model.active_session is None else model.active_session.cache

    def fresh(self, *, lazy: bool) -> RemoteCache:
        """See `models.shell.Caches`."""
        model: Any = self._model()
        blocks: RemoteBlocks = model.blocks

        def open_session(cache: RemoteCache) -> SessionChain:
            chain = blocks.open_chain()
            # A cache that is dropped must not hold the servers' memory.
            weakref.finalize(cache, close_soon, blocks.connection, chain)
            return chain

        return RemoteCache(
            open_session,
            prompt_length=sent_length(model.prompts),
            prefix_length=prefix_length(model.prompts),
            max_length=None,
            owner=blocks,
            fork=partial(forked, partial(model.new_session, ContextVar("unused"), max_length=None)),
            lazy=lazy,
        )


@memoize
def in_swarm(family: Any) -> Any:
    """The distributed form of a class of transformers whose blocks are where `families.blocks_prefix` says."""

    class Distributed(family):  # type: ignore[misc]
        def __init__(self, config: PretrainedConfig, *, connection: SharedConnection | None = None) -> None:
            if connection is None:
                raise UsageError(
                    "A distributed model is made from a checkpoint and a swarm: use from_pretrained(name, "
                    "initial_peers=[…]), or transformers' own from_config for one without a swarm."
                )
            super().__init__(config)
            self.prompts: Prompt | None = None
            self._changes = ChangeTracker()
            self._revision: str | None = None
            self._blocks = RemoteBlocks(
                connection.connection,
                cuts_of(config),
                0,
                families.depth_of(config),
                connection.local,
                partial(padding_changes_rows, config),
            )
            self._active_session: ContextVar[InferenceSession | None] = ContextVar("session", default=None)
            self.cache_name = cache_argument(self.forward)
            layer = BlocksLayer(self._blocks.run, returns=values_returned(config), cuts=self._blocks.cuts)
            self.blocks_at = families.blocks_prefix(config, family)
            self.blocks_holder = (replace_blocks(self, self.blocks_at, layer),)
            caches = SessionCaches(self)
            BaseModelHooks(
                self.blocks_holder[0],
                prompts=self._get_prompts,
                caches=caches,
                reads_flat_rows=lambda: reads_flat_rows(config),
                takes_padding_in_front=lambda: known_in_front(config),
                needs_ids=needs_ids(config),
            )
            self.session_caches = caches
            if family.__name__.endswith("ForSequenceClassification"):
                guard.watch_pooling(self)
            self._check_adapters = AdapterCheck()
            self._shared_connection = connection
            connection.join(self)

        @wraps(family.forward)
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            if vars(self).get("peft_config"):
                self._check_adapters(self)
            return _eagerly(super().forward, *args, **kwargs)

        # --- blocks, prompts, sessions ------------------------------------------------------------------

        @property
        def blocks(self) -> RemoteBlocks:
            """The blocks in the swarm; `model.blocks[i:j](hidden)` runs some of them."""
            return self._blocks

        def _get_prompts(self) -> Prompt | None:
            return self.prompts

        def inference_session(self, max_length: int | None = None) -> InferenceSession:
            """A session for up to `max_length` of the user's tokens a row; prompts come on top."""
            return self.new_session(self._active_session, max_length=max_length)

        def new_session(self, active: ActiveSession, **options: Any) -> InferenceSession:
            """One that is active where `active` says so; `options` as of `InferenceSession`."""
            return InferenceSession(
                self._blocks,
                self.prompts,
                active,
                embed=lambda ids: self.get_input_embeddings()(ids),
                entering=lambda ids: what_enters(self.blocks_holder[0], ids),
                **options,
            )

        @contextmanager
        def apart_from_session(self) -> Iterator[None]:
            """Within the block calls that name no session have none."""
            token = self._active_session.set(None)
            try:
                yield
            finally:
                self._active_session.reset(token)

        @property
        def active_session(self) -> InferenceSession | None:
            """The innermost session whose `with` block we are in."""
            return self._active_session.get()

        # --- saving and ending --------------------------------------------------------------------------

        def resize_token_embeddings(self, *args: Any, **kwargs: Any) -> Any:
            """As transformers'; the new head does for its callers what the old one did."""
            with kept_head(self):
                return super().resize_token_embeddings(*args, **kwargs)

        def load_state_dict(self, state_dict: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
            """As torch's, for the client's part. Raises `UsageError` for weights of blocks."""
            saving.refuse_blocks(self.config, state_dict)
            result = super().load_state_dict(state_dict, *args, **kwargs)
            # What a trainer's checkpoint leaves out is the checkpoint's, and nothing to warn of.
            result.missing_keys[:] = [key for key in result.missing_keys if key.startswith(saving.PROMPTS)]
            return result

        def save_pretrained(
            self, save_directory: str | Path, is_main_process: bool | None = None, *_args: Any, **kwargs: Any
        ) -> None:
            """Write the prompt and what else was changed here; never a checkpoint without its blocks.

            `is_main_process` is what a trainer says: it gets a file that it can load back, too.
            """
            if saving.has_adapters(self, kwargs):
                super().save_pretrained(save_directory, is_main_process is not False, **kwargs)
            elif is_main_process is not False:
                saving.save_client_part(self, Path(save_directory), for_trainer=is_main_process is not None)

        def _apply(self, fn: Any, recurse: bool = True) -> Self:
            changed = self._changes.changed(self)
            super()._apply(fn, recurse)
            self._changes.note(self, but=changed)  # moved or converted, not changed
            return self

        def close(self) -> None:
            """Leave the swarm; the model cannot be used afterwards (a `deepcopy` of it can, until it is closed)."""
            self._shared_connection.leave(self)

        def __deepcopy__(self, memo: dict[int, Any]) -> Self:
            return cast(Self, copied(self, memo))

        def __copy__(self) -> NoReturn:
            refuse_shallow_copy()

        def __reduce_ex__(self, _protocol: Any) -> NoReturn:
            refuse_pickle()

        def __enter__(self) -> Self:
            return self

        def __exit__(
            self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
        ) -> None:
            self.close()

    as_family(Distributed, family)
    return Distributed


def as_family(kind: type, family: type) -> None:
    """Have `kind` pass for `family`.

    transformers looks conversions of weights up by the class's name, and refuses them to classes that are not its own;
    so the class carries the family's name and module.
    """
    kind.__name__, kind.__module__ = family.__name__, family.__module__
    kind.__qualname__ = f"Distributed{family.__name__}"


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _eagerly(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """`function(*args, **kwargs)` as it stands: what waits for a network cannot be compiled, nor gain by it.

    Raises `UsageError` where it is to become a graph that stands for itself.
    """
    if getattr(torch.compiler, "is_exporting", bool)():  # torch 2.6 has no such question
        raise UsageError(
            "A distributed model calls a swarm, so it cannot be exported: export the whole local model instead."
        )
    return function(*args, **kwargs)
