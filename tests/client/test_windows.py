"""Conversations far longer than a window are what the local model makes of them, and servers keep little of them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.client.conftest import random_ids
from tests.covering import covering
from tests.reference import local_model
from tests.swarm_fixture import MemorySwarm
from tests.tiny_models import write_tiny
from torch import Tensor

from corolla.models.attention.pages import MARGIN, PAGE

SPANS = [(0, 2), (2, 4)]
WINDOW = 6  # of the tiny models
FULL = {"mistral": 0, "gemma3_text": 1}  # tables of each span that keep everything
FAMILIES = list(FULL)
SMALL_MARGIN = 24
GREEDY: dict[str, Any] = {"do_sample": False}


class Chat:
    """A swarm's model and the local one."""

    def __init__(self, family: str, folder: Path, margin: int, spans: list[tuple[int, int]]) -> None:
        self.family, self.margin = family, margin
        write_tiny(family, folder)
        self.swarm = MemorySwarm(folder, spans, margin=margin)
        self.model, self.local = self.swarm.model(), local_model(folder)
        for settings in (self.model.generation_config, self.local.generation_config):
            settings.eos_token_id, settings.pad_token_id = None, 0

    def say(self, session: Any, ids: Tensor | None, count: int, **settings: Any) -> Tensor:
        found: Tensor = self.model.generate(ids, max_new_tokens=count, session=session, **(GREEDY | settings))
        return found

    def wanted(self, ids: Tensor, count: int, **settings: Any) -> Tensor:
        """The whole, [R, n + count]."""
        found: Tensor = self.local.generate(ids, max_new_tokens=count, **(GREEDY | settings))
        return found

    def computed(self) -> int:
        return sum(self.swarm.counted().values())

    def pages_held(self) -> list[int]:
        """Of each server, once its compute thread has done what it was told to."""

        async def held(server: Any) -> int:
            pool = server.pool
            found: int = await server.engine.submit(0, lambda: pool.pages - pool.free)
            return found

        return [self.swarm.loop.run(held(server)) for server in self.swarm.servers.values()]

    def most_held(self, tokens: int) -> int:
        """Pages that one row of so many tokens may hold on a server."""
        return FULL[self.family] * -(-tokens // PAGE) + -(-(self.margin + WINDOW - 1 + PAGE) // PAGE)


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def chat(family: str, tmp_path: Path) -> Iterator[Chat]:
    made = Chat(family, tmp_path, SMALL_MARGIN, SPANS)
    with made.swarm:
        yield made


def test_a_prompt_and_a_reply_of_many_windows(chat: Chat) -> None:
    ids = random_ids(1, 150)
    with chat.model.inference_session() as session:
        found = chat.say(session, ids, 60)
        assert torch.equal(found, chat.wanted(ids, 60))
        assert len(found[0, 150:].unique()) > 15
        assert all(0 < held <= chat.most_held(210) for held in chat.pages_held())
    assert chat.swarm.reserved() == [0, 0]


def test_the_real_margin(family: str, tmp_path: Path) -> None:
    """Turn after turn, with a step back of the margin's length in between, and nothing is replayed."""
    chat = Chat(family, tmp_path, MARGIN, [(0, 4)])
    with chat.swarm, chat.model.inference_session() as session:
        ids = random_ids(1, 400)
        past = chat.say(session, ids, 20)
        assert torch.equal(past, chat.wanted(ids, 20))
        assert all(held <= chat.most_held(420) for held in chat.pages_held())
        at = session.position - MARGIN
        session.position, before = at, chat.computed()
        other = random_ids(1, 30, seed=1)
        found = chat.say(session, other, 10)
        assert torch.equal(
            torch.cat([past[:, :at], found], 1), chat.wanted(torch.cat([past[:, :at], other], 1), 10)
        )
        assert chat.computed() - before <= 30 + 10


def test_rows_with_padding_go_on_from_turn_to_turn(chat: Chat) -> None:
    ids, mask = random_ids(3, 90), torch.ones(3, 90, dtype=torch.long)
    mask[1, :60], mask[2, :89] = 0, 0
    with chat.model.inference_session() as session:
        past = chat.say(session, ids, 40, attention_mask=mask)
        assert torch.equal(past, chat.wanted(ids, 40, attention_mask=mask))
        more = random_ids(3, 20, seed=1)
        whole = torch.cat([past, more], 1)
        longer = torch.cat([mask, torch.ones(3, 60, dtype=torch.long)], 1)
        found = chat.say(session, more, 20)
        assert torch.equal(torch.cat([past, found], 1), chat.wanted(whole, 20, attention_mask=longer))
        assert all(held <= 3 * chat.most_held(170) for held in chat.pages_held())


def test_beams(chat: Chat) -> None:
    ids, settings = random_ids(1, 90), {"num_beams": 4}
    with chat.model.inference_session() as session:
        found = chat.say(session, ids, 40, **settings)
        assert torch.equal(found, chat.wanted(ids, 40, **settings))
        assert all(held <= 4 * chat.most_held(130) for held in chat.pages_held())
        # Beam search leaves other rows behind than the one it returns: the next turn may have to go far back.
        more = torch.cat([found, random_ids(1, 5, seed=1)], 1)
        again = chat.say(session, more[:, -5:], 10)
        assert torch.equal(again, chat.wanted(more, 10)[:, 130:])


def test_speculation(chat: Chat) -> None:
    """Prompt lookup takes tokens back again and again."""
    ids = random_ids(1, 20).repeat(1, 5)
    settings = {"prompt_lookup_num_tokens": 8}
    with chat.model.inference_session() as session:
        assert torch.equal(chat.say(session, ids, 40, **settings), chat.wanted(ids, 40))


@pytest.mark.parametrize(
    ("family", "back"),
    covering(FAMILIES, [1, SMALL_MARGIN - 3, 60, 100], together=1),
    indirect=["family"],
)
def test_a_chat_goes_back(chat: Chat, back: int) -> None:
    """Within the margin nothing is computed again, beyond it all; exactly both times."""
    ids, other = random_ids(1, 100), random_ids(1, 7, seed=1)
    with chat.model.inference_session() as session:
        past = chat.say(session, ids, 20)
        session.position = at = session.position - back
        before = chat.computed()
        found = chat.say(session, other, 12)
        whole = torch.cat([past[:, :at], other], 1)
        assert torch.equal(torch.cat([past[:, :at], found], 1), chat.wanted(whole, 12))
        again = 0 if back <= SMALL_MARGIN else at
        assert chat.computed() - before == 2 * (again + 7 + 11)
        more = chat.say(session, None, 20)
        assert torch.equal(torch.cat([whole, found[:, 7:], more], 1), chat.wanted(whole, 32))


def test_a_fork_and_its_origin_go_on_by_themselves(chat: Chat) -> None:
    ids, one, two = random_ids(1, 150), random_ids(1, 6, seed=1), random_ids(1, 9, seed=2)
    session = chat.model.inference_session()
    past = chat.say(session, ids, 20)
    before = chat.computed()
    fork = session.fork()
    assert all(held <= chat.most_held(170) for held in chat.pages_held())  # nothing is copied
    mine, other = chat.say(session, one, 30), chat.say(fork, two, 30)
    assert torch.equal(torch.cat([past, mine], 1), chat.wanted(torch.cat([past, one], 1), 30))
    assert torch.equal(torch.cat([past, other], 1), chat.wanted(torch.cat([past, two], 1), 30))
    assert chat.computed() - before == 2 * ((1 + 6 + 29) + (1 + 9 + 29))
    session.close()
    fork.position = 100  # beyond what it keeps
    found = chat.say(fork, one, 20)
    whole = torch.cat([past[:, :100], one], 1)
    assert torch.equal(torch.cat([past[:, :100], found], 1), chat.wanted(whole, 20))
    fork.close()


@pytest.mark.parametrize(
    ("family", "still_open", "longer"),
    covering(FAMILIES, {"open": True, "closed": False}, {"kept": 5, "given back": 70}),
    indirect=["family"],
)
def test_a_known_beginning(chat: Chat, still_open: bool, longer: int) -> None:
    """Shared while the first session has not gone on for too long, and else sent again; exactly both times."""
    begun, rest, other = random_ids(1, 100), random_ids(1, longer, seed=1), random_ids(1, 30, seed=2)
    first = chat.model.inference_session()
    ids = torch.cat([begun, rest], 1)
    assert torch.equal(chat.say(first, ids, 5), chat.wanted(ids, 5))
    if not still_open:
        first.close()
    before, ids = chat.computed(), torch.cat([begun, other], 1)
    with chat.model.inference_session() as second:
        assert torch.equal(chat.say(second, ids, 15), chat.wanted(ids, 15))
    computed = chat.computed() - before
    assert computed == 2 * (30 + 14) + (0 if longer == 5 else 2 * 100)
    if still_open:
        more = random_ids(1, 3, seed=4)
        whole = torch.cat([first.output_ids, more], 1)
        assert torch.equal(chat.say(first, more, 8), chat.wanted(whole, 8)[:, whole.shape[1] - 3 :])
    first.close()


def test_a_lost_server_is_replaced_far_beyond_the_window(family: str, tmp_path: Path) -> None:
    chat = Chat(family, tmp_path, SMALL_MARGIN, [*SPANS, (2, 4)])
    with chat.swarm, chat.model.inference_session() as session:
        ids = random_ids(1, 200)
        past = chat.say(session, ids, 10)
        chat.swarm.kill(session.hops[1].peer_id)
        assert torch.equal(torch.cat([past, chat.say(session, None, 30)], 1), chat.wanted(ids, 40))


def test_a_small_server_serves_a_long_chat(tmp_path: Path) -> None:
    """400 tokens go through a cache that holds 128, since all blocks see a window only."""
    write_tiny("mistral", tmp_path)
    with MemorySwarm(tmp_path, [(0, 4)], margin=SMALL_MARGIN, cache_tokens=128) as swarm:
        model, local = swarm.model(), local_model(tmp_path)
        for settings in (model.generation_config, local.generation_config):
            settings.eos_token_id, settings.pad_token_id = None, 0
        past = random_ids(1, 20)
        with model.inference_session() as session:
            said = past
            for turn in range(12):
                found = model.generate(said, max_new_tokens=12, session=session, **GREEDY)
                past = past if turn == 0 else torch.cat([past, said], 1)
                past = torch.cat([past, found[:, said.shape[1] :]], 1)
                said = random_ids(1, 20, seed=turn + 1)
        ids = random_ids(1, 20)
        for turn in range(12):
            ids = local.generate(ids, max_new_tokens=12, **GREEDY)
            ids = torch.cat([ids, random_ids(1, 20, seed=turn + 1)], 1)
        assert torch.equal(past, ids[:, : past.shape[1]])
        assert past.shape[1] == 12 * 32
