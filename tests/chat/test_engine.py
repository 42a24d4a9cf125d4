"""The chat around its tokens: what is refused, forgotten, saved; how a reply is stopped; how it is sampled."""

from __future__ import annotations

import json
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.chat.reference import VOCABULARY, byte_tokenizer
from tests.swarm_fixture import MemorySwarm
from tests.tiny_models import tiny_config, write_tiny
from transformers import GenerationConfig

from corolla.chat.engine import ChatEngine, Generation, check_context
from corolla.chat.sampling import SamplingSettings
from corolla.data.render import Renderer, RenderSettings
from corolla.data.sources import load_conversations
from corolla.errors import MissingBlocks, SessionLimit, SwarmUnavailable, UsageError
from corolla.models.limits import UNLIMITED_CONTEXT, context_limit

GREEDY = SamplingSettings(temperature=0, max_new_tokens=12)
Chat = Callable[..., ChatEngine]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny("llama", tmp_path_factory.mktemp("llama"), vocab_size=VOCABULARY)


@pytest.fixture
def swarm(folder: Path) -> Iterator[MemorySwarm]:
    with MemorySwarm(folder, [(0, 2), (2, 4)]) as made:
        yield made


@pytest.fixture
def chat(swarm: MemorySwarm) -> Iterator[Chat]:
    """Engines over one model that never ends a reply by itself, unless told which tokens do."""
    model = swarm.model(patience=0.2)
    engines: list[ChatEngine] = []

    def make(sampling: SamplingSettings = GREEDY, *, ends: Any = None, **arguments: Any) -> ChatEngine:
        model.generation_config.eos_token_id = ends
        tokenizer = byte_tokenizer()
        tokenizer.eos_token = None
        renderer = Renderer(tokenizer, RenderSettings())
        engine = ChatEngine(model, renderer, sampling=sampling, **{"max_context": 400, **arguments})
        engines.append(engine)
        return engine

    yield make
    for engine in engines:
        engine.close()


def said_by(engine: ChatEngine, text: str) -> str:
    return "".join(engine.reply(text))


# --- what is refused ---------------------------------------------------------------------------------------


def test_a_context_that_one_reply_would_fill_is_refused(chat: Chat) -> None:
    with pytest.raises(UsageError, match="--max-new-tokens"):
        chat(max_context=12)
    check_context(GREEDY, 13)


def test_a_blank_message_is_refused(chat: Chat) -> None:
    with pytest.raises(UsageError, match="say something"):
        said_by(chat(), " \n")


def test_a_message_that_is_too_long_is_refused_and_forgotten(chat: Chat, swarm: MemorySwarm) -> None:
    engine = chat(max_context=60)
    said_by(engine, "ab")
    before, tokens = swarm.counted(), engine.tokens
    with pytest.raises(SessionLimit, match="has room for 48"):
        said_by(engine, "a" * 60)
    assert engine.tokens == tokens
    assert swarm.counted() == before
    said_by(engine, "cd")
    assert [message["content"] for message in engine.transcript()[::2]] == ["ab", "cd"]


def test_a_turn_that_fails_is_forgotten_and_can_be_said_again(chat: Chat, swarm: MemorySwarm) -> None:
    reference = chat()
    expected = [said_by(reference, text) for text in ("one", "two")]
    engine = chat()
    assert said_by(engine, "one") == expected[0]
    lost = next(iter(swarm.servers))
    swarm.kill(lost)
    with pytest.raises(SwarmUnavailable):
        said_by(engine, "two")
    assert [message["content"] for message in engine.transcript()] == ["one", expected[0]]
    swarm.add(0, 2)
    assert said_by(engine, "two") == expected[1]
    assert engine.tokens == reference.tokens


# --- stopping ----------------------------------------------------------------------------------------------


def interrupt(pieces: Any) -> None:
    with pytest.raises(KeyboardInterrupt):
        pieces.throw(KeyboardInterrupt)


@pytest.mark.parametrize("stop", [interrupt, lambda pieces: pieces.close()], ids=["Ctrl-C", "closed"])
def test_a_stopped_reply_keeps_what_was_said_and_the_chat_goes_on(
    chat: Chat, stop: Callable[[Any], None]
) -> None:
    whole, engine = chat(), chat(SamplingSettings(temperature=0, max_new_tokens=150))
    full = said_by(whole, "Tell me")
    pieces = engine.reply("Tell me")
    first = next(pieces)
    stop(pieces)
    kept = engine.transcript()[1]["content"]
    assert kept.startswith(first)
    assert full.startswith(kept) or kept.startswith(full)
    assert len(engine.tokens) < 150, "the reply was not stopped"
    delimiter = engine.tokens[len("Tell me") :][:7]
    assert engine.tokens[-7:] == delimiter, "the next turn would not begin behind a delimiter"
    said_by(engine, "And?")
    assert len(engine.transcript()) == 4


