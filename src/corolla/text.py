"""Text from elsewhere, made fit to be used: for a model, for a terminal, for one line of a table or a log.

Everything that came over the network or from a file passes here before somebody reads it: as the text of an error
(`errors.py` sees to it), in a log (`get_logger`), or on the terminal (`cli/terminal.py`).

Invariant: what comes out of here can be encoded as UTF-8, and what `for_terminal` and `one_line` give steers
no terminal and hides nothing: a control sequence loses the character that begins it, and its rest is harmless text.
So a stream may be cleaned piece by piece, wherever a sequence was cut.
"""

from __future__ import annotations

import logging
import traceback

MOST_CHARACTERS = 20_000  # of one message to a person
MOST_LINES = 200

# C0 and C1 control characters but newline and tab, those that turn the direction of other text around, and those that
# nobody sees: two names that look alike should be alike. Joiners stay, with which scripts and emoji are written.
_STEERING = {
    **{code: None for code in (*range(32), *range(127, 160)) if chr(code) not in "\n\t"},
    **dict.fromkeys((*range(0x202A, 0x202F), *range(0x2066, 0x2070), 0x061C, 0x200E, 0x200F)),
    **dict.fromkeys(
        (0x00AD, 0x034F, 0x115F, 0x1160, 0x180E, 0x200B, *range(0x2060, 0x2066), 0x3164, 0xFEFF, 0xFFA0)
    ),
    **dict.fromkeys((*range(0xFFF9, 0xFFFC), *range(0xE0000, 0xE0080))),
    0x2028: "\n",
    0x2029: "\n",
}


def well_formed(text: str) -> str:
    """`text` without lone surrogates, which no tokenizer, file or terminal takes; pairs become their letter."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def printable(text: str) -> str:
    """`text`, or a piece of a stream of it, without what would steer a terminal; not shortened."""
    return well_formed(text).translate(_STEERING)


def for_terminal(text: object, *, characters: int = MOST_CHARACTERS) -> str:
    """`str(text)` as a person may be shown it: nothing that steers a terminal, and not without end."""
    clean = printable(str(text)[: 4 * characters])
    kept = clean.split("\n", MOST_LINES)
    shown = "\n".join(kept[:MOST_LINES])
    return shown if len(shown) <= characters and len(kept) <= MOST_LINES else f"{shown[:characters]} …"


def one_line(text: object, *, characters: int = 200) -> str:
    """`str(text)` for a cell of a table or a name in a sentence: one short line that steers no terminal."""
    clean = " ".join(for_terminal(text, characters=4 * characters).split())
    return clean if len(clean) <= characters else f"{clean[: characters - 1]}…"


def get_logger(name: str) -> logging.Logger:
    """The logger of one of our modules: what it logs is clean whoever shows it, one line a message.

    A second line could pass for another message.
    """
    logger = logging.getLogger(name)
    if _cleaned not in logger.filters:
        logger.addFilter(_cleaned)
    return logger


def _cleaned(record: logging.LogRecord) -> bool:
    record.msg, record.args = one_line(record.getMessage(), characters=2000), None
    if record.exc_info and record.exc_info[0] is not None:
        lines = "".join(traceback.format_exception(*record.exc_info)).rstrip("\n")
        record.exc_text = for_terminal(lines)  # which formatters take instead of their own
    return True
