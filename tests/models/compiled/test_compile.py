"""Compiled passes equal the family's own code, for every family that can be compiled; others are left alone."""

from __future__ import annotations

import logging
import tempfile
import threading
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.covering import covering
from tests.models.conftest import INSTRUCTION_SETS, LANES
from tests.tiny_models import FAMILIES, write_tiny
from torch import Tensor

from corolla.models.attention.packing import PackedBatch, segments_of
from corolla.models.attention.pages import CachedSequence, PagePool
from corolla.models.attention.windows import layout_of
from corolla.models.checkpoints.checkpoint import open_checkpoint
from corolla.models.compiled import compile as compiling
from corolla.models.compiled.compile import MOST_ROWS, compile_blocks
from corolla.models.compiled.program import Program, SizedProgram
from corolla.models.compiled.record import record
from corolla.models.kernels import int8, native
from corolla.models.kernels.apply import Quantization, pack_linears
from corolla.models.kernels.experts import Experts
from corolla.models.kernels.native import library
from corolla.models.prompts import DeepRows
from corolla.models.span import Span, load_span

pytestmark = pytest.mark.skipif(library() is None, reason="there is no C compiler here")

NOT_COMPILED = {
    "falcon": "not packable",
}
COMPILED = tuple(family for family in FAMILIES if family not in NOT_COMPILED)
WINDOWED = {
    "mistral",
    "qwen2",
    "gemma2",
    "gemma3_text",
    "gpt_oss",
}  # some or all blocks see the newest tokens only
EXACT = 1e-5  # of the largest value
LESS_EXACT = {"gpt_oss": 3e-5}  # its experts multiply two products by each other; see test_apply.py
MARGIN = 4
# Heads of 16, as the kernels have them, and weights in bfloat16, which are kept so.
SHAPES: dict[str, dict[str, Any]] = {
    "gpt2": {"n_embd": 64},
    "bloom": {"hidden_size": 64, "n_head": 4},
    "opt": {"hidden_size": 64, "num_attention_heads": 4},
    "falcon": {"hidden_size": 64},
}
SHAPE = {"hidden_size": 64, "num_attention_heads": 4, "head_dim": 16}


def span_of(family: str, quantization: Quantization = "none", dtype: torch.dtype = torch.bfloat16) -> Span:
    return _span_of(family, quantization, dtype, native.instruction_set())


@cache
def _span_of(family: str, quantization: Quantization, dtype: torch.dtype, _kernels: str | None) -> Span:
    """Layers and programs look up their kernels when they are made, so a span is of one instruction set."""
    with tempfile.TemporaryDirectory() as folder:
        written = write_tiny(family, Path(folder), dtype=dtype, **SHAPES.get(family, SHAPE))
        checkpoint = open_checkpoint(str(written))
        span = load_span(checkpoint, 1, 4, dtype=torch.float32, packable=family != "falcon")
    pack_linears(span.blocks, quantization=quantization)
    return span


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


class Crowd:
    """Rows of different lengths, twice: for the family's own code and for `Span.forward_packed`."""

    def __init__(self, span: Span, lengths: list[int]) -> None:
        self.span, self.lengths = span, list(lengths)
        self.pool = PagePool(
            2000, dtype=torch.float32, device=span.device, layout=layout_of(span, margin=MARGIN)
        )
        self.rows = [CachedSequence(self.pool) for _ in lengths]
        ids = torch.cat([torch.arange(length) for length in lengths])
        batch = PackedBatch(segments_of(lengths, self.rows), self.pool)
        span.run_packed(noise(len(ids), span.hidden_size), batch, positions=ids)
        self.twins = [row.fork() for row in self.rows]

    def step(self, seed: int, deep: DeepRows | None = None) -> tuple[Tensor, Tensor]:
        """One more token for each: outputs of the span, and of the family's own code."""
        hidden = noise(len(self.lengths), self.span.hidden_size, seed=seed)
        ids = torch.tensor(self.lengths)
        found = self.span.forward_packed(hidden, self._batch(self.rows), positions=ids, deep=deep)
        wanted = self.span.run_packed(hidden, self._batch(self.twins), positions=ids, deep=deep)
        self.lengths = [one + 1 for one in self.lengths]
        return found, wanted

    def _batch(self, rows: list[CachedSequence]) -> PackedBatch:
        return PackedBatch(segments_of([1] * len(rows), rows), self.pool)


def error(found: Tensor, wanted: Tensor) -> float:
    return float((found - wanted).abs().max() / (1 + wanted.abs().max()))


