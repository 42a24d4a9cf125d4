"""Training through the swarm: packed micro-batches, graphs kept or lost, padding wherever it stands."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tests.client.conftest import random_ids
from tests.reference import Prompted, local_model, relative
from tests.swarm_fixture import MemorySwarm
from tests.tiny_models import write_tiny
from torch import Tensor

from corolla.client.training import MICRO_BATCH_TOKENS, MOST_MICRO_BATCH_TOKENS, micro_batches
from corolla.server.peers import Lease, Leases

EXACT = 1e-4
SAME = 1e-6  # the same arithmetic, summed in the same order
GradientsOf = Callable[..., tuple[Tensor, dict[str, Tensor]]]


class Pair:
    """A swarm of two servers, a model that trains deep prompts through it, and the local one."""

    def __init__(self, family: str, folder: Path) -> None:
        self.swarm = MemorySwarm(write_tiny(family, folder), [(0, 2), (2, 4)])
        self.model = self.swarm.model(tuning_mode="deep_ptune", pre_seq_len=3)
        self.model.prompts.deep.data.normal_(0, 0.3, generator=torch.Generator().manual_seed(1))
        self.local = Prompted(local_model(folder), self.model.prompts.input, self.model.prompts.deep)

    def gradients(
        self, ids: Tensor, mask: Tensor, between: Callable[[], Any] = lambda: None
    ) -> dict[str, Tensor]:
        """Of the mean loss of the labelled tokens; `between` happens between forward and backward."""
        self.model.zero_grad()
        loss = self.model(ids, attention_mask=mask, labels=labels_of(ids, mask)).loss
        between()
        loss.backward()
        found = self.model.prompts
        return {"loss": loss.detach(), "input": found.input.grad.clone(), "deep": found.deep.grad.clone()}

    def expected(self, ids: Tensor, mask: Tensor) -> dict[str, Tensor]:
        assert self.local.deep is not None
        self.local.vectors.grad = self.local.deep.grad = None
        loss = self.local.loss(ids, labels_of(ids, mask), mask)
        loss.backward()
        assert self.local.vectors.grad is not None
        assert self.local.deep.grad is not None
        return {"loss": loss.detach(), "input": self.local.vectors.grad, "deep": self.local.deep.grad}

    def lose_all_leases(self) -> None:
        for server in self.swarm.servers.values():
            assert len(server.leases)
            server.leases._kept.clear()

    @property
    def redeemed(self) -> int:
        return sum(self.swarm.counted("redeemed").values())


def labels_of(ids: Tensor, mask: Tensor) -> Tensor:
    """Real tokens whose predecessor is one: what padding says of its successor is nobody's business."""
    known = mask.clone()
    known[:, 1:] &= mask[:, :-1]
    return ids.masked_fill(known == 0, -100)


def assert_same(found: dict[str, Tensor], wanted: dict[str, Tensor], tolerance: float) -> None:
    for name, tensor in wanted.items():
        assert relative(found[name], tensor) < tolerance, name


@pytest.fixture(scope="module", params=["llama", "bloom", "falcon"])
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    torch.set_num_threads(1)
    pair = Pair(request.param, tmp_path_factory.mktemp(request.param))
    yield pair
    pair.swarm.close()


LENGTH = 40


def masks() -> dict[str, Tensor]:
    """Of five rows of different lengths."""
    columns, lengths = torch.arange(LENGTH), torch.tensor([40, 3, 17, 1, 32])
    right = (columns < lengths[:, None]).long()
    holes = torch.ones(5, LENGTH, dtype=torch.long)
    holes[1, 5:9] = holes[2, ::3] = 0
    holes[3, 10:] = 0
    nothing = right.clone()
    nothing[1] = 0
    return {"right": right, "left": right.flip(1), "holes": holes, "a row of padding only": nothing}


@pytest.mark.parametrize("padding", masks())
def test_padding_anywhere_changes_no_gradient(pair: Pair, padding: str) -> None:
    ids, mask = random_ids(5, LENGTH), masks()[padding]
    before, kept = pair.redeemed, int(mask.sum()) + 5 * 3
    found = pair.gradients(ids, mask)
    assert_same(found, pair.expected(ids, mask), EXACT)
    assert pair.redeemed - before == 2 * kept  # by each of the two servers; padding never travelled


