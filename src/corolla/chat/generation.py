"""One `generate` call on a thread of its own, and its reply as an iterator of text.

Invariant: the call always runs to a proper end. Ctrl-C reaches the main thread only; a reply that is stopped
ends with the token that is being computed, which is not taken, so the session is never left half way.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from queue import SimpleQueue
from typing import Any

import torch
from torch import Tensor
from transformers import StoppingCriteria, StoppingCriteriaList

from corolla.data.replies import ReplyReader


class Generation:
    """Starts at once; `pieces` are to be read, or `stop` called."""

    def __init__(
        self, generate: Callable[[StoppingCriteriaList], object], reader: ReplyReader, *, known: int
    ) -> None:
        """`generate(criteria)` is run with criteria that feed the reader and end when it has ended.

        It goes on after `known` tokens.
        """
        self.reader = reader
        self.error: BaseException | None = None
        self.stopped = False  # by us, not by the model or the limit
        self._generate = generate
        self._known = known
        self._pieces: SimpleQueue[str | None] = SimpleQueue()
        self._stop = threading.Event()
        # A daemon: a process that wants to end does not wait for a server that says nothing.
        self._thread = threading.Thread(target=self._run, name="chat-reply", daemon=True)
        self._thread.start()

    def pieces(self) -> Iterator[str]:
        """The reply's text as it comes. Raises what `generate` raised."""
        while (piece := self._pieces.get()) is not None:
            yield piece
        if self.error is not None:
            raise self.error

    def stop(self) -> None:
        """Wait for the end, which comes with the next token; at once when it is over already."""
        if self._thread.is_alive():
            self._stop.set()
            self._thread.join()

    def _run(self) -> None:
        try:
            self._generate(StoppingCriteriaList([_ReadTokens(self._take, self._known)]))
            if not self.reader.ended:
                self._show(self.reader.finish())
        except BaseException as error:  # handed to whoever reads the pieces
            self.error = error
        finally:
            self._pieces.put(None)

    def _take(self, token: int) -> bool:
        """Read a token; whether the reply is over."""
        if self._stop.is_set():  # whoever stopped it will not see this token
            self.stopped = True
            return True
        self._show(self.reader.push(token))
        return self.reader.ended

    def _show(self, piece: str) -> None:
        if piece:
            self._pieces.put(piece)


class _ReadTokens(StoppingCriteria):  # type: ignore[misc]
    """Sees the new tokens of the one sequence as soon as they are chosen; speculation chooses several at a time."""

    def __init__(self, take: Callable[[int], bool], known: int) -> None:
        self._take = take
        self._known = known

    def __call__(self, input_ids: Tensor, scores: Any, **_kwargs: Any) -> Tensor:
        new = input_ids[0, self._known :].tolist()
        self._known = int(input_ids.shape[1])
        over = any(self._take(token) for token in new)
        return torch.tensor([over], device=input_ids.device)
