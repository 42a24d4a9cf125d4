"""Every public way to call a model equals the local one or is refused in one sentence; see `ways/`."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModelForCausalLM
from tests.client.conftest import Pair
from tests.client.test_prefix import random_prefix
from tests.client.ways.document import document
from tests.client.ways.table import COLUMNS, WAYS, Case, Column, P, Way
from tests.reference import Prefixed, Prompted, local_model, random_ids, with_old_names
from tests.tiny_models import write_tiny
from transformers import LlamaForCausalLM

from corolla.errors import UsageError

PairOf = Callable[..., Pair]
FAMILIES = ("llama", "bloom", "gpt2", "gemma3_text")
LOGITS = 1e-4


def peft_of(model: Any, vectors: torch.Tensor) -> Any:
    """The model with peft's prompt tuning around it, its prompt given."""
    from peft import PromptTuningConfig, TaskType, get_peft_model

    wrapped = get_peft_model(model, PromptTuningConfig(task_type=TaskType.CAUSAL_LM, num_virtual_tokens=P))
    wrapped.prompt_encoder["default"].embedding.weight.data.copy_(vectors)
    return wrapped.eval()


def case_of(pair: Pair, column: Column, family: str, folder: Path) -> Case:
    """Fresh models on the pair's swarm; the local one is a copy, since peft changes it."""
    arguments = {} if column in ("none", "peft prompt") else {"tuning_mode": column, "pre_seq_len": P}
    bare = pair.model(**arguments)
    whole = deepcopy(pair.local)
    for one in (bare, whole):
        one.generation_config.eos_token_id = None
        one.generation_config.pad_token_id = 0
    size = whole.get_input_embeddings().weight.shape[1]
    vectors = torch.randn(P, size, generator=torch.Generator().manual_seed(3)) * 0.3
    deep = None
    if column == "none":
        vectors = vectors[:0]
    elif column == "prefix":
        random_prefix(bare)
    elif column != "peft prompt":
        bare.prompts.input.data.copy_(vectors)
        if bare.prompts.deep is not None:
            deep = bare.prompts.deep.data.normal_(0, 0.3, generator=torch.Generator().manual_seed(1))
    model, local = bare, whole
    if column == "peft prompt":
        model, local = peft_of(bare, vectors), peft_of(with_old_names(whole), vectors)

    def assistant() -> Any:
        made = local_model(write_tiny(family, folder / "assistant", seed=1, layers=2))
        made.generation_config.eos_token_id = None
        return made

    prompted: Any = Prompted(whole, vectors, deep)
    if column == "prefix":
        prompted = Prefixed(whole, bare.prompts.values)
    return Case(column, model, bare, local, whole, prompted, pair.model, assistant)


# Where what a prompt is decides; elsewhere deep prompts, which begin with a prompt, stand for plain ones.
PROMPTS_DIFFER = ("A call of the model", "Losses and gradients", "Loops of one's own", "Sessions")


WHOLE = ("`transformers.Trainer`", "TRL `SFTTrainer`")  # trainers that are tried with each kind of prompt


def is_for_every_run(one: Way, column: Column, family: str) -> bool:
    """Other families than the first are tried every time where families differ, and every night elsewhere."""
    if one.needs is not None:
        return False
    if family != FAMILIES[0]:
        return one.every_family and column == in_turn(one, "none", "deep_ptune", after=FAMILIES.index(family))
    refused = one.sentence(column) is not None and one.section != "Trainers"
    return refused or column in columns_of_every_run(one)


def columns_of_every_run(one: Way) -> set[Column | None]:
    """In the first family: all where the prompt decides; elsewhere deep prompts, and the other columns in turn."""
    if one.section == "Sessions":
        return {"deep_ptune", in_turn(one, "none", "prefix"), in_turn(one, "ptune", "peft prompt")}
    if one.section in PROMPTS_DIFFER:
        return set(COLUMNS)
    if one.section == "`generate`":
        return {"deep_ptune", in_turn(one, "none", "prefix", "peft prompt")}
    if one.section == "Trainers" and one.name not in WHOLE:
        return {in_turn(one, "none", "deep_ptune", "peft prompt")}
    return {"none", "deep_ptune", "peft prompt", *(["prefix"] if one.name == WHOLE[0] else [])}


def in_turn(one: Way, *columns: Column, after: int = 0) -> Column | None:
    """One of the columns that a row has, from row to row another."""
    tried = [column for column in columns if one.sentence(column) != ""]
    return tried[(WAYS.index(one) + after) % len(tried)] if tried else None


def marks(one: Way, column: Column, family: str) -> list[Any]:
    return [] if is_for_every_run(one, column, family) else [pytest.mark.nightly]


# bloom has no position ids and no router: what is given, or asked for, as such changes nothing, locally either.
IGNORED = ("the same by position ids", "the same where a cache may be wanted", "`output_router_logits=True`")
CELLS = [
    pytest.param(
        one,
        column,
        family,
        id=f"{one.section}: {one.name}-{column}-{family}",
        marks=marks(one, column, family),
    )
    for one in WAYS
    for column in COLUMNS
    for family in FAMILIES
    if one.sentence(column) != "" and not (family == "bloom" and one.name in IGNORED)
]