def test_kept_and_recomputed_graphs_give_the_same(pair: Pair) -> None:
    """Several micro-batches of rows of different lengths; the server that lost its leases asks for the inputs."""
    ids, mask = random_ids(8, 150), torch.ones(8, 150, dtype=torch.long)
    mask[1, 60:] = mask[4, 149:] = mask[6, 2:] = 0
    before = pair.redeemed
    kept = pair.gradients(ids, mask)
    assert pair.redeemed - before == 2 * (int(mask.sum()) + 8 * 3)
    before = pair.redeemed
    recomputed = pair.gradients(ids, mask, between=pair.lose_all_leases)
    assert pair.redeemed == before
    assert_same(recomputed, kept, SAME)
    assert_same(kept, pair.expected(ids, mask), EXACT)


def test_one_server_may_have_lost_what_the_other_kept(pair: Pair) -> None:
    ids, mask = random_ids(8, 150), torch.ones(8, 150, dtype=torch.long)
    first = next(iter(pair.swarm.servers.values()))

    def lose() -> None:
        kept: list[Lease] = [*first.leases._kept.values()]
        assert len(kept) > 1
        first.leases.take(*next(iter(first.leases._kept)))  # one micro-batch of several

    before = pair.swarm.counted("redeemed")
    found = pair.gradients(ids, mask, between=lose)
    redeemed = [now - before[peer] for peer, now in pair.swarm.counted("redeemed").items()]
    assert redeemed == [8 * 153 - 3 * 153, 8 * 153]
    assert_same(found, pair.expected(ids, mask), EXACT)


def test_servers_that_keep_nothing(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Leases, "keep", lambda *_: None)
    ids, mask = random_ids(3, 12), torch.ones(3, 12, dtype=torch.long)
    before = pair.redeemed
    assert_same(pair.gradients(ids, mask), pair.expected(ids, mask), EXACT)
    assert pair.redeemed == before


def test_no_graph_is_left_when_all_was_asked_for(pair: Pair) -> None:
    ids, mask = random_ids(3, 12), torch.ones(3, 12, dtype=torch.long)
    pair.gradients(ids, mask)
    assert [(len(one.leases), one.leases.held) for one in pair.swarm.servers.values()] == [(0, 0)] * 2
    with torch.no_grad():
        pair.model(ids, attention_mask=mask)  # no backward will follow, so nothing is lent
    assert [len(one.leases) for one in pair.swarm.servers.values()] == [0, 0]


def test_a_server_lost_between_forward_and_backward(pair: Pair) -> None:
    """Its leases are gone with it; another one computes the backward from the inputs."""
    ids, mask = random_ids(5, LENGTH), masks()["left"]
    wanted = pair.expected(ids, mask)
    spare = pair.swarm.add(2, 4, throughput=1e-3)
    lost = next(peer for peer, one in pair.swarm.servers.items() if one.span.start == 2 and peer != spare)
    found = pair.gradients(ids, mask, between=lambda: pair.swarm.kill(lost))
    assert pair.swarm.servers[spare].counters.backward > 0
    assert_same(found, wanted, EXACT)


@given(st.data())
def test_micro_batches_hold_every_token_once_and_no_padding(data: st.DataObject) -> None:
    rows, tokens = data.draw(st.integers(1, 7)), data.draw(st.integers(1, 300))
    lengths = data.draw(st.lists(st.integers(0, tokens), min_size=rows, max_size=rows))
    side = data.draw(st.sampled_from(["right", "left", "holes", "none"]))
    mask = torch.arange(tokens) < torch.tensor(lengths)[:, None]
    if side == "left":
        mask = mask.flip(1)
    if side == "holes":
        mask[:, ::3] = False
    given_mask = None if side == "none" else mask
    mask = torch.ones(rows, tokens, dtype=torch.bool) if side == "none" else mask
    micros = list(micro_batches(rows, tokens, given_mask, None))
    places = torch.cat([one.places for one in micros]) if micros else torch.zeros(0, dtype=torch.long)
    assert torch.equal(places.sort().values, mask.flatten().nonzero().flatten())
    sizes = [len(one.places) for one in micros]
    assert not sizes or max(sizes) - min(sizes) <= int(mask.sum(1).max())  # they take about as long
    assert len(micros) == 1 or int(mask.sum()) > MICRO_BATCH_TOKENS or not sizes
    columns = torch.arange(tokens).repeat(rows)
    for one in micros:
        assert int(one.lengths.min()) >= 1
        assert int(one.lengths.sum()) == len(one.places)
        assert len(one.places) <= MOST_MICRO_BATCH_TOKENS or len(one.lengths) == 1
        counted = torch.cat([torch.arange(length) for length in one.lengths.tolist()])
        ids = counted if one.positions is None else one.positions[0]
        assert torch.equal(ids, columns[one.places])  # a token's position is its column
        assert torch.equal(one.packed(columns.view(rows, tokens, 1))[0, :, 0], columns[one.places])
