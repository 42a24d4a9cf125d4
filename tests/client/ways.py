"""Every public way to call a model, each as a function that gives what the swarm says and what is right.

`test_ways_in.py` tries each for a model without a prompt, with `ptune` and `deep_ptune`, and wrapped by peft;
`python -m tests.client.ways` writes docs/compatibility.md from the same table.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from tests.reference import Prompted, random_ids
from torch import Tensor

Column = Literal["none", "ptune", "deep_ptune", "peft prompt"]
COLUMNS: tuple[Column, ...] = ("none", "ptune", "deep_ptune", "peft prompt")
P = 3  # prompt tokens
GREEDY: dict[str, Any] = {"do_sample": False}


@dataclass
class Case:
    """One column of the table: a distributed model, and what it must equal."""

    column: Column
    model: Any  # the distributed model, wrapped by peft in its column
    bare: Any  # the distributed model itself
    local: Any  # the whole model on this machine, wrapped by peft in its column
    whole: Any  # the same, never wrapped
    prompted: Prompted  # the whole model with the column's prompt
    other: Callable[[], Any]  # another distributed model
    assistant: Callable[[], Any]  # a small local model

    @property
    def wrapped(self) -> bool:
        """Whether peft stands around the models."""
        return self.column == "peft prompt"

    def logits(self, ids: Tensor, **options: Any) -> Tensor:
        """Logits at the user's tokens."""
        return self.users(self.model(input_ids=ids, **options).logits)

    def users(self, logits: Tensor) -> Tensor:
        """Without the prompt's positions, which peft keeps."""
        return logits[:, P:] if self.wrapped else logits

    def generate(self, ids: Tensor, **options: Any) -> Any:
        """By the distributed model."""
        return self.model.generate(input_ids=ids, **options)

    def expected(self, ids: Tensor, mask: Tensor | None = None, **options: Any) -> Any:
        """What `generate` must give."""
        if self.column in ("none", "peft prompt"):
            more = {} if mask is None else {"attention_mask": mask}
            return self.local.generate(input_ids=ids, **more, **options)
        return self.prompted.generate(ids, mask, **options)


Outcome = tuple[Any, Any]


@dataclass(frozen=True)
class Way:
    """One row of the table."""

    section: str
    name: str
    run: Callable[[Case], Outcome]
    refused: Mapping[str, str]  # column to the sentence's beginning; "" stands for all columns
    note: str  # for the document

    def sentence(self, column: str) -> str | None:
        """What is said in this column, None where the result is equal."""
        return self.refused.get(column, self.refused.get(""))


WAYS: list[Way] = []


def way(
    section: str, name: str, *, refused: str | Mapping[str, str] | None = None, note: str = ""
) -> Callable[[Callable[[Case], Outcome]], Callable[[Case], Outcome]]:
    """Adds a row."""
    sentences = {"": refused} if isinstance(refused, str) else dict(refused or {})

    def add(run: Callable[[Case], Outcome]) -> Callable[[Case], Outcome]:
        WAYS.append(Way(section, name, run, sentences, note))
        return run

    return add


def padded(side: str) -> tuple[Tensor, Tensor]:
    """A batch of three rows, and a mask that hides four tokens of one."""
    ids = random_ids(3, 9)
    mask = torch.ones_like(ids)
    mask[1, slice(0, 4) if side == "left" else slice(5, 9)] = 0
    return ids, mask


def real(logits: Tensor, mask: Tensor) -> Tensor:
    """Logits of the tokens that are no padding."""
    return logits[mask.bool()]


def rows_alone(case: Case, ids: Sequence[Tensor], count: int) -> list[Tensor]:
    """What each row's own conversation, int64 [1, n], is answered by itself."""
    return [case.prompted.greedy(one, count)[:, one.shape[1] :] for one in ids]


PEFT_SESSION = "Another library has put a prompt in front of this session's tokens"
PEFT_CUTS = {"peft prompt": "Generation goes on with"}
OWN_CACHE = "A distributed model keeps its attention cache"

# --- a forward ---------------------------------------------------------------------------------------------

FORWARD = "A call of the model"


@way(FORWARD, "without gradients")
def _plain(case: Case) -> Outcome:
    ids = random_ids(2, 9)
    with torch.no_grad():
        return case.logits(ids), case.prompted.logits(ids)


