"""Proof, before a client uses a family, that this release of transformers does with it what it should.

Invariant: a family that passes gave, in this process and with these libraries, through the very class, hooks,
sessions and `generate` that a client uses, the logits of the whole miniature: in a padded batch, in a session's
second turn, by speculation, after a rollback, with rows exchanged; and its gradients. Releases of transformers change
what stands between `generate` and a model's forward; what cannot be verified is refused, since such a change shows as
wrong words and nothing else.
"""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from inspect import signature
from types import SimpleNamespace
from typing import Any, TypeVar, cast

import torch
import transformers
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel
from transformers.utils.versions import require_version

from corolla.client.local_blocks import LocalBlocks
from corolla.client.model.objects import SharedConnection
from corolla.client.sessions.prefix_cache import PrefixCache
from corolla.errors import UnsupportedFamily
from corolla.models.cache import cache_argument, take_cache
from corolla.models.checkpoints.identity import canonical_config
from corolla.models.checkpoints.pretrained import load_parts
from corolla.models.checks.miniature import close, miniature, random_model, undisturbed
from corolla.models.checks.padding import generates_with_padding, known_in_front
from corolla.models.families import block_key_pattern, depth_of, structure
from corolla.models.span import load_span

# What Corolla's own tests have run with; pyproject.toml says the same.
TESTED = "transformers>=5.20,<5.25"
# A conversation of two turns stays within what a miniature's sessions may hold (`miniature.EDGE`).
ROWS, TOKENS, NEW, MORE, PADDED = 2, 4, 2, 1, 2
_passed: set[bytes] = set()

T = TypeVar("T")


def check_generation(config: PretrainedConfig, distributed: Any) -> None:
    """Generate a few tokens with a miniature of this config; once a process and config, in about a second.

    `distributed` is the client's class for the family. Raises `UnsupportedFamily`, which names the releases that
    are tested.
    """
    wrong = f"a miniature of this {config.model_type} model does not generate what it should"
    family, small = structure(config).causal_lm, miniature(config)
    _check(family, small, distributed, _different_replies, wrong, "nothing is generated with it")


def check_outputs(config: PretrainedConfig, family: Any, distributed: Any) -> None:
    """The same of a class that generates nothing (`family`, in its distributed form): outputs and gradients.

    Raises `UnsupportedFamily`.
    """
    wrong = f"a miniature {family.__name__} in a swarm does not give what it should"
    small = miniature(config)
    small.pad_token_id = 0  # classifiers look for it
    _check(family, small, distributed, _different_outputs, wrong, "it is not used")


def _check(
    family: Any,
    small: PretrainedConfig,
    distributed: Any,
    difference: Callable[[Any, Any], str | None],
    wrong: str,
    so: str,
) -> None:
    """Raises `UnsupportedFamily` where `difference` finds words for how the client's model differs from the whole."""
    key = canonical_config(small.to_dict()) + family.__name__.encode()
    if key in _passed:
        return
    try:
        with undisturbed():
            whole = random_model(family, small)
            found = difference(whole, _client_of(_InMemory(whole), distributed))
    except Exception as error:  # whatever a release that nobody knows makes of it
        found = f"{type(error).__name__}: {' '.join(str(error).split())[:120]}"
    if found is not None:
        raise UnsupportedFamily(
            f"With transformers {transformers.__version__}, {wrong} ({found}), so {so}{_other_release()}"
        )
    _passed.add(key)


def _different_outputs(whole: Any, model: Any) -> str | None:
    ids = torch.randint(3, 64, (ROWS, TOKENS))
    mask = _padded(ids, whole)
    ids[0, ~mask[0].bool()] = 0
    outputs: list[Tensor] = []
    for one in (whole, model):
        found = one(input_ids=ids, attention_mask=mask, use_cache=False)[0]
        outputs.append(found[mask.bool()] if found.ndim == 3 else found)
    if not close(outputs[1], outputs[0]):
        return "in a batch with padding"
    return _different_gradients(whole, model, ids, mask)


def _padded(ids: Tensor, whole: Any) -> Tensor:
    """A mask with padding in the first row's front, where such padding is taken."""
    mask = torch.ones_like(ids)
    mask[0, : PADDED * (known_in_front(whole.config) and generates_with_padding(whole.config))] = 0
    return mask