def test_a_turn_that_is_stopped_before_anything_was_said_is_forgotten(
    chat: Chat, swarm: MemorySwarm, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = chat()
    said_by(engine, "one")
    before = engine.transcript(), engine.tokens
    stopped, waited = threading.Event(), list[bool]()
    stop = Generation.stop

    def told(generation: Generation) -> None:
        stop(generation)
        stopped.set()

    def press(_module: Any, _args: Any) -> None:
        """Ctrl-C while the first token is computed, which goes on once the chat knows of it."""
        hook.remove()
        signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)
        waited.append(stopped.wait(60))

    monkeypatch.setattr(Generation, "stop", told)
    hook = engine._model.get_input_embeddings().register_forward_pre_hook(press)
    with pytest.raises(KeyboardInterrupt):
        said_by(engine, "two")
    assert (engine.transcript(), engine.tokens) == before
    fresh = chat()
    for text in ("one", "three"):
        said_by(fresh, text)
    said_by(engine, "three")
    assert waited == [True]
    assert engine.tokens == fresh.tokens


def test_a_reply_that_nobody_reads_on_is_ended_by_the_next_call(chat: Chat) -> None:
    engine = chat()
    pieces = engine.reply("one")
    next(pieces)
    said_by(engine, "two")
    assert [message["content"] for message in engine.transcript()[::2]] == ["one", "two"]


def test_closing_frees_the_servers(chat: Chat, swarm: MemorySwarm) -> None:
    engine = chat()
    said_by(engine, "one")
    assert all(server.budget.reserved > 0 for server in swarm.servers.values())
    engine.close()
    engine.close()
    assert all(server.budget.reserved == 0 for server in swarm.servers.values())


# --- sampling ----------------------------------------------------------------------------------------------


def test_a_seed_makes_replies_repeatable(chat: Chat) -> None:
    def with_seed(seed: int) -> list[str]:
        engine = chat(SamplingSettings(temperature=1.5, max_new_tokens=20, seed=seed))
        return [said_by(engine, text) for text in ("one", "two")]

    assert with_seed(1) == with_seed(1) != with_seed(2)


def test_choosing_among_one_is_greedy(chat: Chat) -> None:
    sampled = SamplingSettings(temperature=2.0, top_k=1, max_new_tokens=12)
    assert said_by(chat(sampled), "one") == said_by(chat(), "one")


def test_a_penalty_for_repetition_is_applied(chat: Chat) -> None:
    plain, penalised = (
        chat(),
        chat(SamplingSettings(temperature=0, max_new_tokens=12, repetition_penalty=50.0)),
    )
    said_by(plain, "one")
    said_by(penalised, "one")
    reply = penalised.tokens[len("one") + 7 : -7]
    assert reply != plain.tokens[len("one") + 7 : -7]
    assert len(set(reply)) == len(reply)


def test_what_the_checkpoint_says_of_sampling_does_not_show_through(chat: Chat) -> None:
    engine = chat()
    expected = said_by(engine, "one")
    model = engine._model
    model.generation_config = GenerationConfig(
        do_sample=True, temperature=5.0, top_k=200, repetition_penalty=9.0, num_beams=3, max_length=5
    )
    assert said_by(chat(), "one") == expected


@pytest.mark.parametrize("several", [False, True])
def test_the_models_own_end_tokens_end_a_reply(chat: Chat, several: bool) -> None:
    engine = chat()
    said_by(engine, "one")
    reply = engine.tokens[len("one") + 7 : -7]
    index = next(index for index in range(3, len(reply)) if reply[index] not in reply[:index])
    ended = chat(ends=[1, reply[index]] if several else reply[index])
    said_by(ended, "one")
    assert ended.tokens[len("one") + 7 : -7] == reply[:index]


def test_a_reply_is_never_empty_unless_that_is_asked_for(chat: Chat) -> None:
    plain = chat()
    said_by(plain, "one")
    first, *_ = plain.tokens[len("one") + 7 :]
    held_back = chat(ends=first)
    assert said_by(held_back, "one")
    assert held_back.tokens[len("one") + 7] != first
    free = chat(SamplingSettings(temperature=0, max_new_tokens=12, allow_empty=True), ends=first)
    assert said_by(free, "one") == ""
    assert free.tokens == byte_tokenizer()("one\n-----\n\n-----\n").input_ids