@way(FORWARD, "with gradients, in evaluation mode")
def _grad(case: Case) -> Outcome:
    ids = random_ids(2, 9)
    return case.logits(ids), case.prompted.logits(ids)


@way(FORWARD, "in training mode")
def _training(case: Case) -> Outcome:
    ids = random_ids(2, 9)
    case.model.train()
    return case.logits(ids), case.prompted.logits(ids)


@way(FORWARD, "with padding on the left")
def _left(case: Case) -> Outcome:
    ids, mask = padded("left")
    with torch.no_grad():
        found = case.logits(ids, attention_mask=mask)
    return real(found, mask), real(case.prompted.logits(ids, mask), mask)


@way(FORWARD, "with padding on the right")
def _right(case: Case) -> Outcome:
    ids, mask = padded("right")
    found = case.logits(ids, attention_mask=mask)
    return real(found, mask), real(case.prompted.logits(ids, mask), mask)


@way(FORWARD, "padding whose token has no embedding")
def _strange_padding(case: Case) -> Outcome:
    ids, mask = padded("left")
    strange = ids.masked_fill(mask == 0, 10_000)
    if case.wrapped:  # peft embeds by itself
        strange = ids
    with torch.no_grad():
        found = case.logits(strange, attention_mask=mask)
    return real(found, mask), real(case.prompted.logits(ids, mask), mask)


@way(FORWARD, "position ids that say what is so anyway", note="peft leaves them out, with a warning")
def _positions(case: Case) -> Outcome:
    ids = random_ids(2, 9)
    positions = torch.arange(9).expand(2, -1)
    more = {} if case.wrapped else {"position_ids": positions}
    with torch.no_grad():
        return case.logits(ids, **more), case.prompted.logits(ids)


@way(FORWARD, "`inputs_embeds`")
def _embeddings(case: Case) -> Outcome:
    ids = random_ids(2, 9)
    embeddings = case.bare.get_input_embeddings()(ids)
    found = case.users(case.model(inputs_embeds=embeddings).logits)
    return found, case.prompted.logits(ids)


@way(FORWARD, "`logits_to_keep`", note="peft's prompt counts as tokens in front")
def _keep(case: Case) -> Outcome:
    ids = random_ids(2, 9)
    with torch.no_grad():
        found = case.model(input_ids=ids, logits_to_keep=2).logits
    return found, case.prompted.logits(ids)[:, -2:]


@way(FORWARD, "`return_dict=False`")
def _tuple(case: Case) -> Outcome:
    ids = random_ids(2, 9)
    with torch.no_grad():
        found = case.model(input_ids=ids, return_dict=False)[0]
    return case.users(found), case.prompted.logits(ids)


@way(FORWARD, "`use_cache=True`, and its cache continued")
def _use_cache(case: Case) -> Outcome:
    return _loop(case, torch.no_grad(), use_cache=True)


@way(FORWARD, "`use_cache=False`")
def _no_cache(case: Case) -> Outcome:
    ids = random_ids(2, 9)
    with torch.no_grad():
        answer = case.model(input_ids=ids, use_cache=False)
    assert answer.past_key_values is None
    return case.users(answer.logits), case.prompted.logits(ids)


for _option in ("output_hidden_states", "output_attentions", "output_router_logits"):

    @way(FORWARD, f"`{_option}=True`", refused=f"{_option}=True asks for")
    def _inside(case: Case, option: str = _option) -> Outcome:
        return case.model(input_ids=random_ids(1, 5), **{option: True}), None


@way(
    FORWARD,
    "an attention mask with four dimensions",
    refused={
        "": "A distributed model takes a 2-D attention mask",
        "peft prompt": "",
    },
)
def _four(case: Case) -> Outcome:
    return case.bare(input_ids=random_ids(1, 5), attention_mask=torch.ones(1, 1, 5, 5)), None


@way(FORWARD, "a mask of another length", refused="The attention mask covers")
def _short_mask(case: Case) -> Outcome:
    return case.model(input_ids=random_ids(1, 5), attention_mask=torch.ones(1, 4)), None


