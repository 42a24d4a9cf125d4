"""Replies under way: each `generate` call on a thread of a pool, its text and tokens as events for the event loop.

Invariant: what a request asks for is computed as `generate` computes it for the same tokens, however many others are
under way; whoever is not waited for any more stops with the token that is being computed, and a session is given back
only once nothing goes on in it.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import CancelledError, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from transformers import LogitsProcessorList, StoppingCriteriaList

from corolla.api.failures import ApiFailure
from corolla.api.grammar import Matcher
from corolla.api.partners import Partner
from corolla.api.reading import TextReader
from corolla.api.sampling import Sampling, TokenChooser, TokenProbability
from corolla.api.scoring import score_prompt
from corolla.api.sessions import SessionPool, fresh
from corolla.data.replies import TokensSeen
from corolla.text import get_logger

log = get_logger(__name__)

TOKEN_SECONDS = 2.0  # for the token that is being computed, before a call that nobody waits for is broken off
LOOK_SECONDS = 0.1
Finish = Literal["stop", "length"]


@dataclass(frozen=True)
class Wish:
    """One prompt, and what is to come behind it."""

    user: str  # whose sessions may be gone on with
    partner: Partner
    ids: Sequence[int]
    max_tokens: int
    sampling: Sampling
    reader: Callable[[], TextReader]
    count: int = 1  # replies
    matcher: Callable[[], Matcher] | None = None
    score: int | None = None  # of the prompt's tokens, and so many of the likeliest in their places


@dataclass(frozen=True)
class Piece:
    """What is certain now of the reply of this index: text, and where that was asked for, the tokens it is of."""

    index: int
    text: str
    probabilities: tuple[TokenProbability, ...] = ()


@dataclass(frozen=True)
class Scored:
    """The prompt's tokens have been looked at; None for the first, before which there is nothing."""

    index: int
    probabilities: tuple[TokenProbability | None, ...]


@dataclass(frozen=True)
class Ended:
    """The reply of this index is whole."""

    index: int
    reason: Finish


Event = Piece | Scored | Ended


@dataclass
class Timing:
    """When what happened to a run, by `time.monotonic()`; `tokens` are those that were computed for its replies."""

    asked: float
    began: float | None = None
    first: float | None = None
    ended: float | None = None
    tokens: int = 0
    cached: int = 0  # of the prompts' tokens, those that were known
    gaps: list[float] = field(default_factory=list)  # between tokens of one reply


class _Held:
    """Tokens whose text is not certain yet, since it may belong to a stop text: nobody is told of them either."""

    def __init__(self) -> None:
        self._tokens: deque[tuple[int, TokenProbability]] = deque()

    def add(self, position: int, token: TokenProbability) -> None:
        """A token whose text begins at this character of the reply."""
        self._tokens.append((position, token))

    def certain(self, shown: int | None) -> tuple[TokenProbability, ...]:
        """Those of the first `shown` characters that were not given out yet; None: all."""
        found = []
        while self._tokens and (shown is None or self._tokens[0][0] < shown):
            found.append(self._tokens.popleft()[1])
        return tuple(found)