# Programs differ by family, the kernels that they call by instruction set, which the tests of kernels try one by one.
@pytest.mark.parametrize(("lanes", "family"), covering(LANES, COMPILED, together=1), indirect=["lanes"])
def test_every_family_is_compiled_and_computes_the_same(lanes: str, family: str) -> None:
    span = span_of(family)
    assert span.compile() is not None
    with torch.inference_mode():
        for lengths in ([5], [1, 40], [16, 15, 17], [3 + 2 * at for at in range(MOST_ROWS)]):
            crowd = Crowd(span, lengths)
            assert crowd.pool.layout.plain == (family not in WINDOWED)
            for seed in range(1, 8):  # beyond the windows of 6, and over the edge of a page
                assert error(*crowd.step(seed)) < LESS_EXACT.get(family, EXACT), (len(lengths), seed)


@pytest.mark.parametrize(
    ("instruction_set", "family"),
    covering(INSTRUCTION_SETS, COMPILED, together=1),
    indirect=["instruction_set"],
)
def test_in_8_bits_too(instruction_set: str, family: str) -> None:
    span = span_of(family, "int8")
    assert span.compile() is not None
    with torch.inference_mode():
        for lengths in ([7], [2, 30, 17, 9, 5]):
            crowd = Crowd(span, lengths)
            for seed in range(1, 4):
                found, wanted = crowd.step(seed)
                assert (found - wanted).norm() < 0.05 * wanted.norm()


def test_8_bits_without_our_kernel_are_left_to_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(int8, "library", lambda: None)
    if not int8.activation_levels():
        pytest.skip("torch without fbgemm")
    span = _span_of.__wrapped__("llama", "int8", torch.bfloat16, None)  # not the one that other tests share
    assert span.compile() is None
    with torch.inference_mode():
        found, wanted = Crowd(span, [3, 9]).step(1)
    assert torch.equal(found, wanted)


@pytest.mark.parametrize("family", NOT_COMPILED)
def test_other_families_are_left_to_their_own_code(family: str, caplog: pytest.LogCaptureFixture) -> None:
    span = span_of(family)
    with caplog.at_level(logging.INFO):
        assert compile_blocks(span) is None
    if span.packable:
        assert NOT_COMPILED[family] in caplog.text
        with torch.inference_mode():
            found, wanted = Crowd(span, [3, 9]).step(1)
        assert torch.equal(found, wanted)


def test_weights_without_a_narrow_form_are_multiplied_as_they_are() -> None:
    span = span_of("llama", dtype=torch.float32)
    program = compile_blocks(span)
    assert program is not None
    with torch.inference_mode():
        crowd = Crowd(span, [3, 9])
        for _ in range(3):
            found, wanted = crowd.step(2)
            assert error(found, wanted) < 1e-5


@pytest.mark.parametrize("quantization", ["none", "int8"])
def test_an_experts_rows_do_not_depend_on_who_else_is_sent_to_it(quantization: Quantization) -> None:
    span = span_of("mixtral", quantization)
    assert span.compile() is not None
    lengths = [4 + at for at in range(24)]
    with torch.inference_mode():
        crowd, hidden = Crowd(span, lengths), noise(24, span.hidden_size, seed=3)
        found = []
        for own in (lengths, lengths[20:], lengths[20:21]):
            first = lengths.index(own[0])
            rows = [row.fork() for row in crowd.rows[first : first + len(own)]]
            batch = PackedBatch(segments_of([1] * len(own), rows), crowd.pool)
            part = span.forward_packed(hidden[first : first + len(own)], batch, positions=torch.tensor(own))
            found.append(part[-4 if len(own) > 4 else 0 :])
    assert torch.equal(found[1], found[0])
    assert error(found[2], found[0][:1]) < (1e-6 if quantization == "none" else 0.05)


def test_experts_that_are_nobodys_give_nothing() -> None:
    """So transformers says that another machine has an expert (`num_experts` is nobody's number)."""
    span = span_of("mixtral")
    experts = [one for one in span.blocks.modules() if isinstance(one, Experts)]
    count = len(experts[0].down_proj)
    rows = noise(5, span.hidden_size)

    def run(hidden: Tensor, _positions: Tensor, _batch: Any = None) -> Tensor:
        chosen = torch.topk(hidden[:, : count + 1], 2)[1]  # of one number more than there are experts
        weights = torch.topk(hidden[:, : count + 1], 2)[0]
        found: Tensor = experts[0](hidden, chosen, weights)
        return found

    program = Program([record(run, rows[:n], torch.arange(n)) for n in (3, 5)], (3, 5), most=MOST_ROWS)
    batch = PackedBatch(segments_of([1] * 5, Crowd(span, [1] * 5).rows), Crowd(span, [1]).pool)
    with torch.inference_mode():
        found = program.run(rows, torch.arange(5), batch)
        assert bool((torch.topk(rows[:, : count + 1], 2)[1] == count).any())
        torch.testing.assert_close(found, run(rows, torch.arange(5)), rtol=1e-5, atol=1e-5)


