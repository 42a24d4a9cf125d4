"""Calls of `generate`: its rarer options, and what cannot be told to be a prompt."""

from __future__ import annotations

from typing import Any

import torch
from tests.client.ways.table import GREEDY, Case, Outcome, padded, way
from tests.reference import random_ids
from torch import Tensor

GENERATE = "`generate`: further options"
SIX: dict[str, Any] = {"max_new_tokens": 6, **GREEDY}


def compared(case: Case, ids: Tensor, mask: Tensor | None = None, **options: Any) -> Outcome:
    """The same call of both."""
    more = {} if mask is None else {"attention_mask": mask}
    torch.manual_seed(5)
    found = case.generate(ids, **more, **options)
    torch.manual_seed(5)
    return found, case.expected(ids, mask, **options)


SETTINGS: dict[str, dict[str, Any]] = {
    "logits made to sum to one (`renormalize_logits`)": {
        "do_sample": True,
        "max_new_tokens": 6,
        "top_k": 20,
        "renormalize_logits": True,
    },
    "biased, suppressed and forced tokens": {
        **SIX,
        "sequence_bias": [[[7], -3.0]],
        "suppress_tokens": [8, 9],
        "begin_suppress_tokens": [11],
        "forced_eos_token_id": 13,
    },
    "an end that grows likelier (`exponential_decay_length_penalty`)": {
        **SIX,
        "eos_token_id": 9,
        "exponential_decay_length_penalty": (2, 1.2),
    },
    "`max_time`": {**SIX, "max_time": 1000.0},
    "`disable_compile=True`": {**SIX, "disable_compile": True},
    "`low_memory=True`": {**SIX, "low_memory": True},
}
for _name, _settings in SETTINGS.items():

    @way(GENERATE, _name)
    def _option(case: Case, settings: dict[str, Any] = _settings) -> Outcome:
        return compared(case, random_ids(2, 7), **settings)


@way(GENERATE, "a `GenerationConfig`, also one with `use_cache=False`")
def _config(case: Case) -> Outcome:
    from transformers import GenerationConfig

    ids = random_ids(2, 7)
    found = [
        case.generate(
            ids, generation_config=GenerationConfig(max_new_tokens=6, pad_token_id=0, use_cache=cached)
        )
        for cached in (True, False)
    ]
    return torch.stack(found), case.prompted.greedy(ids, 6).repeat(2, 1, 1)


@way(GENERATE, "`cache_implementation` (static, quantized, offloaded, …)", note="the cache is on the servers")
def _implementation(case: Case) -> Outcome:
    ids = random_ids(2, 7)
    kinds = ("static", "dynamic", "quantized", "offloaded")
    found = [case.generate(ids, cache_implementation=kind, **SIX) for kind in kinds]
    return torch.stack(found), case.prompted.greedy(ids, 6).repeat(len(kinds), 1, 1)


@way(GENERATE, "`compile_config`")
def _compiled(case: Case) -> Outcome:
    from transformers import CompileConfig

    return compared(case, random_ids(2, 7), compile_config=CompileConfig(), **SIX)


@way(GENERATE, "a decoding loop of one's own (`custom_generate=function`)")
def _custom(case: Case) -> Outcome:
    def loop(model: Any, input_ids: Tensor, **_options: Any) -> Tensor:
        return model._sample(input_ids, **_options)  # type: ignore[no-any-return]

    return compared(case, random_ids(2, 7), custom_generate=loop, **SIX)


@way(GENERATE, "watermarks")
def _watermarked(case: Case) -> Outcome:
    from transformers import WatermarkingConfig

    return compared(
        case, random_ids(2, 7), watermarking_config=WatermarkingConfig(), do_sample=True, max_new_tokens=6
    )


@way(
    GENERATE,
    "guidance away from another text (`negative_prompt_ids`)",
    refused={"ptune": "", "deep_ptune": "", "prefix": ""},
)
def _negative(case: Case) -> Outcome:
    ids, other = random_ids(1, 7), random_ids(1, 5, seed=4)
    return compared(case, ids, negative_prompt_ids=other, guidance_scale=1.5, **SIX)


@way(GENERATE, "how likely each token was (`compute_transition_scores`), with beams too")
def _transitions(case: Case) -> Outcome:
    ids = random_ids(2, 7)
    found: list[list[Tensor]] = [[], []]
    for beams in (1, 3):
        options = {**SIX, "num_beams": beams, "return_dict_in_generate": True, "output_scores": True}
        for answer, into in zip(compared(case, ids, **options), found, strict=True):
            more = getattr(answer, "beam_indices", None)
            into.append(case.whole.compute_transition_scores(answer.sequences, answer.scores, more))
    return tuple(found[0]), tuple(found[1])


