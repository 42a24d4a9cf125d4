"""Has a share of the servers' answers computed again by others, in the background, and acts on the result.

Invariant: nobody is condemned by one other peer's word: a third, or the client's own checkpoint, decides.
What waits is bounded, answers that come when too many wait are not audited and counted; the work whose
answers are audited never waits for it.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

from torch import Tensor

from corolla.client.audits.audit import (
    Answer,
    Deviation,
    What,
    deviation,
    in_words,
    step_answer,
    tolerance_of,
)
from corolla.client.audits.audit_report import AuditReport
from corolla.client.audits.second_opinion import Opinion, Own, SecondOpinions
from corolla.client.audits.verdicts import Finding
from corolla.client.sessions.span_session import History
from corolla.client.training import micro_batches
from corolla.client.view import SwarmView
from corolla.errors import CheckpointError
from corolla.swarm.directory.routing import Hop

log = logging.getLogger(__name__)

MOST_WAITING = 16
# Coarse rounding sends a token to other experts now and then, and its whole output changes: no lie.
EXACT = ("float32", "float64")


@dataclass
class Counts:
    """What became of the answers that were seen."""

    seen: int = 0
    drawn: int = 0
    dropped: int = 0  # too many waited
    unanswered: int = 0  # nobody else could be asked
    right: int = 0
    wrong: int = 0
    unclear: int = 0
    worst: dict[str, float] = field(default_factory=dict)  # of those that were right, in tolerances


class Auditor:
    """An `audit.Observer`. Used from the client's event loop only."""

    def __init__(
        self,
        view: SwarmView,
        share: float,
        *,
        own: Own | None = None,
        routed: bool = False,
        draw: random.Random | None = None,
    ) -> None:
        """`share` in (0, 1] of all answers; `routed` says that tokens choose experts.

        `draw` is for tests: what nobody can predict otherwise.
        """
        self.counts = Counts()
        self._view = view
        self._share = share
        self._routed = routed
        self._report = AuditReport()
        self._draw = draw or random.SystemRandom()
        self._ask = SecondOpinions(view, own, self._draw)
        self._waiting: deque[Callable[[], Answer | None]] = deque()
        self._worker: asyncio.Task[None] | None = None
        self._right: dict[str, float] = {}  # when a peer was last found right
        self._said: set[str] = set()

    # --- seeing -----------------------------------------------------------------------------------------

    def forward(self, hop: Hop, inputs: dict[str, Tensor], output: Tensor) -> None:
        """See `Observer`."""
        self._offer(lambda: Answer(hop, "forward", inputs, {"hidden": output}))

    def backward(self, hop: Hop, inputs: dict[str, Tensor], claimed: dict[str, Tensor | None]) -> None:
        """See `Observer`."""
        given = {name: tensor for name, tensor in claimed.items() if tensor is not None}
        self._offer(lambda: Answer(hop, "backward", inputs, given))

    def step(
        self, hop: Hop, history: History, mask: Tensor | None, deep: Tensor | None, output: Tensor
    ) -> None:
        """See `Observer`."""
        past = history.copy(history.length)  # the session goes on
        choose = self._draw.choice
        self._offer(partial(step_answer, hop, past, mask, deep, output, micro_batches, choose))

    def _offer(self, make: Callable[[], Answer | None]) -> None:
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
            answer = self._waiting.popleft()()
            if answer is None or answer.hop.peer_id in self._view.verdicts.condemned:
                continue
            try:
                await self._check(answer)
            except CheckpointError as error:
                self._say_once(str(error), f"An audit could not use the checkpoint: {error}")
            except Exception:  # a bug or exhausted memory, which the audited work has no part in
                log.exception("An audit failed")

    async def _check(self, answer: Answer) -> None:
        kind = self._view.numerics_of(answer.hop.peer_id)
        if self._routed and kind not in EXACT:
            self._say_once("routed", "Audits of a mixture of experts need servers that compute in float32.")
            self.counts.unanswered += 1
            return
        second = await self._ask.by_others(answer, {answer.hop.peer_id}) or await self._ask.by_self(answer)
        if second is None:
            self._cannot(answer)
            return
        off, tolerance = self._compare(answer, answer.claimed, second)
        if off.within(tolerance):
            self.counts.right += 1
            self._right[answer.hop.peer_id] = time.time()
            worst = self.counts.worst
            worst[answer.what] = max(worst.get(answer.what, 0.0), off.times(tolerance))
            return
        await self._judge(answer, second, off.times(tolerance))

    async def _judge(self, answer: Answer, second: Opinion, times: float) -> None:
        """Two disagree: who is wrong?"""
        if second.own:
            self._condemn(answer.hop, answer.what, times, "this client's own checkpoint")
            return
        peers = {answer.hop.peer_id, *(hop.peer_id for hop in second.hops)}
        third = await self._ask.by_others(answer, peers)
        if third is not None and self._decided(answer, second, third):
            return
        third = await self._ask.by_self(answer)
        if third is not None and self._decided(answer, second, third):
            return
        self.counts.unclear += 1
        self._disagree(answer, second, times)

    def _decided(self, answer: Answer, second: Opinion, third: Opinion) -> bool:
        first_off, first_tolerance = self._compare(answer, answer.claimed, third)
        off, tolerance = self._compare(answer, second.values, third, second.kinds)
        first_right, second_right = first_off.within(first_tolerance), off.within(tolerance)
        if first_right == second_right and not (third.own and not first_right):
            return False
        others = "this client's own checkpoint" if third.own else in_words(third.hops)
        if not first_right:
            also = f"{in_words(second.hops)} and {others}" if second_right else others
            self._condemn(answer.hop, answer.what, first_off.times(first_tolerance), also)
        if not second_right:
            self._blame(second, answer.what, off.times(tolerance), others)
        return True

    def _blame(self, opinion: Opinion, what: What, times: float, others: str) -> None:
        """The peer behind a wrong opinion; where there are several, each one's part is audited by itself."""
        if len(opinion.legs) == 1:
            self._condemn(opinion.legs[0].hop, what, times, others)
            return
        for leg in opinion.legs:
            self._waiting.append(partial(_same, leg))

    def _compare(
        self,
        answer: Answer,
        values: dict[str, Tensor],
        reference: Opinion,
        kinds: tuple[str, ...] | None = None,
    ) -> tuple[Deviation, Deviation]:
        """How far apart they are, and may be; `kinds` where `values` are not the answer's own."""
        if kinds is None:
            kinds = (self._view.numerics_of(answer.hop.peer_id) or "",)
        every = (*kinds, *reference.kinds)
        tolerance = tolerance_of(every, gradient=answer.backward, wire=self._view.wire)
        return deviation(answer, values, reference.values), tolerance

    # --- acting -----------------------------------------------------------------------------------------

    def _condemn(self, hop: Hop, what: What, times: float, other: str) -> None:
        finding = Finding(
            hop.peer_id,
            what,
            hop.start,
            hop.end,
            times,
            lied=True,
            other=other,
            when=time.time(),
            right_before=self._right.get(hop.peer_id),
        )
        self.counts.wrong += 1
        log.warning("Audit: %s", finding.sentence())
        self._view.verdicts.condemn(finding)
        self._report.add(finding, self._view.model_name)

    def _disagree(self, answer: Answer, second: Opinion, times: float) -> None:
        hop = answer.hop
        other = in_words(second.hops)
        finding = Finding(
            hop.peer_id, answer.what, hop.start, hop.end, times, lied=False, other=other, when=time.time()
        )
        self._say_once(f"{hop.peer_id} {other}", f"Audit: {finding.sentence()}")
        self._report.add(finding, self._view.model_name)

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


def _same(answer: Answer) -> Answer:
    return answer