# What has padding between a prompt and a text, over which gemma3's windows reach: see `test_windows_over_padding`.
GAPS = (
    "with padding on the left",
    "a batch with padding on the left",
    "`transformers.pipeline`, several texts with padding",
    "a mask that changes what was said of cached tokens",
    "padding whose token has no embedding",
    "a mask of numbers with a point, or of true and false",
)
OVER_PADDING = r"Padding stands between tokens|The attention mask says of tokens"
# Where prompts change nothing about what can be tried.
CORE = ("A call of the model", "Losses and gradients", "Loops of one's own", "`generate`", "Sessions")
MISLED = "Generation goes on with|This call brings 4 tokens to a session"


def misled(column: Column) -> bool:
    """Whether peft's prompts go wrong in `generate`, locally too.

    transformers 5.24 calls a cache `cache`, and peft up to 0.21 looks for `past_key_values`: it takes every token for
    the first and puts its prompt in front again. That is refused.
    """
    if column != "peft prompt" or "cache" not in inspect.signature(LlamaForCausalLM.forward).parameters:
        return False
    return '"cache"' not in inspect.getsource(PeftModelForCausalLM.prepare_inputs_for_generation)


@pytest.mark.filterwarnings("ignore")  # libraries warn about their own choices
@pytest.mark.parametrize(("one", "column", "family"), CELLS)
def test_a_cell(pair_of: PairOf, tmp_path: Path, one: Way, column: Column, family: str) -> None:
    if one.needs is not None:
        pytest.importorskip(one.needs)
    case = case_of(pair_of(family), column, family, tmp_path)
    sentence = one.sentence(column)
    if family == "gemma3_text" and column != "none" and one.name in GAPS:
        with pytest.raises(UsageError, match=f"{OVER_PADDING}|{MISLED}"):
            one.run(case)
        return
    if sentence is not None:
        sentences = f"{re.escape(sentence)}|{MISLED}" if misled(column) else re.escape(sentence)
        with pytest.raises(one.error, match=sentences) as refusal:
            one.run(case)
        assert "\n" not in str(refusal.value) or one.error is not UsageError
        return
    try:
        found, expected = one.run(case)
    except UsageError as refusal:
        if misled(column) and re.match(MISLED, str(refusal)):
            return
        raise
    assert_equal(found, expected)


def test_windows_over_padding(pair_of: PairOf) -> None:
    """A local model's window counts padding between tokens: refused as soon as one reaches over it."""
    pair = pair_of("gemma3_text")
    model = pair.model(tuning_mode="ptune", pre_seq_len=P)
    ids, mask = random_ids(2, 9), torch.ones(2, 9, dtype=torch.long)
    mask[1, :4] = 0
    with torch.no_grad(), pytest.raises(UsageError, match="Padding stands between tokens"):
        model(ids, attention_mask=mask)
    holes = torch.ones_like(mask)
    holes[0, 3:5] = 0
    with torch.no_grad(), pytest.raises(UsageError, match="Padding stands between tokens"):
        pair.model()(ids, attention_mask=holes)
    # Three columns of a prompt, two of padding and one token are the window; the next token's leaves one of them out.
    options: dict[str, Any] = {"do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    few = mask[:, 2:5]
    local = Prompted(pair.local, model.prompts.input)
    found = model.generate(ids[:, :3], attention_mask=few, max_new_tokens=1, **options)
    wanted = local.generate(ids[:, :3], few, max_new_tokens=1, **options)
    assert_equal(found.logits, wanted.logits)
    computed = sum(pair.swarm.counted().values())
    with pytest.raises(UsageError, match="window of 6 tokens reaches over it"):
        model.generate(ids[:, :3], attention_mask=few, max_new_tokens=2, **options)
    assert sum(pair.swarm.counted().values()) == computed
    model.generate(ids[:, :3], max_new_tokens=12, **options)  # without padding between them


def assert_equal(found: Any, expected: Any) -> None:
    """Tokens are the same, other numbers within what float32 rounds."""
    if isinstance(expected, tuple):
        assert len(found) == len(expected)
        for one, other in zip(found, expected, strict=True):
            assert_equal(one, other)
        return
    assert found.shape == expected.shape
    if found.dtype == torch.int64:
        assert torch.equal(found, expected), f"{found.tolist()} instead of {expected.tolist()}"
    else:
        scale = max(1.0, float(expected.detach()[expected.isfinite()].abs().max()))
        both = found.isfinite() & expected.isfinite()
        assert torch.equal(found.isfinite(), expected.isfinite())
        assert (found - expected)[both].abs().max() < LOGITS * scale


def test_no_cell_is_left_out() -> None:
    assert len({(one.section, one.name) for one in WAYS}) == len(WAYS)
    assert all(any(one.sentence(column) != "" for column in COLUMNS) for one in WAYS)
    core = [one for one in WAYS if one.section in CORE]
    assert len(core) > 80
    assert all(one.sentence(column) != "" for one in core for column in COLUMNS[:4])


def test_the_document_says_what_is_tried() -> None:
    path = Path(__file__).parents[2] / "docs" / "compatibility.md"
    assert path.read_text() == document(), "write it anew: python -m tests.client.ways"