@way(GENERATE, "`max_length` and `min_length` of the whole")
def _lengths(case: Case) -> Outcome:
    ids = random_ids(2, 7)
    found = case.generate(ids, max_length=12, min_length=9, **GREEDY)
    return found, case.prompted.greedy(ids, 5)


@way(GENERATE, "a mask of numbers with a point, or of true and false")
def _masks(case: Case) -> Outcome:
    ids, mask = padded("left")
    found = [case.generate(ids, attention_mask=one, **SIX) for one in (mask.float(), mask.bool())]
    return torch.stack(found), case.expected(ids, mask, **SIX).repeat(2, 1, 1)


@way(GENERATE, "no input at all, which begins with the model's first token")
def _from_nothing(case: Case) -> Outcome:
    found = case.model.generate(**SIX)
    first = torch.full((1, 1), case.whole.generation_config.bos_token_id)
    return found, case.prompted.greedy(first, 6)


@way(GENERATE, "`use_cache=None`, and lengths as numbers of numpy's or with a point")
def _kinds_of_numbers(case: Case) -> Outcome:
    import numpy as np

    ids = random_ids(2, 7)
    found = [
        case.generate(ids, **options, **GREEDY)
        for options in (
            {"max_new_tokens": 6, "use_cache": None},
            {"max_new_tokens": np.int64(6)},
            {"max_new_tokens": 5.5},
        )
    ]
    return torch.stack(found), case.prompted.greedy(ids, 6).repeat(3, 1, 1)


@way(GENERATE, "`inputs_embeds` with `use_cache=False`", refused={"peft prompt": ""}, note="peft takes ids")
def _embeddings_uncached(case: Case) -> Outcome:
    ids = random_ids(2, 7)
    embeddings = case.bare.get_input_embeddings()(ids)
    found = case.model.generate(inputs_embeds=embeddings, use_cache=False, **SIX)
    return found, case.prompted.greedy(ids, 6)[:, 7:]


@way(GENERATE, "a mask of another length", refused="The attention mask covers 6 tokens, but 7 were given")
def _short_mask(case: Case) -> Outcome:
    return case.bare.generate(random_ids(2, 7), attention_mask=torch.ones(2, 6), **SIX), None


@way(GENERATE, "a batch with padding on the right", refused="A row ends in padding")
def _right(case: Case) -> Outcome:
    ids, mask = padded("right")
    return case.generate(ids, attention_mask=mask, **SIX), None


for _name, _wrong in {"a list of ids": [[5, 6]], "ids of one dimension": torch.tensor([5, 6])}.items():

    @way(GENERATE, _name, refused="generate takes token ids as a tensor")
    def _no_rows_of_ids(case: Case, wrong: Any = _wrong) -> Outcome:
        return case.bare.generate(wrong, **SIX), None


@way(GENERATE, "an empty input", refused="generate was given no tokens")
def _empty(case: Case) -> Outcome:
    return case.bare.generate(random_ids(2, 5)[:, :0], **SIX), None


@way(GENERATE, "no rows", refused="generate was given no tokens")
def _no_rows(case: Case) -> Outcome:
    return case.bare.generate(random_ids(2, 5)[:0], **SIX), None


@way(
    GENERATE,
    "continuous batching (`generate_batch`)",
    refused={"": "Continuous batching keeps attention caches at the client"},
)
def _continuous(case: Case) -> Outcome:
    return case.bare.generate_batch([random_ids(1, 5)[0].tolist()]), None


_MOVED: dict[str, dict[str, Any]] = {
    "DoLa": {"dola_layers": "high"},
    "Contrastive Search": {"penalty_alpha": 0.6, "top_k": 4},
    "Group Beam Search": {"num_beams": 4, "num_beam_groups": 2, "diversity_penalty": 0.5},
    "Constrained Beam Search": {"num_beams": 4, "force_words_ids": [[7]]},
}
for _name, _options in _MOVED.items():

    @way(
        GENERATE,
        f"{_name} ({', '.join(f'`{key}`' for key in _options)})",
        refused=("Dola" if _name == "DoLa" else _name),
        error=ValueError,
        note="transformers has moved it into a repository of its own",
    )
    def _moved(case: Case, options: dict[str, Any] = _options) -> Outcome:
        return case.generate(random_ids(1, 5), max_new_tokens=4, **options), None


@way(
    GENERATE,
    "an argument that no model has",
    refused="The following `model_kwargs` are not used by the model: ['wrong']",
    error=ValueError,
)
def _unknown(case: Case) -> Outcome:
    return case.generate(random_ids(1, 5), max_new_tokens=4, wrong=1), None
