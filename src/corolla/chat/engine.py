"""A conversation with a model over one inference session.

Invariant: between two replies the session's tokens are a beginning of `history.ids`, the tokens that training
has for the same turns; so a turn costs the servers its own tokens, never the history's, and whatever ended a
reply (the delimiter, its greatest length, Ctrl-C, an error), the next turn starts at the right place.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import StoppingCriteria, StoppingCriteriaList

from corolla.chat.history import ChatHistory, Exchange
from corolla.chat.reader import ReplyReader
from corolla.chat.sampling import SamplingSettings
from corolla.data.render import Renderer
from corolla.errors import UsageError
from corolla.models.prompt_files import write_json

UNBOUNDED_CONTEXT = 2048  # for families whose config names no length (alibi)


class ChatEngine:
    """Talks with a distributed model. Use it from one thread; only `stop` may be called from others."""

    def __init__(
        self,
        model: Any,
        renderer: Renderer,
        *,
        sampling: SamplingSettings,
        max_context: int | None = None,
        system: str | None = None,
        notify: Callable[[str], None] | None = None,
    ) -> None:
        """`max_context` is the most tokens of conversation, prompts not counted (None: what the model can).

        `notify` is given a sentence when old turns had to be forgotten. Raises `UsageError`.
        """
        most = context_length(model)
        self.max_context = most if max_context is None else min(max_context, most)
        if self.max_context <= sampling.max_new_tokens:
            raise UsageError(
                f"A context of {self.max_context} tokens has no room for a message and a reply of up to "
                f"{sampling.max_new_tokens} tokens: ask for shorter replies (--max-new-tokens)."
            )
        self.sampling = sampling
        self.history = ChatHistory(renderer, system=system)
        self._model = model
        self._renderer = renderer
        self._notify = notify or (lambda _sentence: None)
        self._session: Any = None
        self._stopped = threading.Event()
        self._replying = False
        self._random = _random_state(sampling.seed)

    @property
    def _limit(self) -> int:
        """Tokens that a turn may begin with."""
        return self.max_context - self.sampling.max_new_tokens

    # --- talking -----------------------------------------------------------------------------------------

    def reply(self, text: str) -> Iterator[str]:
        """The model's reply to `text`, piece by piece as it comes.

        Closing the iterator early, or `stop`, ends the reply and keeps what was said until then. After an
        error the conversation is what it was before. Raises `UsageError`, `SwarmUnavailable`.
        """
        if self._replying:
            raise UsageError("One reply at a time: close the iterator of the last one first.")
        if not text.strip():
            raise UsageError("There is no reply to an empty message.")
        forgotten = self.history.make_room(text, limit=self._limit, room=self._limit // 2)
        if forgotten:
            self._settle()
            self._notify(
                f"The conversation has outgrown the {self.max_context:,} tokens that fit the model: "
                f"it goes on without the oldest {forgotten} of its exchanges."
            )
        if self._session is None:
            self._session = self._model.inference_session(max_length=self.max_context)
        self._replying = True
        reader = self._reader()
        try:
            yield from self._say(self.history.ids + self.history.prompt_ids(text), reader)
        except GeneratorExit:
            self._keep(text, reader)
            raise
        except BaseException as error:
            if isinstance(error, KeyboardInterrupt):
                self._keep(text, reader)
            raise
        else:
            self._keep(text, reader)
        finally:
            self._settle()
            self._replying = False

    def stop(self) -> None:
        """End the reply that is being given after its present token; safe from signal handlers."""
        self._stopped.set()

    def _reader(self) -> ReplyReader:
        settings, tokenizer = self._renderer.settings, self._renderer.tokenizer
        return ReplyReader(
            tokenizer,
            stop_ids=self._renderer.stop_ids,
            end_ids=_end_ids(self._model, tokenizer),
            stop_text=settings.delimiter if settings.style == "delimiter" else None,
        )

    def _keep(self, text: str, reader: ReplyReader) -> None:
        reader.finish()
        if reader.ids or reader.ended:
            self.history.add(Exchange(text, reader.text, tuple(reader.ids)))

    def _say(self, ids: list[int], reader: ReplyReader) -> Iterator[str]:
        """Generate on a thread of its own, so that Ctrl-C never hits in the middle of a step."""
        self._stopped.clear()
        pieces: queue.SimpleQueue[str | BaseException | None] = queue.SimpleQueue()
        listener = _Listener(reader, pieces.put, self._stopped)
        new = torch.tensor([ids[self._session.position :]])

        def work() -> None:
            try:
                self._generate(new, listener)
                pieces.put(None)
            except BaseException as error:
                pieces.put(error)

        thread = threading.Thread(target=work, name="chat-reply", daemon=True)
        thread.start()
        try:
            while isinstance(piece := pieces.get(), str):
                if piece:
                    yield piece
            if piece is not None:
                raise piece
            if rest := reader.finish():
                yield rest
        finally:
            self._stopped.set()
            thread.join()

    def _generate(self, new: torch.Tensor, listener: _Listener) -> None:
        with torch.random.fork_rng(devices=[]):
            torch.set_rng_state(self._random)
            self._model.generate(
                new,
                session=self._session,
                attention_mask=torch.ones_like(new),
                stopping_criteria=StoppingCriteriaList([listener]),
                pad_token_id=0,  # one row is never padded; without it transformers would write a warning
                **self.sampling.generate_arguments(),
            )
            self._random = torch.get_rng_state()

    def _settle(self) -> None:
        """Set the session to the longest beginning that it shares with the history."""
        if self._session is None:
            return
        seen = self._session.output_ids
        tokens = [] if seen is None else seen[0].tolist()
        self._session.position = _shared_beginning(tokens, self.history.ids)

    # --- the conversation as a whole ---------------------------------------------------------------------

    def undo(self) -> bool:
        """Forget the newest exchange, as if it had not been; False when there is none."""
        undone = self.history.undo(room=self._limit // 2)
        self._settle()
        return undone

    def reset(self) -> None:
        """Forget everything, and free the servers' memory."""
        self.history.clear()
        self.close()

    def close(self) -> None:
        """Free the servers' memory; the next reply would run the conversation anew. Safe to call twice."""
        if self._session is not None:
            session, self._session = self._session, None
            session.close()

    def transcript(self) -> list[dict[str, str]]:
        """All that was said: `role` (system, user, assistant) and `content`, in order."""
        return self.history.messages()

    def save(self, path: Path) -> None:
        """Write the transcript as `{"messages": […]}`, which `corolla tune --data` reads; whole or not at all."""
        try:
            write_json(path, {"messages": self.transcript()})
        except OSError as error:
            raise UsageError(
                f"The conversation could not be saved to {path}: {error.strerror or error}."
            ) from error