@way(
    FORWARD,
    "a token that has no embedding",
    refused={"": "Token 256 has no embedding", "peft prompt": ""},
    note="peft embeds by itself",
)
def _no_embedding(case: Case) -> Outcome:
    return case.bare(input_ids=torch.tensor([[5, 256]])), None


@way(FORWARD, "neither ids nor embeddings", refused="Give the model input_ids")
def _nothing(case: Case) -> Outcome:
    return case.bare(), None


# --- losses ------------------------------------------------------------------------------------------------

LOSS = "Losses and gradients"


def _losses(case: Case, found: Tensor, expected: Tensor) -> Outcome:
    found.backward()
    expected.backward()
    parts = [(found, expected)]
    if case.column in ("ptune", "deep_ptune"):
        parts.append((case.bare.prompts.input.grad, case.prompted.vectors.grad))
    if case.column == "deep_ptune":
        parts.append((case.bare.prompts.deep.grad, case.prompted.deep.grad))
    return tuple(one for one, _ in parts), tuple(other for _, other in parts)


@way(LOSS, "`labels`", note="peft's own model class scores the first token from the prompt's last one")
def _labels(case: Case) -> Outcome:
    ids, mask = padded("right")
    labels = ids.masked_fill(mask == 0, -100)
    if case.column == "none":
        case.bare.get_input_embeddings().weight.requires_grad_()
    found = case.model(input_ids=ids, attention_mask=mask, labels=labels).loss
    if case.wrapped:
        expected = case.local(input_ids=ids, attention_mask=mask, labels=labels).loss
        return found, expected
    return _losses(case, found, case.prompted.loss(ids, labels, mask))


@way(LOSS, "`labels` inside a session, which stays as it was")
def _labels_in_session(case: Case) -> Outcome:
    ids, other = random_ids(1, 7), random_ids(1, 6, seed=1)
    with case.bare.inference_session() as session:
        said = case.bare.generate(ids, max_new_tokens=4, **GREEDY)
        before = session.position
        loss = case.bare(input_ids=other, labels=other).loss
        assert session.position == before
        more = case.bare.generate(None, max_new_tokens=4, **GREEDY)
    plain = (
        case.prompted
        if case.column in ("ptune", "deep_ptune")
        else Prompted(case.whole, case.prompted.vectors[:0])
    )
    tokens = torch.cat([said, more], 1)
    return (loss, tokens), (plain.loss(other, other), plain.greedy(ids, 8))


@way(LOSS, "`labels` that are no tokens", refused="The label 999 is no token of this model")
def _wrong_label(case: Case) -> Outcome:
    ids = random_ids(1, 5)
    return case.model(input_ids=ids, labels=torch.full_like(ids, 999)).loss, None


def flat_batch() -> tuple[Tensor, Tensor, list[Tensor]]:
    """One row of three sequences, its position ids, and the sequences."""
    parts = [random_ids(1, length, seed=length) for length in (5, 3, 6)]
    positions = torch.cat([torch.arange(part.shape[1]) for part in parts])[None]
    return torch.cat(parts, 1), positions, parts


@way(
    LOSS,
    "batches without padding (`position_ids` that start anew, `use_cache=False`)",
    refused={"peft prompt": ""},
    note="a prompt stands in front of each sequence; peft leaves position ids out, with a warning",
)
def _flat(case: Case) -> Outcome:
    ids, positions, parts = flat_batch()
    labels = ids.masked_fill(positions == 0, -100)
    found = case.bare(input_ids=ids, position_ids=positions, labels=labels, use_cache=False)
    expected = torch.cat([case.prompted.logits(part) for part in parts], 1)
    loss = torch.nn.functional.cross_entropy(expected[0, :-1], labels[0, 1:])
    if case.column == "none":
        alone = case.whole(input_ids=ids, position_ids=positions, use_cache=False).logits
        assert (alone - expected).abs().max() < 1e-4
    return (found.logits, found.loss), (expected, loss)


@way(LOSS, "the same where a cache may be wanted", refused="Position ids start anew inside a row")
def _flat_cached(case: Case) -> Outcome:
    ids, positions, _ = flat_batch()
    return case.bare(input_ids=ids, position_ids=positions, labels=ids), None


