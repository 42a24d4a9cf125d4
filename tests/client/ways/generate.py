"""Calls of `generate`."""

from __future__ import annotations

from typing import Any

import torch
from tests.client.ways.table import GREEDY, PEFT_CUTS, Case, Outcome, padded, way
from tests.reference import random_ids
from torch import Tensor

GENERATE = "`generate`"


def _compared(case: Case, ids: Tensor, mask: Tensor | None = None, **options: Any) -> Outcome:
    more = {} if mask is None else {"attention_mask": mask}
    torch.manual_seed(5)
    found = case.generate(ids, **more, max_new_tokens=10, **options)
    torch.manual_seed(5)
    return found, case.expected(ids, mask, max_new_tokens=10, **options)


SETTINGS: dict[str, dict[str, Any]] = {
    "greedy": GREEDY,
    "sampling (temperature, top-k, top-p)": {
        "do_sample": True,
        "temperature": 0.9,
        "top_k": 30,
        "top_p": 0.95,
    },
    "sampling (min-p, typical, epsilon)": {
        "do_sample": True,
        "min_p": 0.02,
        "typical_p": 0.9,
        "epsilon_cutoff": 1e-4,
    },
    "several samples a row": {"do_sample": True, "num_return_sequences": 3},
    "beam search": {**GREEDY, "num_beams": 3, "num_return_sequences": 2},
    "beam search with sampling": {"do_sample": True, "num_beams": 3},
    "beams with a length penalty that stop early": {
        **GREEDY,
        "num_beams": 3,
        "length_penalty": 2.0,
        "early_stopping": True,
    },
    "repetition penalty, no repeated n-grams, bad words": {
        **GREEDY,
        "repetition_penalty": 1.3,
        "no_repeat_ngram_size": 2,
        "bad_words_ids": [[7], [9, 11]],
    },
    "least and most length": {**GREEDY, "min_new_tokens": 4},
    "`use_cache=False`": {**GREEDY, "use_cache": False},
}
for _name, _settings in SETTINGS.items():

    @way(GENERATE, _name)
    def _generated(case: Case, settings: dict[str, Any] = _settings) -> Outcome:
        return _compared(case, random_ids(2, 7), **settings)


@way(
    GENERATE,
    "a prompt in chunks (`prefill_chunk_size`)",
    refused={"peft prompt": "Generation goes on with 4 tokens"},
)
def _chunks(case: Case) -> Outcome:
    ids = random_ids(2, 10)
    return case.generate(ids, max_new_tokens=8, prefill_chunk_size=4, **GREEDY), case.prompted.greedy(ids, 8)


@way(GENERATE, "a batch with padding on the left")
def _generate_left(case: Case) -> Outcome:
    ids, mask = padded("left")
    return _compared(case, ids, mask, **GREEDY)


@way(GENERATE, "rows that end before others")
def _ending(case: Case) -> Outcome:
    ids = random_ids(3, 7)
    free = case.expected(ids, max_new_tokens=10, **GREEDY)
    end = int(free[0, 9])
    return _compared(case, ids, eos_token_id=end, pad_token_id=0, **GREEDY)


@way(GENERATE, "stop criteria of one's own")
def _criteria(case: Case) -> Outcome:
    from transformers import StoppingCriteria, StoppingCriteriaList

    class Long(StoppingCriteria):  # type: ignore[misc]
        def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
            return torch.full((input_ids.shape[0],), input_ids.shape[1] >= 12)

    return _compared(case, random_ids(2, 7), stopping_criteria=StoppingCriteriaList([Long()]), **GREEDY)


@way(GENERATE, "allowed tokens by a function")
def _allowed(case: Case) -> Outcome:
    return _compared(
        case, random_ids(2, 7), prefix_allowed_tokens_fn=lambda _row, _ids: list(range(3, 60)), **GREEDY
    )


@way(GENERATE, "scores and logits with the answer")
def _scores(case: Case) -> Outcome:
    options = {"return_dict_in_generate": True, "output_scores": True, "output_logits": True}
    found, expected = _compared(case, random_ids(2, 7), **options, **GREEDY)
    return (
        (found.sequences, torch.stack(found.scores), torch.stack(found.logits)),
        (expected.sequences, torch.stack(expected.scores), torch.stack(expected.logits)),
    )


