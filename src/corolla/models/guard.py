"""What is refused before anything is computed: a call that does not continue what its cache holds.

Invariant: what enters the blocks continues what the cache holds. Cached tokens and new ones together are the
conversation that mask and position ids speak of, under the mask and the prompt that the cached ones were
computed with. Every way of calling a model goes through `BaseModelHooks._enter` and with that through here.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.nn.functional import pad
from transformers import PretrainedConfig, PreTrainedModel

from corolla.errors import UsageError
from corolla.models.cache import Caches, RemoteCache, cache_argument, own_cache, take_cache
from corolla.models.families import INNER_OUTPUTS

OTHER_INPUTS = ("pixel_values", "image_", "images", "input_features", "input_values", "audio_", "video_")
IGNORED = -100  # the label of a position that carries no loss


class NoHooks(nn.Module):
    """A module that stands for blocks which are elsewhere, so that what a hook would see is not what it asks for."""

    def _refuse(self, *_args: Any, **_kwargs: Any) -> NoReturn:
        raise UsageError(
            "A block's hidden states stay on the servers, so no hook can stand there: model.blocks[i:j](hidden) runs "
            "some of the blocks, and gives what comes out of them."
        )

    register_forward_hook = register_forward_pre_hook = _refuse
    register_full_backward_hook = register_full_backward_pre_hook = register_backward_hook = _refuse


def shape(named: dict[str, Any], *, may_be_empty: bool = False) -> tuple[int, int]:
    """Rows and tokens of a call. `may_be_empty` allows none: of a prompt alone (`front.py`). Raises `UsageError`."""
    ids, embeddings = named.get("input_ids"), named.get("inputs_embeds")
    shaped = ids if ids is not None else embeddings
    if (
        not isinstance(shaped, Tensor)
        or shaped.ndim != (2 if ids is not None else 3)
        or not (may_be_empty or (shaped.shape[0] and shaped.shape[1]))
    ):
        raise UsageError(
            "Give the model input_ids [rows, tokens] or inputs_embeds [rows, tokens, hidden size], of at least one "
            "token."
        )
    return int(shaped.shape[0]), int(shaped.shape[1])


def check_outputs(named: Mapping[str, Any]) -> None:
    """Raises `UsageError` for outputs that stay on the servers, and for what is not text."""
    other = next((name for name in named if name.startswith(OTHER_INPUTS) and named[name] is not None), None)
    if other is not None:
        raise UsageError(f"{other} is no text, and only the text part of a model is served: leave it out.")
    for option, what in INNER_OUTPUTS.items():
        if named.get(option):
            raise UsageError(
                f"{option}=True asks for {what}, which stay on the servers: leave it out; hidden states can be had "
                "with model.blocks[i:j](hidden)."
            )


def switch_off_outputs(*configs: Any) -> list[str]:
    """Have configs not ask for such outputs by default; gives the options that were on."""
    found = [option for option in INNER_OUTPUTS if any(getattr(config, option, None) for config in configs)]
    for config in configs:
        for option in found:
            if getattr(config, option, None):
                setattr(config, option, False)
    return found


def embedding_of(base: Any) -> nn.Module | None:
    """The embedding of tokens; None for a model without one (`models/front.py`)."""
    try:
        found: nn.Module | None = base.get_input_embeddings()
    except NotImplementedError:
        return None
    return found


def known_ids(ids: Tensor, mask: Tensor | None, embedding: Any) -> Tensor:
    """Token ids [R, T] that all have an embedding: padding's that have none are 0. Raises `UsageError`.

    `mask` [R, S], whose last T columns are those of `ids`, is 0 for padding.
    """
    rows = getattr(embedding, "num_embeddings", None)
    if ids.dtype not in (torch.int64, torch.int32):
        raise UsageError(f"Token ids are int64 or int32, not {ids.dtype}; give embeddings as inputs_embeds=.")
    if not isinstance(rows, int) or not ids.numel():
        return ids
    strange = (ids < 0) | (ids >= rows)
    if not bool(strange.any()):
        return ids
    padding = None if mask is None or mask.ndim != 2 else ~mask[:, -ids.shape[1] :].bool()
    if padding is not None and padding.shape[1] == ids.shape[1]:
        ids = ids.masked_fill(strange & padding, 0)
        strange = strange & ~padding
    if bool(strange.any()):
        raise UsageError(
            f"Token {int(ids[strange][0])} has no embedding: this model has {rows} of them, 0 to {rows - 1}. Use the "
            "model's own tokenizer, or resize the embeddings before the model is loaded."
        )
    return ids


def check_prompt(ids: Any, mask: Any, *, may_be_empty: bool) -> None:
    """Raises `UsageError` unless `generate` can be given these token ids and this mask, where they are not None."""
    if ids is not None and not (isinstance(ids, Tensor) and ids.ndim == 2):
        raise UsageError(
            "generate takes token ids as a tensor [rows, tokens]: a tokenizer gives them with return_tensors='pt', "
            "and ids[None] makes one row of them."
        )
    if ids is not None and not (ids.shape[0] and (ids.shape[1] or may_be_empty)):
        raise UsageError(
            "generate was given no tokens; leave the input out to begin with the model's first token."
        )
    if mask is not None and not (isinstance(mask, Tensor) and mask.ndim == 2):
        raise UsageError("A distributed model takes a 2-D attention mask (1 for tokens, 0 for padding).")


def check_beams(forward: Callable[..., Any], generation_config: Any, config: PretrainedConfig) -> None:
    """Raises `UsageError` for a beam search that goes wrong in transformers itself."""
    if (generation_config.num_beams or 1) > 1 and own_cache(forward) is not None:
        raise UsageError(
            f"transformers' own beam search leaves the states of {config.model_type} models where they are, so its "
            "replies would be wrong: generate with num_beams=1."
        )


def check_ends(mask: Tensor | None) -> None:
    """Raises `UsageError` where a row of the mask [R, N] of all tokens before generation ends in padding."""
    if mask is not None and mask.shape[1] and not bool(mask[:, -1].all()):
        raise UsageError(
            "A row ends in padding, and generation goes on after a row's last token: pad on the left "
            "(tokenizer.padding_side = 'left'), or give ended rows new tokens."
        )


def starts_anew(positions: Tensor) -> bool:
    """Whether a row of position ids [R, T] holds more than one sequence, as `transformers` sees it."""
    return positions.shape[-1] > 1 and bool((positions.diff(dim=-1) != 1).any())


def counts_from(positions: Tensor, first: int) -> bool:
    """Whether each row of position ids [R or 1, T] counts on from `first`."""
    new = int(positions.shape[-1])
    if new == 1:  # a token of a reply: numbers are compared sooner than tensors
        return all(place == first for place in positions.flatten().tolist())
    return bool((positions == torch.arange(first, first + new, device=positions.device)).all())


def known_positions(positions: Tensor, mask: Tensor | None) -> Tensor:
    """Position ids [R or 1, T] that are none below 0: padding's that are become 0. Raises `UsageError`.

    `mask` [R, S], whose last T columns are those of the positions, is 0 for padding.
    """
    if positions.is_floating_point():
        raise UsageError(f"Position ids are whole numbers, not {positions.dtype}.")
    below = positions < 0
    if not bool(below.any()):
        return positions
    real = below if mask is None else below & mask[:, -positions.shape[-1] :].bool()
    if bool(real.any()):
        raise UsageError("A position id is below 0 where there is no padding; positions count from 0.")
    return positions.clamp(min=0)


def check_embeddings(embeddings: Tensor, embedding: Any) -> None:
    """Raises `UsageError` for embeddings [R, T, E] of another width or dtype than this model's `embedding` gives."""
    weight = getattr(embedding, "weight", None)
    if not isinstance(weight, Tensor) or weight.ndim != 2 or not weight.is_floating_point():
        return
    width = int(weight.shape[1])
    if embeddings.shape[-1] != width or embeddings.dtype != weight.dtype:
        raise UsageError(
            f"This model's embeddings are {width} wide and {weight.dtype}, not {embeddings.shape[-1]} and "
            f"{embeddings.dtype}; give inputs_embeds as model.get_input_embeddings()(ids) gives them."
        )