def _other_release() -> str:
    """What may help, where this release is none that Corolla is tested with."""
    try:
        require_version(TESTED)
    except ImportError:
        return f"; Corolla is tested with {TESTED}: pip install '{TESTED}'"
    return ""


def _different_replies(whole: Any, model: Any) -> str | None:
    for one in (whole, model):
        one.generation_config.update(eos_token_id=None, pad_token_id=0)
    ids = torch.randint(3, 64, (ROWS, TOKENS))
    mask = _padded(ids, whole)
    if not _same(model.generate(ids, attention_mask=mask, **_greedy()), whole, ids, mask):
        return (
            "as transformers itself says other words with a cache than without"
            if _contradicts_itself(whole, ids, mask)
            else "in a batch with padding"
        )
    row, more = ids[1:], ids[1:, :MORE]
    with model.inference_session() as session:
        first = model.generate(row, session=session, **_greedy())
        # transformers does not speculate with models whose blocks keep a state.
        ahead = {} if whole._is_stateful else {"prompt_lookup_num_tokens": 2}
        second = model.generate(more, session=session, **ahead, **_greedy())
    if not _same(first, whole, row, torch.ones_like(row)):
        return "in a session"
    both = torch.cat([first.sequences, more], 1)
    # Without a mask it would be guessed from tokens that were said.
    if not _same(second, whole, both, torch.ones_like(both)) and not _goes_on_so(second, whole, row, more):
        return "in a session's second turn"
    return _different_cache(whole, model, ids, mask) or _different_gradients(whole, model, ids, mask)


@torch.no_grad()
def _different_cache(whole: Any, model: Any, ids: Tensor, mask: Tensor) -> str | None:
    """The last token again after a rollback, and with the rows of the batch exchanged, as beam search does."""
    wanted = _last_logits(whole, ids, mask)
    cache = take_cache(dict(model(input_ids=ids, attention_mask=mask, use_cache=True)))

    def last(ids: Tensor, mask: Tensor) -> Tensor:
        cache.crop(TOKENS - 1)
        arguments: dict[str, Any] = {model.cache_name: cache, "attention_mask": mask}
        logits: Tensor = model(input_ids=ids[:, -1:], **arguments).logits
        return logits

    if not close(last(ids, mask), wanted):
        return "after a rollback"
    cache.crop(TOKENS - 1)
    cache.reorder_cache(torch.tensor([1, 0]))
    return None if close(last(ids.flip(0), mask.flip(0)), wanted.flip(0)) else "with its rows exchanged"


def _last_logits(whole: Any, ids: Tensor, mask: Tensor) -> Tensor:
    """The whole's, with the last token behind a cache of its own where blocks keep a state: what some families' code
    gives token by token is not quite what it gives at once."""
    if not whole._is_stateful:
        return cast(Tensor, whole(input_ids=ids, attention_mask=mask).logits[:, -1:])
    cache = take_cache(dict(whole(input_ids=ids[:, :-1], attention_mask=mask[:, :-1], use_cache=True)))
    arguments: dict[str, Any] = {cache_argument(whole.forward): cache}
    given = whole.prepare_inputs_for_generation(ids, attention_mask=mask, use_cache=True, **arguments)
    if given.get("attention_mask") is not None:  # recurrences alone are given none behind the first pass
        arguments["attention_mask"] = mask
    if "position_ids" in signature(whole.forward).parameters:  # not every family's code counts what is cached
        arguments["position_ids"] = torch.full((ROWS, 1), TOKENS - 1)
    return cast(Tensor, whole(input_ids=ids[:, -1:], **arguments).logits)


def _different_gradients(whole: Any, model: Any, ids: Tensor, mask: Tensor) -> str | None:
    gradients: list[Tensor] = []
    weight = real = mask.bool()
    for one in (whole, model):
        outputs, embeddings = _of_embeddings(one, ids, mask)
        if not gradients:
            weight = torch.randn_like(outputs)
            if outputs.ndim == 3:  # a number for each token, also of padding
                weight *= real.unsqueeze(-1)
        gradients += torch.autograd.grad((outputs * weight).sum(), [embeddings])
    return None if close(gradients[1][real], gradients[0][real]) else "in gradients"