class _Listener(StoppingCriteria):  # type: ignore[misc]
    """Hears every token of a `generate` call as it comes, and says when to stop."""

    def __init__(self, reader: ReplyReader, put: Callable[[str], None], stopped: threading.Event) -> None:
        self._reader = reader
        self._put = put
        self._stopped = stopped

    def __call__(self, input_ids: torch.Tensor, scores: Any, **_kwargs: Any) -> torch.Tensor:
        if not self._reader.ended:
            self._put(self._reader.push(int(input_ids[0, -1])))
        done = self._reader.ended or self._stopped.is_set()
        return torch.full((input_ids.shape[0],), done, dtype=torch.bool, device=input_ids.device)


def context_length(model: Any) -> int:
    """How many tokens of conversation the model takes, its trained prompt not counted."""
    config = model.config.get_text_config()
    length = getattr(config, "max_position_embeddings", None) or UNBOUNDED_CONTEXT
    prompt = model.prompts
    return int(length) - (0 if prompt is None else prompt.length)


def _end_ids(model: Any, tokenizer: Any) -> set[int]:
    """Single tokens that end a reply in any style."""
    known = model.generation_config.eos_token_id
    listed = known if isinstance(known, list) else [known]
    return {int(token) for token in [*listed, tokenizer.eos_token_id] if token is not None}


def _random_state(seed: int | None) -> torch.Tensor:
    generator = torch.Generator()
    if seed is None:
        generator.seed()
    else:
        generator.manual_seed(seed)
    return generator.get_state()


def _shared_beginning(left: list[int], right: list[int]) -> int:
    for index, (one, other) in enumerate(zip(left, right, strict=False)):
        if one != other:
            return index
    return min(len(left), len(right))