@way(LOSS, "gradients through a session", refused="Gradients do not go through a session's caches")
def _through(case: Case) -> Outcome:
    ids = random_ids(1, 6)
    embeddings = case.bare.get_input_embeddings()(ids).detach().requires_grad_()
    with torch.no_grad():
        past = case.bare(input_ids=ids, use_cache=True).past_key_values
    return case.bare(inputs_embeds=embeddings, past_key_values=past).logits.sum().backward(), None


# --- loops of one's own --------------------------------------------------------------------------------------

LOOPS = "Loops of one's own"


def _loop(case: Case, mode: Any, *, train: bool = False, **options: Any) -> Outcome:
    """The cache that an answer carries, passed on; peft's class puts its prompt in front again, so bare."""
    ids = random_ids(2, 9)
    case.bare.train(train)
    with mode:
        first = case.bare(input_ids=ids[:, :5], **options)
        found = [first.logits]
        past = first.past_key_values
        for at in range(5, 9):
            answer = case.bare(input_ids=ids[:, at : at + 1], past_key_values=past, **options)
            found.append(answer.logits)
            past = answer.past_key_values
    plain = case.prompted if not case.wrapped else Prompted(case.whole, case.prompted.vectors[:0])
    return torch.cat(found, 1).detach(), plain.logits(ids)


@way(LOOPS, "passing the answer's cache on, without gradients")
def _loop_no_grad(case: Case) -> Outcome:
    return _loop(case, torch.no_grad())


@way(LOOPS, "with gradients enabled")
def _loop_grad(case: Case) -> Outcome:
    return _loop(case, torch.enable_grad())


@way(LOOPS, "in training mode")
def _loop_train(case: Case) -> Outcome:
    return _loop(case, torch.enable_grad(), train=True)


@way(LOOPS, "in inference mode")
def _loop_inference(case: Case) -> Outcome:
    return _loop(case, torch.inference_mode())


@way(LOOPS, "inside `with session`, naming no cache")
def _loop_in_session(case: Case) -> Outcome:
    ids = random_ids(2, 9)
    with case.bare.inference_session(), torch.no_grad():
        parts = [case.bare(input_ids=ids[:, cut]).logits for cut in (slice(0, 5), slice(5, 6), slice(6, 9))]
    plain = case.prompted if not case.wrapped else Prompted(case.whole, case.prompted.vectors[:0])
    return torch.cat(parts, 1), plain.logits(ids)


@way(LOOPS, "inside `with session` with gradients, in training mode")
def _loop_in_session_training(case: Case) -> Outcome:
    ids = random_ids(2, 9)
    case.bare.train()
    with case.bare.inference_session():
        parts = [case.bare(input_ids=ids[:, cut]).logits for cut in (slice(0, 5), slice(5, 9))]
    plain = case.prompted if not case.wrapped else Prompted(case.whole, case.prompted.vectors[:0])
    return torch.cat(parts, 1).detach(), plain.logits(ids)


@way(LOOPS, "`use_cache=False` inside `with session`, which stays as it was")
def _apart(case: Case) -> Outcome:
    ids, other = random_ids(1, 6), random_ids(1, 5, seed=1)
    plain = case.prompted if not case.wrapped else Prompted(case.whole, case.prompted.vectors[:0])
    with case.bare.inference_session() as session, torch.no_grad():
        first = case.bare(input_ids=ids[:, :4]).logits
        apart = case.bare(input_ids=other, use_cache=False).logits
        assert session.position == 4
        second = case.bare(input_ids=ids[:, 4:]).logits
    return (torch.cat([first, second], 1), apart), (plain.logits(ids), plain.logits(other))


@way(LOOPS, "`copy.deepcopy` of a cache, to use a beginning several times")
def _copied(case: Case) -> Outcome:
    import copy

    begin = random_ids(1, 6)
    plain = case.prompted if not case.wrapped else Prompted(case.whole, case.prompted.vectors[:0])
    found, expected = [], []
    with torch.no_grad():
        past = case.bare(input_ids=begin).past_key_values
        for seed in (1, 2):
            ids = torch.cat([begin, random_ids(1, 4, seed=seed)], 1)
            found.append(
                case.bare.generate(ids, past_key_values=copy.deepcopy(past), max_new_tokens=6, **GREEDY)
            )
            expected.append(plain.greedy(ids, 6))
        tail = random_ids(1, 3, seed=9)
        found.append(case.bare(input_ids=tail, past_key_values=past).logits)
        expected.append(plain.logits(torch.cat([begin, tail], 1))[:, 6:])
    return tuple(found), tuple(expected)


