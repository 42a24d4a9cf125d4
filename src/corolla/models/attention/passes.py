"""In which passes a sequence's tokens came.

Some families' code computes a token by itself, behind others, otherwise than among others (`checks/steps.py`). What is
computed anew of these comes in passes as it came first.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

LEAST = 3  # tokens that are taken of a longer pass


def lengths_of(passes: Iterable[tuple[int, bool]]) -> list[int]:
    """Tokens of each pass, of those that have so many and whether these are what is left of more.

    One token that is left of more goes with those before it, if they were several as well.
    """
    found: list[int] = []
    for length, cut in passes:
        if length == 1 and cut and found and found[-1] > 1:
            found[-1] += 1
        else:
            found.append(length)
    return found


def piece_of(left: int, most: int) -> int:
    """How many of a pass's tokens come next, of so many that are left: about `most`, and no last one by itself."""
    taken = min(left, max(LEAST, most))
    return taken - 1 if left - taken == 1 else taken


def in_groups(lengths: Iterable[int], most: int) -> Iterator[list[int]]:
    """The passes in groups of about `most` tokens at most, long ones in pieces."""
    group: list[int] = []
    for length in lengths:
        while length:
            room = most - sum(group)
            if group and room < min(length, LEAST):
                yield group
                group, room = [], most
            group.append(piece_of(length, room))
            length -= group[-1]
    if group:
        yield group