def check_labels(labels: Tensor, words: int | None) -> None:
    """Raises `UsageError` for labels that are neither one of the model's `words` nor to be ignored."""
    if words is None or not labels.numel():
        return
    wrong = ((labels < 0) & (labels != IGNORED)) | (labels >= words)
    if bool(wrong.any()):
        raise UsageError(
            f"The label {int(labels[wrong][0])} is no token of this model, which has {words}; give token ids, or "
            f"{IGNORED} where there is to be no loss."
        )


def check_labels_of(labels: Tensor, mask: Any, *, shifted: bool) -> None:
    """Raises `UsageError` for labels [R, T] that are predicted from padding; `mask` [R, S] ends where they do.

    Padding never reaches a server, so what stands at its places is not what a local model computes there. That is
    padding behind padding, or a row's first token behind padding in front. `shifted` labels stand where they are
    predicted, others one place behind.
    """
    if not isinstance(mask, Tensor) or mask.ndim != 2 or labels.ndim != 2 or mask.shape[1] < labels.shape[1]:
        return
    mask = mask[:, mask.shape[1] - labels.shape[1] :].to(labels.device).expand_as(labels)
    before, labels = (mask, labels) if shifted else (mask[:, :-1], labels[:, 1:])
    own = pad(mask[:, 1:], (0, 1), value=0) if shifted else mask[:, 1:]
    from_padding = (labels != IGNORED) & (before == 0)
    if bool((from_padding & (own == 0)).any()):
        raise UsageError(
            "Some labels stand on padding, which servers never see: make them -100 "
            "(labels.masked_fill(attention_mask == 0, -100)), or leave the attention mask out to learn padding as "
            "any other token."
        )
    if bool(from_padding.any()):
        raise UsageError(
            "With padding in front, the label of a row's first token would be predicted from padding, which "
            "servers never see: pad on the right (tokenizer.padding_side = 'right'), or make that label -100."
        )