def test_bits_depend_neither_on_the_company_nor_on_threads() -> None:
    span = span_of("llama")
    lengths = [4 + at for at in range(40)]
    before = torch.get_num_threads()
    with torch.inference_mode():  # once: the bits of torch's products may well depend on threads
        crowd = Crowd(span, lengths)
    found = []
    try:
        for threads, own in ((1, lengths), (2, lengths), (2, lengths[:3])):
            torch.set_num_threads(threads)
            with torch.inference_mode():
                rows = [row.fork() for row in crowd.rows[: len(own)]]
                hidden = noise(40, span.hidden_size, seed=9)[: len(own)]
                batch = PackedBatch(segments_of([1] * len(own), rows), crowd.pool)
                found.append(span.forward_packed(hidden, batch, positions=torch.tensor(own)))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(found[0], found[1])
    # Few rows of a product are added up in another order than many.
    assert error(found[2], found[0][:3]) < 1e-6


def test_deep_prompts_gradients_and_long_steps_go_through_the_familys_code(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    span = span_of("qwen3")
    assert span.compile() is not None
    monkeypatch.setattr(SizedProgram, "run", lambda *_: pytest.fail("the compiled pass was used"))
    with torch.inference_mode():
        deep = DeepRows.of([(0, 2, 1)], [noise(3, 8, span.hidden_size)])
        found, wanted = Crowd(span, [2, 30]).step(1, deep)
        assert torch.equal(found, wanted)
        crowd = Crowd(span, [4, 4])
        batch = PackedBatch(segments_of([2, 1], crowd.rows), crowd.pool)
        span.forward_packed(noise(3, span.hidden_size), batch, positions=torch.tensor([4, 5, 4]))
    hidden = noise(2, span.hidden_size).requires_grad_()
    span.forward_packed(
        hidden, PackedBatch(segments_of([1, 1])), positions=torch.tensor([0, 0])
    ).sum().backward()
    assert hidden.grad is not None


def test_sub_spans_are_compiled_by_themselves() -> None:
    whole = span_of("gemma3_text")
    part = whole.view(2, 4)
    assert part.compile() is not None
    assert part.compile() is not whole.compile()
    with torch.inference_mode():
        assert error(*Crowd(part, [9, 2]).step(1)) < EXACT


def test_another_pool_is_another_cache() -> None:
    span = span_of("llama")
    with torch.inference_mode():
        first, second = Crowd(span, [6]), Crowd(span, [11, 3])
        for seed in range(1, 4):
            assert error(*first.step(seed)) < EXACT
            assert error(*second.step(seed)) < EXACT


def test_scratch_is_as_large_as_the_longest_table_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    """The program was compared on a pool of one table; here blocks with a window have another, far shorter one."""
    span, own = span_of("gemma2"), SizedProgram._scores
    assert span.compile() is not None
    guards: list[Tensor] = []

    def guarded(self: SizedProgram, tables: Any, threads: int) -> Tensor:
        size = len(own(self, tables, threads))
        memory = torch.full((size + 5000,), 7.0)
        guards.append(memory[size:])
        return memory[:size]

    monkeypatch.setattr(SizedProgram, "_scores", guarded)
    with torch.inference_mode():
        crowd = Crowd(span, [400])
        for row in (*crowd.rows, *crowd.twins):
            row.trim()
        assert error(*crowd.step(1)) < EXACT
    assert guards
    assert all(bool((one == 7.0).all()) for one in guards)


@pytest.mark.parametrize("quantization", ["none", "int8"])
def test_a_program_that_computes_something_else_is_not_used(
    quantization: Quantization, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    run = SizedProgram.run

    def wrong(self: SizedProgram, hidden: Tensor, positions: Tensor, tables: Any) -> Tensor:
        return run(self, hidden, positions + 1, tables)

    monkeypatch.setattr(SizedProgram, "run", wrong)
    assert compile_blocks(span_of("llama", quantization)) is None
    assert "would change their results" in caplog.text


def test_blocks_that_depend_on_the_number_of_rows_are_refused(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    span = span_of("llama")
    own = Span.run_packed

    def uneven(self: Span, hidden: Tensor, *arguments: Any, **more: Any) -> Tensor:
        return own(self, hidden * (2.0 if len(hidden) > 4 else 1.0), *arguments, **more)

    monkeypatch.setattr(Span, "run_packed", uneven)
    with caplog.at_level(logging.INFO):
        assert compile_blocks(span) is None
    assert "depends on the number of rows" in caplog.text


def test_what_other_threads_compute_meanwhile_is_theirs() -> None:
    span, other = span_of("llama"), span_of("qwen3")
    ended = threading.Event()

    def work() -> None:
        with torch.inference_mode():
            while not ended.is_set():
                other.run_packed(
                    noise(2, other.hidden_size), PackedBatch(segments_of([2])), positions=torch.arange(2)
                )

    thread = threading.Thread(target=work)
    thread.start()
    try:
        for _ in range(5):
            assert compile_blocks(span) is not None
    finally:
        ended.set()
        thread.join()


def test_without_a_compiler_nothing_is_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiling, "library", lambda: None)
    assert compile_blocks(span_of("llama")) is None
