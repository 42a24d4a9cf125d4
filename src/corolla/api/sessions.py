"""Sessions that are kept, so that a request which continues a known conversation goes on where that was.

Invariant: a session is with one request at a time, and holds nothing but tokens of a request of the same user for the
same partner, its replies included. What is kept stays within the budget, the least recently used going first.
"""

from __future__ import annotations

import contextlib
import threading
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from corolla.api.partners import Partner
from corolla.client.sessions.prefix_cache import common_length
from corolla.errors import CorollaError

ENDS_SECONDS = 0.15  # for servers to say that they have freed a cache
LEAST_SHARED = 8  # tokens for which a session is worth being forked


@dataclass(frozen=True)
class Kept:
    """A session that nobody uses now."""

    user: str
    partner: Partner
    session: Any
    ids: Tensor  # int64 [n], what it holds
    nbytes: int


class SessionPool:
    """For any thread."""

    def __init__(self, *, most: int, most_bytes: int) -> None:
        """`most` sessions are kept, whose histories take `most_bytes` of this machine's memory."""
        self._most, self._most_bytes = most, most_bytes
        self._lock = threading.Lock()
        self._kept: list[Kept] = []  # the least recently used first
        self._gone: list[weakref.ref[Partner]] = []  # whom requests under way may still speak with
        self._closed = False

    @property
    def count(self) -> int:
        """Sessions that are kept."""
        return len(self._kept)

    @property
    def nbytes(self) -> int:
        """Memory that they take here."""
        return sum(one.nbytes for one in list(self._kept))

    def take(self, user: str, partner: Partner, ids: Sequence[int]) -> Any:
        """A session to say `ids` in, set to the longest beginning of them that is known, at least a token short.

        One that holds more than such a beginning is forked, so that both can be gone on with.
        """
        wanted = torch.tensor(list(ids))
        with self._lock:
            best, shared = None, 0
            for one in reversed(self._kept):
                if one.user == user and one.partner is partner:
                    common = common_length(one.ids, wanted)
                    if common > shared:
                        best, shared = one, common
            if best is not None and (shared >= LEAST_SHARED or shared == len(best.ids)):
                self._kept.remove(best)
            else:
                best = None
        if best is None:
            return fresh(partner)
        position = min(shared, len(ids) - 1)
        try:
            if shared == len(best.ids):
                session = best.session
            else:
                session = best.session.fork()
                self._put(best)
            session.position = min(position, session.position)
        except CorollaError:  # the servers are gone, and with them what they held: it is computed again
            _close(best.session)
            return fresh(partner)
        return session

    def give(self, user: str, partner: Partner, session: Any) -> None:
        """A request is done with a session, which is kept or closed."""
        known = session.output_ids
        if known is None or known.shape[0] != 1 or bool((known < 0).any()):
            _close(session)
            return
        ids = known[0].detach().cpu().clone()
        self._put(Kept(user, partner, session, ids, _bytes_of(session, partner)))

    def _put(self, kept: Kept) -> None:
        with self._lock:
            if self._closed or any(one() is kept.partner for one in self._gone):
                leaving = [kept]
            else:
                self._kept.append(kept)
                leaving = self._over_budget()
            self._kept = [one for one in self._kept if not any(one is other for other in leaving)]
        for one in leaving:
            _close(one.session)

    def _over_budget(self) -> list[Kept]:
        leaving = self._kept[: max(0, len(self._kept) - self._most)]
        rest = self._kept[len(leaving) :]
        total = sum(one.nbytes for one in rest)
        while rest and total > self._most_bytes:
            total -= rest[0].nbytes
            leaving.append(rest.pop(0))
        return leaving

    def forget(self, partner: Partner) -> None:
        """A partner is gone, and nobody will ask for its sessions."""
        with self._lock:
            self._gone = [*(one for one in self._gone if one() is not None), weakref.ref(partner)]
            leaving = [one for one in self._kept if one.partner is partner]
            self._kept = [one for one in self._kept if one.partner is not partner]
        for one in leaving:
            _close(one.session)

    def close(self) -> None:
        """Free what is kept, and whatever is given back from now on."""
        with self._lock:
            self._closed = True
            leaving, self._kept = self._kept, []
        for one in leaving:
            _close(one.session)


def fresh(partner: Partner) -> Any:
    """A session of nobody's."""
    return partner.model.inference_session(max_length=partner.max_context)


def _close(session: Any) -> None:
    with contextlib.suppress(CorollaError):
        session.close(seconds=ENDS_SECONDS)


def _bytes_of(session: Any, partner: Partner) -> int:
    """About what the client keeps of a session: what entered each of its spans."""
    config = partner.model.config
    width = int(config.hidden_size) * int(partner.model.dtype.itemsize)
    return int(session.position) * width * max(1, len(session.hops))