def watch_losses(model: PreTrainedModel, caches: Caches) -> None:
    """Have calls with labels stand by themselves: a loss neither goes on with a session nor becomes part of it."""
    names = [name for name in inspect.signature(model.forward).parameters if name != "self"]
    cache_name = cache_argument(model.forward)

    def enter(
        _model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        named = dict(zip(names, args, strict=False)) | kwargs
        cache = take_cache(named)
        labels, shifted = named.get("labels"), named.get("shift_labels")
        for given, wanted in ((shifted, True), (labels, False)):
            if isinstance(given, Tensor):
                check_labels(given, getattr(model.get_output_embeddings(), "out_features", None))
                check_labels_of(given, named.get("attention_mask"), shifted=wanted)
        whole = isinstance(labels, Tensor) and cache is None and named.get("use_cache") is not False
        if whole and caches.active() is not None:
            cache = caches.fresh(lazy=True)
        return (), named if cache is None else {**named, cache_name: cache}

    model.register_forward_pre_hook(enter, with_kwargs=True)


def watch_pooling(model: PreTrainedModel) -> None:
    """Have a classifier refuse rows whose answer would be read off padding, of which servers give nothing."""
    names = [name for name in inspect.signature(model.forward).parameters if name != "self"]

    def enter(_model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        named = dict(zip(names, args, strict=False)) | kwargs
        ids, mask = named.get("input_ids"), named.get("attention_mask")
        if not isinstance(mask, Tensor) or mask.ndim != 2 or not mask.shape[1]:
            return
        pad = model.config.get_text_config().pad_token_id
        last = torch.full((len(mask),), mask.shape[1] - 1)
        if isinstance(ids, Tensor) and ids.shape == mask.shape and pad is not None:
            last = (torch.arange(ids.shape[1]) * (ids.cpu() != pad)).argmax(-1)
        if not bool(mask.cpu()[torch.arange(len(mask)), last].all()):
            raise UsageError(
                f"A classifier reads a row's answer off its last token that is not the pad_token_id ({pad}), and the "
                "attention mask says of one that it is padding: load the model with the tokenizer's "
                "pad_token_id=, or pad on the left."
            )

    model.register_forward_pre_hook(enter, with_kwargs=True)


def check_cache(given: Any, owner: object) -> None:
    """Raises `UsageError` unless this cache is an open one of the model with that owner."""
    if not isinstance(given, RemoteCache):
        raise UsageError(
            f"A distributed model keeps its attention cache on the servers and cannot use a {type(given).__name__}: "
            "leave it out (the answer carries a cache that can be passed on), or pass session=. A prefix, such as "
            "peft's CARTRIDGE, is trained with tuning_mode='prefix' and loaded with prompts=FOLDER."
        )
    if given.owner is not owner:
        raise UsageError("This session belongs to another model; open one with model.inference_session().")
    if given.closed:
        raise UsageError("This session is closed; open another one with model.inference_session().")


def check_continues(cache: RemoteCache | None, rows: int, new: int, named: Mapping[str, Any]) -> None:
    """Raises `UsageError` unless `new` tokens in `rows` rows go on where the cache ends."""
    past = 0 if cache is None else cache.length
    mask, positions = named.get("attention_mask"), named.get("position_ids")
    if mask is not None:
        check_mask(mask, rows, past, new)
    if positions is not None:
        _check_shape(positions, rows, new)
    if cache is None or not past:
        return
    if rows % cache.rows:
        raise UsageError(f"This session holds {cache.rows} sequences; a batch of {rows} cannot continue it.")
    announced, cache.announced = cache.announced, None
    if announced is not None and announced != new:
        raise UsageError(
            f"Generation goes on with {announced} tokens, of which another library has made {new} (peft's prompts do "
            "so in speculation, and always where peft does not know this transformers yet): load the prompt with "
            "from_pretrained(…, prompts=FOLDER), or generate without speculation."
        )
    _check_past(mask, cache, rows)
    if mask is None and cache.mask is None and positions is not None:
        _check_positions(positions, past, new)


def _check_shape(positions: Any, rows: int, new: int) -> None:
    if not isinstance(positions, Tensor) or not positions.ndim:
        raise UsageError("Position ids are a tensor of whole numbers, one for each new token.")
    if positions.shape[-1] != new or (positions.ndim > 1 and positions.shape[0] not in (1, rows)):
        raise UsageError(
            f"The position ids have the shape {list(positions.shape)}, but the new tokens {[rows, new]}: give one for "
            "each new token."
        )


def check_mask(mask: Tensor, rows: int, past: int, new: int) -> None:
    """Raises `UsageError` unless the mask [R, S] is one of `past` cached and `new` tokens."""
    if not isinstance(mask, Tensor) or mask.ndim != 2 or bool((mask < 0).any()):
        raise UsageError("A distributed model takes a 2-D attention mask (1 for tokens, 0 for padding).")
    if mask.shape[0] not in (1, rows):
        raise UsageError(f"The attention mask has {mask.shape[0]} rows, but {rows} were given.")
    if mask.shape[1] == past + new:
        return
    if past:
        raise UsageError(
            f"This call brings {new} tokens to a session that holds {past}, but its attention mask covers "
            f"{mask.shape[1]}: pass the tokens that come after the cached ones, and a mask for all {past + new}."
        )
    raise UsageError(
        f"The attention mask covers {mask.shape[1]} tokens, but {new} were given; it needs a number for each."
    )


def _check_past(mask: Tensor | None, cache: RemoteCache, rows: int) -> None:
    """The mask says of cached tokens what it said when they were computed."""
    before = cache.mask
    if mask is None and before is None:
        return
    if before is None:
        same = mask is None or bool(mask[:, : cache.length].all())
    else:
        before = before.repeat_interleave(rows // before.shape[0], dim=0).bool()
        same = bool(before.all()) if mask is None else _equal(mask[:, : cache.length].bool(), before)
    if not same:
        raise UsageError(
            "The attention mask says of tokens in the session what it did not say when they were computed; set "
            "session.position back to where the masks differ, or open another session."
        )


def _equal(given: Tensor, before: Tensor) -> bool:
    return torch.equal(given.cpu().expand_as(before), before)


def _check_positions(positions: Tensor, past: int, new: int) -> None:
    if not counts_from(positions, past):
        raise UsageError(
            f"The position ids begin at {int(positions.flatten()[0])}, but the session holds {past} tokens and this "
            f"call brings {new}: pass the tokens that come after the cached ones, with the positions from {past} on."
        )


def real_mask(mask: Tensor | None, positions: Tensor | None) -> Tensor | None:
    """The padding mask as bool, or None when no token is padding.

    With explicit positions an all-ones mask stays: without one, some families would read position ids that
    start anew as packed sequences.
    """
    if mask is None:
        return None
    mask = mask.bool()
    return None if bool(mask.all()) and positions is None else mask


def position_limit(holder: nn.Module, embedding: nn.Module | None, config: Any) -> int | None:
    """How many tokens a row may have where positions have embeddings of their own (gpt2, opt); None elsewhere."""
    tables = [
        child for child in holder.children() if isinstance(child, nn.Embedding) and child is not embedding
    ]
    limit = getattr(config, "max_position_embeddings", None)
    learned = any(isinstance(limit, int) and child.num_embeddings >= limit for child in tables)
    return int(limit) if learned and limit else None


def check_places(positions: Tensor, prompt: int, limit: int | None) -> None:
    """Raises `UsageError` for position ids, not counting the prompt's, that a model with `limit` of them lacks."""
    if limit is None or not positions.numel():
        return
    if int(positions.min()) < 0:
        raise UsageError(f"{int(positions.min())} is no position; they begin with 0, of padding, too.")
    check_reach(prompt + int(positions.max()) + 1, limit)


def check_reach(tokens: int, limit: int | None) -> None:
    """Raises `UsageError` when so many tokens a row, prompts included, go beyond the model's positions."""
    if limit is not None and tokens > limit:
        raise UsageError(
            f"This call needs {tokens} positions, the prompt's included, but the model has {limit}: shorten the text, "
            "or ask for fewer tokens."
        )
