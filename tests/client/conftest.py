"""Swarms of tiny models, made once for each family and process."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.client.lying import LyingSwarm
from tests.reference import local_model
from tests.reference import random_ids as random_ids  # for the tests of this folder
from tests.swarm_fixture import MemorySwarm
from tests.tiny_models import write_tiny

from corolla.server import handlers
from corolla.wire.frames import Packet

TWO = ((0, 2), (2, 4))
THREE = ((0, 1), (1, 3), (3, 4))


@dataclass(frozen=True)
class Pair:
    """A swarm and the local model that it must equal."""

    swarm: MemorySwarm
    local: Any

    def model(self, **arguments: Any) -> Any:
        """A distributed model that, like the local one, never stops early."""
        model = self.swarm.model(**arguments)
        model.generation_config.eos_token_id = None
        model.generation_config.pad_token_id = 0
        return model


def goes_back_forks_and_heals(pair: Pair, model: Any, session: Any, ids: Any, whole: Any) -> None:
    """`whole` [1, 22] comes of `ids` [1, 8] in a session that is set back, is forked, and loses its servers."""
    greedy: dict[str, Any] = {"do_sample": False}
    assert torch.equal(model.generate(ids, max_new_tokens=6, **greedy), whole[:, :14])
    session.position = 9
    twin = session.fork()
    for span in session.chain.spans:
        pair.swarm.loop.run(span.drop())
    assert torch.equal(model.generate(None, max_new_tokens=7, **greedy), whole[:, 9:16])
    with twin:
        assert torch.equal(model.generate(None, max_new_tokens=13, session=twin, **greedy), whole[:, 9:])


@pytest.fixture(scope="module")
def pair_of(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Pair]]:
    """`pair_of(family, spans)`; swarms live as long as the module's tests."""
    torch.set_num_threads(1)
    swarms: list[MemorySwarm] = []

    @cache
    def folder_of(family: str) -> Path:
        return write_tiny(family, tmp_path_factory.mktemp(family))

    @cache
    def make(family: str, spans: tuple[tuple[int, int], ...] = TWO) -> Pair:
        swarm = MemorySwarm(folder_of(family), spans)
        swarms.append(swarm)
        local = local_model(folder_of(family))
        local.generation_config.eos_token_id = None
        local.generation_config.pad_token_id = 0
        return Pair(swarm, local)

    yield make
    for swarm in swarms:
        swarm.close()


@pytest.fixture
def swarm_of(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., LyingSwarm]]:
    """`swarm_of(names)`: a swarm of the model in the module's `folder`, whose servers can be made to lie."""
    made: list[LyingSwarm] = []
    honest = handlers._Stream._reply

    async def reply(self: Any, packet: Packet) -> Packet:
        answer = await honest(self, packet)
        lie = next((lies[self._server] for lies in (one.lies for one in made) if self._server in lies), None)
        return answer if lie is None else Packet(answer.message, lie(answer))

    def make(names: str = "abc") -> LyingSwarm:
        made.append(LyingSwarm(folder, names))
        return made[-1]

    monkeypatch.setattr(handlers._Stream, "_reply", reply)
    yield make
    for swarm in made:
        swarm.close()
