"""The distributed models: each family's own `…ForCausalLM`, with its blocks in the swarm.

Invariant: whatever the local model can do (generate, train, be wrapped by peft or a trainer) the
distributed one inherits; the overrides below only bring in the session and the prompts, and keep a
checkpoint without blocks from being written as if it were whole.
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
from typing import Any, NoReturn, ParamSpec, Self, cast

import torch
import transformers
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel

from corolla.client.connection import SwarmConnection
from corolla.client.local_blocks import load_local
from corolla.client.model import arguments, saving
from corolla.client.model.arguments import LoadRequest
from corolla.client.model.heads import Noted, kept_head
from corolla.client.model.loading import client_dtype_for, connect, first_prompt, load_shell
from corolla.client.model.objects import (
    AdapterCheck,
    SharedConnection,
    copied,
    refuse_pickle,
    refuse_shallow_copy,
)
from corolla.client.model.startcheck import check_generation
from corolla.client.remote_blocks import LaterSession, RemoteBlocks
from corolla.client.sessions.generating import GenerateCall, prepare_room, watched
from corolla.client.sessions.session import ActiveSession, InferenceSession, go_on_from
from corolla.errors import UnsupportedFamily, UsageError
from corolla.models import families
from corolla.models.cache import RemoteCache, cache_argument
from corolla.models.checkpoints.checkpoint import open_checkpoint
from corolla.models.checks.forms import crossing_of, needs_ids, reads_flat_rows, values_returned
from corolla.models.guard import watch_losses
from corolla.models.prompts import Prompt, prefix_length, sent_length
from corolla.models.shell import BaseModelHooks, BlocksLayer, replace_blocks, what_enters
from corolla.text import get_logger

log = get_logger(__name__)

P = ParamSpec("P")


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
        session = LaterSession(model.blocks)
        new = partial(model.new_session, ContextVar("unused"), max_length=None)
        return RemoteCache(
            session,
            prompt_length=sent_length(model.prompts),
            prefix_length=prefix_length(model.prompts),
            max_length=None,
            owner=model.blocks,
            fork=lambda cache: go_on_from(cache, new, session.chain).cache,
            lazy=lazy,
        )


@memoize
def distributed_class(architecture: str) -> type[PreTrainedModel]:
    """The distributed form of a `transformers` class such as `LlamaForCausalLM`.

    Raises `UnsupportedFamily` for anything but a causal language model.
    """
    family: Any = getattr(transformers, architecture, None)
    if family is None or not architecture.endswith(("ForCausalLM", "LMHeadModel")):
        raise UnsupportedFamily(
            f"{architecture} is not a causal language model of transformers; Corolla serves those (…ForCausalLM)."
        )

    class Distributed(family):  # type: ignore[misc]
        """See `AutoDistributedModelForCausalLM`."""

        def __init__(self, config: PretrainedConfig, *, connection: SharedConnection | None = None) -> None:
            if connection is None:
                raise UsageError(
                    "A distributed model is made from a checkpoint and a swarm: use from_pretrained(name, "
                    "initial_peers=[…]), or AutoModelForCausalLM.from_config for one without a swarm."
                )
            super().__init__(config)
            self.prompts: Prompt | None = None
            self._noted = Noted()
            self._revision: str | None = None
            self._blocks = RemoteBlocks(
                connection.connection, crossing_of(config), 0, config.num_hidden_layers, connection.local
            )
            self._active_session: ContextVar[InferenceSession | None] = ContextVar("session", default=None)
            self.cache_name = cache_argument(self.forward)
            layer = BlocksLayer(
                self._blocks.run, returns=values_returned(config), crossing=self._blocks.crossing
            )
            self.blocks_holder = (replace_blocks(self, families.blocks_prefix(config), layer),)
            caches = SessionCaches(self)
            BaseModelHooks(
                self.blocks_holder[0],
                prompts=self._get_prompts,
                caches=caches,
                reads_flat_rows=lambda: reads_flat_rows(config),
                needs_ids=needs_ids(config),
            )
            watch_losses(self, caches)
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

        # --- generation ---------------------------------------------------------------------------------

        def generate(
            self,
            inputs: Tensor | None = None,
            *args: Any,
            session: InferenceSession | None = None,
            **kwargs: Any,
        ) -> Any:
            """As `transformers`' generate; with a session, goes on after what it holds.

            `inputs` [R, T] are then the new tokens (None: none), and only what came after the earlier
            calls' output is returned. Raises `SessionLimit` before anything is computed.
            """
            return GenerateCall(self, super().generate, args, kwargs).run(inputs, session)

        @wraps(family.prepare_inputs_for_generation)  # `generate` reads what it takes off its signature
        def prepare_inputs_for_generation(self, input_ids: Tensor, *args: Any, **kwargs: Any) -> Any:
            """As the family's own, and not what the cache holds already, which speculation would run again."""
            cache = kwargs.get(self.cache_name)
            if isinstance(cache, RemoteCache) and not args:
                new = cache.new_of(input_ids, kwargs.get("inputs_embeds"))
                if new is not None and kwargs.get("next_sequence_length") is None:
                    kwargs["next_sequence_length"] = new
            prepared = super().prepare_inputs_for_generation(input_ids, *args, **kwargs)
            if isinstance(cache, RemoteCache):
                cache.announce(prepared, kwargs.get("attention_mask"))
            return prepared

        def _prepare_cache_for_generation(
            self,
            generation_config: Any,
            model_kwargs: dict[str, Any],
            generation_mode: Any,
            batch_size: int,
            max_cache_length: int,
        ) -> None:
            """Where `generate` knows how far it may go: the room is reserved before anything is computed."""
            room = prepare_room(self, generation_config, model_kwargs, generation_mode, max_cache_length)
            super()._prepare_cache_for_generation(
                generation_config, model_kwargs, generation_mode, batch_size, room
            )

        def _get_stopping_criteria(self, generation_config: Any, *args: Any, **kwargs: Any) -> Any:
            criteria = super()._get_stopping_criteria(generation_config, *args, **kwargs)
            return watched(criteria, generation_config)

        def init_continuous_batching(self, *_args: Any, **_kwargs: Any) -> NoReturn:
            """Raises `UsageError`: what batches continuously keeps the keys and values of its own."""
            raise UsageError(
                "Continuous batching keeps attention caches at the client, and this model's are on the servers, which "
                "batch what comes: use generate, or a session for each conversation."
            )

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
            changed = self._noted.changed(self)
            super()._apply(fn, recurse)
            self._noted.note(self, but=changed)  # moved or converted, not changed
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

        from_pretrained = staticmethod(_loader(arguments.from_pretrained, architecture))

    # transformers looks conversions of weights up by the class's name, and refuses them to classes that are
    # not its own; so the class carries the family's name and module.
    Distributed.__name__, Distributed.__module__ = architecture, family.__module__
    Distributed.__qualname__ = f"Distributed{architecture}"
    return Distributed


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


