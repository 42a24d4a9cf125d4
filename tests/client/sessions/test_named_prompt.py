"""Bundles that servers have computed by themselves: clients send nothing of them, and nothing shows."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.client.conftest import random_ids
from tests.covering import covering
from tests.mutants import Mistakes, Plant, no_mistake, passes
from tests.reference import Prompted, local_model
from tests.swarm_fixture import MemorySwarm
from tests.tiny_models import write_tiny

from corolla.client.sessions import named_prompt
from corolla.models import prompts
from corolla.models.attention.pages import PAGE, BlockTable, CachedSequence, PagePool, pages_for
from corolla.models.cache import BlocksCall
from corolla.models.checkpoints.checkpoint import open_checkpoint
from corolla.models.checkpoints.prompt_files import save_prompt
from corolla.models.families import blocks_prefix
from corolla.models.prompts import SoftPrompt
from corolla.server.scheduler.execution import Kind
from corolla.server.sessions import opening, prefilled

MODES = ["ptune", "deep_ptune"]
each_mode = pytest.mark.parametrize("mode", MODES)
# By the registry, with an embedding norm, with added positions, with a multiplier, narrower outside, …
FAMILIES = ["llama", "bloom", "gpt2", "gemma2", "gemma3_text", "opt", "granite", "qwen3_moe"]
LENGTH = 19  # a full page and a part of one
SPANS = [(0, 1), (1, 4)]


def write_bundle(folder: Path, model: Path, mode: str, *, length: int = LENGTH, seed: int = 1) -> Path:
    """A prompt's files, as `corolla tune` leaves them."""
    checkpoint = open_checkpoint(str(model))
    config, noise = checkpoint.config, torch.Generator().manual_seed(seed)
    width = getattr(config, "word_embed_proj_dim", config.hidden_size)
    blocks = config.num_hidden_layers if mode == "deep_ptune" else 0
    prompt = SoftPrompt(torch.randn(length, width, generator=noise) * 0.3, blocks, config.hidden_size)
    if prompt.deep is not None:
        prompt.deep.data.normal_(0, 0.3, generator=noise)
    save_prompt(folder, prompt, config=config, model_name=checkpoint.name, identity=checkpoint.identity)
    return folder


class Chats:
    """A swarm some of whose servers have computed a bundle, clients of it, and the model here."""

    def __init__(
        self, tmp_path: Path, family: str = "llama", mode: str = "ptune", *, length: int = LENGTH
    ) -> None:
        self.folder = write_tiny(family, tmp_path / family)
        self.bundle = write_bundle(tmp_path / "bundle", self.folder, mode, length=length)
        self.swarm = MemorySwarm(self.folder, [])
        self.length = length

    def __enter__(self) -> Chats:
        return self

    def __exit__(self, *_: object) -> None:
        self.swarm.close()

    def serve(self, *spans: tuple[int, int], **options: Any) -> list[str]:
        """Servers that have computed the bundle."""
        options.setdefault("bundles", [self.bundle])
        return [self.swarm.add(*span, **options) for span in spans]

    def client(self, **options: Any) -> Any:
        """Another peer that chats with the bundle."""
        model = self.swarm.model(prompts=self.bundle, **options)
        model.generation_config.eos_token_id, model.generation_config.pad_token_id = None, 0
        return model

    def local(self, model: Any) -> Prompted:
        """What a client's model must equal."""
        here = local_model(self.folder)
        here.generation_config.eos_token_id, here.generation_config.pad_token_id = None, 0
        return Prompted(here, model.prompts.input, model.prompts.deep)

    def pages(self, peer: str) -> int:
        """How many pages rows hold at a server."""
        server = self.swarm.servers[peer]
        work = server.engine.submit(Kind.DECODE, lambda: server.pool.pages - server.pool.free)
        return self.swarm.loop.run(work)


def say(model: Any, ids: torch.Tensor | None, count: int, **options: Any) -> torch.Tensor:
    found: torch.Tensor = model.generate(ids, max_new_tokens=count, do_sample=False, **options)
    return found


def inputs_of(session: Any) -> list[torch.Tensor]:
    """What the client would give to a replacement of each span."""
    return [span.history.inputs()[0] for span in session.chain.spans]


