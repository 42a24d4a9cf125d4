"""Texts in which the delimiter stands by itself.

A reply ends where the delimiter begins, so a model that learns to say the delimiter inside of a reply is cut
off there, in every chat.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from corolla.data.conversation import Conversation

SIGNS = "-=#~*+_"


def delimiter_note(conversations: Sequence[Conversation], delimiter: str) -> str | None:
    """A sentence on the texts that contain `delimiter`, with one that none contains; None where none does."""
    texts = [turn.text for conversation in conversations for turn in conversation.turns]
    found = sum(delimiter in text for text in texts)
    if not found:
        return None
    replies = sum(
        turn.role == "assistant" and delimiter in turn.text
        for conversation in conversations
        for turn in conversation.turns
    )
    other = next(one for one in _others() if not any(one in text for text in texts))
    return (
        f"{found:,} of {len(texts):,} texts contain the delimiter, {replies:,} of them replies, which a chat would "
        f"end there: give one that none contains, such as --delimiter '{_typed(other)}'."
    )


def _others() -> Iterator[str]:
    """Delimiters like the default, longer and longer."""
    count = 5
    while True:
        yield from (f"\n{sign * count}\n" for sign in SIGNS)
        count += 1


def _typed(delimiter: str) -> str:
    """As it is typed on a command line."""
    return delimiter.replace("\n", "\\n").replace("\t", "\\t")