@way(LOOPS, "`crop` of a cache")
def _cropped(case: Case) -> Outcome:
    ids, other = random_ids(1, 8), random_ids(1, 3, seed=1)
    plain = case.prompted if not case.wrapped else Prompted(case.whole, case.prompted.vectors[:0])
    with torch.no_grad():
        past = case.bare(input_ids=ids).past_key_values
        past.crop(-3)
        found = case.bare(input_ids=other, past_key_values=past).logits
    return found, plain.logits(torch.cat([ids[:, :5], other], 1))[:, 5:]


@way(LOOPS, "a cache of one's own (`DynamicCache`, `StaticCache`, …)", refused=OWN_CACHE)
def _own_cache(case: Case) -> Outcome:
    from transformers import DynamicCache

    return case.bare(input_ids=random_ids(1, 5), past_key_values=DynamicCache()), None


@way(
    LOOPS,
    "all tokens again, though the cache holds some",
    refused="This call brings 8 tokens to a session that",
)
def _again(case: Case) -> Outcome:
    ids = random_ids(1, 8)
    with torch.no_grad():
        past = case.bare(input_ids=ids[:, :5]).past_key_values
        return case.bare(input_ids=ids, past_key_values=past, attention_mask=torch.ones_like(ids)), None


@way(LOOPS, "the same by position ids", refused="The position ids begin at 0, but the session holds 5")
def _again_positions(case: Case) -> Outcome:
    ids = random_ids(1, 8)
    with torch.no_grad():
        past = case.bare(input_ids=ids[:, :5]).past_key_values
        return case.bare(input_ids=ids, past_key_values=past, position_ids=torch.arange(8)[None]), None


@way(
    LOOPS,
    "a mask that changes what was said of cached tokens",
    refused="The attention mask says of tokens in",
)
def _changed_mask(case: Case) -> Outcome:
    ids, mask = padded("left")
    with torch.no_grad():
        past = case.bare(input_ids=ids, attention_mask=mask).past_key_values
        whole = torch.ones(3, 10)
        return case.bare(input_ids=ids[:, :1], past_key_values=past, attention_mask=whole), None


@way(LOOPS, "a closed session", refused="This session is closed")
def _closed(case: Case) -> Outcome:
    with case.bare.inference_session() as session:
        case.bare.generate(random_ids(1, 5), max_new_tokens=2, **GREEDY)
    return case.bare.generate(random_ids(1, 5), session=session, max_new_tokens=2), None


@way(LOOPS, "another model's session", refused="This session belongs to another model")
def _others(case: Case) -> Outcome:
    with case.other().inference_session() as session:
        return case.bare.generate(random_ids(1, 5), session=session, max_new_tokens=2), None


# --- generate ------------------------------------------------------------------------------------------------

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


@way(GENERATE, "`inputs_embeds`", refused={"peft prompt": ""}, note="peft takes ids")
def _generate_embeddings(case: Case) -> Outcome:
    ids = random_ids(2, 7)
    embeddings = case.bare.get_input_embeddings()(ids)
    found = case.bare.generate(inputs_embeds=embeddings, max_new_tokens=8, **GREEDY)
    return found, case.prompted.greedy(ids, 8)[:, 7:]


@way(GENERATE, "speculation from the prompt (`prompt_lookup_num_tokens`)", refused=PEFT_CUTS)
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


# --- sessions --------------------------------------------------------------------------------------------------

SESSIONS = "Sessions"
SECOND = {"peft prompt": PEFT_SESSION}


def _turns(
    case: Case, turns: Sequence[Tensor], *, last: Mapping[str, Any] | None = None, **options: Any
) -> Outcome:
    """Each turn answered with five tokens in one session, and the whole computed anew."""
    whole = turns[0][:, :0]
    said = []
    with case.bare.inference_session() as session:
        for index, ids in enumerate(turns):
            more = last if last is not None and index == len(turns) - 1 else options
            said.append(
                case.model.generate(input_ids=ids, session=session, max_new_tokens=5, **{**GREEDY, **more})
            )
    for ids in turns:
        whole = case.prompted.greedy(torch.cat([whole, ids], 1), 5)
    return torch.cat(said, 1), whole