@pytest.mark.parametrize(("family", "mode"), covering(FAMILIES, MODES, together=1))
def test_nothing_of_the_prompt_is_sent_and_nothing_shows(tmp_path: Path, family: str, mode: str) -> None:
    with Chats(tmp_path, family, mode) as chats:
        chats.serve(*SPANS)
        model, ids = chats.client(), random_ids(2, 7)
        mask = torch.ones_like(ids)
        mask[1, :3] = 0
        chats.local(model).assert_greedy(say(model, ids, 9), 7)
        assert set(chats.swarm.counted().values()) == {2 * (7 + 8)}
        with model.inference_session() as session:
            found = say(model, ids, 9, session=session, attention_mask=mask)
            known = inputs_of(session)
        assert len(set(found[:, 7:].flatten().tolist())) > 4
        assert set(chats.swarm.counted().values()) == {4 * (7 + 8)}  # padding in the count

        with MemorySwarm(chats.folder, SPANS) as alone:  # servers that have computed nothing by themselves
            sender = alone.model(prompts=chats.bundle)
            sender.generation_config = model.generation_config
            with sender.inference_session() as session:
                assert torch.equal(say(sender, ids, 9, session=session, attention_mask=mask), found)
                sent = inputs_of(session)
        for mine, theirs in zip(known, sent, strict=True):
            assert torch.allclose(mine, theirs, atol=1e-4)
        assert torch.equal(known[0][:, : chats.length], sent[0][:, : chats.length])


@pytest.mark.parametrize(
    ("family", "mode", "kept"),
    covering(["llama", "bloom", "gpt2", "gemma3_text"], MODES, ["float32", "int8", "bfloat16", "float64"]),
)
def test_a_server_holds_what_a_client_would_have_made(
    tmp_path: Path, family: str, mode: str, kept: str
) -> None:
    """Bit for bit: pages and outputs of the bundle, beside those of a client that sends the same columns."""
    quantization = "int8" if kept == "int8" else "none"
    dtype = torch.float32 if kept == "int8" else getattr(torch, kept)
    with Chats(tmp_path, family, mode) as chats:
        chats.swarm.dtype = dtype
        peers = chats.serve(*SPANS, quantization=quantization)
        model = chats.client(dtype=torch.promote_types(dtype, torch.float32))
        chain, hidden, outputs = _prompt_alone(chats, model)
        name = named_prompt.NamedPrompt.of(model.prompts.input, model.prompts.deep, hidden).name.digest
        for peer, span in zip(peers, chain.spans, strict=True):
            server = chats.swarm.servers[peer]
            bundle = server.bundles[name]
            sent = server.sessions.find(model.blocks.connection.view.peer_id, span.name)
            assert sent is not None
            for block in range(span.hop.start, span.hop.end):
                mine, theirs = (
                    _columns(server.pool, block, row) for row in (bundle.row, sent.block_tables[0])
                )
                assert torch.equal(mine, theirs), f"block {block} at {peer}"
        assert torch.equal(bundle.outputs[-1], outputs)


def _prompt_alone(chats: Chats, model: Any) -> tuple[Any, torch.Tensor, torch.Tensor]:
    """A session's chain to which the prompt was sent and nothing else; what was sent, and the outputs."""
    chain = model.inference_session().chain
    layer = model.get_submodule(blocks_prefix(model.config))[0]
    entered: list[torch.Tensor] = []
    run = layer._run

    def listening(hidden: torch.Tensor, call: Any) -> torch.Tensor:
        entered.append(hidden[:, : chats.length])
        output: torch.Tensor = run(hidden, call)
        return output

    layer._run = listening
    say(model, random_ids(1, 4), 1)
    return chain, entered[0], chain.step(entered[0], BlocksCall(None, None, None, None, 0))


def _columns(pool: PagePool, block: int, row: CachedSequence) -> torch.Tensor:
    """A bundle's keys and values of one block, as they lie in a row's pages."""
    table, place = (0, block) if pool.layout.plain else pool.layout.places[block]
    pages = row.tables[table].pages
    sides = [
        torch.cat([side[page * PAGE : (page + 1) * PAGE] for page in pages])[:LENGTH]
        for side in pool._stores[place]
    ]
    return torch.stack(sides)


