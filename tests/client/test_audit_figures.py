"""How many answers it takes to find a liar, and that honest servers raise no alarm."""

from __future__ import annotations

import random
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.client.lying import (
    CASES,
    LIES,
    WORK,
    LyingSwarm,
    audited,
    auditor_of,
    decode,
    settle,
    skip_a_block,
    train,
    until_found,
)
from tests.tiny_models import write_tiny

from corolla.client.audits.audit import Answer
from corolla.client.audits.auditor import Auditor
from corolla.client.audits.own_blocks import OwnBlocks
from corolla.config import SwarmConfig
from corolla.swarm.directory.routing import Hop

Note = Callable[[str, Any], None]

SHARE = 0.05
CLIENTS = 16  # in `make nightly`, for each kind of lie
SKIPPED = "a block left out"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny("llama", tmp_path_factory.mktemp("llama"))


def test_a_liar_takes_as_many_requests_as_the_share_says(swarm_of: Callable[..., LyingSwarm]) -> None:
    """At a share p, 1/p answers on average; here 24 clients with p = 0.05."""
    swarm = swarm_of("ab")
    inputs = {"hidden": torch.randn(1, 4, 32), "lengths": torch.tensor([4])}
    counts = []
    for seed in range(24):
        own, draw = OwnBlocks(swarm.checkpoint, swarm.dtype), random.Random(seed)
        connection = swarm.connect(
            SwarmConfig(patience=2.0),
            observe=lambda view, own=own, draw=draw: Auditor(view, 0.05, own=own, draw=draw),
        )
        auditor = connection.audits

        async def ask(auditor: Auditor = auditor, view: Any = connection.view) -> int:
            await view.records.refresh()
            while not view.verdicts.condemned:
                answer = Answer(Hop("a", 0, 4), "forward", inputs, {"hidden": torch.randn(1, 4, 32)})
                auditor.saw(lambda _draw, answer=answer: answer)
                await auditor.settled()
            return auditor.counts.seen

        counts.append(connection.run(ask()))
    assert 10 < statistics.mean(counts) < 33


@pytest.mark.nightly
@pytest.mark.parametrize(("lie", "work"), [*CASES, (SKIPPED, "train"), (SKIPPED, "decode")])
def test_how_many_answers_it_takes(
    swarm_of: Callable[..., LyingSwarm],
    lie: str,
    work: str,
    record_property: Note,
    scaled: Callable[[float], int],
) -> None:
    """From whole work of clients that do not know each other; a lie in gradients is not in every answer."""
    swarm = swarm_of()
    if lie == SKIPPED:
        skip_a_block(swarm, "a")
    else:
        swarm.lie("a", LIES[lie][0]())
    answers = [
        until_found(audited(swarm, SHARE, own=True, seed=seed), WORK[work], most=1000)
        for seed in range(scaled(CLIENTS))
    ]
    record_property("liars", {"lie": lie, "work": work, "share": SHARE, "answers": answers})
    assert statistics.mean(answers) < 5 / SHARE


HONEST = [("llama", 6000), ("bloom", 2000), ("gemma2", 2000)]  # comparisons in `make nightly`: 10,000


@pytest.mark.parametrize(
    ("family", "most"),
    [
        ("llama", 120),
        ("bloom", 24),
        *(pytest.param(*one, marks=[pytest.mark.nightly, pytest.mark.timeout(3600)]) for one in HONEST),
    ],
)
def test_honest_servers_raise_no_alarm(
    tmp_path: Path,
    family: str,
    most: int,
    record_property: Note,
    scaled: Callable[[float], int],
) -> None:
    """Of both kinds of kernels, packed and padded, with 8 bits and without, cut differently, with compressed
    wires; training, prefill, decoding and beams, alone and beside others."""
    folder = write_tiny(family, tmp_path)
    checks, worst = 0, dict[str, float]()
    most = scaled(most) if (family, most) in HONEST else most
    for quantization, wire in [("none", "compute"), ("int8", "compute"), ("none", "float16")]:
        with LyingSwarm(folder, "") as swarm:
            swarm.add(0, 4, "a", 1000.0, quantization)
            swarm.add(0, 4, "b", 1.0, quantization)
            swarm.add(0, 3, "c", 1.0, quantization)
            swarm.add(2, 4, "d", 1.0, quantization)
            swarm.servers["b"].span.packable = False
            models = [audited(swarm, 1.0, own=own, wire=wire, seed=own) for own in (False, True)]
            auditors = [auditor_of(model) for model in models]
            seed = 0
            while sum(one.counts.right for one in auditors) < most / 3:
                for model in models:
                    train(model, seed, rows=1 + seed % 5)
                    decode(model, seed)
                    settle(model)
                seed += 1
            for auditor in auditors:
                assert not auditor.counts.wrong
                assert not auditor.counts.unclear
                checks += auditor.counts.right
                for what, times in auditor.counts.worst.items():
                    key = f"{quantization}/{wire} {what}"
                    worst[key] = max(worst.get(key, 0.0), times)
    record_property("honest", {"family": family, "comparisons": checks, "worst": worst})
    assert max(worst.values()) < 0.5