class Run:
    """The replies to some wishes; `events` are to be read, or `cancel` called. Made by `Generator.start`."""

    def __init__(
        self,
        wishes: Sequence[Wish],
        pool: SessionPool,
        executor: ThreadPoolExecutor,
        finished: Callable[[Run], None],
    ) -> None:
        """`finished(run)` is called on one of its threads once all is over, however that came."""
        self.wishes = wishes
        self.error: BaseException | None = None
        self._finished = finished
        self.timing = Timing(time.monotonic())
        self.done = threading.Event()
        self.let_go = threading.Event()  # nobody waits for it any more
        self._pool, self._executor = pool, executor
        self._loop = asyncio.get_running_loop()
        self._events: asyncio.Queue[Event | BaseException | None] = asyncio.Queue()
        self._lock = threading.Lock()
        self._active: dict[int, Any] = {}  # sessions in which something goes on
        self._left = sum(wish.count for wish in wishes)

    @property
    def cancelled(self) -> bool:
        """Whether nobody waits for it any more."""
        return self.let_go.is_set()

    @property
    def count(self) -> int:
        """Replies."""
        return sum(wish.count for wish in self.wishes)

    def begin(self) -> None:
        """Hand everything to the threads."""
        index = 0
        for wish in self.wishes:
            self._executor.submit(self._first, wish, index)
            index += wish.count

    async def events(self) -> AsyncIterator[Event]:
        """What happens, until all is over. Raises what went wrong, and cancels the rest when nobody listens."""
        left = self.count
        try:
            while left:
                event = await self._events.get()
                if isinstance(event, BaseException):
                    raise event
                if event is None:
                    return
                left -= isinstance(event, Ended)
                yield event
        finally:
            if left:
                self.cancel()

    def cancel(self) -> None:
        """Compute no further token; a call that waits for a server is broken off soon. At once, from any thread."""
        if self.cancelled or self.done.is_set():
            return
        self.let_go.set()
        threading.Thread(target=self._break_off, name="api-cancel", daemon=True).start()

    def _break_off(self) -> None:
        self.done.wait(TOKEN_SECONDS)
        while not self.done.wait(LOOK_SECONDS):
            with self._lock:
                active = list(self._active.values())
            for session in active:
                session.stop()

    # --- on threads of the pool ---------------------------------------------------------------------------

    def _first(self, wish: Wish, index: int) -> None:
        """The prompt and the first reply; the others go on threads of their own, in sessions that share the prompt."""
        sessions: list[Any] = []
        try:
            if self.cancelled:
                raise CancelledError
            self.timing.began = self.timing.began or time.monotonic()
            sessions = self._sessions(wish, index)
            for number, session in enumerate(sessions[1:], start=1):
                self._executor.submit(self._reply, wish, index + number, session, number)
        except BaseException as error:
            for session in sessions:
                session.close(seconds=0.0)
            self._over(wish.count, error)
            return
        self._reply(wish, index, sessions[0], 0)

    def _sessions(self, wish: Wish, index: int) -> list[Any]:
        anew = wish.score is not None  # every token is to be looked at
        take = self._pool.take
        session = fresh(wish.partner) if anew else take(wish.user, wish.partner, wish.ids)
        found = [session]
        with self._using(index, session):
            self.timing.cached += int(session.cache.length)
            if wish.score is not None:
                probabilities = score_prompt(wish.partner.model, session, wish.ids, wish.score, self._wanted)
                for number in range(wish.count):
                    self._tell(Scored(index + number, probabilities))
            elif wish.count > 1:
                self._read_prompt(wish, session)
            known = min(len(wish.ids) - 1, int(session.position))
            session.position = known
            found += [session.fork() for _ in range(wish.count - 1)]
        return found

    def _read_prompt(self, wish: Wish, session: Any) -> None:
        """All of it but the last token, so that several replies can begin there."""
        before = wish.ids[int(session.position) : len(wish.ids) - 1]
        if before:
            known = len(wish.ids) - 1
            criteria = StoppingCriteriaList([TokensSeen(lambda _row, _token: True, known)])
            self._generate(wish, session, before, known, LogitsProcessorList(), criteria, 1)

    def _reply(self, wish: Wish, index: int, session: Any, number: int) -> None:
        error: BaseException | None = None
        try:
            last: list[Event] = [Ended(index, "length")]
            with self._using(index, session):
                if wish.max_tokens:
                    last = self._say(wish, index, session, number)
            self._pool.give(wish.user, wish.partner, session)
            for event in last:  # now, so that whoever goes on at once finds the session
                self._tell(event)
        except BaseException as raised:
            error = raised
            if isinstance(raised, CancelledError):
                self._pool.give(wish.user, wish.partner, session)
            else:
                with contextlib.suppress(Exception):
                    session.close(seconds=0.0)
        self._over(1, error)

    def _say(self, wish: Wish, index: int, session: Any, number: int) -> list[Event]:
        """Generate a reply; gives the events that end it."""
        if self.cancelled:
            raise CancelledError
        sampling = wish.sampling
        if sampling.seed is not None and number:
            sampling = replace(sampling, seed=sampling.seed + number)
        matcher = None if wish.matcher is None else wish.matcher()
        chooser = TokenChooser(sampling, matcher)
        reader = wish.reader()
        latest: list[float] = []
        held = _Held()

        def take(_row: int, token: int) -> bool:
            self._note_token(latest)
            if chooser.probabilities:
                held.add(reader.position, chooser.probabilities[-1])
            text = reader.push(token)
            certain = held.certain(reader.shown)
            if (text or certain) and not self.cancelled:
                self._tell(Piece(index, text, certain))
            return reader.ended or self.cancelled or (matcher is not None and matcher.over)

        new = wish.ids[int(session.position) :]
        criteria = StoppingCriteriaList([TokensSeen(take, len(wish.ids))])
        processors = LogitsProcessorList([chooser])
        self._generate(wish, session, new, len(wish.ids), processors, criteria, wish.max_tokens)
        if self.cancelled:
            raise CancelledError
        rest = reader.finish()
        # Of a reply that goes no further, what has no text is a part; what ends one is not.
        certain = held.certain(reader.shown if reader.ended else None)
        ended = reader.ended or (matcher is not None and matcher.over)
        last = [Piece(index, rest, certain)] if rest or certain else []
        return [*last, Ended(index, "stop" if ended else "length")]

    def _generate(
        self,
        wish: Wish,
        session: Any,
        new: Sequence[int],
        known: int,
        processors: Any,
        criteria: Any,
        most: int,
    ) -> None:
        model = wish.partner.model
        penalty = wish.sampling.repetition_penalty
        # The chooser applies it, so that what it notes are the model's own scores.
        neutral = {} if penalty is None else {"repetition_penalty": 1.0}
        model.generate(
            torch.tensor([list(new)], device=model.device),
            # Without one, tokens equal to the padding's would be hidden.
            attention_mask=torch.ones(1, known, dtype=torch.long, device=model.device),
            session=session,
            stopping_criteria=criteria,
            logits_processor=processors,
            eos_token_id=None,  # the reader knows them; `generate` would want one to pad with
            tokenizer=wish.partner.tokenizer,  # some checkpoints name strings to stop at
            max_new_tokens=most,
            do_sample=False,  # the chooser draws
            temperature=1.0,
            top_k=50,
            top_p=1.0,
            num_beams=1,
            num_return_sequences=1,
            **neutral,
        )

    def _note_token(self, latest: list[float]) -> None:
        now = time.monotonic()
        with self._lock:
            self.timing.tokens += 1
            self.timing.first = self.timing.first or now
            if latest:
                self.timing.gaps.append(now - latest[0])
        latest[:] = [now]

    def _wanted(self) -> bool:
        return not self.cancelled

    @contextlib.contextmanager
    def _using(self, index: int, session: Any) -> Any:
        with self._lock:
            self._active[index] = session
        try:
            yield
        finally:
            with self._lock:
                del self._active[index]

    def _tell(self, event: Event | BaseException | None) -> None:
        with contextlib.suppress(RuntimeError):  # the loop has ended, and nobody listens
            self._loop.call_soon_threadsafe(self._events.put_nowait, event)

    def _over(self, count: int, error: BaseException | None) -> None:
        if error is not None and not isinstance(error, CancelledError):
            self.error = error
            self._tell(error)
        elif error is not None:
            self._tell(None)
        with self._lock:
            self._left -= count
            over = self._left == 0
        if over:
            self.timing.ended = time.monotonic()
            self.done.set()
            self._finished(self)