@pytest.mark.parametrize(("mode", "length"), covering(MODES, [3, 16, LENGTH], together=1))
def test_two_peers_share_the_pages_and_neither_sees_the_other(tmp_path: Path, mode: str, length: int) -> None:
    with Chats(tmp_path, mode=mode, length=length) as chats:
        peers = chats.serve(*SPANS)
        whole, parts = length // PAGE, pages_for(length) - length // PAGE
        assert [chats.pages(peer) for peer in peers] == [pages_for(length)] * 2
        one, other = chats.client(), chats.client()
        local = chats.local(one)
        a, b = random_ids(1, 5), random_ids(1, 6, seed=5)
        with one.inference_session() as mine, other.inference_session() as theirs:
            first, second = say(one, a, 1, session=mine), say(other, b, 1, session=theirs)
            # Each has copied the page that it goes on in, and holds the full ones with the bundle.
            own = [pages_for(length + n) - whole for n in (5, 6)]
            assert chats.pages(peers[0]) == whole + parts + sum(own)
            for _ in range(4):
                first = torch.cat([first, say(one, None, 5, session=mine)], 1)
                second = torch.cat([second, say(other, None, 5, session=theirs)], 1)
            mine.position = 2
            again = say(one, a[:, 2:], 6, session=mine)
            second = torch.cat([second, say(other, None, 5, session=theirs)], 1)
        assert torch.equal(first, local.greedy(a, 21))
        assert torch.equal(second, local.greedy(b, 26))
        assert torch.equal(again[:, -6:], local.greedy(a, 6)[:, -6:])
        assert [chats.pages(peer) for peer in peers] == [pages_for(length)] * 2
        assert chats.swarm.reserved() == [0, 0]


@pytest.mark.parametrize(
    ("mode", "victim", "known"), covering(MODES, [0, 1], {"without": False, "with": True})
)
def test_a_replacement_need_not_have_the_bundle(tmp_path: Path, mode: str, victim: int, known: bool) -> None:
    with Chats(tmp_path, mode=mode) as chats:
        peers = chats.serve(*SPANS, throughput=1000)
        chats.serve((0, 2), (1, 4), bundles=[chats.bundle] if known else [], throughput=10)
        model = chats.client()
        local = chats.local(model)
        ids, more = random_ids(1, 6), random_ids(1, 3, seed=3)
        with model.inference_session() as session:
            found = say(model, ids, 5, session=session)
            chats.swarm.kill(peers[victim])
            found = torch.cat([found, say(model, None, 6, session=session)], 1)
            assert torch.equal(found, local.greedy(ids, 11))
            fork = session.fork()
            session.position = 2
            again = say(model, more, 5, session=session)
            assert torch.equal(again[:, -5:], local.greedy(torch.cat([ids[:, :2], more], 1), 5)[:, -5:])
            forked = say(model, more, 5, session=fork)
            assert torch.equal(forked[:, -5:], local.greedy(torch.cat([found, more], 1), 5)[:, -5:])


@each_mode
def test_some_servers_have_it(tmp_path: Path, mode: str) -> None:
    """Each span by itself: what one server has not computed is sent to it."""
    for first, second in [(True, False), (False, True)]:
        with Chats(tmp_path / str(first), mode=mode) as chats:
            (a,) = chats.serve((0, 2), bundles=[chats.bundle] if first else [])
            (b,) = chats.serve((2, 4), bundles=[chats.bundle] if second else [])
            model, ids = chats.client(), random_ids(1, 6)
            with model.inference_session() as session:
                found = say(model, ids, 6, session=session)
            assert torch.equal(found, chats.local(model).greedy(ids, 6))
            counted = chats.swarm.counted()
            assert counted[a] == 11 + (0 if first else LENGTH)
            assert counted[b] == 11 + (0 if second else LENGTH)


