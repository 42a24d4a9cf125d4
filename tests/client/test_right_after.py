"""Every fault at the first message right after a rollback or a fork: nothing of it shows. In virtual time, fp64."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.client.conftest import random_ids
from tests.faults import KINDS, REPLY_ONLY, Fault, Injector
from tests.reference import Prompted, local_model
from tests.schedules.world import DTYPE, ServerPlan, SimulatedSwarm, checkpoint_of

from corolla.client.model.arguments import from_pretrained
from corolla.client.model.causal_lm import load_distributed

GREEDY: dict[str, Any] = {"do_sample": False}
SERVERS = [ServerPlan("a", 0, 2, 100.0), ServerPlan("b", 2, 4, 100.0), ServerPlan("spare", 1, 4, 30.0)]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("right-after")


def rolled_back(session: Any, ids: torch.Tensor) -> tuple[Any, torch.Tensor]:
    session.position = 11
    return session, ids[:, :11]


def forked(session: Any, ids: torch.Tensor) -> tuple[Any, torch.Tensor]:
    return session.fork(), ids


@pytest.mark.parametrize(
    ("moment", "n"),  # of which the first server of the chain is hit, or the second
    [
        (rolled_back, 1),
        (forked, 2),
        pytest.param(rolled_back, 2, marks=pytest.mark.nightly),
        pytest.param(forked, 1, marks=pytest.mark.nightly),
    ],
)
@pytest.mark.parametrize("kind", KINDS)
def test_it_equals_the_undisturbed_run(root: Path, kind: str, moment: Callable[..., Any], n: int) -> None:
    checkpoint = checkpoint_of("llama", root)
    swarm = SimulatedSwarm(checkpoint, SERVERS)
    try:
        model = load_distributed(
            from_pretrained(checkpoint.name, dtype=DTYPE, tuning_mode="deep_ptune", pre_seq_len=3),
            connection=swarm.connect("client", 600.0),
        )
        model.prompts.deep.data.normal_(0, 0.3, generator=torch.Generator().manual_seed(1))
        model.generation_config.eos_token_id, model.generation_config.pad_token_id = None, 0
        local = Prompted(local_model(checkpoint.name, DTYPE), model.prompts.input, model.prompts.deep)
        injector = Injector(swarm, frozenset({"client"}))
        session = model.inference_session(max_length=100)
        model.generate(random_ids(1, 9), max_new_tokens=5, session=session, **GREEDY)
        session, ids = moment(session, session.output_ids)

        async def arm() -> None:
            on = "reply" if kind in REPLY_ONLY else "request"
            injector.fail_at(Fault(kind, None, on=on, n=n, returns=20.0, blocks=(0, 4)))

        swarm.loop.run(arm())
        new = random_ids(1, 2, seed=7)
        model.generate(new, max_new_tokens=6, session=session, **GREEDY)
        assert injector.log, "the fault hit nothing"
        expected = local.greedy(torch.cat([ids, new], 1), 6)
        assert session.output_ids.tolist() == expected.tolist()
    finally:
        swarm.close()