@pytest.mark.parametrize("temperature", [0.0, 3.0])
def test_a_model_that_wants_to_say_the_delimiter_only_says_something(chat: Chat, temperature: float) -> None:
    engine = chat(SamplingSettings(temperature=temperature, max_new_tokens=9, seed=3))
    pieces = byte_tokenizer()("\n- ").input_ids

    def prefer(_head: Any, _inputs: Any, logits: Any) -> Any:
        logits = logits.clone()
        logits[..., pieces] += 100.0
        return logits

    hook = engine._model.lm_head.register_forward_hook(prefer)
    replies = [said_by(engine, text) for text in ("one", "two", "three")]
    hook.remove()
    assert all(reply.strip("- \n") for reply in replies), replies
    assert [message["content"] for message in engine.transcript()[1::2]] == replies


def test_tokens_equal_to_the_paddings_are_seen(chat: Chat) -> None:
    engine = chat()
    engine._model.generation_config.pad_token_id = None
    plain = said_by(engine, "one two three")
    engine._model.generation_config.pad_token_id = byte_tokenizer()("o").input_ids[0]
    assert said_by(chat(), "one two three") == plain


# --- the conversation as a whole -----------------------------------------------------------------------------


def test_a_saved_chat_is_data_to_learn_from(chat: Chat, tmp_path: Path) -> None:
    engine = chat(system="Be kind.")
    for text in ("one", "two"):
        said_by(engine, text)
    path = tmp_path / "chat.json"
    engine.save(path)
    assert json.loads(path.read_text()) == [{"messages": engine.transcript()}]
    assert [message["role"] for message in engine.transcript()] == ["system"] + ["user", "assistant"] * 2
    (conversation,), _ = load_conversations(str(path))
    assert [turn.text for turn in conversation.turns][1::2] == ["one", "two"]


def test_a_chat_that_cannot_be_saved_goes_on(chat: Chat, tmp_path: Path) -> None:
    engine = chat()
    said_by(engine, "one")
    with pytest.raises(UsageError, match="could not be saved"):
        engine.save(tmp_path / "nowhere" / "chat.json")
    said_by(engine, "two")


def test_there_is_nothing_to_undo_at_first(chat: Chat) -> None:
    engine = chat()
    assert engine.undo() is None
    said_by(engine, "one")
    assert engine.undo() == "one"
    assert engine.undo() is None
    assert engine.tokens == []


def test_turns_are_left_behind_when_one_token_is_too_many(chat: Chat) -> None:
    notices: list[str] = []
    engine = chat(max_context=150, notify=notices.append)
    said_by(engine, "one")
    fits = 150 - GREEDY.max_new_tokens - len(engine.tokens) - len("\n-----\n")
    said_by(engine, "x" * fits)
    assert notices == []
    engine.undo()
    said_by(engine, "x" * (fits + 1))
    assert len(notices) == 1


def test_undoing_what_was_left_behind_brings_older_turns_back(chat: Chat) -> None:
    notices: list[str] = []
    engine = chat(max_context=110, notify=notices.append)
    count = 0
    while not notices:
        said_by(engine, f"turn {count}")
        count += 1
    fitted = [engine.undo() for _ in range(count - 1)]
    assert fitted == [f"turn {index}" for index in reversed(range(1, count))]
    said_by(engine, "again")
    fresh = chat(max_context=110)
    said_by(fresh, "turn 0")
    said_by(fresh, "again")
    assert engine.tokens == fresh.tokens
    assert engine.transcript() == fresh.transcript()


@pytest.mark.parametrize(
    ("family", "limit"), [("llama", 512), ("gpt2", 512), ("opt", 512), ("bloom", UNLIMITED_CONTEXT)]
)
def test_the_context_is_the_models_without_its_prompt(family: str, limit: int) -> None:
    assert context_limit(tiny_config(family), 16) == limit - 16


def test_a_chat_may_go_to_the_very_end_of_the_models_positions(tmp_path: Path) -> None:
    """gpt2 looks positions up in a table: one too many is an error."""
    folder = write_tiny("gpt2", tmp_path, vocab_size=VOCABULARY, n_positions=64)
    with MemorySwarm(folder, [(0, 2), (2, 4)]) as swarm:
        model = swarm.model(tuning_mode="ptune", pre_seq_len=4)
        model.generation_config.eos_token_id = None
        limit = context_limit(model.config, 4)
        renderer = Renderer(byte_tokenizer(), RenderSettings(delimiter="\n"))
        with ChatEngine(model, renderer, sampling=GREEDY, max_context=limit) as engine:
            said_by(engine, "x" * (limit - 13))
            assert len(engine.tokens) >= limit - 13 + 2
            with pytest.raises(SessionLimit, match="This message takes"):
                said_by(engine, "x" * (limit - 12))


def test_missing_blocks_are_named(chat: Chat, swarm: MemorySwarm) -> None:
    engine = chat()
    for peer in list(swarm.servers):
        swarm.kill(peer)
    with pytest.raises((MissingBlocks, SwarmUnavailable)):
        said_by(engine, "one")
    assert engine.transcript() == []
