"""Sessions of families whose code computes a token by itself otherwise than among others: what their servers compute
again is what a local model holds that was never interrupted."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.models.every_family import tiny
from tests.swarm_fixture import MemorySwarm

from corolla.client.sessions import span_session
from corolla.models.cache import cache_argument, take_cache
from corolla.models.checks.miniature import random_model
from corolla.models.checks.steps import steps_differ
from corolla.models.families import structure
from corolla.server.sessions import step

FAMILIES = ("nemotron_h", "zamba2")
SPANS = {"nemotron_h": [(0, 2), (2, 5)], "zamba2": [(0, 2), (2, 6)]}
PROMPT, SAID, MORE, REPLY = 70, 12, 5, 6  # tokens
ROUNDING = 1e-5  # of the largest logit; a time step that is bounded wrongly makes about 1e-3


def greedy(count: int) -> dict[str, Any]:
    return {
        "max_new_tokens": count,
        "do_sample": False,
        "eos_token_id": None,
        "pad_token_id": 0,
        "return_dict_in_generate": True,
        "output_logits": True,
    }


class Talk:
    """A model in a swarm, the same on this machine, and a text that both are given."""

    def __init__(self, folder: Path, family: str) -> None:
        config = tiny(family)
        torch.manual_seed(3)
        self.local = random_model(structure(config).causal_lm, config)
        self.local.save_pretrained(folder)
        self.swarm = MemorySwarm(folder, SPANS[family])
        self.ids = torch.randint(3, config.vocab_size, (2, PROMPT + MORE))
        self.prompt, self.more = self.ids[:, :PROMPT], self.ids[:, PROMPT:]

    def wanted(self, said: int, rows: slice = slice(None)) -> torch.Tensor:
        """The logits of a reply to more, behind so many tokens of a first reply that was said one by one."""
        first = self.local.generate(self.prompt[rows], **self._all(PROMPT, rows), **greedy(said + 1))
        cache = {cache_argument(self.local.forward): take_cache(dict(first))}
        whole = torch.cat([first.sequences[:, : PROMPT + said], self.more[rows]], 1)
        then = self.local.generate(whole, **self._all(whole.shape[1], rows), **cache, **greedy(REPLY))
        return torch.stack(then.logits)

    def _all(self, count: int, rows: slice) -> dict[str, Any]:
        return {"attention_mask": torch.ones_like(self.ids[rows, :1].expand(-1, count))}

    def lose(self, *servers: int) -> None:
        """Their caches, as after a restart."""
        for at in servers:
            server = list(self.swarm.servers.values())[at]

            async def forget(server: Any = server) -> None:
                for session in list(server.sessions._open):
                    session.give_up()

            self.swarm.loop.run(forget())


@pytest.fixture(params=FAMILIES)
def talk(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Talk]:
    made = Talk(tmp_path, request.param)
    with made.swarm, torch.no_grad():
        yield made


def said_and_more(talk: Talk, model: Any, *, said: int, lost: tuple[int, ...], rows: slice) -> torch.Tensor:
    """The logits of the reply to more, when a reply was set back to `said` tokens, and servers had lost the rest."""
    with model.inference_session() as session:
        model.generate(talk.prompt[rows], session=session, **greedy(SAID))
        talk.lose(*lost)
        session.position = PROMPT + said
        found = model.generate(talk.more[rows], session=session, **greedy(REPLY))
    return torch.stack(found.logits)


def close(found: torch.Tensor, wanted: torch.Tensor) -> bool:
    return bool((found - wanted).abs().max() <= ROUNDING * wanted.abs().max())


ONE, BOTH = slice(0, 1), slice(0, 2)


@pytest.mark.parametrize(("lost", "rows"), [((), BOTH), ((), ONE), ((0,), ONE), ((0, 1), BOTH)])
def test_what_was_said_one_by_one_is_computed_so_again(
    talk: Talk, lost: tuple[int, ...], rows: slice
) -> None:
    found = said_and_more(talk, talk.swarm.model(), said=SAID - 3, lost=lost, rows=rows)
    assert close(found, talk.wanted(SAID - 3, rows))


def test_a_cache_may_be_lost_more_than_once(talk: Talk) -> None:
    model = talk.swarm.model()
    with model.inference_session() as session:
        model.generate(talk.prompt[:1], session=session, **greedy(SAID))
        for _ in range(2):
            talk.lose(0, 1)
            session.position = PROMPT + SAID - 3
            found = model.generate(talk.more[:1], session=session, **greedy(REPLY))
    assert close(torch.stack(found.logits), talk.wanted(SAID - 3, ONE))


def test_blocks_that_run_here_do_so_too(talk: Talk) -> None:
    found = said_and_more(talk, talk.swarm.model(local_blocks=1), said=SAID - 3, lost=(), rows=ONE)
    assert close(found, talk.wanted(SAID - 3, ONE))


def test_passes_that_come_in_pieces_end_with_no_single_token(
    talk: Talk, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A message has room for 23 tokens, three of which leave one of the prompt; a server's pass for 11."""
    monkeypatch.setattr(span_session, "REPLAY_TOKENS", 23)
    columns = step._columns
    monkeypatch.setattr(step, "_columns", lambda tokens, rows: columns(min(tokens, 11), rows))
    for lost in ((), (1,)):
        found = said_and_more(talk, talk.swarm.model(), said=SAID - 3, lost=lost, rows=ONE)
        assert close(found, talk.wanted(SAID - 3, ONE))


@pytest.mark.parametrize("lost", [(), (0, 1)])
def test_one_token_that_is_left_of_a_pass_is_still_one_among_others(
    talk: Talk, lost: tuple[int, ...]
) -> None:
    model = talk.swarm.model()
    with model.inference_session() as session:
        session.position = 0
        for part in (talk.ids[:1, :4], talk.more[:1]):
            model(part, past_key_values=session.cache, use_cache=True)
        talk.lose(*lost)
        session.cache.truncate(5)
        found = model(talk.prompt[:1, :3], past_key_values=session.cache, use_cache=True).logits
    whole = torch.cat([talk.ids[:1, :4], talk.more[:1, :1], talk.prompt[:1, :3]], 1)
    assert close(found, talk.local(whole).logits[:, -3:])


def test_another_session_begins_with_no_more_than_was_computed_at_once(talk: Talk) -> None:
    model = talk.swarm.model()
    with model.inference_session() as session:
        said = model.generate(talk.prompt[:1], session=session, **greedy(SAID)).sequences
        prompt = torch.cat([said, talk.more[:1]], 1)
        before = sum(talk.swarm.counted().values())
        with model.inference_session() as other:
            found = model.generate(prompt, session=other, **greedy(REPLY))
        assert sum(talk.swarm.counted().values()) - before <= 2 * (SAID + MORE + REPLY)  # it was shared
    wanted = talk.local.generate(prompt, **greedy(REPLY))
    assert close(torch.stack(found.logits), torch.stack(wanted.logits))


def test_honest_servers_are_not_found_lying(talk: Talk) -> None:
    model = talk.swarm.model(audit=1.0)
    with model.inference_session() as session:
        for _ in range(2):
            model.generate(talk.prompt[:1, :8], session=session, **greedy(SAID))
        model.generate(talk.more[:1], session=session, **greedy(SAID))
    connection = model.blocks.connection
    talk.swarm.loop.run(connection.audits.settled())
    assert not connection.view.verdicts.condemned


def test_other_families_pay_nothing() -> None:
    assert not any(steps_differ(tiny(family)) for family in ("llama", "qwen3_next", "jamba", "mamba2"))
