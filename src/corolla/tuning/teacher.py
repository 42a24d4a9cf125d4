"""A model as its own teacher: it is asked about pieces of a text that it has before it, and answers.

Invariant: an exchange is decided by the model, the pieces, the settings and its number; which others are made beside
it changes nothing. Of each token that an answer has, and of what ended it, the teacher's distribution is the one with
the piece in context, before any sampling.

Self-study with context distillation: Eyuboglu et al. 2025 (Cartridges, arXiv 2506.06266).
"""

from __future__ import annotations

import contextlib
import hashlib
import random
import re
import threading
from collections import Counter
from collections.abc import Collection, Generator, Iterable, Iterator, Sequence
from concurrent.futures import CancelledError, ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList, StoppingCriteriaList

from corolla.data.conversation import Turn
from corolla.data.cuts import shared
from corolla.data.documents import SENTENCE, Chunk
from corolla.data.render import Renderer
from corolla.data.replies import ReplyReader, TokensSeen, reply_ends
from corolla.errors import DataError, SessionLimit, UsageError
from corolla.models.limits import context_limit
from corolla.tuning.samples import base_model
from corolla.tuning.settings import StudySettings

LIKELIEST = 20  # tokens whose probabilities are kept
AT_ONCE = 8  # exchanges about a piece
DRAWN_FROM = 50  # likeliest tokens, of a question
TEMPERATURE = 0.7  # of questions; answers are what is likeliest
LONGEST_SENTENCE, SHORTEST_SENTENCE = 240, 12  # characters
# A line that goes on in the next, which is no item of a list, no heading, and not behind a gap.
WRAPPED = re.compile(r"(?<=\S)[ \t]*\r?\n(?!\d+[.)]\s)(?=[^\W_])")
# What a question may be about, so that a text is seen from several sides, as in self-study; most are about one of its
# sentences, in turn, so that each is asked about.
SENTENCE_HERE = "{sentence}"
SEEDS = {
    "fact": 'Ask one short question that this sentence of the text answers: "{sentence}" Write only the question.',
    "detail": 'Ask one short question about a name, a number or a place in this sentence of the text: "{sentence}" '
    "Write only the question.",
    "reason": 'Ask one question, with why or how, about this sentence of the text: "{sentence}" '
    "Write only the question.",
    "use": "Ask one question of somebody who needs the text above for their work. Write only the question.",
    "summary": 'Ask what the text says about the subject of this sentence: "{sentence}" Write only the question.',
}
ANSWER = "Answer in a sentence or two from the text above: "
# Every other exchange is about a sentence that is itself the answer, so that no model is too small to ask about it.
SAID = "said"
ABOUT, GOES_ON = "What is said about {words}?", "How does this go on: {words}"
RARE = 3  # a word that a text has more often is hardly what somebody asks about
SHORT = 3  # letters of a word that is not looked for, unless it has a digit
# Where words are not parted by spaces (Chinese, Japanese), each character counts as one.
UNPARTED = "\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff"
WORD = re.compile(rf"[{UNPARTED}]|[^\W{UNPARTED}]+")


@dataclass(frozen=True)
class Exchange:
    """A question about a piece of a text, and the answer that the model gave with the piece before it."""

    number: int
    chunk: int
    seed: str  # one of `SEEDS`, or `SAID`
    question: str
    answer: str
    tokens: list[int]  # of the answer, and of what ended it
    said: int  # how many of `tokens` are the answer's
    top_ids: list[list[int]]  # for each of `tokens` the likeliest ones there, best first
    top_logprobs: list[list[float]]

    def __post_init__(self) -> None:
        if not self.said <= len(self.tokens) == len(self.top_ids) == len(self.top_logprobs):
            raise ValueError("of each token there is the teacher's distribution")


@dataclass(frozen=True)
class _Said:
    text: str
    tokens: list[int]
    own: int
    logits: Tensor  # [n, V]


def sentences_of(text: str) -> list[str]:
    """The sentences of a piece that are long enough to ask about, or all of it; each no longer than is repeated."""
    whole = WRAPPED.sub(" ", text)
    found = [" ".join(one.split()).lstrip("#*-> ")[:LONGEST_SENTENCE] for one in SENTENCE.findall(whole)]
    return [one for one in found if len(one) >= SHORTEST_SENTENCE] or [
        " ".join(text.split())[:LONGEST_SENTENCE]
    ]


def telling_words(text: str, often: Counter[str]) -> list[str]:
    """The words of a text, in order, that are what somebody would ask about: seldom in the whole, of which `often`."""
    return [
        word
        for word in WORD.findall(text)
        if 0 < often[word.casefold()] <= RARE
        and (len(word) > SHORT or any(map(str.isdigit, word)) or re.match(f"[{UNPARTED}]", word))
    ]


def counted_words(texts: Iterable[str]) -> Counter[str]:
    """How often each word is in these, without regard to case."""
    return Counter(word for text in texts for word in WORD.findall(text.casefold()))


