"""A chat: turns in, replies out as they are generated, one session's caches behind them.

Invariant: when a turn begins, the session's tokens are made a beginning of the window's, which are what training
renders for the same turns; a turn feeds what the session lacks and nothing else. The session lacks the end
of a reply that was cut short, and nothing of one that the model ended in training's own tokens. No wait for a server
holds up whoever wants a reply to stop, or the chat to end.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any, Self

import torch
from transformers import LogitsProcessorList, StoppingCriteriaList

from corolla.chat.sampling import SamplingSettings
from corolla.chat.transcript import Transcript
from corolla.chat.window import Exchange, Window, newest_that_fit
from corolla.data.cuts import shared
from corolla.data.render import Renderer
from corolla.data.replies import Beginnings, ReplyReader, TokensSeen, reply_ends
from corolla.errors import SessionLimit, UsageError
from corolla.files import write_json

LOOK_SECONDS = 0.05  # between two looks whether somebody has had enough
SOON = 0.02
TOKEN_SECONDS = 2.0  # for a stopped reply's last token, before the next reply begins
ENDS_SECONDS = 0.15  # for servers to say that they have freed a cache, and for a call to end


def check_context(sampling: SamplingSettings, max_context: int) -> None:
    """Raises `UsageError` when a reply alone may fill the context."""
    if sampling.max_new_tokens >= max_context:
        raise UsageError(
            f"Replies of up to {sampling.max_new_tokens} tokens leave no room in a context of {max_context}: "
            "lower --max-new-tokens or raise --max-length."
        )


class Generation:
    """One `generate` call on a thread of its own, and its reply as an iterator of text.

    Starts at once; `pieces` are to be read, or `stop` called. Whoever stops it does not wait for it: no token is taken
    from then on, and the call ends by itself with the next one, or when its session is told to end it.
    """

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
        self._lock = threading.Lock()  # who stops it reads the reader afterwards
        self._over = False
        # A daemon: a process that wants to end does not wait for a server that says nothing.
        self._thread = threading.Thread(target=self._run, name="chat-reply", daemon=True)
        self._thread.start()

    def pieces(self, enough: Callable[[], bool]) -> Iterator[str]:
        """The reply's text as it comes, until `enough()`. Raises what `generate` raised."""
        while not enough():
            with contextlib.suppress(Empty):
                piece = self._pieces.get(timeout=LOOK_SECONDS)
                if piece is None:
                    break
                yield piece
        if self.error is not None:
            raise self.error

    def stop(self) -> None:
        """Take no more tokens; at once, whatever a server does. Nothing where it is over already."""
        with self._lock:
            if not self._over:
                self._over = self.stopped = True
                self.reader.finish()

    def end(self, tell: Callable[[], None], *, by_itself: float) -> bool:
        """Have the call of a reply that is over end as well, if need be by telling it; whether it has.

        `by_itself`: seconds for the token that is being computed, whose caches would be lost with it. A call that has
        not begun yet does not hear what it is told.
        """
        self._thread.join(by_itself)
        deadline = time.monotonic() + ENDS_SECONDS
        while self._thread.is_alive() and time.monotonic() < deadline:
            tell()
            self._thread.join(SOON)
        return not self._thread.is_alive()

    def _run(self) -> None:
        error = None
        try:
            self._generate(StoppingCriteriaList([TokensSeen(self._take, self._known)]))
        except BaseException as raised:  # handed to whoever reads the pieces
            error = raised
        with self._lock:
            if not self._over:
                self._over = True
                self.error = error
                if error is None and not self.reader.ended:
                    self._show(self.reader.finish())
        self._pieces.put(None)

    def _take(self, _row: int, token: int) -> bool:
        """Read a token; whether the reply is over."""
        with self._lock:
            if not self._over:  # whoever stopped it will not see this token
                self._show(self.reader.push(token))
            return self._over or self.reader.ended

    def _show(self, piece: str) -> None:
        if piece:
            self._pieces.put(piece)


