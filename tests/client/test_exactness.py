"""Through the swarm equals the local model: logits, tokens, losses, gradients, for every family."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tests.client.conftest import THREE, TWO, Pair, random_ids
from tests.covering import covering
from tests.reference import Prompted, relative
from tests.swarm_fixture import MemorySwarm
from tests.tiny_models import FAMILIES, write_tiny

LOGITS = 1e-4
GRADIENTS = 1e-4

PairOf = Callable[..., Pair]
both_swarms = pytest.mark.parametrize(
    "spans", [pytest.param(TWO, marks=pytest.mark.nightly), THREE], ids=["two servers", "three servers"]
)
every_family = pytest.mark.parametrize("family", FAMILIES)
# What depends on a family as well as on the kind of prompt is in the blocks' own arithmetic, which both pass through.
every_family_in_turn = pytest.mark.parametrize(
    ("family", "mode"), covering(FAMILIES, ["ptune", "deep_ptune"], together=1)
)


@every_family
@both_swarms
def test_logits_and_padding(pair_of: PairOf, family: str, spans: tuple[tuple[int, int], ...]) -> None:
    pair = pair_of(family, spans)
    model, ids = pair.model(), random_ids(3, 9)
    with torch.no_grad():
        assert (model(ids).logits - pair.local(ids).logits).abs().max() < LOGITS
        for padded in (slice(0, 4), slice(6, 9)):
            mask = torch.ones_like(ids)
            mask[1, padded] = 0
            found = model(ids, attention_mask=mask).logits
            expected = pair.local(ids, attention_mask=mask).logits
            assert ((found - expected) * mask[..., None]).abs().max() < LOGITS


@every_family
@both_swarms
def test_generation(pair_of: PairOf, family: str, spans: tuple[tuple[int, int], ...]) -> None:
    pair = pair_of(family, spans)
    model, ids = pair.model(), random_ids(2, 7)
    left = torch.ones_like(ids)
    left[0, :3] = 0
    settings = [
        {"do_sample": False, "num_beams": 3, "num_return_sequences": 2},
        {"do_sample": False, "attention_mask": left},  # of one row; the other is greedy without padding
        {"do_sample": True, "temperature": 0.9, "top_k": 30, "top_p": 0.95, "num_return_sequences": 2},
    ]
    if FAMILIES.index(family) % 2:  # what draws comes behind the logits, where families do not differ
        settings.pop()
    for extra in settings:
        torch.manual_seed(5)
        found = model.generate(ids, max_new_tokens=10, **extra)
        torch.manual_seed(5)
        expected = pair.local.generate(ids, max_new_tokens=10, **extra)
        assert torch.equal(found, expected), extra
    repeated = random_ids(1, 5).repeat(1, 3)
    found = model.generate(repeated, max_new_tokens=16, do_sample=False, prompt_lookup_num_tokens=4)
    assert torch.equal(found, pair.local.generate(repeated, max_new_tokens=16, do_sample=False))


@every_family
def test_padded_rows_equal_unpadded_ones(pair_of: PairOf, family: str) -> None:
    pair = pair_of(family, THREE)
    model, ids = pair.model(), random_ids(1, 6)
    padded = torch.cat([torch.zeros(1, 4, dtype=torch.long), ids], 1)
    mask = (torch.arange(10) >= 4).long()[None]
    batch = torch.cat([padded, random_ids(1, 10, seed=1)])
    masks = torch.cat([mask, torch.ones_like(mask)])
    found = model.generate(batch, attention_mask=masks, max_new_tokens=8, do_sample=False)
    assert torch.equal(found[0, 10:], model.generate(ids, max_new_tokens=8, do_sample=False)[0, 6:])


@every_family_in_turn
@both_swarms
def test_losses_and_prompt_gradients(
    pair_of: PairOf, family: str, spans: tuple[tuple[int, int], ...], mode: str
) -> None:
    pair = pair_of(family, spans)
    model = pair.model(tuning_mode=mode, pre_seq_len=3)
    if model.prompts.deep is not None:
        model.prompts.deep.data.normal_(0, 0.3, generator=torch.Generator().manual_seed(1))
    local = Prompted(pair.local, model.prompts.input, model.prompts.deep)
    ids = random_ids(4, 150)  # more than one micro-batch
    mask = torch.ones_like(ids)
    mask[2, 100:] = 0
    labels = ids.masked_fill(mask == 0, -100)
    loss = model(ids, attention_mask=mask, labels=labels).loss
    loss.backward()
    expected = local.loss(ids, labels, mask)
    expected.backward()
    assert abs(loss.item() - expected.item()) < LOGITS
    assert relative(model.prompts.input.grad, local.vectors.grad) < GRADIENTS
    if local.deep is not None:
        assert relative(model.prompts.deep.grad, local.deep.grad) < GRADIENTS
    assert [name for name, one in model.named_parameters() if one.requires_grad] == [
        f"prompts.{name}" for name, _ in model.prompts.named_parameters()
    ]


@every_family_in_turn
def test_cached_decoding_with_prompts(pair_of: PairOf, family: str, mode: str) -> None:
    pair = pair_of(family, THREE)
    model = pair.model(tuning_mode=mode, pre_seq_len=3)
    if model.prompts.deep is not None:
        model.prompts.deep.data.normal_(0, 0.3, generator=torch.Generator().manual_seed(1))
    local = Prompted(pair.local, model.prompts.input, model.prompts.deep)
    ids = random_ids(2, 7)
    found = model.generate(ids, max_new_tokens=10, do_sample=False)
    assert torch.equal(found, local.greedy(ids, 10))


def test_logits_only_where_there_is_a_label(pair_of: PairOf) -> None:
    pair = pair_of("llama")
    model, ids = pair.model(tuning_mode="ptune", pre_seq_len=3), random_ids(3, 12)
    labels = ids.clone()
    labels[:, :5] = -100
    keep = torch.zeros_like(ids, dtype=torch.bool)
    keep[:, :-1] = labels[:, 1:] != -100
    whole = model(ids, labels=labels).loss
    few = model(ids, logits_to_keep=keep, labels=labels, shift_labels=labels[:, 1:][keep[:, :-1]]).loss
    assert abs(whole.item() - few.item()) < 1e-6


def test_slices_of_blocks_give_hidden_states_and_gradients(pair_of: PairOf) -> None:
    pair = pair_of("llama")
    model, ids = pair.model(), random_ids(2, 9)
    hidden = model.get_input_embeddings()(ids).requires_grad_()
    expected = pair.local(ids, output_hidden_states=True).hidden_states
    middle = model.blocks[:3](hidden)
    assert (middle - expected[3]).abs().max() < LOGITS
    assert (model.blocks[1:3](model.blocks[0](hidden)) - expected[3]).abs().max() < LOGITS
    middle.square().sum().backward()
    twin = hidden.detach().clone().requires_grad_()
    pair.local.model(inputs_embeds=twin, output_hidden_states=True).hidden_states[3].square().sum().backward()
    assert relative(hidden.grad, twin.grad) < GRADIENTS


@pytest.mark.parametrize(("wire", "tolerance"), [("float16", 5e-3), ("int8", 0.1)])
def test_a_compressed_wire_is_close_and_replays_are_the_same(
    tmp_path: Path, wire: str, tolerance: float
) -> None:
    """Logits and gradients stay close; after a loss the replacement gives the very same tokens."""
    folder = write_tiny("llama", tmp_path)
    with MemorySwarm(folder, [(0, 2), (2, 4), (2, 4)]) as swarm:
        plain, model = swarm.model(), swarm.model(wire=wire)
        ids = random_ids(1, 12)
        for one in (plain, model):
            one.generation_config.eos_token_id = None
        expected = plain(ids).logits
        assert 0 < (model(ids).logits - expected).abs().max() < tolerance * expected.abs().max()
        gradients = []
        for one in (plain, model):
            embedded = one.get_input_embeddings()(ids).detach().requires_grad_()
            one(inputs_embeds=embedded, labels=ids).loss.backward()
            gradients.append(embedded.grad)
        found, wanted = gradients[1], gradients[0]
        assert 0 < (found - wanted).norm() < 4 * tolerance * wanted.norm()
        undisturbed = model.generate(ids, max_new_tokens=16, do_sample=False)
        with model.inference_session() as session:
            first = model.generate(ids, max_new_tokens=8, do_sample=False)
            swarm.kill(session.hops[1].peer_id)
            rest = model.generate(None, max_new_tokens=8, do_sample=False)
        assert torch.equal(torch.cat([first, rest], 1), undisturbed)