def _of_embeddings(model: Any, ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """A model's outputs, and its embeddings of the tokens, of which they are differentiable."""
    seen: list[Tensor] = []

    def keep(_embedding: Any, _args: Any, output: Tensor) -> Tensor:
        seen.append(output.detach().requires_grad_())
        return seen[-1].clone()

    handle = model.get_input_embeddings().register_forward_hook(keep)  # some blocks are given the ids as well
    try:
        outputs = model(input_ids=ids, attention_mask=mask, use_cache=False)[0]
    finally:
        handle.remove()
    return outputs, seen[0]


def _greedy() -> dict[str, Any]:
    return {
        "max_new_tokens": NEW,
        "do_sample": False,
        "use_cache": True,
        "return_dict_in_generate": True,
        "output_logits": True,
    }


def _same(found: Any, whole: Any, ids: Tensor, mask: Tensor) -> bool:
    """Whether the logits of every generated token are the whole model's."""
    expected = whole.generate(ids, attention_mask=mask, **_greedy())
    return close(torch.stack(found.logits), torch.stack(expected.logits))


def _contradicts_itself(whole: Any, ids: Tensor, mask: Tensor) -> bool:
    """Whether the whole model generates otherwise than it computes at once."""
    said = whole.generate(ids, attention_mask=mask, **_greedy())
    longer = torch.nn.functional.pad(mask, (0, NEW - 1), value=1)
    wanted = whole(input_ids=said.sequences[:, :-1], attention_mask=longer, use_cache=False).logits[:, -1]
    return not close(said.logits[-1], wanted)


def _goes_on_so(found: Any, whole: Any, row: Tensor, more: Tensor) -> bool:
    """Whether `found` is what the whole model says behind its own cache, where blocks keep a state: what some
    families' code gives token by token is not quite what it gives at once."""
    if not whole._is_stateful:
        return False
    first = whole.generate(row, attention_mask=torch.ones_like(row), **_greedy())
    both = torch.cat([first.sequences, more], 1)
    kept: dict[str, Any] = {cache_argument(whole.forward): take_cache(dict(first))}
    then = whole.generate(both, attention_mask=torch.ones_like(both), **kept, **_greedy())
    return close(torch.stack(found.logits), torch.stack(then.logits))


class _InMemory:
    """What is asked of a checkpoint here, for a model that is on no disk."""

    name = "miniature"

    def __init__(self, whole: PreTrainedModel) -> None:
        self.config = whole.config
        self.num_blocks = depth_of(whole.config)
        self._state = whole.state_dict()

    def tensors(
        self, wanted: Callable[[str], bool], *, widen_to: torch.dtype | None = None
    ) -> dict[str, Tensor]:
        """As a `Checkpoint`'s."""
        return {key: tensor.clone() for key, tensor in self._state.items() if wanted(key)}


def _client_of(checkpoint: Any, distributed: Any) -> Any:
    """A client's model all of whose blocks run here."""
    pattern = block_key_pattern(checkpoint.config)
    state = checkpoint.tensors(lambda key: pattern.match(key) is None, widen_to=torch.float32)
    connection: Any = _NoSwarm()
    local = LocalBlocks(load_span(checkpoint, 0, checkpoint.num_blocks, dtype=torch.float32))
    shared = SharedConnection(connection, local)
    model, _ = load_parts(distributed, checkpoint, state, torch.float32, connection=shared)
    model.requires_grad_(False).eval()
    return model


class _NoSwarm:
    """The connection of a client that leaves no blocks to others."""

    def __init__(self) -> None:
        self.prefix_cache = PrefixCache()
        self.view = SimpleNamespace(wire="compute", steps_differ=False)
        self.retry = self.audits = None
        self.is_open = True

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """What never waits needs no loop."""
        try:
            work.send(None)
        except StopIteration as done:
            result: T = done.value
            return result
        raise RuntimeError("a client without a swarm has waited for one")

    def run_soon(self, work: Coroutine[Any, Any, Any]) -> None:
        """As `run`."""
        self.run(work)

    def close(self) -> None:
        """There is nothing to leave."""