class ChatEngine:
    """One conversation with a distributed model. Not for several threads at once."""

    def __init__(
        self,
        model: Any,
        renderer: Renderer,
        *,
        sampling: SamplingSettings,
        max_context: int,
        system: str | None = None,
        notify: Callable[[str], None] = lambda notice: None,
        journal: Transcript | None = None,
    ) -> None:
        """`max_context` is what `context_limit` gives, or less: the tokens of conversation, replies included.

        `notify` is told in a sentence when older turns are left behind; `journal` is told all that happens, and
        its `TranscriptError`s come out of the method that made it happen, whose work is done then. A `seed` in
        `sampling` seeds torch's own generator, here and once. Raises `UsageError` when a reply alone would fill
        the context.
        """
        check_context(sampling, max_context)
        self._model = model
        self._renderer = renderer
        self._sampling = sampling
        self._max_context = max_context
        self._system = system
        self._notify = notify
        self._journal = journal
        self._exchanges: list[Exchange] = []
        self._window = Window(renderer, system)
        self._session: Any = None
        self._said = ""  # in the turn that is being generated, or was last
        self._generation: Generation | None = None
        self._unsettled = False
        self._end_ids = reply_ends(model, renderer)
        self._beginnings = None if sampling.allow_empty else Beginnings.of(renderer, self._end_ids)
        if sampling.seed is not None:
            torch.manual_seed(sampling.seed)

    # --- talking -----------------------------------------------------------------------------------------

    def reply(self, said: str, *, enough: Callable[[], bool] = lambda: False) -> Generator[str, None, None]:
        """The reply to `said`, in pieces as they are generated.

        Closing the generator, Ctrl-C while it waits, or `enough()`, which is asked several times a second, stops
        the reply at once and keeps what was said of it; a turn that raises is forgotten. Raises `SessionLimit`
        when `said` is too long, `SwarmUnavailable`.
        """
        self._settle()
        if not said.strip():
            raise UsageError("There is nothing to reply to; say something.")
        prompt = self._make_room(said)
        self._leave_call(by_itself=TOKEN_SECONDS)
        if self._session is None:
            self._session = self._model.inference_session(max_length=self._max_context)
        self._align_session(prompt)
        new = torch.tensor([prompt[self._session.position :]], device=self._model.device)
        reader = ReplyReader.of(self._renderer, self._end_ids)
        processors = LogitsProcessorList()
        if self._beginnings is not None:
            processors.append(self._beginnings.processor(len(prompt), self._sampling.max_new_tokens))

        def generate(criteria: StoppingCriteriaList) -> None:
            self._model.generate(
                new,
                # Without one, tokens equal to the padding's would be hidden.
                attention_mask=torch.ones(1, len(prompt), dtype=torch.long, device=new.device),
                session=self._session,
                stopping_criteria=criteria,
                logits_processor=processors,
                eos_token_id=None,  # the reader knows them; `generate` would want one to pad with
                tokenizer=self._renderer.tokenizer,  # some checkpoints name strings to stop at
                **self._sampling.generate_arguments(),
            )

        self._said, self._unsettled = said, True
        self._generation = Generation(generate, reader, known=len(prompt))
        try:
            yield from self._generation.pieces(enough)
        finally:
            self._settle()

    def _make_room(self, said: str) -> list[int]:
        """The prompt's tokens, after older turns were left behind if they had to be."""
        room = self._max_context - self._sampling.max_new_tokens
        prompt = self._window.prompted(said)
        started_anew = len(self._window) == 0 and bool(self._exchanges)
        if len(prompt) <= room and not started_anew:
            return prompt
        # When it overflows, half of the room is set free, or every turn from now on would leave one more
        # exchange behind and replay the others.
        within = room if started_anew else room // 2
        window = newest_that_fit(self._renderer, self._system, self._exchanges, said, within)
        prompt = window.prompted(said)
        if len(prompt) > room:
            raise SessionLimit(
                f"This message takes {len(prompt)} tokens, but the chat has room for {room} besides its reply: "
                "shorten it, or lower --max-new-tokens."
            )
        self._begin(window)
        if len(window) < len(self._exchanges):
            self._notify(
                f"The conversation has outgrown the {self._max_context} tokens that fit; "
                f"going on with {_count(len(window), 'earlier exchange')}."
            )
        return prompt

    def _settle(self) -> None:
        """Bring a turn that has been begun to its end; its call may still be under way (`_leave_call`)."""
        generation = self._generation
        if generation is None or not self._unsettled:
            return
        generation.stop()
        self._unsettled = False
        reader, exchange = generation.reader, None
        if generation.error is None and not (generation.stopped and not reader.text):
            exchange = Exchange(self._said, reader.text, tuple(reader.ids))
            self._window.add(exchange)
            self._exchanges.append(exchange)
        if not generation.stopped:
            self._leave_call(by_itself=ENDS_SECONDS)
            self._align_session(self._window.ids)
        if exchange is not None and self._journal is not None:
            self._journal.add(exchange, len(self._window))

    def _leave_call(self, *, by_itself: float) -> None:
        """Make sure that nothing goes on in the session: a stopped reply's call may wait for a server.

        A session whose call does not end is left to it.
        """
        generation, self._generation = self._generation, None
        if generation is not None and not generation.end(self._session.stop, by_itself=by_itself):
            self._session = None

    def _align_session(self, ids: Sequence[int]) -> None:
        """Take from the session what is not in `ids`: an end token, the cut part of a reply, a turn."""
        if self._session is None or self._session.output_ids is None:
            return
        held = self._session.output_ids[0].tolist()
        self._session.position = shared(held, ids)

    # --- the conversation as a whole -----------------------------------------------------------------------

    @property
    def tokens(self) -> list[int]:
        """What of the conversation the model sees, with what closes the last reply."""
        self._settle()
        return list(self._window.ids)

    def undo(self) -> str | None:
        """Forget the last exchange, as if it had not been; gives what was said in it, None without one."""
        self._settle()
        if not self._exchanges:
            return None
        forgotten = self._exchanges.pop()
        if len(self._window):
            self._window.drop_newest()
        if self._journal is not None:
            self._journal.undo(len(self._window))
        return forgotten.said

    def reset(self) -> None:
        """Forget the whole conversation."""
        self._settle()
        self._exchanges.clear()
        self._begin(Window(self._renderer, self._system))
        if self._journal is not None:
            self._journal.reset()

    def restore(self, exchanges: Sequence[Exchange], kept: int) -> None:
        """Go on with a chat of which the model saw the `kept` newest exchanges; it is fed them anew."""
        self._settle()
        self._exchanges = list(exchanges)
        self._begin(Window(self._renderer, self._system, exchanges[len(exchanges) - kept :]))

    def transcript(self) -> list[dict[str, str]]:
        """Everything that was said, as messages with `role` and `content`."""
        self._settle()
        messages = [] if self._system is None else [{"role": "system", "content": self._system}]
        for exchange in self._exchanges:
            messages.append({"role": "user", "content": exchange.said})
            messages.append({"role": "assistant", "content": exchange.reply})
        return messages

    def save(self, path: Path) -> None:
        """Write the conversation as JSON that `corolla tune --data` reads. Raises `UsageError`."""
        try:
            write_json(path, [{"messages": self.transcript()}])
        except OSError as error:
            raise UsageError(
                f"The chat could not be saved to {path}: {error.strerror or error}; give another file."
            ) from error

    def _begin(self, window: Window) -> None:
        self._window = window
        self._leave_call(by_itself=0.0)
        session, self._session = self._session, None
        if session is not None:
            session.close(seconds=ENDS_SECONDS)

    def close(self) -> None:
        """Free the servers' caches; safe to call twice."""
        self._settle()
        self._begin(self._window)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_error: object) -> None:
        self.close()


def _count(number: int, thing: str) -> str:
    return f"{number or 'no'} {thing}{'' if number == 1 else 's'}"