@way(SESSIONS, "a first turn")
def _first_turn(case: Case) -> Outcome:
    return _turns(case, [random_ids(2, 7)])


@way(SESSIONS, "later turns", refused=SECOND)
def _later_turns(case: Case) -> Outcome:
    return _turns(case, [random_ids(2, 7), random_ids(2, 4, seed=1), random_ids(2, 3, seed=2)])


@way(SESSIONS, "later turns by speculation from the prompt", refused=SECOND)
def _later_lookup(case: Case) -> Outcome:
    turns = [random_ids(1, 5).repeat(1, 3), random_ids(1, 5).repeat(1, 2), random_ids(1, 5).repeat(1, 3)]
    return _turns(case, turns, prompt_lookup_num_tokens=4)


@way(SESSIONS, "later turns by speculation with a smaller model", refused=PEFT_CUTS)
def _later_assisted(case: Case) -> Outcome:
    turns = [random_ids(1, 7), random_ids(1, 5, seed=1)]
    return _turns(case, turns, assistant_model=case.assistant())


@way(SESSIONS, "later turns in chunks", refused=PEFT_CUTS)
def _later_chunks(case: Case) -> Outcome:
    return _turns(case, [random_ids(1, 7), random_ids(1, 9, seed=1)], prefill_chunk_size=3)


@way(SESSIONS, "`use_cache=False` in the checkpoint's settings", refused=SECOND)
def _unwilling(case: Case) -> Outcome:
    case.bare.generation_config.use_cache = False
    try:
        return _turns(case, [random_ids(2, 7), random_ids(2, 4, seed=1)])
    finally:
        case.bare.generation_config.use_cache = True


@way(SESSIONS, "`use_cache=False` with a session, whose conversation goes on")
def _without(case: Case) -> Outcome:
    return _turns(
        case, [random_ids(2, 7), random_ids(2, 4, seed=1), random_ids(2, 4, seed=2)], use_cache=False
    )


@way(SESSIONS, "a later turn with `use_cache=False`, and one after it", refused=SECOND)
def _mixed(case: Case) -> Outcome:
    return _turns(case, [random_ids(2, 7), random_ids(2, 4, seed=1)], last={"use_cache": False})


@way(SESSIONS, "going on without new tokens (`inputs=None`)", refused=SECOND)
def _going_on(case: Case) -> Outcome:
    ids = random_ids(2, 7)
    with case.bare.inference_session() as session:
        first = case.model.generate(input_ids=ids, session=session, max_new_tokens=4, **GREEDY)
        rest = case.bare.generate(None, session=session, max_new_tokens=5, **GREEDY)
    return torch.cat([first, rest], 1), case.prompted.greedy(ids, 9)


@way(SESSIONS, "a later turn by beam search, and one after it", refused=SECOND)
def _later_beams(case: Case) -> Outcome:
    ids, more = random_ids(1, 7), random_ids(1, 4, seed=1)
    beams = {**GREEDY, "num_beams": 3}
    with case.bare.inference_session() as session:
        first = case.model.generate(input_ids=ids, session=session, max_new_tokens=5, **GREEDY)
        second = case.model.generate(input_ids=more, session=session, max_new_tokens=5, **beams)
        third = case.model.generate(input_ids=more, session=session, max_new_tokens=5, **GREEDY)
    whole = torch.cat([case.prompted.greedy(ids, 5), more], 1)
    whole = case.expected(whole, max_new_tokens=5, **beams)
    whole = case.prompted.greedy(torch.cat([whole, more], 1), 5)
    return torch.cat([first, second, third], 1), whole


@way(SESSIONS, "a batch with padding, later turns", refused=SECOND)
def _later_padded(case: Case) -> Outcome:
    ids, mask = padded("left")
    more = random_ids(3, 4, seed=1)
    with case.bare.inference_session() as session:
        first = case.model.generate(
            input_ids=ids, attention_mask=mask, session=session, max_new_tokens=5, **GREEDY
        )
        second = case.model.generate(input_ids=more, session=session, max_new_tokens=5, **GREEDY)
    rows = [
        one[keep.bool()][None]
        for one, keep in zip(first, torch.nn.functional.pad(mask, (0, 5), value=1), strict=True)
    ]
    alone = rows_alone(case, [torch.cat([row, one[None]], 1) for row, one in zip(rows, more, strict=True)], 5)
    return second[:, 4:], torch.cat(alone)


