"""What strangers write reaches neither a tokenizer nor a terminal as it is."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from corolla.text import for_terminal, one_line, printable, well_formed

ANY_TEXT = st.text(st.characters(codec=None, exclude_categories=()))


@pytest.mark.parametrize(
    "text",
    [
        "\x1b[31mred\x1b[0m",
        "\x1b]0;title\x07",
        "\x1b]52;c;Y2xpcA==\x1b\\",
        "\x9b2J",
        "\x90q\x9c",
        "over\rwrite",
        "back\x08space",
        "\u202egnp.exe",
        "\u2066x\u2069",
        "\x00\x7f",
        "\ud800 alone",
    ],
)
def test_what_steers_a_terminal_is_gone(text: str) -> None:
    for clean in (for_terminal(text), one_line(text), printable(text)):
        assert all(letter.isprintable() or letter in "\n\t" for letter in clean)
        clean.encode()


@given(ANY_TEXT)
def test_any_text_can_be_shown(text: str) -> None:
    for_terminal(text).encode()
    assert not set(printable(text)) & {"\x1b", "\x9b", "\r", "\u202e"}
    assert "\n" not in one_line(text)


@given(ANY_TEXT, st.integers(0, 20))
def test_a_stream_can_be_cut_anywhere(text: str, at: int) -> None:
    text = text.encode("utf-16", "replace").decode("utf-16")
    text = f"\x1b[{text}\x1b]8;;x\x1b\\"
    assert printable(text[:at]) + printable(text[at:]) == printable(text)


def test_text_without_such_characters_stays() -> None:
    text = "Grüße, 日本語\n\t\u05e9\u05dc 👩\u200d👩\u200d👧 [bold]"
    assert for_terminal(text) == printable(text) == well_formed(text) == text


def test_surrogates() -> None:
    assert well_formed("\ud83d\ude00") == "😀"
    assert well_formed("a\ud83db") == "a\ufffdb"


def test_it_has_an_end() -> None:
    assert len(for_terminal("x" * 10**6)) < 21_000
    assert for_terminal("a\n" * 1000).count("\n") < 201
    assert one_line("a " * 1000).endswith("…")
    assert len(one_line("a" * 1000)) == 200