@way(GENERATE, "going on with the cache of an answer", refused={"peft prompt": ""})
def _returned_cache(case: Case) -> Outcome:
    ids, more = random_ids(1, 7), random_ids(1, 3, seed=1)
    answer = case.bare.generate(ids, max_new_tokens=4, return_dict_in_generate=True, **GREEDY)
    longer = torch.cat([answer.sequences, more], 1)
    found = case.bare.generate(longer, past_key_values=answer.past_key_values, max_new_tokens=5, **GREEDY)
    first = case.prompted.greedy(ids, 4)
    return found, case.prompted.greedy(torch.cat([first, more], 1), 5)


@way(
    GENERATE,
    "guidance (`guidance_scale`), in and out of sessions",
    note="what stands without the text is the prompt alone",
)
def _guided(case: Case) -> Outcome:
    ids, scale = random_ids(1, 7), 1.5
    with case.bare.inference_session():
        found = case.generate(ids, max_new_tokens=6, guidance_scale=scale, **GREEDY)
    if case.wrapped or case.column == "none":
        return found, case.expected(ids, max_new_tokens=6, guidance_scale=scale, **GREEDY)
    whole = ids
    for _ in range(6):
        said = whole[:, ids.shape[1] - 1 :]
        full, free = (case.prompted.logits(part)[:, -1].log_softmax(-1) for part in (whole, said))
        whole = torch.cat([whole, (scale * (full - free) + free).argmax(-1, keepdim=True)], 1)
    return found, whole


@way(GENERATE, "`inputs_embeds`", every_family=True, refused={"peft prompt": ""}, note="peft takes ids")
def _generate_embeddings(case: Case) -> Outcome:
    ids = random_ids(2, 7)
    embeddings = case.bare.get_input_embeddings()(ids)
    found = case.bare.generate(inputs_embeds=embeddings, max_new_tokens=8, **GREEDY)
    return found, case.prompted.greedy(ids, 8)[:, 7:]


@way(
    GENERATE, "speculation from the prompt (`prompt_lookup_num_tokens`)", every_family=True, refused=PEFT_CUTS
)
def _lookup(case: Case) -> Outcome:
    ids = random_ids(1, 5).repeat(1, 3)
    found = case.generate(ids, max_new_tokens=16, prompt_lookup_num_tokens=4, **GREEDY)
    return found, case.prompted.greedy(ids, 16)


@way(GENERATE, "speculation by a smaller model (`assistant_model`)", refused=PEFT_CUTS)
def _assisted(case: Case) -> Outcome:
    ids = random_ids(1, 9)
    found = case.generate(ids, max_new_tokens=12, assistant_model=case.assistant(), **GREEDY)
    return found, case.prompted.greedy(ids, 12)


@way(GENERATE, "a streamer on a thread")
def _streamed(case: Case) -> Outcome:
    import threading

    from transformers.generation.streamers import BaseStreamer

    class Heard(BaseStreamer):  # type: ignore[misc]
        def __init__(self) -> None:
            self.tokens: list[int] = []

        def put(self, value: Tensor) -> None:
            self.tokens += value.flatten().tolist()

        def end(self) -> None: ...

    heard, ids = Heard(), random_ids(1, 7)
    thread = threading.Thread(
        target=case.generate, args=(ids,), kwargs={"max_new_tokens": 8, "streamer": heard, **GREEDY}
    )
    thread.start()
    thread.join()
    return torch.tensor([heard.tokens]), case.prompted.greedy(ids, 8)


for _option in ("output_hidden_states", "output_attentions"):

    @way(GENERATE, f"`{_option}=True`", refused=f"{_option}=True asks for")
    def _generate_inside(case: Case, option: str = _option) -> Outcome:
        return case.generate(
            random_ids(1, 5), max_new_tokens=2, return_dict_in_generate=True, **{option: True}
        ), None
