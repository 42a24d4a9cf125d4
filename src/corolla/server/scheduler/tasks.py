"""Small things that asyncio leaves open: work that is given up, several results in their order.

Invariant: what these return from has left no task behind.
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Sequence
from typing import Any, TypeVar

T = TypeVar("T")


async def in_order(work: Sequence[Coroutine[Any, Any, T]]) -> list[T]:
    """All results; everything waits from the start, so that less urgent work does not come in between.

    The first error gives the rest up.
    """
    tasks = [asyncio.create_task(item) for item in work]
    try:
        return [await task for task in tasks]
    finally:
        for task in tasks:
            await give_up(task)


async def give_up(task: asyncio.Task[Any]) -> None:
    """End a task whose result nobody wants any more."""
    task.cancel()
    await asyncio.wait({task})
    if not task.cancelled():
        task.exception()  # seen, so that asyncio does not report it
