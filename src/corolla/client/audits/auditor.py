"""Has a share of the servers' answers computed again by others, in the background, and acts on the result.

Invariant: nobody is condemned by the word of others, however many: only by what this client computed itself. Where
it cannot, a disagreement stays unclear, and others are preferred to both sides for a while. What waits is bounded,
answers that come when too many wait are counted and not audited; audited work never waits for its audit.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

from corolla.client.audits.audit import Answer, deviation, tolerance_of
from corolla.client.audits.own_blocks import OwnBlocks
from corolla.client.audits.second_opinion import Opinion, ask_others
from corolla.client.servers import Finding
from corolla.client.view import SwarmView
from corolla.errors import CheckpointError
from corolla.swarm.directory.routing import Hop
from corolla.text import get_logger

log = get_logger(__name__)

MOST_WAITING = 16
AGREED_SHARE = 0.125  # of answers that another server agrees with, which this client computes all the same
# Coarse rounding sends a token to other experts now and then, and its whole output changes: no lie.
EXACT = ("float32", "float64")


@dataclass
class Counts:
    """What became of the answers that were seen."""

    seen: int = 0
    drawn: int = 0
    dropped: int = 0  # too many waited
    unanswered: int = 0  # nobody could be asked
    right: int = 0
    wrong: int = 0
    unclear: int = 0  # two disagree, and nobody can decide
    worst: dict[str, float] = field(default_factory=dict)  # of those that were right, in tolerances


class Auditor:
    """An `audit.Observer`. Used from the client's event loop only."""

    def __init__(
        self,
        view: SwarmView,
        share: float,
        *,
        own: OwnBlocks | None = None,
        routed: bool = False,
        draw: random.Random | None = None,
    ) -> None:
        """`share` in (0, 1] of all answers; `own` decides; `routed` says that tokens choose experts.

        `draw` is for tests: what nobody can predict otherwise.
        """
        self.counts = Counts()
        self._view = view
        self._share = share
        self._routed = routed
        self._draw = draw or random.SystemRandom()
        self._own = own
        self._waiting: deque[Callable[[random.Random], Answer | None]] = deque()
        self._worker: asyncio.Task[None] | None = None
        self._right: dict[str, float] = {}  # when a peer was last found right
        self._said: set[str] = set()

    def saw(self, make: Callable[[random.Random], Answer | None]) -> None:
        """See `Observer`."""
        self.counts.seen += 1
        if self._draw.random() >= self._share:
            return
        self.counts.drawn += 1
        if len(self._waiting) >= MOST_WAITING:
            self.counts.dropped += 1
            return
        self._waiting.append(make)
        if self._worker is None or self._worker.done():
            self._worker = asyncio.ensure_future(self._work())

    async def settled(self) -> None:
        """Wait until nothing waits."""
        while self._worker is not None and not self._worker.done():
            await asyncio.wait([self._worker])

    async def close(self) -> None:
        """Forget what waits."""
        self._waiting.clear()
        if self._worker is not None:
            self._worker.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._worker

    # --- deciding ---------------------------------------------------------------------------------------

    async def _work(self) -> None:
        while self._waiting:
            answer = self._waiting.popleft()(self._draw)
            if answer is None or answer.hop.peer_id in self._view.verdicts.condemned:
                continue
            try:
                await self._check(answer)
            except CheckpointError as error:
                self._say_once(str(error), f"An audit could not use the checkpoint: {error}")
            except Exception:  # a bug or exhausted memory, which the audited work has no part in
                log.exception("An audit failed")

    async def _check(self, answer: Answer) -> None:
        kind = self._view.expected_numerics(answer.hop.peer_id)
        if self._routed and kind not in EXACT:
            self._say_once("routed", "Audits of a mixture of experts need servers that compute in float32.")
            self.counts.unanswered += 1
            return
        claim = Opinion(answer.claimed, (answer.hop,))
        other = await ask_others(self._view, answer, kind, self._draw)
        off = None if other is None else self._apart(answer, claim, other)
        agree = off is not None and off <= 1
        # Two who lie alike agree, too.
        own = await self._by_self(answer) if not agree or self._draw.random() < AGREED_SHARE else None
        if own is None and agree and off is not None:
            self._note_right(answer, off)
            return
        if own is not None:
            self._decide(answer, [claim] if other is None else [claim, other], own)
        elif other is not None and off is not None:
            self._leave_unclear(answer, other, off)
        else:
            self._cannot(answer)

    async def _by_self(self, answer: Answer) -> Opinion | None:
        """The client's own computation; None where the blocks do not fit here. Raises `CheckpointError`."""
        own, hop = self._own, answer.hop
        if own is None or not await asyncio.to_thread(own.fits, hop.start, hop.end):
            return None
        kind = own.kind_for(self._view.expected_numerics(hop.peer_id))
        return Opinion(await asyncio.to_thread(own.answer, answer, kind))

    def _apart(self, answer: Answer, one: Opinion, other: Opinion) -> float:
        """How far they are apart, in what honest ones may be: more than 1 is a disagreement.

        That is what this client expects of the arithmetic that it asked for, whatever anybody says of himself since.
        """
        kind = self._view.expected_numerics(answer.hop.peer_id)
        tolerance = tolerance_of((kind,), gradient=answer.backward, wire=self._view.wire)
        return deviation(answer, one.values, other.values).times(tolerance)

    # --- acting -----------------------------------------------------------------------------------------

    def _note_right(self, answer: Answer, off: float) -> None:
        self.counts.right += 1
        self._right[answer.hop.peer_id] = time.time()
        self.counts.worst[answer.what] = max(self.counts.worst.get(answer.what, 0.0), off)

    def _decide(self, answer: Answer, said: list[Opinion], own: Opinion) -> None:
        """Whoever says otherwise than the client itself lies; of several together, any one may."""
        for opinion in said:
            off = self._apart(answer, opinion, own)
            if off <= 1:
                if opinion is said[0]:
                    self._note_right(answer, off)
            elif len(opinion.hops) == 1:
                self._condemn(opinion.hops[0], answer, off)
            else:
                self._view.health.doubt(hop.peer_id for hop in opinion.hops)

    def _condemn(self, hop: Hop, answer: Answer, off: float) -> None:
        finding = Finding(hop, answer.what, off, self._right.get(hop.peer_id))
        self.counts.wrong += 1
        log.warning("Audit: %s", finding.sentence())
        self._view.verdicts.condemn(finding)

    def _leave_unclear(self, answer: Answer, other: Opinion, off: float) -> None:
        self.counts.unclear += 1
        peers = [answer.hop.peer_id, *(hop.peer_id for hop in other.hops)]
        self._view.health.doubt(peers)
        names = f"{peers[0]} and {' and '.join(peers[1:])}"
        self._say_once(
            names,
            f"Audit: {names} disagree about a {answer.what} of blocks {answer.hop.start}:{answer.hop.end} ({off:.1f} "
            "times the tolerance), and this machine has no room to compute it: others are preferred for a while.",
        )

    def _cannot(self, answer: Answer) -> None:
        self.counts.unanswered += 1
        start, end = answer.hop.start, answer.hop.end
        self._say_once(
            f"{start}:{end}",
            f"Audits need a second server for blocks {start}:{end}, or room for them in this machine's memory; "
            "what is asked of the only one goes unchecked.",
        )

    def _say_once(self, key: str, sentence: str) -> None:
        if key not in self._said:
            self._said.add(key)
            log.warning("%s", sentence)
