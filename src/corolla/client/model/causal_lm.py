"""The distributed models as people load them: each family's own `…ForCausalLM`, a classifier, or the bare model.

Invariant: `generate` is transformers' own; the overrides below only bring in the session.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import cache as memoize
from functools import wraps
from typing import Any, NoReturn, ParamSpec

import transformers
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel

from corolla.client.connection import SwarmConnection
from corolla.client.local_blocks import load_local
from corolla.client.model import arguments
from corolla.client.model.arguments import LoadRequest
from corolla.client.model.distributed import as_family, in_swarm
from corolla.client.model.loading import client_dtype_for, connect, first_prompt, load_shell
from corolla.client.model.objects import SharedConnection
from corolla.client.model.startcheck import check_generation, check_outputs
from corolla.client.sessions.generating import GenerateCall, beyond_cache, prepare_room, watched
from corolla.client.sessions.session import InferenceSession
from corolla.errors import UnsupportedFamily, UsageError
from corolla.models import families
from corolla.models.checkpoints.checkpoint import Checkpoint, open_checkpoint
from corolla.models.guard import watch_losses

P = ParamSpec("P")
# Which class of transformers a checkpoint is loaded as; None: its own causal language model.
Chosen = Callable[[PretrainedConfig], type[PreTrainedModel]] | None


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

    class Distributed(in_swarm(family)):  # type: ignore[misc]
        """See `AutoDistributedModelForCausalLM`."""

        def __init__(self, config: PretrainedConfig, *, connection: SharedConnection | None = None) -> None:
            super().__init__(config, connection=connection)
            watch_losses(self, self.session_caches)

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

        prepare_inputs_for_generation = beyond_cache(family.prepare_inputs_for_generation)

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

        from_pretrained = staticmethod(_loader(arguments.from_pretrained, architecture))

    as_family(Distributed, family)
    return Distributed


def load_distributed(
    request: LoadRequest,
    *,
    only: str | None = None,
    connection: SwarmConnection | None = None,
    chosen: Chosen = None,
) -> Any:
    """The model that was asked for, over a connection of its own unless one is given.

    Raises as `from_pretrained`; `only` is the architecture that it must have.
    """
    config = request.swarm
    checkpoint = open_checkpoint(
        request.name, revision=request.revision, token=request.token, cache_dir=request.cache_dir
    )
    part = _part_of(checkpoint, only, chosen)
    dtype = client_dtype_for(checkpoint, request.dtype)
    count = config.check_local(checkpoint.num_blocks)
    connection = connection or connect(checkpoint, config, dtype)
    try:
        connection.check_complete(count)
        shared = SharedConnection(connection, load_local(checkpoint, count, dtype))
        model = load_shell(part, checkpoint, shared, dtype, request)
        model.prompts = first_prompt(model, checkpoint, request)
    except BaseException:
        connection.close()
        raise
    return model


def _part_of(checkpoint: Checkpoint, only: str | None, chosen: Chosen) -> Any:
    """The client's class, once it was tried. Raises `UnsupportedFamily`, or `UsageError` where it is not `only`."""
    config = checkpoint.config
    name = checkpoint.architecture if chosen is None else chosen(config).__name__
    if only is not None and name != only:
        raise UsageError(
            f"{checkpoint.name} is a {name}, not a {only}: use Distributed{name} or the class of all families, such "
            "as AutoDistributedModelForCausalLM."
        )
    if chosen is None:
        part: Any = distributed_class(name)
        check_generation(config, part)
    else:
        family: Any = chosen(config)
        part = in_swarm(family)
        check_outputs(config, family, part)
    return part


def _loader(
    asked: Callable[P, LoadRequest], only: str | None = None, chosen: Chosen = None
) -> Callable[P, Any]:
    @wraps(asked)  # readers, editors and type checkers see its arguments
    def load(*args: P.args, **options: P.kwargs) -> Any:
        return load_distributed(asked(*args, **options), only=only, chosen=chosen)

    signature = inspect.signature(asked).replace(return_annotation=PreTrainedModel)
    load.__signature__ = signature  # type: ignore[attr-defined]
    return load


class _Auto:
    def __init__(self) -> None:
        raise UsageError(f"Use {type(self).__name__}.from_pretrained(name, initial_peers=[…]).")


class AutoDistributedModelForCausalLM(_Auto):
    """Loads any supported family by the checkpoint's own architecture."""

    from_pretrained = staticmethod(_loader(arguments.from_pretrained))


class AutoDistributedModel(_Auto):
    """The family's base model, which ends in hidden states [R, T, H], prompts not counted."""

    from_pretrained = staticmethod(_loader(arguments.from_pretrained, chosen=families.base_class))


class AutoDistributedModelForSequenceClassification(_Auto):
    """The family's classifier: a small head at the client, trained together with the prompt."""

    from_pretrained = staticmethod(_loader(arguments.classifier, chosen=families.classifier_class))


def distributed_named(architecture: str) -> Any:
    """What `corolla.Distributed…` stands for: it has the class's `from_pretrained`. Raises `UnsupportedFamily`."""
    if architecture.endswith("ForSequenceClassification"):
        asked: Any = arguments.classifier
        chosen: Chosen = families.classifier_class
    elif architecture.endswith("Model") and not architecture.endswith("LMHeadModel"):
        asked, chosen = arguments.from_pretrained, families.base_class
    else:
        return distributed_class(architecture)
    if not hasattr(transformers, architecture):
        raise UnsupportedFamily(f"transformers has no class {architecture}.")
    load = staticmethod(_loader(asked, architecture, chosen))
    return type(f"Distributed{architecture}", (_Auto,), {"from_pretrained": load})
