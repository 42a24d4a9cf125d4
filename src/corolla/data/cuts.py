"""Where the tokens of a text begin and end.

Invariant: a cut that is `clean` parts the text's tokens as it parts the text: those before it are what the
tokenizer makes of the text before it.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

ANCHORS = ("\n", "a")  # what a text is put behind to see its tokens inside of another


@dataclass(frozen=True)
class Cut:
    """`index` tokens lie before a place in a text. Where it is not `clean`, the next token spans the place."""

    index: int
    clean: bool


def ids_of(tokenizer: Any, text: str) -> list[int]:
    """The tokens of a text, without those that the tokenizer adds."""
    ids: list[int] = tokenizer(text, add_special_tokens=False, verbose=False).input_ids
    return ids


def all_ids(tokenizer: Any, texts: Sequence[str]) -> list[list[int]]:
    """The tokens of each text, in one call."""
    if not texts:
        return []
    ids: list[list[int]] = tokenizer(list(texts), add_special_tokens=False, verbose=False).input_ids
    return ids


def ids_inside(tokenizer: Any, text: str) -> list[int]:
    """The tokens that a text has inside of another: SentencePiece puts a space in front of whole texts only."""
    for anchor in ANCHORS:
        before, both = ids_of(tokenizer, anchor), ids_of(tokenizer, anchor + text)
        if both[: len(before)] == before:
            return both[len(before) :]
    return ids_of(tokenizer, text)


def cut(tokenizer: Any, text: str, places: Sequence[int]) -> tuple[list[int], list[Cut]]:
    """A text's tokens, and where `places` in it (numbers of characters) fall between them."""
    if not tokenizer.is_fast:
        ids = ids_of(tokenizer, text)
        return ids, [_by_prefix(tokenizer, text, ids, place) for place in places]
    encoded = tokenizer(text, add_special_tokens=False, verbose=False, return_offsets_mapping=True)
    ids = list(encoded.input_ids)
    starts = [start for start, _ in encoded.offset_mapping]
    ends = list(accumulate((end for _, end in encoded.offset_mapping), max))
    return ids, [
        _by_offsets(starts, ends, place) or _by_prefix(tokenizer, text, ids, place) for place in places
    ]


def _by_offsets(starts: list[int], ends: list[int], place: int) -> Cut | None:
    """None where offsets do not tell: characters that no token has, and tokens that have no character."""
    index = bisect_right(ends, place)
    if place == 0 or index == 0 or ends[index - 1] != place or starts[index - 1] == place:
        spanned = index < len(starts) and starts[index] < place
        return Cut(index, clean=False) if spanned else None
    return Cut(index, clean=index == len(starts) or starts[index] >= place)


def _by_prefix(tokenizer: Any, text: str, ids: list[int], place: int) -> Cut:
    before = ids_of(tokenizer, text[:place])
    index = 0
    while index < min(len(before), len(ids)) and before[index] == ids[index]:
        index += 1
    return Cut(index, clean=index == len(before))


def shared(first: Sequence[int], second: Sequence[int]) -> int:
    """How many leading tokens are equal."""
    count = 0
    for one, other in zip(first, second, strict=False):
        if one != other:
            break
        count += 1
    return count
