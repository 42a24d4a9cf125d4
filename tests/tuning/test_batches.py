"""Examples are drawn from the right conversations, and labels stand where they are predicted."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.tuning.tiny_setup import conversations, settings

from corolla.data.collate import Collator
from corolla.data.conversation import Conversation, Turn
from corolla.data.render import Example
from corolla.errors import DataError
from corolla.tuning.batches import prepare
from corolla.tuning.evaluate import flat_targets


def test_held_out_conversations_are_not_trained_on_and_the_choice_is_repeatable(tokenizer: Any) -> None:
    first = prepare(tokenizer, settings(), conversations())
    again = prepare(tokenizer, settings(), conversations())
    trained = {example.conversation for example in first.train}
    held_out = {example.conversation for example in first.held_out}
    assert len(held_out) == 5
    assert not trained & held_out
    assert first.fingerprint() == again.fingerprint()
    assert first.fingerprint() != prepare(tokenizer, settings(seed=1), conversations()).fingerprint()


def test_samples_limit_the_training_examples(tokenizer: Any) -> None:
    assert len(prepare(tokenizer, settings(samples=7), conversations()).train) == 7
    assert len(prepare(tokenizer, settings(steps=2, batch_size=3), conversations()).train) == 6
    everything = prepare(tokenizer, settings(steps=None), conversations()).train
    assert len({example.conversation for example in everything}) == 24 - 5


def test_one_example_of_each_conversation_comes_before_a_second_of_any(tokenizer: Any) -> None:
    turns = [Turn("user", "so?"), Turn("assistant", "x" * 40)]
    long = [Conversation(tuple(turns * 4), id=f"long-{index}") for index in range(20)]
    chosen = settings(samples=18, held_out=4, steps=1)
    names = [example.conversation for example in prepare(tokenizer, chosen, long).train]
    assert len(names) == 18
    assert len(set(names)) == 16


def test_conversations_without_a_reply_are_an_error_that_names_the_purpose(tokenizer: Any) -> None:
    silent = [Conversation((Turn("user", "hello?"),), id=str(index)) for index in range(9)]
    with pytest.raises(DataError, match="training"):
        prepare(tokenizer, settings(), silent)


def test_a_kept_position_is_the_one_before_its_label_and_padding_is_never_kept() -> None:
    examples = [
        Example([5, 6, 7, 8], [5, -100, 7, 8], ["reply"] * 4, "a"),  # the first label is never predicted
        Example([9, 10], [-100, 10], ["context", "reply"], "b"),
    ]
    batch = Collator()(examples)
    expected = torch.tensor([[False, True, True, False], [True, False, False, False]])
    assert torch.equal(batch["logits_to_keep"], expected)
    assert flat_targets(batch["labels"]).tolist() == [7, 8, 10]
    assert batch["labels"][0, 0] == -100
    # Counted from the second token on, as the Trainer does it, or from the first: the same.
    assert (batch["labels"] != -100).sum() == batch["logits_to_keep"].sum()


def test_a_conversation_that_cannot_be_rendered_costs_itself_only(tokenizer: Any) -> None:
    call = {"tool_calls": [{"function": {"name": "weather", "arguments": "{}"}}]}
    about_tools = Conversation(
        (Turn("user", "rain?"), Turn("assistant", "", more=call), Turn("assistant", "No.")), id="tools"
    )
    prepared = prepare(tokenizer, settings(), [about_tools, *conversations()])
    assert prepared.notes == (
        "1 conversation left out that could not be rendered: Turns about tools need a chat template, which the "
        "delimiter style is not.",
    )
    assert prepared.fingerprint() == prepare(tokenizer, settings(), conversations()).fingerprint()
    with pytest.raises(DataError, match=r"too few to hold 5 out .*\. 1 conversation left out that could not"):
        prepare(tokenizer, settings(), [about_tools, *conversations()[:2]])
    with pytest.raises(DataError, match="None of 2 conversations can be rendered: Turns about tools"):
        prepare(tokenizer, settings(), [about_tools] * 2)


def test_a_delimiter_that_stands_in_a_text_is_said(tokenizer: Any) -> None:
    drawn = Conversation((Turn("user", "draw"), Turn("assistant", "a | b\n-----\nDone.")), id="drawn")
    (note,) = prepare(tokenizer, settings(), [drawn, *conversations()]).notes
    texts = 2 + sum(len(conversation.turns) for conversation in conversations())
    assert note.startswith(f"1 of {texts} texts contain the delimiter, 1 of them replies, ")
    assert note.endswith(r"such as --delimiter '\n=====\n'.")
    assert prepare(tokenizer, settings(), conversations()).notes == ()
