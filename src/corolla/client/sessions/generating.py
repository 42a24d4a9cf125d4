"""What a distributed model's `generate` does around `transformers`' own: the conversation, the cache, the room.

Invariant: a call that goes on with a session is given the whole conversation, and the cache holds a true beginning
of it; what the call said becomes part of the session and is returned without what earlier calls have returned.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import wraps
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, StoppingCriteriaList
from transformers.generation.configuration_utils import GenerationMode

from corolla.client.sessions.session import InferenceSession, sequences_of
from corolla.errors import UsageError
from corolla.models import guard, padded_rows
from corolla.models.cache import RemoteCache, take_cache
from corolla.models.checks.padding import generates_with_padding, padding_changes_rows
from corolla.models.shell import check_cached_length

_row_ends: ContextVar[RowEnds | None] = ContextVar("corolla_row_ends", default=None)


@contextmanager
def _noting(ends: RowEnds | None) -> Iterator[None]:
    """Where rows end within the block is noted there."""
    token = _row_ends.set(ends)
    try:
        yield
    finally:
        _row_ends.reset(token)


class GenerateCall:
    """One call of `generate` of a distributed model, whose family's own is `plain`."""

    def __init__(
        self, model: Any, plain: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        self._model = model
        self._plain = plain
        self._args = args
        self._kwargs = kwargs

    def run(self, inputs: Tensor | None, session: InferenceSession | None) -> Any:
        """With the cache or the session that the call names, the active session, or one of its own."""
        given = take_cache(self._kwargs)
        if given is not None and session is not None:
            raise UsageError("Give either session= or a cache, which is a session's own.")
        if session is not None and not isinstance(session, InferenceSession):
            raise UsageError("session= takes a session, which model.inference_session() gives.")
        if given is None and session is None:
            session = self._model.active_session
        inputs = self._kwargs.pop("input_ids", None) if inputs is None else inputs
        follows = self._kwargs.get("inputs_embeds") is not None or (
            session is not None and session.position > 0
        )
        mask = self._kwargs.get("attention_mask")
        guard.check_prompt(inputs, mask, may_be_empty=follows)
        if inputs is not None and mask is not None and not follows and given is None:
            guard.check_mask(mask, inputs.shape[0], 0, inputs.shape[1])
        if self._kwargs.get("use_cache", False) is None:  # says nothing, as if left out
            del self._kwargs["use_cache"]
        # What a processor, or speculation, asks the model meanwhile is no part of the session.
        with self._model.apart_from_session(), _noting(None):
            if given is not None:
                return self._with_cache(given, inputs)
            if session is not None:
                return self._in_session(session, inputs, callers=True)
            embedded = self._kwargs.get("inputs_embeds") is not None  # whose cache transformers insists on
            if self._kwargs.get("use_cache") is False and not embedded:
                return self._plain(inputs, *self._args, **self._kwargs)
            return self._without_session(inputs)

    def _with_cache(self, cache: Any, inputs: Tensor | None) -> Any:
        """With a cache that an earlier call has returned; `inputs` are all tokens, as for a local model."""
        guard.check_cache(cache, self._model.blocks)
        mask = self._kwargs.get("attention_mask")
        if inputs is not None and (mask is None or mask.shape[1] == inputs.shape[1]):
            cache.begin_call(inputs, None)
        try:
            return self._plain(inputs, *self._args, **{self._model.cache_name: cache}, **self._kwargs)
        finally:
            cache.end_call()

    def _without_session(self, inputs: Tensor | None) -> Any:
        session = self._model.new_session(ContextVar("unused"), max_length=None)
        try:
            result = self._in_session(session, inputs)
        except BaseException:
            session.close()
            raise
        if isinstance(result, Tensor):
            session.close()
        return result  # its cache goes with it, to be passed on

    def _in_session(self, session: InferenceSession, inputs: Tensor | None, *, callers: bool = False) -> Any:
        model, kwargs = self._model, self._kwargs
        whole = session.begin(
            inputs,
            kwargs.pop("attention_mask", None),
            kwargs.pop("inputs_embeds", None),
            # peft puts its prompts in front by a method of its own in the place of ours, and in empty sessions only.
            share=getattr(model.prepare_inputs_for_generation, "__self__", None) is model,
        )
        if whole.mask is not None:
            kwargs["attention_mask"] = whole.mask
        if whole.embeddings is not None:
            kwargs["inputs_embeds"] = whole.embeddings
        kwargs.setdefault("use_cache", True)  # a session is a cache, whatever the checkpoint's settings say
        session.cache.begin_call(whole.ids, whole.embeddings, in_session=callers)
        ends = RowEnds()
        try:
            with _noting(ends):
                result = self._plain(whole.ids, *self._args, **{model.cache_name: session.cache}, **kwargs)
        except BaseException:
            session.break_off(whole)
            raise
        finally:
            session.cache.end_call()
        newer = session.keep(sequences_of(result), whole, ends.mask_of)
        if isinstance(result, Tensor):
            return newer
        result.sequences = newer
        return result


def watched(criteria: Any, generation_config: Any) -> Any:
    """A call's stopping criteria, which say where rows end."""
    ends = _row_ends.get()
    return criteria if ends is None else ends.watch(criteria, generation_config)


def prepare_room(
    model: Any, generation_config: Any, model_kwargs: dict[str, Any], mode: Any, max_cache_length: int
) -> int:
    """Check and reserve what a call may need before anything is computed; gives the most tokens of its cache.

    Here `generate` knows how far it may go, and the padding mask that holds for the whole conversation.
    """
    cache, mask = model_kwargs.get(model.cache_name), model_kwargs.get("attention_mask")
    max_cache_length = math.ceil(max_cache_length)  # 5.0, or a number of numpy's or torch's
    ends = _row_ends.get()
    if ends is not None:
        ends.given_mask = mask
    guard.check_beams(model.blocks_holder[0].forward, generation_config, model.config)
    padded_rows.check_cached_padding(mask, lambda: generates_with_padding(model.config), model.config)
    generation_config.cache_implementation = None  # some checkpoints ask for a local kind
    if isinstance(cache, RemoteCache):
        if cache.counted_twice and mode == GenerationMode.ASSISTED_GENERATION:
            raise UsageError(
                "Speculation cannot go on with a session in which some tokens are known as embeddings only: generate "
                "without prompt_lookup_num_tokens and assistant_model."
            )
        max_cache_length -= cache.counted_twice
        cache.align_mask(mask)
        cache.check_room(max_cache_length - cache.length)
    guard.check_ends(mask)
    padding = 0 if mask is None else int((mask == 0).sum(1).min())
    prompt = 0 if model.prompts is None else model.prompts.length
    holder = model.blocks_holder[0]
    if not (isinstance(cache, RemoteCache) and cache.in_session):
        padded_rows.check_windows(
            mask,
            holder.config,
            more=(prompt, 0 if mask is None else max(0, max_cache_length - int(mask.shape[1]))),
            as_alone=lambda: not padding_changes_rows(model.config, before=False, between=True),
        )
    limit = guard.position_limit(holder, model.get_input_embeddings(), model.config)
    guard.check_reach(prompt + max_cache_length - padding, limit)
    if not isinstance(cache, RemoteCache):
        return max_cache_length
    if generation_config.use_cache:
        check_cached_length(model, prompt + max_cache_length)
        cache.reserve(max_cache_length)
    else:
        del model_kwargs[model.cache_name]
    return max_cache_length


def beyond_cache(prepare: Callable[..., Any]) -> Callable[..., Any]:
    """A family's `prepare_inputs_for_generation`, but for what the cache holds, which speculation would run again."""

    @wraps(prepare)  # `generate` reads what it takes off its signature
    def prepare_inputs_for_generation(model: Any, input_ids: Tensor, *args: Any, **kwargs: Any) -> Any:
        cache = kwargs.get(model.cache_name)
        if isinstance(cache, RemoteCache) and not args:
            new = cache.new_of(input_ids, kwargs.get("inputs_embeds"))
            if new is not None and kwargs.get("next_sequence_length") is None:
                kwargs["next_sequence_length"] = new
        prepared = prepare(model, input_ids, *args, **kwargs)
        if isinstance(cache, RemoteCache):
            cache.announce(prepared, kwargs.get("attention_mask"))
        return prepared

    return prepare_inputs_for_generation


class RowEnds:
    """Where the rows of one call of `generate` end, which fills up those that end before the others.

    Noted is what `generate` itself goes by: an end token, a string, a criterion of the caller's.
    """

    def __init__(self) -> None:
        self._ends: Tensor | None = None  # int64 [R], 0 for a row that goes on
        self._end_tokens: Tensor | None = None  # for beams, whose hypotheses end by these alone
        # What `generate` goes by of the tokens that it was given, [R, N] with a row for each beam; None: no padding.
        self.given_mask: Tensor | None = None

    def watch(self, criteria: StoppingCriteriaList, config: GenerationConfig) -> StoppingCriteriaList:
        """The same criteria, watched."""
        if config.num_beams == 1:
            return _Watched(criteria, self)
        self._end_tokens = getattr(config, "_eos_token_tensor", None)
        return criteria

    def note(self, done: Tensor, length: int) -> None:
        """Rows that are `done`, bool [R], have ended with that many tokens, unless they had ended before."""
        if not bool(done.any()):  # nearly always
            return
        ends = torch.zeros_like(done, dtype=torch.long) if self._ends is None else self._ends
        self._ends = torch.where((ends == 0) & done, length, ends)

    def mask_of(self, sequences: Tensor, given: int, columns: int) -> Tensor | None:
        """The padding mask int64 [R, columns + n - given] of a call's result [R, n]; None where no token is padding.

        It was given `columns` tokens a row, and the first `given` ones of the result are among them.
        """
        said, before = self.real(sequences, given), self.given_mask
        if bool(said.all()) and (before is None or bool(before.all())):
            return None
        rows = said.shape[0]
        whole = torch.ones(rows, columns, dtype=torch.int64)
        if before is not None:  # of several beams, or samples, all have their row's
            whole[:] = before.cpu()[torch.arange(rows) * before.shape[0] // rows]
        return torch.cat([whole, said.to("cpu", torch.int64)], 1)

    def real(self, sequences: Tensor, given: int) -> Tensor:
        """Which of the tokens behind the first `given` ones of [R, n] are no padding, bool [R, n - given]."""
        said = sequences[:, given:]
        if self._ends is not None and len(self._ends) == len(said):
            places = torch.arange(given, sequences.shape[1], device=said.device)
            ends = self._ends.to(said.device)[:, None]
            return (ends == 0) | (places < ends)
        if self._end_tokens is None:
            return torch.ones_like(said, dtype=torch.bool)
        ended = torch.isin(said, self._end_tokens.to(said.device)).long()
        return (ended.cumsum(1) - ended) == 0


class _Watched(StoppingCriteriaList):  # type: ignore[misc]
    """Criteria that say what they find to a `RowEnds` as well."""

    def __init__(self, criteria: StoppingCriteriaList, ends: RowEnds) -> None:
        super().__init__(criteria)
        self._ends = ends

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Any:
        done = super().__call__(input_ids, scores, **kwargs)
        self._ends.note(done, int(input_ids.shape[1]))
        return done
