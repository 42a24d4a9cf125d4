"""Conversations that a new one may begin with, so that a prefix they share is computed once.

Invariant: a session begins only with tokens that are its own, under the same prompts, from one that this
client itself has had; what was kept of closed sessions stays within `KEPT` sessions and `KEPT_BYTES`.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from corolla.client.sessions.chain import SessionChain

LEAST_TOKENS = 64  # a shorter prefix is computed faster than it is asked for
KEPT = 8
KEPT_BYTES = 256 * 2**20


@dataclass(frozen=True)
class CachedPrefix:
    """What a session of one row holds: its tokens int64 [n], where they are, and its input prompt [P, H] or a prefix's
    digest.

    `version` is the chain's, read before the tokens: another thread may take some back meanwhile.
    """

    ids: Tensor
    chain: SessionChain
    prompt: Tensor | str | None
    version: int


def common_length(one: Tensor, other: Tensor) -> int:
    """How many first tokens two histories, int64 [n] each, share."""
    length = min(len(one), len(other))
    differs = (one[:length] != other[:length]).nonzero()
    return int(differs[0]) if len(differs) else length


class Session(Protocol):
    """What the cache asks of a session."""

    def prefix(self) -> CachedPrefix | None:
        """What others may begin with, if anything."""


class PrefixCache:
    """The sessions of one connection, open and lately closed. For any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._open: weakref.WeakSet[Session] = weakref.WeakSet()
        self._kept: list[CachedPrefix] = []

    def opened(self, session: Session) -> None:
        """A session of this client has begun."""
        with self._lock:
            self._open.add(session)

    def keep(self, prefix: CachedPrefix) -> None:
        """Remember a session that is being closed, at the expense of older ones."""
        with self._lock:
            kept = [*self._kept, prefix][-KEPT:]
            while kept and sum(one.chain.history_bytes() for one in kept) > KEPT_BYTES:
                kept.pop(0)
            self._kept = kept

    def find(self, ids: Tensor, prompt: Tensor | str | None) -> tuple[CachedPrefix, int] | None:
        """The session that shares most first tokens with int64 [n], at most n - 1, and how many."""
        best: tuple[CachedPrefix, int] | None = None
        for one in self._prefixes():
            if not _same(one.prompt, prompt):
                continue
            common = min(common_length(one.ids, ids), len(ids) - 1)
            if common >= LEAST_TOKENS and (best is None or common > best[1]):
                best = (one, common)
        return best

    def _prefixes(self) -> Iterator[CachedPrefix]:
        with self._lock:
            kept, sessions = self._kept, list(self._open)
        yield from reversed(kept)
        for session in sessions:
            prefix = session.prefix()
            if prefix is not None:
                yield prefix


def _same(one: Tensor | str | None, other: Tensor | str | None) -> bool:
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return torch.equal(one, other)
    return not isinstance(one, Tensor) and not isinstance(other, Tensor) and one == other