class Generator:
    """Where replies are made. On the event loop."""

    def __init__(self, pool: SessionPool, *, at_once: int, waiting: int) -> None:
        """So many replies are computed at a time, and so many may wait for that."""
        self.pool = pool
        self._most, self._waiting = at_once, waiting
        self._executor = ThreadPoolExecutor(at_once, thread_name_prefix="api-reply")
        self._runs: list[Run] = []
        self.draining = False

    @property
    def runs(self) -> list[Run]:
        """Those that are under way or wait."""
        self._runs = [run for run in self._runs if not run.done.is_set()]
        return list(self._runs)

    @property
    def under_way(self) -> int:
        """Replies that are computed or wait."""
        return sum(run.count for run in self.runs)

    @property
    def queued(self) -> int:
        """Of them, those that wait."""
        return max(0, self.under_way - self._most)

    def start(self, wishes: Sequence[Wish], finished: Callable[[Run], None] = lambda run: None) -> Run:
        """Begin; for `finished` see `Run`. Raises `ApiFailure` where too much is waiting, or nothing more is begun."""
        if self.draining:
            raise ApiFailure(503, "This server is about to end: ask another one.", code="shutting_down")
        count = sum(wish.count for wish in wishes)
        if self.under_way + count > self._most + self._waiting:
            raise ApiFailure(
                429,
                f"{self.under_way} replies are under way or waiting here: try again in a moment.",
                code="rate_limit_exceeded",
                headers={"Retry-After": "5"},
            )
        run = Run(wishes, self.pool, self._executor, finished)
        self._runs.append(run)
        run.begin()
        return run

    async def close(self) -> None:
        """Stop what is under way, and free what is kept."""
        self.draining = True
        runs = self.runs
        for run in runs:
            run.cancel()
        await asyncio.to_thread(lambda: [run.done.wait(3 * TOKEN_SECONDS) for run in runs])
        self._executor.shutdown(wait=False, cancel_futures=True)
        await asyncio.to_thread(self.pool.close)