@way(SESSIONS, "a batch of which one row ended early, later turns", refused=SECOND)
def _later_ended(case: Case) -> Outcome:
    ids, more = random_ids(2, 7), random_ids(2, 4, seed=1)
    end = int(case.prompted.greedy(ids, 3)[0, 8])
    with case.bare.inference_session() as session:
        first = case.model.generate(
            input_ids=ids, session=session, max_new_tokens=8, eos_token_id=end, pad_token_id=0, **GREEDY
        )
        second = case.model.generate(input_ids=more, session=session, max_new_tokens=5, **GREEDY)
    assert not first[0, 9:].any(), "the first row should have ended"
    rows = [first[:1, :9], first[1:]]
    alone = rows_alone(case, [torch.cat([row, one[None]], 1) for row, one in zip(rows, more, strict=True)], 5)
    return second[:, 4:], torch.cat(alone)


@way(SESSIONS, "a position set back", refused=SECOND)
def _back(case: Case) -> Outcome:
    ids, more = random_ids(1, 7), random_ids(1, 4, seed=1)
    with case.bare.inference_session() as session:
        first = case.model.generate(input_ids=ids, session=session, max_new_tokens=6, **GREEDY)
        session.position = 9
        second = case.model.generate(input_ids=more, session=session, max_new_tokens=5, **GREEDY)
    whole = torch.cat([first[:, :9], more], 1)
    return second[:, 4:], case.prompted.greedy(whole, 5)[:, 13:]


@way(SESSIONS, "`inputs_embeds` first, then ids", refused={"peft prompt": ""}, note="peft takes ids")
def _embeds_then_ids(case: Case) -> Outcome:
    ids, more = random_ids(2, 7), random_ids(2, 4, seed=1)
    embeddings = case.bare.get_input_embeddings()(ids)
    with case.bare.inference_session() as session:
        first = case.bare.generate(inputs_embeds=embeddings, session=session, max_new_tokens=5, **GREEDY)
        second = case.bare.generate(more, session=session, max_new_tokens=5, **GREEDY)
        third = case.bare.generate(None, session=session, max_new_tokens=3, **GREEDY)
    whole = case.prompted.greedy(ids, 5)
    whole = case.prompted.greedy(torch.cat([whole, more], 1), 8)
    return torch.cat([first, second, third], 1), whole[:, 7:]


@way(SESSIONS, "`inputs_embeds` twice", refused={"peft prompt": ""}, note="peft takes ids")
def _embeds_twice(case: Case) -> Outcome:
    ids, more = random_ids(2, 7), random_ids(2, 4, seed=1)
    embed = case.bare.get_input_embeddings()
    with case.bare.inference_session() as session:
        first = case.bare.generate(inputs_embeds=embed(ids), session=session, max_new_tokens=5, **GREEDY)
        second = case.bare.generate(inputs_embeds=embed(more), session=session, max_new_tokens=5, **GREEDY)
    whole = case.prompted.greedy(ids, 5)
    expected = case.prompted.greedy(torch.cat([whole, more], 1), 5)
    return torch.cat([first, second], 1), torch.cat([whole[:, 7:], expected[:, 16:]], 1)


@way(SESSIONS, "ids first, then `inputs_embeds`", refused={"peft prompt": ""}, note="peft takes ids")
def _ids_then_embeds(case: Case) -> Outcome:
    ids, more = random_ids(2, 7), random_ids(2, 4, seed=1)
    embed = case.bare.get_input_embeddings()
    with case.bare.inference_session() as session:
        first = case.bare.generate(ids, session=session, max_new_tokens=5, **GREEDY)
        second = case.bare.generate(inputs_embeds=embed(more), session=session, max_new_tokens=5, **GREEDY)
    whole = case.prompted.greedy(ids, 5)
    expected = case.prompted.greedy(torch.cat([whole, more], 1), 5)
    return torch.cat([first, second], 1), torch.cat([whole, expected[:, 16:]], 1)


