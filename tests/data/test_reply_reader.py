"""What is shown of a reply, and which tokens are kept, whatever the tokens are."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.chat.tokenizers import merging_tokenizer, spacing_tokenizer

from corolla.data.replies import ReplyReader

DELIMITER = "\n-----\n"
END = 2
TEXTS = st.text(st.characters(codec="utf-8", exclude_characters="\ufffd"), max_size=40)


def ids_of(tokenizer: Any, text: str) -> list[int]:
    ids: list[int] = tokenizer(text, add_special_tokens=False).input_ids
    return ids


def reader_of(tokenizer: Any, delimiter: str = DELIMITER) -> ReplyReader:
    stop = [END] if not delimiter else ids_of(tokenizer, delimiter)
    return ReplyReader(tokenizer, stop_ids=stop, end_ids={END}, stop_text=delimiter)


def read(reader: ReplyReader, ids: list[int]) -> list[str]:
    """The pieces shown, until the reply ends or the tokens do."""
    pieces = []
    for token in ids:
        pieces.append(reader.push(token))
        if reader.ended:
            return pieces
    return [*pieces, reader.finish()]


@given(TEXTS)
def test_pieces_joined_are_the_text_and_characters_come_whole(text: str) -> None:
    tokenizer = merging_tokenizer()
    reader = reader_of(tokenizer, "")
    ids = ids_of(tokenizer, text)
    pieces = read(reader, ids)
    assert "".join(pieces) == reader.text == text
    assert not any("\ufffd" in piece for piece in pieces)
    assert reader.ids == ids


@given(st.lists(st.integers(3, 399), max_size=30))
def test_any_tokens_give_what_decoding_them_gives(ids: list[int]) -> None:
    tokenizer = merging_tokenizer()
    reader = reader_of(tokenizer, "")
    assert "".join(read(reader, ids)) == reader.text == tokenizer.decode(ids)
    assert reader.ids == ids


def test_text_comes_with_its_token_and_not_later() -> None:
    tokenizer = merging_tokenizer()
    ids = ids_of(tokenizer, "the quick wizard jumps")
    pieces = read(reader_of(tokenizer), ids)
    assert [piece.strip() for piece in pieces[:-1]] == [tokenizer.decode([token]).strip() for token in ids]


def test_a_character_of_several_tokens_waits_for_its_last() -> None:
    tokenizer = merging_tokenizer()
    ids = ids_of(tokenizer, "😀")
    assert len(ids) == 4
    assert read(reader_of(tokenizer), ids) == ["", "", "", "😀", ""]


def test_words_keep_their_spaces() -> None:
    tokenizer = spacing_tokenizer()
    reader = reader_of(tokenizer)
    assert "".join(read(reader, ids_of(tokenizer, "the quick brown fox"))) == "the quick brown fox"


@pytest.mark.parametrize("tokenizer", [merging_tokenizer(), spacing_tokenizer()], ids=["bytes", "words"])
@given(st.sampled_from(["", "the fox", "said:\n", "a --- b", "the end.", "\n\n----"]))
def test_the_delimiter_ends_a_reply_and_is_never_shown(tokenizer: Any, said: str) -> None:
    reader = reader_of(tokenizer)
    own = ids_of(tokenizer, said)
    pieces = read(reader, [*own, *ids_of(tokenizer, DELIMITER), *ids_of(tokenizer, "more")])
    assert reader.ended
    assert "".join(pieces) == reader.text == said
    assert reader.ids == own


def test_a_delimiter_in_other_tokens_ends_the_reply_too() -> None:
    tokenizer = merging_tokenizer()
    one_by_one = [token for character in DELIMITER for token in ids_of(tokenizer, character)]
    own = ids_of(tokenizer, "I do not know")
    assert one_by_one != ids_of(tokenizer, DELIMITER)
    reader = reader_of(tokenizer)
    pieces = read(reader, [*own, *one_by_one])
    assert reader.ended
    assert "".join(pieces) == "I do not know"
    assert reader.ids == own


def test_a_token_that_straddles_the_delimiter_is_tokenized_anew() -> None:
    tokenizer = merging_tokenizer()
    straddling = next(token for token in range(400) if tokenizer.decode([token]) == ".\n")
    own = ids_of(tokenizer, "the dog")
    rest = [token for character in DELIMITER[1:] for token in ids_of(tokenizer, character)]
    reader = reader_of(tokenizer)
    pieces = read(reader, [*own, straddling, *rest])
    assert reader.ended
    assert "".join(pieces) == "the dog."
    assert reader.ids == [*own, *ids_of(tokenizer, ".")]


@pytest.mark.parametrize("tokenizer", [merging_tokenizer(), spacing_tokenizer()], ids=["bytes", "words"])
@pytest.mark.parametrize("ending", [[], [END]], ids=["cut", "end token"])
def test_a_delimiter_that_was_only_begun_is_not_the_replys(tokenizer: Any, ending: list[int]) -> None:
    own, delimiter = ids_of(tokenizer, "And then what?"), ids_of(tokenizer, DELIMITER)
    for size in range(1, len(delimiter)):
        reader = reader_of(tokenizer)
        pieces = read(reader, [*own, *delimiter[:size], *ending])
        assert "".join(pieces) == "And then what?"
        assert reader.ids == own
        assert reader.ended == bool(ending)


@pytest.mark.parametrize("begun", ["\n", "\n-", "\n----"])
def test_nor_is_one_begun_in_other_tokens(begun: str) -> None:
    tokenizer = merging_tokenizer()
    reader = reader_of(tokenizer)
    ids = [token for text in ("And then what?", *begun) for token in ids_of(tokenizer, text)]
    assert "".join(read(reader, ids)) == "And then what?"
    assert reader.ids == ids_of(tokenizer, "And then what?")


def test_what_only_looked_like_a_delimiter_is_shown_once_it_is_clear() -> None:
    tokenizer = merging_tokenizer()
    text = "He said:\n--\nI do\n\n-----"
    reader = reader_of(tokenizer)
    assert "".join(read(reader, ids_of(tokenizer, text + " not"))) == text + " not"
    assert not reader.ended


@pytest.mark.parametrize("delimiter", [DELIMITER, ""])
def test_an_end_token_ends_a_reply(delimiter: str) -> None:
    tokenizer = merging_tokenizer()
    own = ids_of(tokenizer, "the lazy dog")
    reader = reader_of(tokenizer, delimiter)
    assert "".join(read(reader, [*own, END, *own])) == "the lazy dog"
    assert reader.ended
    assert reader.ids == own
