"""Text from elsewhere, made fit to be used: for a model, for a terminal, for one line of a table or a log.

Invariant: what comes out of here can be encoded as UTF-8, and what `for_terminal` and `one_line` give steers
no terminal: a control sequence loses the character that begins it, and its rest is harmless text. So a stream
may be cleaned piece by piece, wherever a sequence was cut.
"""

from __future__ import annotations

MOST_CHARACTERS = 20_000  # of one message to a person
MOST_LINES = 200

# C0 and C1 control characters but newline and tab, and those that turn the direction of other text around.
_STEERING = {
    **{code: None for code in (*range(32), *range(127, 160)) if chr(code) not in "\n\t"},
    **dict.fromkeys((*range(0x202A, 0x202F), *range(0x2066, 0x206A))),
    0x2028: "\n",
    0x2029: "\n",
}


def well_formed(text: str) -> str:
    """`text` without lone surrogates, which no tokenizer, file or terminal takes; pairs become their letter."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def printable(text: str) -> str:
    """`text`, or a piece of a stream of it, without what would steer a terminal; not shortened."""
    return well_formed(text).translate(_STEERING)


def for_terminal(text: object, *, characters: int = MOST_CHARACTERS, lines: int = MOST_LINES) -> str:
    """`str(text)` as a person may be shown it: nothing that steers a terminal, and not without end."""
    clean = printable(str(text)[: 4 * characters])
    kept = clean.split("\n", lines)
    shown = "\n".join(kept[:lines])
    return shown if len(shown) <= characters and len(kept) <= lines else f"{shown[:characters]} …"


def one_line(text: object, *, characters: int = 200) -> str:
    """`str(text)` for a cell of a table or a name in a sentence: one short line that steers no terminal."""
    clean = " ".join(for_terminal(text, characters=4 * characters).split())
    return clean if len(clean) <= characters else f"{clean[: characters - 1]}…"
