"""Libraries around a model: pipelines, streamers, accelerate, torch's own tools, the evaluation harness."""

from __future__ import annotations

from typing import Any

import torch
from tests.client.ways.table import GREEDY, Case, Outcome, way
from tests.client.ways.twin import twins
from tests.reference import random_ids
from tests.tuning.tiny_setup import byte_tokenizer
from torch import Tensor

LIBRARIES = "Libraries"
TEXTS = ("12 90 44 7 31 200", "8 15 77")
TEMPLATE = "{% for message in messages %}{{ ' ' + message.content + ' 9' }}{% endfor %}"


def tokenizer(side: str = "left") -> Any:
    """Its words are the numbers of a tiny model's tokens, each with a space before it."""
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    special = {"<pad>": 0, "<s>": 1, "</s>": 2}
    numbers = {f" {index}": index for index in range(3, 256)}
    words = Tokenizer(models.WordLevel({**special, **numbers}, unk_token="<pad>"))
    words.normalizer = normalizers.Replace(Regex("^ ?"), " ")
    words.pre_tokenizer = pre_tokenizers.Split(Regex(" [0-9]+"), "isolated")
    words.decoder = decoders.Fuse()
    made = PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", eos_token="</s>", bos_token="<s>", padding_side=side
    )
    made.model_input_names = ["input_ids", "attention_mask"]
    made.chat_template = TEMPLATE
    return made


def as_ids(text: str) -> Tensor:
    """The tokens of what the tokenizer has written."""
    return torch.tensor([[int(word) for word in text.split()]])


def written(ids: Tensor) -> Tensor:
    """Of token ids [1, n] those that a library writes, which leaves special ones out."""
    return ids[:, ids[0] > 2]


def _alone(case: Case, text: str, count: int) -> Tensor:
    return case.prompted.greedy(as_ids(text), count)


def _piped(model: Any, inputs: Any, **options: Any) -> Any:
    from transformers import pipeline

    made = pipeline("text-generation", model=model, tokenizer=tokenizer())
    return made(inputs, max_new_tokens=6, do_sample=False, **options)


@way(LIBRARIES, "`transformers.pipeline`, one text")
def _pipeline(case: Case) -> Outcome:
    found = _piped(case.model, TEXTS[0])[0]["generated_text"]
    return as_ids(found), written(_alone(case, TEXTS[0], 6))


@way(LIBRARIES, "`transformers.pipeline`, several texts with padding")
def _pipeline_batch(case: Case) -> Outcome:
    found, local = (
        [as_ids(one[0]["generated_text"]) for one in _piped(model, list(TEXTS), batch_size=2)]
        for model in (case.model, case.local)
    )
    if case.wrapped or case.column == "none":  # peft gives padded rows other positions than rows alone
        return tuple(found), tuple(local)
    return tuple(found), tuple(written(_alone(case, text, 6)) for text in TEXTS)


@way(LIBRARIES, "`transformers.pipeline`, chat messages")
def _pipeline_chat(case: Case) -> Outcome:
    messages = [{"role": "user", "content": TEXTS[0]}, {"role": "assistant", "content": "5"}]
    messages.append({"role": "user", "content": TEXTS[1]})
    found = _piped(case.model, messages)[0]["generated_text"][-1]["content"]
    ids = as_ids(f"{TEXTS[0]} 9 5 9 {TEXTS[1]} 9")
    return as_ids(found), written(case.prompted.greedy(ids, 6)[:, ids.shape[1] :])


@way(LIBRARIES, "`TextIteratorStreamer`, generation on a thread")
def _iterated(case: Case) -> Outcome:
    import threading

    from transformers import TextIteratorStreamer

    words = tokenizer()
    heard = TextIteratorStreamer(words, skip_prompt=True, timeout=60, skip_special_tokens=True)
    options = {**words(TEXTS[0], return_tensors="pt")}
    options |= {"streamer": heard, "max_new_tokens": 6, **GREEDY}
    thread = threading.Thread(target=case.model.generate, kwargs=options)
    thread.start()
    found = as_ids("".join(heard))
    thread.join()
    return found, written(_alone(case, TEXTS[0], 6)[:, 6:])


