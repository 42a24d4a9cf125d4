"""Servers that lie are found, avoided and reported; honest ones that differ raise no alarm."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.client.conftest import random_ids
from tests.swarm_fixture import MemorySwarm
from tests.tiny_models import write_tiny
from torch import Tensor

from corolla.client.audit import TOLERANCES, Answer, deviation, tolerance_of
from corolla.client.audit_report import AuditReport
from corolla.client.auditor import MOST_WAITING, Auditor
from corolla.client.own_blocks import OwnBlocks
from corolla.errors import LyingServer, UsageError
from corolla.server import handlers
from corolla.server.block_server import BlockServer
from corolla.swarm.routing import Hop
from corolla.wire.frames import Packet
from corolla.wire.messages import Gradients, Output

GREEDY: dict[str, Any] = {"do_sample": False}
Tensors = dict[str, Tensor]
Lie = Callable[[Packet], Tensors]


class Swarm(MemorySwarm):
    """Servers a, b, … of all four blocks, of which some lie."""

    def __init__(self, folder: Path, names: str = "abc") -> None:
        super().__init__(folder, [])
        self.lies: dict[BlockServer, Lie] = {}
        for rank, name in enumerate(names):
            self.add(0, 4, name, throughput=1000.0 / 10**rank)

    def lie(self, name: str, lie: Lie) -> None:
        """From now on this server answers with the tensors that `lie` makes of its true reply."""
        self.lies[self.servers[name]] = lie


@pytest.fixture(autouse=True)
def report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AuditReport:
    monkeypatch.setenv("COROLLA_CACHE", str(tmp_path / "cache"))
    return AuditReport()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny("llama", tmp_path_factory.mktemp("llama"))


@pytest.fixture
def swarm_of(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Swarm]]:
    made: list[Swarm] = []
    honest = handlers._Stream._reply

    async def reply(self: Any, packet: Packet) -> Packet:
        answer = await honest(self, packet)
        lie = next((lies[self._server] for lies in (one.lies for one in made) if self._server in lies), None)
        return answer if lie is None else Packet(answer.message, lie(answer))

    def make(names: str = "abc") -> Swarm:
        made.append(Swarm(folder, names))
        return made[-1]

    monkeypatch.setattr(handlers._Stream, "_reply", reply)
    yield make
    for swarm in made:
        swarm.close()


def audited(swarm: Swarm, share: float, *, own: bool = False, seed: int = 1, **arguments: Any) -> Any:
    model = swarm.model(tuning_mode="deep_ptune", pre_seq_len=3, patience=2.0, **arguments)
    model.generation_config.eos_token_id = None
    model.prompts.deep.data.normal_(0, 0.3, generator=torch.Generator().manual_seed(1))
    mine = OwnBlocks(swarm.checkpoint, model.dtype) if own else None
    model.blocks.connection.start_audits(share, mine, draw=random.Random(seed))
    return model


def auditor_of(model: Any) -> Auditor:
    auditor = model.blocks.connection.view.audits
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


@pytest.mark.parametrize(("lie", "work"), CASES)
def test_a_liar_is_found_avoided_and_reported(
    swarm_of: Callable[..., Swarm], report: AuditReport, lie: str, work: str
) -> None:
    swarm = swarm_of()
    honest = audited(swarm, 0.0)
    expected = WORK[work](honest, 7)
    swarm.lie("a", LIES[lie][0]())
    model = audited(swarm, 0.2)
    seen = until_found(model, WORK[work])
    print(f"{lie}, {work}: found after {seen} answers at a share of 0.2")
    # The others are believed, and from now on everything is as it should be.
    assert set(model.blocks.connection.view.verdicts.condemned) == {"a"}
    counted = swarm.counted("forward")["a"], swarm.counted()["a"]
    assert (WORK[work](model, 7) - expected).abs().max() < 1e-4
    assert (swarm.counted("forward")["a"], swarm.counted()["a"]) == counted
    [found] = report.read()
    assert (found.peer_id, found.lied, found.start, found.end) == ("a", True, 0, 4)
    assert found.worst > 1
    assert set(found.what) <= {"train": {"forward", "backward"}, "decode": {"step"}}[work]


def test_a_server_that_skips_a_block_is_found(swarm_of: Callable[..., Swarm]) -> None:
    swarm = swarm_of()
    block = swarm.servers["a"].span.blocks[2]
    for weight in (block.self_attn.o_proj.weight, block.mlp.down_proj.weight):
        weight.data.zero_()
    for work in (decode, train):
        print(f"a skipped block, {work.__name__}: {until_found(audited(swarm, 0.2), work)} answers")


def test_a_liar_takes_as_many_requests_as_the_share_says(swarm_of: Callable[..., Swarm]) -> None:
    """At a share p, 1/p answers on average; here 24 clients with p = 0.05."""
    swarm = swarm_of("ab")
    inputs = {"hidden": torch.randn(1, 4, 32), "lengths": torch.tensor([4])}
    counts = []
    for seed in range(24):
        model = swarm.model(patience=2.0)
        connection = model.blocks.connection
        own = OwnBlocks(swarm.checkpoint, model.dtype)
        auditor = connection.start_audits(0.05, own, draw=random.Random(seed))

        async def ask(auditor: Auditor = auditor, view: Any = connection.view) -> int:
            await view.refresh()
            while not view.verdicts.condemned:
                auditor.forward(Hop("a", 0, 4), inputs, torch.randn(1, 4, 32))
                await auditor.settled()
            return auditor.counts.seen

        counts.append(connection.run(ask()))
    mean = sum(counts) / len(counts)
    print(f"found after {mean:.1f} answers on average, {max(counts)} at most; 1/p is 20")
    assert 10 < mean < 33


def test_the_session_goes_on_after_the_lie_with_the_others(
    swarm_of: Callable[..., Swarm], folder: Path
) -> None:
    """Caches that came from the liar are rebuilt; what it made the model say is taken back by the caller."""
    swarm = swarm_of("")
    swarm.add(0, 1, "first")
    for name in ("a", "b", "c"):
        swarm.add(1, 2, name, throughput={"a": 1000.0}.get(name, 1.0))
    swarm.add(2, 4, "last")
    model = audited(swarm, 1.0)
    ids = random_ids(1, 6)
    expected = audited(swarm, 0.0).generate(ids, max_new_tokens=10, **GREEDY)
    with model.inference_session(max_length=64) as session:
        model.generate(ids, max_new_tokens=4, **GREEDY)
        assert settle(model).counts.right >= 4
        said = session.position
        before = swarm.counted()["first"]
        swarm.lie("a", changed(Output, noisy(0.5))())
        model.generate(None, max_new_tokens=1, **GREEDY)
        settle(model)
        with pytest.raises(LyingServer, match=r"blocks 1:2.*last right at"):
            model.generate(None, max_new_tokens=1, **GREEDY)
        session.position = said
        rest = model.generate(None, max_new_tokens=6, **GREEDY)
        found = torch.cat([session.output_ids[:, :said], rest], 1)
        assert torch.equal(found, expected)
        # Blocks before the liar's keep their cache; "first" was asked for the new tokens only.
        assert swarm.counted()["first"] - before <= 6 + 4
        assert "a" not in {span.hop.peer_id for span in session._chain._spans}
        assert settle(model).counts.wrong == 1


def test_nobody_begins_with_what_a_liar_made(swarm_of: Callable[..., Swarm]) -> None:
    swarm = swarm_of()
    model, ids = audited(swarm, 0.0), random_ids(1, 40)
    expected = model.generate(ids, max_new_tokens=6, **GREEDY)
    swarm.lie("a", changed(Output, noisy(0.3))())
    liars = audited(swarm, 1.0)
    with liars.inference_session() as session:
        liars.generate(ids, max_new_tokens=1, **GREEDY)  # kept as a beginning for others
        settle(liars)
        with liars.inference_session():
            assert torch.equal(liars.generate(ids, max_new_tokens=6, **GREEDY), expected)
        with pytest.raises(LyingServer), session:
            liars.generate(None, max_new_tokens=2, **GREEDY)


def test_two_that_disagree_are_named_and_neither_is_condemned(
    swarm_of: Callable[..., Swarm], report: AuditReport, caplog: pytest.LogCaptureFixture
) -> None:
    swarm = swarm_of("ab")
    swarm.lie("b", changed(Output, noisy(0.01))())
    model = audited(swarm, 1.0)
    for seed in range(3):
        decode(model, seed)
        assert settle(model).counts.unclear
    assert not model.blocks.connection.view.verdicts.condemned
    [found] = report.read()
    assert (found.peer_id, found.other, found.lied) == ("a", "b", False)
    assert found.count == auditor_of(model).counts.unclear
    assert sum("a and b disagree" in one.getMessage() for one in caplog.records) == 1


@pytest.mark.parametrize("liar", ["a", "b"])
def test_the_clients_own_checkpoint_decides_between_two(swarm_of: Callable[..., Swarm], liar: str) -> None:
    swarm = swarm_of("ab")
    swarm.lie(liar, changed(Output, noisy(0.01))())
    model = audited(swarm, 1.0, own=True)
    train_once(model)
    assert set(model.blocks.connection.view.verdicts.condemned) == {liar}


def train_once(model: Any) -> None:
    try:
        train(model)
    except LyingServer:
        return
    finally:
        settle(model)


def test_a_lone_server_is_checked_by_the_client_itself(swarm_of: Callable[..., Swarm]) -> None:
    swarm = swarm_of("a")
    model = audited(swarm, 1.0, own=True)
    train(model)
    decode(model)
    counts = settle(model).counts
    assert counts.right + counts.dropped == counts.seen
    assert not counts.wrong
    swarm.lie("a", changed(Gradients, one_sign)())
    train_once(model)
    with pytest.raises(LyingServer, match="wrong backward"):
        train(model)


def test_a_lone_server_that_nobody_can_check_is_said_once(
    swarm_of: Callable[..., Swarm], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    swarm = swarm_of("a")
    model = audited(swarm, 1.0, own=True)
    monkeypatch.setattr(OwnBlocks, "fits", lambda *_: False)
    for _ in range(2):
        train(model)
    assert settle(model).counts.unanswered >= 4
    said = [one.getMessage() for one in caplog.records if "need a second server" in one.getMessage()]
    assert len(said) == 1
    assert "blocks 0:4" in said[0]


def test_one_who_slanders_is_found_instead(swarm_of: Callable[..., Swarm]) -> None:
    """The answer was right; the server that was asked about it lies."""
    swarm = swarm_of()
    swarm.lie("b", changed(Output, noisy(0.01))())
    model = audited(swarm, 1.0)
    for seed in range(3):
        with contextlib.suppress(LyingServer):
            decode(model, seed)
        settle(model)
    assert set(model.blocks.connection.view.verdicts.condemned) == {"b"}


def test_several_servers_together_check_one(swarm_of: Callable[..., Swarm]) -> None:
    """Blocks 0:4 of one server by two with half of them each; a wrong half is found by its own audit."""
    swarm = swarm_of("a")
    for name in ("x", "y"):
        swarm.add(0, 2, f"{name}-front", throughput=1.0)
        swarm.add(2, 4, f"{name}-back", throughput=1.0)
    model = audited(swarm, 1.0)
    for seed in range(2):
        train(model, seed)
        decode(model, seed)
        assert settle(model).counts.right
    assert not auditor_of(model).counts.wrong
    swarm.lie("x-back", changed(Gradients, noisy(0.01))())
    for seed in range(4):
        with contextlib.suppress(LyingServer):
            train(model, seed)
        settle(model)
    assert set(model.blocks.connection.view.verdicts.condemned) <= {"x-back"}


def test_the_audited_server_is_asked_nothing_more(swarm_of: Callable[..., Swarm]) -> None:
    swarm = swarm_of()
    counted = []
    for share in (0.0, 1.0):
        before = {name: swarm.counted(name)["a"] for name in ("forward", "backward", "inference")}
        model = audited(swarm, share)
        train(model)
        decode(model)
        if share:
            assert settle(model).counts.right
        counted.append({name: swarm.counted(name)["a"] - before[name] for name in before})
    assert counted[0] == counted[1]


def test_audits_that_are_behind_are_dropped_and_work_goes_on(swarm_of: Callable[..., Swarm]) -> None:
    swarm = swarm_of()
    model = audited(swarm, 1.0)
    for name in ("b", "c"):
        swarm.stop(name)  # whoever audits does not answer
    for seed in range(4):
        decode(model, seed)
    counts = auditor_of(model).counts
    assert counts.dropped == counts.drawn - MOST_WAITING - 1
    model.close()


def test_a_refusal_is_no_lie(swarm_of: Callable[..., Swarm]) -> None:
    swarm = swarm_of()
    model = audited(swarm, 1.0)
    swarm.kill("b")
    train(model)
    counts = settle(model).counts
    assert (counts.right, counts.wrong, counts.unclear) == (2, 0, 0)


@pytest.mark.parametrize("share", [-0.1, 1.5])
def test_a_share_that_is_none(swarm_of: Callable[..., Swarm], share: float) -> None:
    with pytest.raises(UsageError, match=r"share of requests to audit is .*0 to 1"):
        swarm_of("a").model(audit=share)


def test_from_pretrained_starts_audits(swarm_of: Callable[..., Swarm]) -> None:
    swarm = swarm_of("ab")
    assert auditor_of(swarm.model(audit=0.05))._share == 0.05
    assert not isinstance(swarm.model().blocks.connection.view.audits, Auditor)


# --- Honest servers -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "most"),
    [
        ("llama", 120),
        ("bloom", 24),
        pytest.param("llama", 6000, marks=pytest.mark.nightly),
        pytest.param("bloom", 2000, marks=pytest.mark.nightly),
        pytest.param("gemma2", 2000, marks=pytest.mark.nightly),
    ],
)
def test_honest_servers_raise_no_alarm(tmp_path: Path, family: str, most: int) -> None:
    """Of both kinds of kernels, packed and padded, with 8 bits and without, cut differently, with compressed
    wires; training, prefill, decoding and beams, alone and in company."""
    folder = write_tiny(family, tmp_path)
    checks, worst = 0, dict[str, float]()
    for quantization, wire in [("none", "compute"), ("int8", "compute"), ("none", "float16")]:
        with Swarm(folder, "") as swarm:
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
    print(f"{family}: {checks} comparisons, no alarm; largest in tolerances: {worst}")
    assert max(worst.values()) < 0.5


# --- Comparing ------------------------------------------------------------------------------------------


def answer_of(given: Tensor) -> Answer:
    return Answer(Hop("a", 0, 1), "forward", {"hidden": given}, {})


def test_deviations_are_parts_of_what_the_blocks_did() -> None:
    given = torch.randn(1, 50, 64)
    change = torch.randn(1, 50, 64)
    true = given * 100 + change
    off = deviation(answer_of(given * 100), {"hidden": true + 0.01 * change}, {"hidden": true})
    assert 0.001 < off.typical < 0.01  # the change, and a part of the token's own size
    one = true.clone()
    one[0, 7] += change[0, 7]
    off = deviation(answer_of(given * 100), {"hidden": one}, {"hidden": true})
    assert off.worst > 5 * off.typical


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_no_number_is_never_within_a_tolerance(value: float) -> None:
    true = torch.randn(1, 4, 8)
    told = true.clone()
    told[0, 1, 2] = value
    off = deviation(answer_of(torch.zeros(1, 4, 8)), {"hidden": told}, {"hidden": true})
    assert not off.within(TOLERANCES["4 bits"].output)
    assert deviation(answer_of(torch.zeros(1, 4, 8)), {"hidden": told}, {"hidden": told}).worst == 0


def test_an_answer_where_nothing_was_due() -> None:
    nothing = torch.zeros(1, 3, 8)
    answer = answer_of(nothing)
    assert deviation(answer, {"hidden": nothing}, {"hidden": nothing}).worst == 0
    assert deviation(answer, {"hidden": nothing + 1e-9}, {"hidden": nothing}).worst > 1e9


@pytest.mark.parametrize(
    ("kinds", "wire", "expected"),
    [
        (("float32", "float32"), "compute", "float32"),
        (("float32", "bfloat16"), "compute", "half"),
        (("float32", "float32+int8"), "compute", "8 bits"),
        (("bfloat16+nf4", "float32"), "compute", "4 bits"),
        (("float32", "float32"), "float16", "half"),
        (("float32", "float32"), "int8", "8 bits"),
        (("made up", "float64"), "compute", "half"),
    ],
)
def test_the_coarsest_arithmetic_sets_the_tolerance(kinds: Any, wire: Any, expected: str) -> None:
    assert tolerance_of(kinds, gradient=False, wire=wire) is TOLERANCES[expected].output
    assert tolerance_of(kinds, gradient=True, wire=wire) is TOLERANCES[expected].gradient