def load_distributed(
    request: LoadRequest, *, only: str | None = None, connection: SwarmConnection | None = None
) -> Any:
    """The model that was asked for, over a connection of its own unless one is given.

    Raises as `from_pretrained`; `only` is the architecture that it must have.
    """
    config = request.swarm
    checkpoint = open_checkpoint(
        request.name, revision=request.revision, token=request.token, cache_dir=request.cache_dir
    )
    if only is not None and checkpoint.architecture != only:
        raise UsageError(
            f"{request.name} is a {checkpoint.architecture}, not a {only}: use Distributed{checkpoint.architecture} "
            "or AutoDistributedModelForCausalLM."
        )
    part = distributed_class(checkpoint.architecture)
    check_generation(checkpoint.config, part)
    dtype = client_dtype_for(checkpoint, request.dtype)
    count = config.check_local(checkpoint.num_blocks)
    connection = connection or connect(checkpoint, config, dtype)
    try:
        connection.check_complete(count)
        shared = SharedConnection(connection, load_local(checkpoint, count, dtype))
        model = load_shell(
            part, checkpoint, shared, dtype, config.quantization, request.device, request.prompts
        )
        model.prompts = first_prompt(model, checkpoint, request)
    except BaseException:
        connection.close()
        raise
    return model


def _loader(asked: Callable[P, LoadRequest], only: str | None = None) -> Callable[P, Any]:
    @wraps(asked)  # readers, editors and type checkers see its arguments
    def load(*args: P.args, **options: P.kwargs) -> Any:
        return load_distributed(asked(*args, **options), only=only)

    return load


class AutoDistributedModelForCausalLM:
    """Loads any supported family by the checkpoint's own architecture."""

    def __init__(self) -> None:
        raise UsageError("Use AutoDistributedModelForCausalLM.from_pretrained(name, initial_peers=[…]).")

    from_pretrained = staticmethod(_loader(arguments.from_pretrained))