def about_sentence(sentence: str, often: Counter[str], drawn: random.Random) -> str:
    """A question that a sentence answers: about two of its words, else how it goes on."""
    words = telling_words(sentence, often)
    if len(words) < 3:  # two would give away all of it
        return GOES_ON.format(words=sentence[: max(1, len(sentence) // 3)])
    longest = sorted(range(len(words)), key=lambda place: len(words[place]))[-4:]
    return ABOUT.format(words=", ".join(words[place] for place in sorted(drawn.sample(longest, 2))))


class Reading:
    """A piece of a text in the caches of a session, and what is asked about it, each in a fork of that session.

    Use as a context manager. The methods are for any number of threads.
    """

    def __init__(self, model: Any, renderer: Renderer, text: str, settings: StudySettings) -> None:
        """`model` has no prompt at the moment. Raises `UsageError` where the piece is too long for it."""
        self._model, self._renderer, self._text, self._settings = model, renderer, text, settings
        self._sentences, self._often = sentences_of(text), counted_words([text])
        self._ends = reply_ends(model, renderer)
        prompts = [self._prompt(request) for request in (*SEEDS.values(), ANSWER)]
        self._begin = prompts[0][: min(shared(prompts[0], one) for one in prompts[1:])]
        self._lock = threading.Lock()
        self._stopped = False
        self._forks: set[Any] = set()
        self._session = model.inference_session()

    def __enter__(self) -> Self:
        try:
            self._generate(self._session, self._begin, len(self._begin), 1, lambda _row, _token: True, None)
        except BaseException:
            self._session.close()
            raise
        self._session.position = len(self._begin)
        return self

    def __exit__(self, *_error: object) -> None:
        self._session.close()

    def exchange(self, number: int, chunk: int, turn: int) -> Exchange:
        """The exchange of this number, `turn` others about this piece, the `chunk`th, having come before it.

        Raises `SwarmUnavailable`, `CancelledError` after `stop`.
        """
        half, odd = divmod(turn, 2)
        rounds, place = divmod(half, len(self._sentences))
        sentence, own = self._sentences[place], f"{self._settings.seed}:{number}"
        seed = SAID if odd else list(SEEDS)[(half + rounds) % len(SEEDS)]
        question, said = self._read_out(sentence, own) if odd else self._asked(seed, sentence, own)
        if said is None:
            return Exchange(number, chunk, seed, question, "", [], 0, [], [])
        logprobs, ids = said.logits.float().log_softmax(-1).topk(min(LIKELIEST, said.logits.shape[-1]))
        return Exchange(
            number,
            chunk,
            seed,
            question,
            said.text.strip(),
            said.tokens,
            said.own,
            ids.tolist(),
            [[round(one, 6) for one in row] for row in logprobs.tolist()],
        )

    def answer(self, question: str) -> _Said:
        """The likeliest answer, with the piece in context."""
        return self._say(ANSWER + question, self._settings.answer_tokens, None)

    def _asked(self, seed: str, sentence: str, own: str) -> tuple[str, _Said | None]:
        """A question of the model's, drawn by numbers of its `own`, and the answer; none where nothing was asked."""
        request = SEEDS[seed].replace(SENTENCE_HERE, sentence)
        asked = self._say(request, self._settings.question_tokens, _Drawn(own))
        question = next((line.strip() for line in asked.text.splitlines() if line.strip()), "")
        return question, self.answer(question) if question else None

    @torch.no_grad()
    def _read_out(self, sentence: str, own: str) -> tuple[str, _Said | None]:
        """A question about a sentence, and the sentence as the answer, up to the longest; none where it is no reply.

        The distributions are those of the model as it would answer so with the piece before it.
        """
        question = about_sentence(sentence, self._often, random.Random(own))
        try:
            talk = [Turn("user", question), Turn("assistant", sentence)]
            rendering = self._renderer.style.render(talk)
        except DataError:  # there are marks in it that are the template's own
            return question, None
        place = rendering.replies[1]
        if place.begin == place.end:  # the tokenizer knows none of it
            return question, None
        end = [*self._renderer.stop_ids] if place.apart else []
        tokens = [*rendering.ids[place.begin : place.end], *end][: self._settings.answer_tokens]
        prompt = self._prompt(ANSWER + question)
        with self._forked() as session:
            session.position = shared(self._begin, prompt)
            new = torch.tensor([prompt[session.position :] + tokens[:-1]], device=self._model.device)
            output = self._model(
                new,
                use_cache=True,
                logits_to_keep=len(tokens),
                **{self._model.cache_name: session.cache},
            )
        said = min(place.end - place.begin, len(tokens))
        return question, _Said(sentence, tokens, said, output.logits[0])

    def stop(self) -> None:
        """End what is being said, in any thread."""
        with self._lock:
            self._stopped = True
            for fork in self._forks:
                fork.stop()

    def _prompt(self, request: str) -> list[int]:
        return self._renderer.prompt_ids([Turn("user", f"{self._text.strip()}\n\n{request}")])

    def _say(self, request: str, most: int, drawn: _Drawn | None) -> _Said:
        prompt = self._prompt(request)
        reader, tokens = ReplyReader.of(self._renderer, self._ends), list[int]()

        def take(_row: int, token: int) -> bool:
            tokens.append(token)
            reader.push(token)
            return reader.ended

        with self._forked() as session:
            session.position = shared(self._begin, prompt)
            result = self._generate(
                session, prompt[session.position :], len(prompt), most, take, drawn, output_logits=True
            )
        if not reader.ended:
            reader.finish()
        own = shared(reader.ids, tokens)
        return _Said(reader.text, tokens, own, torch.cat(result.logits))

    @contextlib.contextmanager
    def _forked(self) -> Iterator[Any]:
        with self._lock:
            if self._stopped:
                raise CancelledError
            session = self._session.fork()
            self._forks.add(session)
        try:
            yield session
        finally:
            with self._lock:
                self._forks.discard(session)
            session.close()

    def _generate(
        self, session: Any, new: Sequence[int], known: int, most: int, take: Any, drawn: Any, **more: Any
    ) -> Any:
        device = self._model.device
        return self._model.generate(
            torch.tensor([new], device=device),
            attention_mask=torch.ones(1, known, dtype=torch.long, device=device),
            session=session,
            do_sample=False,
            num_beams=1,
            num_return_sequences=1,
            repetition_penalty=1.0,
            max_new_tokens=most,
            eos_token_id=None,
            pad_token_id=0,
            tokenizer=self._renderer.tokenizer,
            return_dict_in_generate=True,
            logits_processor=LogitsProcessorList([] if drawn is None else [drawn]),
            stopping_criteria=StoppingCriteriaList([TokensSeen(take, known)]),
            **more,
        )


class _Drawn(LogitsProcessor):  # type: ignore[misc]
    """Makes the likeliest token one that is drawn, by numbers of its own (Gumbel's): threads share torch's."""

    def __init__(self, seed: str) -> None:
        number = int.from_bytes(hashlib.sha256(seed.encode()).digest()[:8], "big") >> 1
        self._generator = torch.Generator().manual_seed(number)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        noise = -torch.empty(scores.shape, dtype=torch.float32).exponential_(generator=self._generator).log()
        least = scores.topk(min(DRAWN_FROM, scores.shape[-1])).values[:, -1:]
        return (scores / TEMPERATURE + noise.to(scores)).masked_fill(scores < least, -torch.inf)


def exchanges(
    model: Any, renderer: Renderer, chunks: Sequence[Chunk], settings: StudySettings, known: Collection[int]
) -> Generator[Exchange]:
    """All exchanges of a study but those whose numbers are known, piece by piece; n is about piece n % pieces.

    Raises `SwarmUnavailable`; whoever closes the iterator ends what is under way.
    """
    with base_model(model):
        for place, chunk in enumerate(chunks):
            missing = [one for one in range(place, settings.questions, len(chunks)) if one not in known]
            if missing:
                with Reading(model, renderer, chunk.text, settings) as reading:
                    yield from _at_once(reading, missing, place, len(chunks))


def _at_once(reading: Reading, numbers: Sequence[int], chunk: int, chunks: int) -> Generator[Exchange]:
    with ThreadPoolExecutor(AT_ONCE, thread_name_prefix="study") as pool:
        found = [pool.submit(reading.exchange, number, chunk, number // chunks) for number in numbers]
        try:
            for one in as_completed(found):  # each is kept as soon as it is there
                yield one.result()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            reading.stop()
            raise


def check_room(
    config: Any,
    renderer: Renderer,
    chunks: Sequence[Chunk],
    settings: StudySettings,
    asked: Sequence[str] = (),
) -> None:
    """Raises `SessionLimit` where a piece, a question and an answer do not fit the model of that config.

    `asked` are questions of somebody's. Raises `UsageError` where there is no text, more of it than questions, or too
    little `max_length` to learn a question with its answer.
    """
    if not chunks:
        raise UsageError("There is nothing to study: the documents hold no text.")
    question = len(renderer.prompt_ids([Turn("user", "?")])) + settings.question_tokens
    least, given = question + settings.answer_tokens, settings.rendering.max_length
    if least > given:
        raise UsageError(
            f"A question of {settings.question_tokens} tokens with an answer of {settings.answer_tokens} takes "
            f"{least} in a chat, more than --max-length {given}: give that, or fewer --answer-tokens."
        )
    limit = context_limit(config, 0)
    longest = max(chunks, key=lambda chunk: chunk.tokens)
    request = max(SEEDS.values(), key=len).replace(SENTENCE_HERE, max(sentences_of(longest.text), key=len))
    request = max([request, *(ANSWER + one for one in asked)], key=len)
    prompt = renderer.prompt_ids([Turn("user", f"{longest.text}\n\n{request}")])
    needed = len(prompt) + settings.question_tokens + settings.answer_tokens
    if needed > limit:
        raise SessionLimit(
            f"A part of {longest.tokens} tokens with its question and answer takes {needed}, more than the {limit} "
            "that the model can read: give a smaller --chunk-tokens"
            f"{', or shorter --facts' if asked else ''}."
        )
    if settings.questions < len(chunks):
        raise UsageError(
            f"The text has {len(chunks)} parts: give --questions {len(chunks)} or more, or a larger --chunk-tokens."
        )