def test_a_server_without_it_is_asked_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Deep prompts are sent to it at once from then on; those of another bundle are asked for again."""
    asked, find = [], prefilled.find

    def noting(bundles: Any, named: Any) -> Any:
        asked.append(None if named is None else named.deep)
        return find(bundles, named)

    monkeypatch.setattr(opening, "find", noting)
    with Chats(tmp_path, mode="deep_ptune") as chats:
        chats.serve((0, 4), bundles=[])
        model, ids = chats.client(), random_ids(1, 6)
        for _ in range(3):
            assert torch.equal(say(model, ids, 3), chats.local(model).greedy(ids, 3))
        assert asked == [True, None, None, None]
        model.prompts.deep.data.mul_(2)
        assert torch.equal(say(model, ids, 3), chats.local(model).greedy(ids, 3))
        assert asked[4:] == [True, None]


@each_mode
def test_parts_of_a_servers_blocks(tmp_path: Path, mode: str) -> None:
    """Spans that overlap are used in part."""
    with Chats(tmp_path, mode=mode) as chats:
        chats.serve((0, 3), throughput=50)
        chats.serve((1, 4), throughput=50)
        model, ids = chats.client(), random_ids(1, 6)
        local = chats.local(model)
        with model.inference_session() as session:
            found = say(model, ids, 6, session=session)
            hops = [(hop.start, hop.end) for hop in session.hops]
        assert hops[0][1] < 3 or hops[1][0] > 1
        assert torch.equal(found, local.greedy(ids, 6))
        assert set(chats.swarm.counted().values()) == {11}


@each_mode
def test_back_to_before_the_prompt(tmp_path: Path, mode: str) -> None:
    """From there the prompt is computed anew, as it is by then; the bundle stays what it was."""
    with Chats(tmp_path, mode=mode) as chats:
        chats.serve(*SPANS)
        model, ids = chats.client(), random_ids(1, 6)
        with model.inference_session() as session:
            say(model, ids, 4, session=session)
            session.position = 0
            found = say(model, ids[:, 1:], 5, session=session)
            assert torch.equal(found, chats.local(model).greedy(ids[:, 1:], 5))
            session.position = 0
            model.prompts.input.data.mul_(3)
            found = say(model, ids, 5, session=session)
            assert torch.equal(found, chats.local(model).greedy(ids, 5))
        other = chats.client()
        assert torch.equal(say(other, ids, 5), chats.local(other).greedy(ids, 5))


def test_beams(tmp_path: Path) -> None:
    with Chats(tmp_path) as chats:
        chats.serve(*SPANS)
        model, ids = chats.client(), random_ids(2, 6)
        found = say(model, ids, 8, num_beams=3)
        with MemorySwarm(chats.folder, SPANS) as alone:
            sender = alone.model(prompts=chats.bundle)
            sender.generation_config = model.generation_config
            assert torch.equal(found, say(sender, ids, 8, num_beams=3))
        assert len(set(found[0].tolist())) > 8


@each_mode
def test_an_evicted_session_begins_with_it_again(tmp_path: Path, mode: str) -> None:
    with Chats(tmp_path, mode=mode) as chats:
        peers = chats.serve(*SPANS)
        model, ids = chats.client(), random_ids(1, 6)
        with model.inference_session() as session:
            found = say(model, ids, 3, session=session)
            for peer in peers:
                server = chats.swarm.servers[peer]
                (holder,) = server.budget._holders
                holder.evicted = True
                chats.swarm.loop.run(_let_go(server, holder))
            before = chats.swarm.counted()
            found = torch.cat([found, say(model, None, 4, session=session)], 1)
            after = chats.swarm.counted()
        assert torch.equal(found, chats.local(model).greedy(ids, 7))
        assert all(after[peer] - before[peer] == 8 + 4 for peer in peers)  # replayed without the prompt


async def _let_go(server: Any, holder: Any) -> None:
    server.budget.release(holder)
    holder.on_evicted()


@pytest.mark.parametrize(
    ("mode", "what"), [("ptune", "input"), ("deep_ptune", "input"), ("deep_ptune", "deep")]
)
def test_a_prompt_that_was_trained_further_is_another(tmp_path: Path, mode: str, what: str) -> None:
    with Chats(tmp_path, mode=mode) as chats:
        chats.serve(*SPANS)
        model, ids = chats.client(), random_ids(1, 6)
        tensor = getattr(model.prompts, what)
        session = model.inference_session()
        with torch.no_grad():
            tensor[..., -1, -1] += 0.5
        if what == "deep":  # a session has the deep prompts that were there when it was made
            session.close()
            session = model.inference_session()
        with session:
            found = say(model, ids, 6, session=session)
        assert torch.equal(found, chats.local(model).greedy(ids, 6))
        assert set(chats.swarm.counted().values()) == {11 + LENGTH}


def test_what_would_not_be_the_same_is_sent(tmp_path: Path) -> None:
    """Activations that are rounded on the way, blocks that run at the client, another dtype."""
    with Chats(tmp_path) as chats:
        _, second = chats.serve(*SPANS)
        ids = random_ids(1, 6)
        for options in ({"wire": "float16"}, {"local_blocks": 1}, {"dtype": torch.bfloat16}):
            before = chats.swarm.counted()
            say(chats.client(**options), ids, 2)
            assert chats.swarm.counted()[second] - before[second] == 7 + LENGTH
    with Chats(tmp_path / "wide") as chats:
        chats.swarm.dtype = torch.bfloat16
        peers = chats.serve(*SPANS)
        for dtype in (torch.bfloat16, torch.float32):
            before = chats.swarm.counted()
            say(chats.client(dtype=dtype), ids, 2)
            assert all(chats.swarm.counted()[peer] - before[peer] == 7 for peer in peers)


def test_audits_see_the_whole(tmp_path: Path) -> None:
    """A server that lies about a bundle's outputs is found like any other."""
    with Chats(tmp_path) as chats:
        (liar,) = chats.serve((0, 4), throughput=1000)
        chats.serve((0, 4), throughput=1)
        model, ids = chats.client(audit=1.0), random_ids(1, 6)
        say(model, ids, 1)
        auditor = model.blocks.connection.audits
        chats.swarm.loop.run(auditor.settled())
        assert (auditor.counts.right, auditor.counts.wrong) == (1, 0)
        for bundle in chats.swarm.servers[liar].bundles.values():
            bundle.outputs[-1] = bundle.outputs[-1] + 0.1
        say(model, random_ids(1, 9, seed=4), 1)
        chats.swarm.loop.run(auditor.settled())
        assert model.blocks.connection.view.verdicts.condemned


