"""A chat: turns in, replies out as they are generated, one session's caches behind them.

Invariant: between turns, the session's tokens are a beginning of the window's, which are what training
renders for the same turns; a turn feeds what the session lacks and nothing else. The session lacks the end
of a reply that was cut short, and nothing of one that the model ended in training's own tokens.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue
from typing import Any, Self

import torch
from transformers import LogitsProcessorList, StoppingCriteriaList

from corolla.chat.sampling import SamplingSettings
from corolla.chat.transcript import Transcript
from corolla.chat.window import Exchange, Window, newest_that_fit
from corolla.data.render import Renderer
from corolla.data.replies import Beginnings, ReplyReader, TokensSeen, reply_ends
from corolla.errors import SessionLimit, UsageError
from corolla.files import write_json


def check_context(sampling: SamplingSettings, max_context: int) -> None:
    """Raises `UsageError` when a reply alone may fill the context."""
    if sampling.max_new_tokens >= max_context:
        raise UsageError(
            f"Replies of up to {sampling.max_new_tokens} tokens leave no room in a context of {max_context}: "
            "lower --max-new-tokens or raise --max-length."
        )


class Generation:
    """One `generate` call on a thread of its own, and its reply as an iterator of text.

    Starts at once; `pieces` are to be read, or `stop` called. Ctrl-C reaches the main thread only, so the call always
    runs to a proper end: a reply that is stopped ends with the token that is being computed, which is not taken.
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
            self._generate(StoppingCriteriaList([TokensSeen(self._take, self._known)]))
            if not self.reader.ended:
                self._show(self.reader.finish())
        except BaseException as error:  # handed to whoever reads the pieces
            self.error = error
        finally:
            self._pieces.put(None)

    def _take(self, _row: int, token: int) -> bool:
        """Read a token; whether the reply is over."""
        if self._stop.is_set():  # whoever stopped it will not see this token
            self.stopped = True
            return True
        self._show(self.reader.push(token))
        return self.reader.ended

    def _show(self, piece: str) -> None:
        if piece:
            self._pieces.put(piece)


@dataclass(frozen=True)
class _Turn:
    """A turn that is being generated."""

    said: str
    generation: Generation


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
        self._turn: _Turn | None = None
        self._end_ids = reply_ends(model, renderer)
        self._beginnings = None if sampling.allow_empty else Beginnings.of(renderer, self._end_ids)
        if sampling.seed is not None:
            torch.manual_seed(sampling.seed)

    # --- talking -----------------------------------------------------------------------------------------

    def reply(self, said: str) -> Generator[str, None, None]:
        """The reply to `said`, in pieces as they are generated.

        Closing the generator, or Ctrl-C while it waits, stops the reply and keeps what was said of it; a turn
        that raises is forgotten. Raises `SessionLimit` when `said` is too long, `SwarmUnavailable`.
        """
        self._settle()
        if not said.strip():
            raise UsageError("There is nothing to reply to; say something.")
        prompt = self._make_room(said)
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

        self._turn = _Turn(said, Generation(generate, reader, known=len(prompt)))
        try:
            yield from self._turn.generation.pieces()
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
        """Bring a turn that has been begun to its end; interrupted itself, it is done by the next call."""
        if self._turn is None:
            return
        said, generation = self._turn.said, self._turn.generation
        generation.stop()
        self._turn = None
        reader = generation.reader
        if generation.error is None and not (generation.stopped and not reader.text):
            exchange = Exchange(said, reader.text, tuple(reader.ids))
            self._window.add(exchange)
            self._exchanges.append(exchange)
            self._align_session(self._window.ids)
            if self._journal is not None:
                self._journal.add(exchange, len(self._window))
        else:
            self._align_session(self._window.ids)

    def _align_session(self, ids: Sequence[int]) -> None:
        """Take from the session what is not in `ids`: an end token, the cut part of a reply, a turn."""
        if self._session is None or self._session.output_ids is None:
            return
        held = self._session.output_ids[0].tolist()
        self._session.position = _shared(held, ids)

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
            self._align_session(self._window.ids)
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
        session, self._session = self._session, None
        if session is not None:
            session.close()

    def close(self) -> None:
        """Free the servers' caches; safe to call twice."""
        self._settle()
        self._begin(self._window)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_error: object) -> None:
        self.close()


def _shared(first: Sequence[int], second: Sequence[int]) -> int:
    """How many leading tokens are equal."""
    count = 0
    for one, other in zip(first, second, strict=False):
        if one != other:
            break
        count += 1
    return count


def _count(number: int, thing: str) -> str:
    return f"{number or 'no'} {thing}{'' if number == 1 else 's'}"
