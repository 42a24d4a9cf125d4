"""Servers that lie, and clients that have them audited."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.reference import random_ids
from tests.swarm_fixture import MemorySwarm
from torch import Tensor

from corolla.client.audits.audit import TOLERANCES
from corolla.client.audits.auditor import Auditor
from corolla.client.audits.own_blocks import OwnBlocks
from corolla.client.view import SwarmView
from corolla.errors import LyingServer
from corolla.server.block_server import BlockServer
from corolla.wire.frames import Packet
from corolla.wire.messages import Gradients, Output

GREEDY: dict[str, Any] = {"do_sample": False}
Tensors = dict[str, Tensor]
Lie = Callable[[Packet], Tensors]


class LyingSwarm(MemorySwarm):
    """Servers a, b, … of all four blocks, of which some lie."""

    def __init__(self, folder: Path, names: str = "abc") -> None:
        super().__init__(folder, [])
        self.lies: dict[BlockServer, Lie] = {}
        for rank, name in enumerate(names):
            self.add(0, 4, name, throughput=1000.0 / 10**rank)

    def lie(self, name: str, lie: Lie) -> None:
        """From now on this server answers with the tensors that `lie` makes of its true reply."""
        self.lies[self.servers[name]] = lie


def audited(swarm: LyingSwarm, share: float, *, own: bool = False, seed: int = 1, **arguments: Any) -> Any:
    mine = OwnBlocks(swarm.checkpoint, arguments.get("dtype", swarm.dtype)) if own else None

    def observe(view: SwarmView) -> Auditor:
        return Auditor(view, share, own=mine, draw=random.Random(seed))

    model = swarm.model(tuning_mode="deep_ptune", pre_seq_len=3, patience=2.0, observe=observe, **arguments)
    model.generation_config.eos_token_id = None
    model.prompts.deep.data.normal_(0, 0.3, generator=torch.Generator().manual_seed(1))
    return model


def auditor_of(model: Any) -> Auditor:
    auditor = model.blocks.connection.audits
    assert isinstance(auditor, Auditor)
    return auditor


def settle(model: Any) -> Auditor:
    auditor = auditor_of(model)
    model.blocks.connection.run(auditor.settled())
    return auditor


def train(model: Any, seed: int = 0, rows: int = 2) -> Any:
    ids = random_ids(rows, 24, seed)
    model.zero_grad()
    model(ids, labels=ids).loss.backward()
    return model.prompts.deep.grad.clone()


def decode(model: Any, seed: int = 0) -> Tensor:
    """With padding, and beams."""
    ids = random_ids(2, 9, seed)
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    model.generate(ids[:1], num_beams=3, max_new_tokens=3, **GREEDY)
    found: Tensor = model.generate(ids, attention_mask=mask, max_new_tokens=5, **GREEDY)
    return found


def changed(kind: type[Any], how: Callable[[Tensor], Tensor]) -> Callable[[], Lie]:
    """A lie about every tensor of one kind of message."""

    def make() -> Lie:
        def lie(reply: Packet) -> Tensors:
            if not isinstance(reply.message, kind):
                return reply.tensors
            return {name: how(one.clone()) for name, one in reply.tensors.items()}

        return lie

    return make


def noisy(size: float) -> Callable[[Tensor], Tensor]:
    def add(tensor: Tensor) -> Tensor:
        return tensor + size * tensor.norm(dim=-1, keepdim=True) * tensor.shape[-1] ** -0.5 * torch.randn(
            tensor.shape, generator=torch.Generator().manual_seed(1)
        )

    return add


def one_sign(tensor: Tensor) -> Tensor:
    """Of the largest number of the last token."""
    last = tensor.reshape(-1, tensor.shape[-1])[-1]
    last[last.abs().argmax()] *= -1
    return tensor


def yesterdays() -> Lie:
    """The answer before, where it has the right shape."""
    before: dict[Any, Tensors] = {}

    def lie(reply: Packet) -> Tensors:
        if not reply.tensors:
            return reply.tensors
        shape = tuple(sorted((name, one.shape) for name, one in reply.tensors.items()))
        told = before.get(shape, reply.tensors)
        before[shape] = reply.tensors
        return told

    return lie


SNEAKY = 3 * TOLERANCES["float32"].gradient.typical  # hardly more than what honest servers may differ by
LIES: dict[str, tuple[Callable[[], Lie], tuple[str, ...]]] = {
    "noise": (changed(Output, noisy(0.01)), ("train", "decode")),
    "a sign": (changed(Output, one_sign), ("train", "decode")),
    "yesterday's answer": (yesterdays, ("train", "decode")),
    "wrong gradients": (changed(Gradients, noisy(0.01)), ("train",)),
    "a sign of gradients": (changed(Gradients, one_sign), ("train",)),
    "just above the tolerance": (changed(Output, noisy(SNEAKY)), ("train", "decode")),
    "gradients just above the tolerance": (changed(Gradients, noisy(SNEAKY)), ("train",)),
}
CASES = [(name, work) for name, (_, works) in LIES.items() for work in works]
WORK = {"train": train, "decode": decode}


def until_found(model: Any, work: Callable[..., Any], most: int = 60) -> int:
    """Work until a is condemned; how many answers that took. Work that comes after it is told so."""
    verdicts, told = model.blocks.connection.view.verdicts, ""
    for seed in range(most):
        try:
            work(model, seed % 3)
        except LyingServer as error:  # found while this work was going on
            told = f"{error.peer_id}: {error}"
        seen = settle(model).counts.seen
        if verdicts.condemned:
            break
    assert set(verdicts.condemned) == {"a"}, auditor_of(model).counts
    if work is train and not told:
        with pytest.raises(LyingServer) as caught:
            train(model)
        told = f"{caught.value.peer_id}: {caught.value}"
    assert told.startswith("a: a gave a wrong") or (work is decode and not told)
    return seen


def skip_a_block(swarm: LyingSwarm, name: str) -> None:
    """From now on one block of this server does nothing."""
    block = swarm.servers[name].span.blocks[2]
    for weight in (block.self_attn.o_proj.weight, block.mlp.down_proj.weight):
        weight.data.zero_()