@way(LIBRARIES, "`stop_strings` with a tokenizer")
def _stops(case: Case) -> Outcome:
    ids, words = random_ids(1, 7), byte_tokenizer()
    options = {"tokenizer": words, "max_new_tokens": 8, **GREEDY}
    options["stop_strings"] = [words.decode(case.prompted.greedy(ids, 8)[0, 10:11])]
    return case.generate(ids, **options), case.expected(ids, **options)


# --- accelerate and torch ------------------------------------------------------------------------------------


@way(LIBRARIES, "`accelerate`: a prepared model and optimizer")
def _prepared(case: Case) -> Outcome:
    from accelerate import Accelerator

    ids = random_ids(2, 6)
    losses = []
    for model in twins(case):
        trained = [one for one in model.parameters() if one.requires_grad]
        prepared, optimizer = Accelerator(cpu=True).prepare(model, torch.optim.SGD(trained, lr=0.5))
        said = []
        for _ in range(3):
            loss = prepared(input_ids=ids, labels=ids).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            said.append(loss.detach())
        losses.append(torch.stack(said))
    return losses[0], losses[1]


@way(LIBRARIES, "`torch.autocast` in bfloat16", note="no further from float32 than the local model is")
def _autocast(case: Case) -> Outcome:
    ids = random_ids(2, 9)
    exact = case.prompted.logits(ids)
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.no_grad():
        found, local = case.logits(ids).float(), case.prompted.logits(ids).float()
    assert (found - exact).abs().max() <= (local - exact).abs().max()
    return exact, exact


@way(LIBRARIES, "`torch.compile`, which leaves the call as it is")
def _compiled(case: Case) -> Outcome:
    ids = random_ids(2, 7)
    with torch.no_grad():
        found = torch.compile(case.model, backend="eager")(input_ids=ids).logits
    return case.users(found), case.prompted.logits(ids)


@way(LIBRARIES, "`torch.utils.checkpoint` around a call")
def _checkpointed(case: Case) -> Outcome:
    from torch.utils.checkpoint import checkpoint

    embeddings = case.bare.get_input_embeddings()(random_ids(2, 7)).detach().requires_grad_()
    found = checkpoint(
        lambda x: case.model(inputs_embeds=x, use_cache=False).logits, embeddings, use_reentrant=False
    )
    found.square().mean().backward()
    gradient, embeddings.grad = embeddings.grad, None
    expected = case.prompted.logits(random_ids(2, 7))
    other = case.whole.get_input_embeddings()(random_ids(2, 7)).detach().requires_grad_()
    if case.column in ("none", "ptune", "peft prompt"):
        front = case.prompted.vectors.detach().expand(2, -1, -1)
        whole = case.whole(inputs_embeds=torch.cat([front, other], 1), use_cache=False).logits
        (whole if case.wrapped else whole[:, front.shape[1] :]).square().mean().backward()
        assert (gradient - other.grad).abs().max() < 1e-4 * other.grad.abs().max()
    return case.users(found), expected


@way(LIBRARIES, "`torch.func.functional_call`")
def _functional(case: Case) -> Outcome:
    ids = random_ids(2, 7)
    with torch.no_grad():
        return (
            case.users(torch.func.functional_call(case.model, {}, (), {"input_ids": ids}).logits),
            case.prompted.logits(ids),
        )


@way(
    LIBRARIES,
    "`torch.func.grad`, `jvp`",
    refused="In order to use an autograd.Function with functorch transforms",
    error=RuntimeError,
)
def _func_grad(case: Case) -> Outcome:
    embeddings = case.bare.get_input_embeddings()(random_ids(1, 5)).detach()
    return torch.func.grad(lambda x: case.bare(inputs_embeds=x).logits.mean())(embeddings), None


@way(LIBRARIES, "`torch.func.vmap`", refused="vmap: It looks like you're", error=RuntimeError)
def _vmap(case: Case) -> Outcome:
    return torch.func.vmap(lambda x: case.bare(input_ids=x[None]).logits)(random_ids(2, 5)), None


