"""No reply is empty, whatever the model would like to say first, and nothing else is changed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.chat.tokenizers import merging_tokenizer, spacing_tokenizer
from tests.tiny_models import tiny_config
from transformers import AutoModelForCausalLM, LogitsProcessorList

from corolla.data.replies import SILENT_TOKENS, Beginnings
from corolla.errors import UsageError

DELIMITER = "\n-----\n"
END = 2
TOKENIZERS = pytest.mark.parametrize(
    "tokenizer", [merging_tokenizer(), spacing_tokenizer()], ids=["bytes", "words"]
)


def ids_of(tokenizer: Any, text: str) -> list[int]:
    ids: list[int] = tokenizer(text, add_special_tokens=False).input_ids
    return ids


def beginnings(tokenizer: Any, delimiter: str = DELIMITER) -> Beginnings:
    stop = ids_of(tokenizer, delimiter) if delimiter else [END]
    return Beginnings(tokenizer, stop_ids=stop, end_ids={END}, stop_text=delimiter)


def allowed(
    made: Beginnings, tokenizer: Any, said: list[int], *, most: int = 20, width: int | None = None
) -> set[int]:
    """The tokens that may follow, behind a prompt of three."""
    width = width or len(tokenizer)
    processor = made.processor(3, most)
    scores = processor(torch.tensor([[5, 5, 5, *said]]), torch.zeros(1, width))
    return set(torch.isfinite(scores[0]).nonzero().flatten().tolist())


@TOKENIZERS
@pytest.mark.parametrize("delimiter", [DELIMITER, "###", "<END>", "\n\n", " | ", "--o--"])
def test_a_reply_begins_with_no_part_of_the_delimiter(tokenizer: Any, delimiter: str) -> None:
    may = allowed(beginnings(tokenizer, delimiter), tokenizer, [])
    assert END not in may
    assert not may & set(ids_of(tokenizer, delimiter))
    for token in may:
        text = tokenizer.decode([token], skip_special_tokens=True)
        core, own = delimiter.strip(), text.strip()
        assert not (core and own.startswith(core))
        assert not (own and core.startswith(own))
        if own and not any(character.isalnum() for character in own):
            assert own not in core
    assert set(ids_of(tokenizer, "dog")) & may, "an ordinary word may come"


@TOKENIZERS
def test_white_space_is_a_piece_of_a_delimiter_that_begins_with_it(tokenizer: Any) -> None:
    made = beginnings(tokenizer)
    texts = [tokenizer.decode([token], skip_special_tokens=True) for token in allowed(made, tokenizer, [])]
    assert all(text.strip() or not text for text in texts)


@TOKENIZERS
def test_what_was_begun_may_end_at_once(tokenizer: Any) -> None:
    for delimiter in (DELIMITER, ""):
        made = beginnings(tokenizer, delimiter)
        everything = set(range(len(tokenizer)))
        assert allowed(made, tokenizer, ids_of(tokenizer, "dog")) == everything
        assert allowed(made, tokenizer, ids_of(tokenizer, "."), most=2) == everything


def test_with_a_template_only_the_end_is_kept_from_coming_first() -> None:
    tokenizer = merging_tokenizer()
    made = beginnings(tokenizer, "")
    space = ids_of(tokenizer, "\n")
    everything = set(range(len(tokenizer)))
    assert allowed(made, tokenizer, []) == everything - {END}
    assert allowed(made, tokenizer, space) == everything - {END}


@pytest.mark.parametrize("said", [SILENT_TOKENS, 1])
def test_white_space_alone_does_not_fill_a_reply(said: int) -> None:
    tokenizer = merging_tokenizer()
    made = beginnings(tokenizer, "")
    may = allowed(made, tokenizer, ids_of(tokenizer, "\n") * said, most=50 if said > 1 else 2)
    assert may
    assert all(tokenizer.decode([token], skip_special_tokens=True).strip() for token in may)


def test_a_character_of_several_tokens_that_is_white_space_begins_nothing() -> None:
    tokenizer = merging_tokenizer()
    space = ids_of(tokenizer, "\u2003")
    assert len(space) == 3
    assert END not in allowed(beginnings(tokenizer), tokenizer, space)
    face = ids_of(tokenizer, "😀")
    assert END in allowed(beginnings(tokenizer), tokenizer, face)


@pytest.mark.parametrize("width", [300, 500])
def test_a_head_may_have_more_rows_than_the_tokenizer_tokens_or_fewer(width: int) -> None:
    tokenizer = merging_tokenizer()
    made = beginnings(tokenizer)
    may = allowed(made, tokenizer, [], width=width)
    assert may - set(range(400, width)) == {token for token in allowed(made, tokenizer, []) if token < width}
    assert all(token < 400 for token in allowed(made, tokenizer, [], most=1, width=width))
    assert allowed(made, tokenizer, [width - 1], width=width)


def test_a_vocabulary_of_nothing_but_the_delimiter_is_refused() -> None:
    tokenizer = merging_tokenizer()
    everything = range(len(tokenizer))
    with pytest.raises(UsageError, match="--delimiter"):
        Beginnings(tokenizer, stop_ids=[], end_ids=everything, stop_text="")


@pytest.fixture(scope="module")
def eager() -> Any:
    """A model to which the delimiter's pieces and the end are always the likeliest."""
    tokenizer = merging_tokenizer()
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(tiny_config("llama", vocab_size=len(tokenizer))).eval()
    likely = torch.zeros(len(tokenizer))
    for text in (DELIMITER, "-", "--", "\n", " ", "\n\n"):
        likely[ids_of(tokenizer, text)] = 30.0
    likely[END] = 29.0
    head = torch.nn.Linear(model.config.hidden_size, len(tokenizer))
    head.weight.data, head.bias.data = model.lm_head.weight.data, likely
    model.lm_head = head
    return model


@pytest.mark.parametrize(
    "how",
    [
        {"do_sample": False},
        {"do_sample": True, "top_k": 3},
        {"do_sample": False, "num_beams": 3},
        {"do_sample": True, "num_beams": 2},
        {"do_sample": False, "min_new_tokens": 3},
        {"do_sample": False, "max_new_tokens": 1},
    ],
    ids=lambda how: " ".join(f"{name}={value}" for name, value in how.items()),
)
@pytest.mark.parametrize("delimiter", [DELIMITER, ""])
def test_whatever_way_tokens_are_chosen(eager: Any, how: dict[str, Any], delimiter: str) -> None:
    tokenizer = merging_tokenizer()
    made = beginnings(tokenizer, delimiter)
    ids = torch.tensor([[0, 0, 40, 41], [50, 51, 52, 53]])
    how = {"max_new_tokens": 12, **how}
    torch.manual_seed(1)
    found = eager.generate(
        ids,
        attention_mask=(ids != 0).long(),
        eos_token_id=END,
        pad_token_id=0,
        logits_processor=LogitsProcessorList([made.processor(4, how["max_new_tokens"])]),
        **how,
    )
    for row in found[:, 4:].tolist():
        text = tokenizer.decode(row, skip_special_tokens=True)
        reply = text.partition(delimiter)[0].strip("- \n") if delimiter else text.strip()
        assert reply, (row, text)
