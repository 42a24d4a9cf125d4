"""Sessions of families that keep a state go back and fork without being computed anew, exactly."""

from __future__ import annotations

from pathlib import Path

import torch
from tests.models.every_family import tiny
from tests.swarm_fixture import MemorySwarm

from corolla.models.checks.miniature import random_model
from corolla.models.families import structure

LONG, FEW = 120, 40


def test_a_turn_is_taken_back_at_the_cost_of_a_few_tokens(tmp_path: Path) -> None:
    config = tiny("qwen3_next")
    torch.manual_seed(3)
    local = random_model(structure(config).causal_lm, config)
    local.save_pretrained(tmp_path)
    ids = torch.randint(3, config.vocab_size, (1, LONG + 6))
    with MemorySwarm(tmp_path, [(0, 2), (2, 5)]) as swarm, torch.no_grad():
        model = swarm.model()
        options = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None}

        def reply(new: torch.Tensor, before: torch.Tensor, session: object) -> None:
            found = model.generate(new, session=session, **options)[:, -5:]
            whole = torch.cat([before, new], 1)
            wanted = local.generate(whole, attention_mask=torch.ones_like(whole), **options)[:, -5:]
            assert torch.equal(found, wanted)

        with model.inference_session(max_length=2 * LONG) as session:
            reply(ids[:, :LONG], ids[:, :0], session)
            session.position = LONG
            reply(ids[:, LONG : LONG + 3], ids[:, :LONG], session)
            before = sum(swarm.counted().values())
            session.position = LONG
            reply(ids[:, LONG + 3 :], ids[:, :LONG], session)
            assert sum(swarm.counted().values()) - before < FEW
            before = sum(swarm.counted().values())
            with session.fork() as twin:
                twin.position = LONG
                reply(ids[:, LONG : LONG + 2], ids[:, :LONG], twin)
            assert sum(swarm.counted().values()) - before < FEW