@way(
    LIBRARIES,
    "gradients of gradients (`create_graph=True`)",
    refused="Gradients of gradients do not go through",
)
def _double(case: Case) -> Outcome:
    embeddings = case.bare.get_input_embeddings()(random_ids(1, 5)).detach().requires_grad_()
    loss = case.model(inputs_embeds=embeddings, use_cache=False).logits.square().mean()
    return torch.autograd.grad(loss, embeddings, create_graph=True), None


@way(LIBRARIES, "`torch.export`", refused="A distributed model calls a swarm, so it cannot be exported")
def _exported(case: Case) -> Outcome:
    return torch.export.export(case.bare, (random_ids(1, 5),), strict=False), None


@way(LIBRARIES, "hooks on the embedding and the last norm")
def _hooked(case: Case) -> Outcome:
    ids = random_ids(2, 7)
    models = (case.bare, case.whole)
    parts = [part for one in models for part in (one.get_input_embeddings(), one.get_output_embeddings())]
    handles = [one.register_forward_hook(lambda _part, _args, output: output * 1.5) for one in parts]
    try:
        with torch.no_grad():
            return case.logits(ids), case.prompted.logits(ids)
    finally:
        for handle in handles:
            handle.remove()


@way(
    LIBRARIES,
    "the base model by itself (`model.base_model(…)`, `get_decoder()`)",
    refused={"peft prompt": ""},
)
def _base(case: Case) -> Outcome:
    ids = random_ids(2, 7)
    head = case.whole.get_output_embeddings()
    with torch.no_grad():
        found = [
            head(base(input_ids=ids).last_hidden_state)
            for base in (case.bare.base_model, case.bare.get_decoder())
        ]
        return torch.stack(found), case.prompted.logits(ids).repeat(2, 1, 1, 1)


# --- lm-evaluation-harness -------------------------------------------------------------------------------------


def _harness(model: Any) -> Any:
    from lm_eval.models.huggingface import HFLM

    words = tokenizer()
    words.name_or_path = "words"
    return HFLM(pretrained=model, tokenizer=words, batch_size=2, max_length=64, add_bos_token=False)


def _requests(kind: str, arguments: list[Any]) -> list[Any]:
    from lm_eval.api.instance import Instance

    return [Instance(kind, {}, one, index) for index, one in enumerate(arguments)]


@way(LIBRARIES, "`lm_eval`: log-likelihoods", needs="lm_eval")
def _likelihoods(case: Case) -> Outcome:
    pairs = [(TEXTS[0], " 17 3"), (TEXTS[1], " 90"), (TEXTS[1], " 5 6 7 8")]
    found = _harness(case.model).loglikelihood(_requests("loglikelihood", pairs))
    if (
        case.wrapped
    ):  # peft's logits have the prompt's positions too, and the harness takes them for the text's
        local = _harness(case.local).loglikelihood(_requests("loglikelihood", pairs))
        return torch.tensor([one for one, _ in found]), torch.tensor([one for one, _ in local])
    expected = []
    for before, after in pairs:
        ids, count = as_ids(before + after), as_ids(after).shape[1]
        logits = case.prompted.logits(ids)[0, -count - 1 : -1].log_softmax(-1)
        expected.append(logits.gather(1, ids[0, -count:, None]).sum())
    return torch.tensor([one for one, _ in found]), torch.stack(expected).detach()


@way(LIBRARIES, "`lm_eval`: generation", needs="lm_eval")
def _until(case: Case) -> Outcome:
    arguments = [(text, {"until": ["@"], "max_gen_toks": 6}) for text in TEXTS]
    found = _harness(case.model).generate_until(_requests("generate_until", arguments))
    if case.wrapped:  # peft gives padded rows other positions than rows alone
        local = _harness(case.local).generate_until(_requests("generate_until", arguments))
        return tuple(as_ids(one) for one in found), tuple(as_ids(one) for one in local)
    expected = [written(_alone(case, text, 6)[:, as_ids(text).shape[1] :]) for text in TEXTS]
    return tuple(as_ids(one) for one in found), tuple(expected)