@way(SESSIONS, "the same long prompt a second time, by speculation (its beginning is shared)")
def _shared(case: Case) -> Outcome:
    ids = random_ids(1, 12).repeat(1, 7)
    more = {} if case.wrapped else {"prompt_lookup_num_tokens": 4}
    found = [case.generate(ids, max_new_tokens=8, **more, **GREEDY) for _ in range(2)]
    return torch.cat(found), case.prompted.greedy(ids, 8).repeat(2, 1)


@way(SESSIONS, "the same long prompt with and without what stands around the model")
def _shared_bare(case: Case) -> Outcome:
    ids = random_ids(1, 80)
    plain = Prompted(case.whole, case.prompted.vectors[:0]) if case.wrapped else case.prompted
    bare, wrapped = (
        one.generate(input_ids=ids, max_new_tokens=6, **GREEDY) for one in (case.bare, case.model)
    )
    return (bare, wrapped), (plain.greedy(ids, 6), case.prompted.greedy(ids, 6))


@way(SESSIONS, "the same long prompt after the embeddings were changed")
def _shared_changed(case: Case) -> Outcome:
    ids = random_ids(1, 80)
    weights = [one.get_input_embeddings().weight for one in (case.bare, case.whole)]
    before = weights[0].detach().clone()
    case.generate(ids, max_new_tokens=2, **GREEDY)
    try:
        for weight in weights:
            weight.data.copy_(before.flip(0))
        return case.generate(ids, max_new_tokens=8, **GREEDY), case.prompted.greedy(ids, 8)
    finally:
        for weight in weights:
            weight.data.copy_(before)


@way(SESSIONS, "a fork of a session", refused=SECOND)
def _forked(case: Case) -> Outcome:
    ids, more = random_ids(1, 7), random_ids(1, 4, seed=1)
    with case.bare.inference_session() as session:
        first = case.model.generate(input_ids=ids, session=session, max_new_tokens=5, **GREEDY)
        with session.fork() as twin:
            other = case.model.generate(input_ids=more, session=twin, max_new_tokens=5, **GREEDY)
        rest = case.model.generate(session=session, max_new_tokens=5, **GREEDY)
    whole = case.prompted.greedy(ids, 10)
    branch = case.prompted.greedy(torch.cat([whole[:, :12], more], 1), 5)
    return (torch.cat([first, rest], 1), other), (whole, branch[:, 12:])


@way(
    SESSIONS,
    "more tokens than the session was opened for",
    refused="This call needs 13 tokens, but its session",
)
def _too_many(case: Case) -> Outcome:
    with case.bare.inference_session(max_length=12) as session:
        return case.bare.generate(random_ids(1, 8), session=session, max_new_tokens=6, **GREEDY), None


def document() -> str:
    """docs/compatibility.md."""
    head = (
        "# Which calls work\n\n"
        "Every public way to call a distributed model either equals the local Hugging Face model, or is refused in\n"
        "one sentence before anything is computed. `tests/client/test_ways_in.py` tries each row in each column, on\n"
        "models of several families, and this page is written from the same table\n"
        "(`python -m tests.client.ways`). “=”: equal (tokens, or logits and losses within 1e-4 in float32). The\n"
        'columns: without a prompt, with `tuning_mode="ptune"`, with `"deep_ptune"`, and wrapped by peft\n'
        "(`get_peft_model(model, PromptTuningConfig(…))`). “-”: not peft's to do.\n"
    )
    lines, section = [head], ""
    for one in WAYS:
        if one.section != section:
            section = one.section
            lines += [
                f"\n## {section}\n",
                "| call | none | ptune | deep_ptune | peft prompt | |",
                "|---|---|---|---|---|---|",
            ]
        cells, notes = [], [one.note] if one.note else []
        for column in COLUMNS:
            sentence = one.sentence(column)
            cells.append("=" if sentence is None else "-" if not sentence else "refused")
            if sentence:
                quoted = f"“{sentence} …”"
                notes += [] if quoted in notes else [quoted]
        lines.append(f"| {one.name} | {' | '.join(cells)} | {'; '.join(notes)} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    from pathlib import Path

    Path("docs/compatibility.md").write_text(document())