# --- planted mistakes --------------------------------------------------------------------------------------


def shared_page_written(patch: Mistakes) -> None:
    patch.setattr(BlockTable, "_copy_on_write", lambda _self, _index: None)


def deep_prompts_forgotten_by_the_server(patch: Mistakes) -> None:
    through = prefilled.EnteringPrompt.through

    def shallow(self: Any, span: Any, batch: Any) -> Any:
        return dataclasses.replace(through(dataclasses.replace(self, deep=None), span, batch), deep=self.deep)

    patch.setattr(prefilled.EnteringPrompt, "through", shallow)


def blocks_before_the_span_left_out(patch: Mistakes) -> None:
    before = prefilled.before_span
    patch.setattr("tests.swarm_fixture.before_span", lambda *args, **rest: before(*args[:2], 0, **rest))


def outputs_of_another_block(patch: Mistakes) -> None:
    patch.setattr(prefilled.PrefilledPrompt, "outputs_of", lambda self, _span: self.outputs[0])


def one_column_too_few(patch: Mistakes) -> None:
    prompt = named_prompt.PromptOutputs
    left = prompt.left_to_send

    def early(self: Any, step: Any, tensors: Any) -> Any:
        return left(prompt(self.outputs[:, 1:]), step, tensors)

    patch.setattr(prompt, "left_to_send", early)


def deep_prompts_not_in_the_name(patch: Mistakes) -> None:
    digest = prompts.digest
    for module in (named_prompt, prefilled):
        patch.setattr(module, "digest", lambda vectors, _deep, dtype: digest(vectors, None, dtype))


CAUGHT_BY: dict[Plant, set[str]] = {
    no_mistake: set(),
    shared_page_written: {"beside_others"},
    deep_prompts_forgotten_by_the_server: {"by_itself", "beside_others"},
    blocks_before_the_span_left_out: {"by_itself", "beside_others"},
    outputs_of_another_block: {"failover"},
    one_column_too_few: {"by_itself", "beside_others"},
    deep_prompts_not_in_the_name: {"trained"},
}


@dataclasses.dataclass
class Checks:
    """The comparisons of the tests above, each on its own."""

    chats: Chats

    def by_itself(self) -> bool:
        model, ids = self.chats.client(), random_ids(1, 6)
        return torch.equal(say(model, ids, 8), self.chats.local(model).greedy(ids, 8))

    def beside_others(self) -> bool:
        model, other, ids = self.chats.client(), self.chats.client(), random_ids(1, 6)
        with model.inference_session() as mine, other.inference_session() as theirs:
            found = say(model, ids, 2, session=mine)
            say(other, random_ids(1, 6, seed=2), 2, session=theirs)
            found = torch.cat([found, say(model, None, 8, session=mine)], 1)
        return torch.equal(found, self.chats.local(model).greedy(ids, 10))

    def trained(self) -> bool:
        model, ids = self.chats.client(), random_ids(1, 6)
        model.prompts.deep.data.mul_(-2)
        return torch.equal(say(model, ids, 8), self.chats.local(model).greedy(ids, 8))

    def failover(self) -> bool:
        model, ids = self.chats.client(), random_ids(1, 6)
        with model.inference_session() as session:
            found = say(model, ids, 3, session=session)
            self.chats.swarm.kill(session.hops[-1].peer_id)
            found = torch.cat([found, say(model, None, 8, session=session)], 1)
        return torch.equal(found, self.chats.local(model).greedy(ids, 11))


@pytest.mark.parametrize("plant", CAUGHT_BY, ids=lambda plant: plant.__name__)
def test_mutant(plant: Plant, tmp_path: Path, mistakes: Mistakes) -> None:
    plant(mistakes)
    with Chats(tmp_path, mode="deep_ptune", length=3) as chats:
        chats.serve((0, 2), (2, 4), throughput=1000)
        chats.serve((2, 4), bundles=[], throughput=1)
        checks = Checks(chats)
        due = CAUGHT_BY[plant]
        names = ("by_itself", "beside_others", "trained", "failover")
        tried = [name for name in names if name in due or not due]
        failed = {name for name in tried if not passes(getattr(checks, name))}
    assert failed == due
