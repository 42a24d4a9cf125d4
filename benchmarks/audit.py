"""What honest servers differ by, which is what the tolerances of audits must allow, and what lies look like.

For each class of arithmetic pairs of honest servers answer the same: with one thread and with two, alone and beside
others, packed and token by token with a cache (in compiled passes too), with and without our kernels, with the int8
arithmetic of machines that have VNNI and of those that have not. Printed: how many comparisons, the distribution of
differences in parts of what the blocks do (`client/audits/audit.py: Deviation`), and the margin below the tolerance
that stands in the code; then how many tolerances each kind of lie is.

    python -m benchmarks.audit                        # SmolLM2, blocks 0:15 and 15:30
    python -m benchmarks.audit --classes float32 bfloat16 --spans 1
    python -m benchmarks.audit --model FOLDER --rounds 20

Invariant: every class and span is on disk as soon as it is measured (`benchmarks/results/audits.jsonl`; another
model's are only printed). `python -m benchmarks.reliability` makes the table of them.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from benchmarks.results import RESULTS, append, conditions
from benchmarks.sizes import MODEL
from corolla.cli.common import set_up_libraries
from corolla.client.audits.audit import Answer, Deviation, deviation, tolerance_of
from corolla.models.attention.packing import PackedBatch, segments_of
from corolla.models.attention.pages import CachedSequence, PagePool, pages_for
from corolla.models.checkpoints.checkpoint import Checkpoint, open_checkpoint
from corolla.models.checks.selfcheck import check_family
from corolla.models.kernels.apply import Quantization, pack_linears
from corolla.models.prompts import DeepRows
from corolla.models.span import Span, load_span
from corolla.server.training import Sequences
from corolla.swarm.directory.routing import Hop

FILE = RESULTS / "audits.jsonl"
FIGURE = "audits of"  # and a class and a span
PROMPT = 4


@dataclass
class Honest:
    """One way in which an honest server may compute."""

    span: Span
    kind: str  # as `ServerRecord.numerics`
    threads: int = 1

    def answer(self, inputs: dict[str, Tensor], what: str) -> dict[str, Tensor]:
        """To a `Forward`, to a `Backward`, or to the newest token of a session whose history `inputs` is."""
        torch.set_num_threads(self.threads)
        try:
            if what == "step":
                return {"hidden": self._decoded(inputs)}
            sequences = Sequences(self.span, inputs)
            if what == "forward":
                return {"hidden": sequences.forward()}
            return sequences.backward(True, inputs["grad"])
        finally:
            torch.set_num_threads(1)

    def _decoded(self, inputs: dict[str, Tensor]) -> Tensor:
        """The first part as a prefill, the rest token by token, as a session's steps are computed."""
        hidden = inputs["hidden"][0].to(self.span.dtype)
        pool = PagePool(pages_for(len(hidden)), dtype=self.span.dtype, device=self.span.device)
        row, half, outputs, at = CachedSequence(pool), len(hidden) // 2, [], 0
        for part in (hidden[:half], *hidden[half:].split(1)):
            count = len(part)
            with torch.inference_mode():
                output = self.span.forward_packed(
                    part,
                    PackedBatch(segments_of([count], [row]), pool),
                    positions=torch.arange(at, at + count),
                    deep=DeepRows.of([(0, at, count)], [inputs["prompts"]]),
                )
            outputs.append(output)
            at += count
        return torch.cat(outputs).unsqueeze(0).to(inputs["hidden"].dtype)


class Ways:
    """Honest servers of blocks [start, end) by class; all of a class may audit each other."""

    def __init__(self, checkpoint: Checkpoint, start: int, end: int) -> None:
        self._checkpoint, self._start, self._end = checkpoint, start, end
        self._packable = check_family(checkpoint.config)

    def _span(self, dtype: torch.dtype, quantization: Quantization | None, pieces: int | None = None) -> Span:
        span = load_span(
            self._checkpoint,
            self._start,
            self._end,
            dtype=dtype,
            packable=check_family(self._checkpoint.config),
        )
        if quantization is not None:
            pack_linears(span.model, quantization=quantization, pieces=pieces)
        return span

    def of(self, name: str) -> list[Honest]:
        """The servers of a class."""
        return CLASSES[name](self)

    def float32(self) -> list[Honest]:
        plain, packed = self._span(torch.float32, None), self._span(torch.float32, "none")
        return [Honest(packed, "float32"), Honest(packed, "float32", 2), Honest(plain, "float32")]

    def int8_any(self) -> list[Honest]:
        return [Honest(self._span(torch.float32, "int8", pieces), "float32+int8") for pieces in (1, 2)]

    def int8_alike(self) -> list[Honest]:
        span = self._span(torch.float32, "int8")  # with VNNI, steps of one token are compiled and others not
        return [Honest(span, "float32+int8"), Honest(span, "float32+int8", 2)]

    def int8_and_float32(self) -> list[Honest]:
        return [*self.int8_alike()[:1], *self.float32()[:1]]

    def float64(self) -> list[Honest]:
        double = self._span(torch.float64, None)
        return [Honest(double, "float64"), Honest(double, "float64", 2)]

    def half(self, dtype: torch.dtype, kind: str) -> list[Honest]:
        return [Honest(self._span(dtype, None), kind), *self.float32()[:1]]


CLASSES: dict[str, Callable[[Ways], list[Honest]]] = {
    "float32": Ways.float32,
    "int8, any two machines": Ways.int8_any,
    "int8, two alike": Ways.int8_alike,
    "int8 and float32": Ways.int8_and_float32,
    "float64": Ways.float64,
    "bfloat16 and float32": lambda ways: ways.half(torch.bfloat16, "bfloat16"),
    "float16 and float32": lambda ways: ways.half(torch.float16, "float16"),
}


def questions(checkpoint: Checkpoint, before: Span | None, rounds: int) -> Iterator[dict[str, Tensor]]:
    """Packed sequences of real embeddings, on their way through the blocks `before` where there are any."""
    width = int(checkpoint.config.hidden_size)
    [table] = checkpoint.tensors(
        lambda key: key.endswith(("embed_tokens.weight", "word_embeddings.weight", "wte.weight")),
        widen_to=torch.float32,
    ).values()
    draw = torch.Generator().manual_seed(0)
    for _ in range(rounds):
        length = int(torch.randint(8, 96, (1,), generator=draw))
        hidden = table[torch.randint(3, len(table), (1, length), generator=draw)].float()
        if before is not None:
            with torch.no_grad():
                hidden = before.forward(hidden)
        yield {
            "hidden": hidden,
            "grad": torch.randn(1, length, width, generator=draw) * 1e-3,
            "lengths": torch.tensor([length]),
            "draw": torch.randint(0, 2**31, (1,), generator=draw),
        }


@dataclass
class Seen:
    """The differences of one class and kind of request."""

    found: list[Deviation] = field(default_factory=list)

    def as_dict(self, tolerance: Deviation) -> dict[str, Any]:
        """Median, 99th percentile and largest, and how many times the largest fits into the tolerance."""
        plain: dict[str, Any] = {"comparisons": len(self.found)}
        for part in ("typical", "worst"):
            values = torch.tensor([getattr(one, part) for one in self.found], dtype=torch.float64)
            top = float(values.max())
            plain[part] = [float(values.median()), float(values.quantile(0.99)), top]
            plain[f"{part} margin"] = getattr(tolerance, part) / max(top, 1e-300)
        return plain


def compared(
    answerer: Honest, auditor: Honest, inputs: dict[str, Tensor], what: str
) -> tuple[Answer, dict[str, Tensor]]:
    """The first's answer, and the second's to what an audit would ask."""
    given = {name: one for name, one in inputs.items() if what == "backward" or name != "grad"}
    hop = Hop("a", answerer.span.start, answerer.span.end)
    claimed = answerer.answer(given, what)
    newest = None
    if what == "step":  # an audit of a step sees the newest token only
        newest = torch.arange(given["hidden"].shape[1]) == given["hidden"].shape[1] - 1
    answer = Answer(hop, what, given, claimed, newest)
    return answer, auditor.answer(given, "backward" if what == "backward" else "forward")


Lie = Callable[[Honest, Answer], dict[str, Tensor]]


def noise(size: float) -> Lie:
    """So much, as a part of every number's usual size."""

    def lie(_liar: Honest, answer: Answer) -> dict[str, Tensor]:
        draw = torch.Generator().manual_seed(0)
        return {
            name: one + size * one.std() * torch.randn(one.shape, generator=draw)
            for name, one in answer.claimed.items()
        }

    return lie


def sign(_liar: Honest, answer: Answer) -> dict[str, Tensor]:
    """One number in a hundred has the wrong sign."""
    draw = torch.Generator().manual_seed(0)
    return {
        name: torch.where(torch.rand(one.shape, generator=draw) < 0.01, -one, one)
        for name, one in answer.claimed.items()
    }


def skipped(liar: Honest, answer: Answer) -> dict[str, Tensor]:
    """The last block is left out."""
    span = liar.span
    short = Honest(span.view(span.start, span.end - 1), liar.kind)
    inputs = answer.inputs | {"prompts": answer.inputs["prompts"][:-1]}
    told = short.answer(inputs, answer.what)
    if "prompts" in told:
        told["prompts"] = torch.cat([told["prompts"], answer.claimed["prompts"][-1:]])
    return told


LIES: dict[str, Lie] = {
    "noise 0.1 %": noise(1e-3),
    "noise 1 %": noise(1e-2),
    "noise 10 %": noise(0.1),
    "signs flipped": sign,
    "last block skipped": skipped,
}


def measure(
    checkpoint: Checkpoint, start: int, end: int, name: str, asked: list[dict[str, Tensor]]
) -> dict[str, Any]:
    """The distributions of one class for one span, and what of each lie was found."""
    servers = Ways(checkpoint, start, end).of(name)
    honest: dict[str, dict[str, Any]] = {}
    told: dict[str, list[float]] = {}
    for what in ("forward", "step", "backward"):
        tolerance = tolerance_of({one.kind for one in servers}, gradient=what == "backward")
        seen = Seen()
        for question in asked:
            pair = random.Random(int(question["draw"])).sample(servers, 2)
            answer, reference = compared(pair[0], pair[1], asked_of(servers, question), what)
            seen.found.append(deviation(answer, answer.claimed, reference))
            for lie, change in LIES.items():
                off = deviation(answer, change(pair[0], answer), reference)
                told.setdefault(f"{what}: {lie}", []).append(off.times(tolerance))
        honest[what] = seen.as_dict(tolerance)
    lies = {
        lie: {"found": sum(one > 1 for one in times), "of": len(times), "times": [min(times), max(times)]}
        for lie, times in told.items()
    }
    figure = f"{FIGURE} {name}, blocks {start}:{end}"
    return {"figure": figure, "class": name, "span": [start, end], "honest": honest, "lies": lies}


def asked_of(servers: list[Honest], question: dict[str, Tensor]) -> dict[str, Tensor]:
    """A question with deep prompts, in the class's own dtype."""
    draw = torch.Generator().manual_seed(int(question["draw"]))
    scale = 0.1 * float(question["hidden"].std())
    span = servers[0].span
    prompts = torch.randn(span.end - span.start, PROMPT, span.hidden_size, generator=draw) * scale
    inputs = {key: one for key, one in question.items() if key != "draw"} | {"prompts": prompts}
    if servers[0].kind == "float64":
        inputs["hidden"], inputs["grad"] = inputs["hidden"].double(), inputs["grad"].double()
    return inputs


def show(line: dict[str, Any]) -> None:
    """Print what was measured."""
    for what, one in line["honest"].items():
        cells = [
            f"{part} {' '.join(f'{value:.1e}' for value in one[part])} margin {one[f'{part} margin']:6.3g}"
            for part in ("typical", "worst")
        ]
        print(f"{line['class'] + ' ' + what:32} {one['comparisons']:5}  {'   '.join(cells)}")
    for lie, one in line["lies"].items():
        least, most = one["times"]
        print(
            f"    {lie:32} {one['found']}/{one['of']} found; {least:.2g} to {most:.2g} tolerances", flush=True
        )


def main() -> None:
    """Measure every class on the model's two halves."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", default=MODEL)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--classes", nargs="+", choices=list(CLASSES), default=list(CLASSES), metavar="CLASS")
    parser.add_argument("--spans", nargs="+", type=int, choices=(0, 1), default=[0, 1], help="which halves")
    arguments = parser.parse_args()
    set_up_libraries()
    torch.set_num_threads(1)
    found = conditions()
    checkpoint = open_checkpoint(arguments.model)
    half = checkpoint.num_blocks // 2
    for start, end in [((0, half), (half, checkpoint.num_blocks))[index] for index in arguments.spans]:
        print(f"\n{checkpoint.name}, blocks {start}:{end}: comparisons, then median, 99 %, largest")
        before = load_span(checkpoint, 0, start, dtype=torch.float32) if start else None
        asked = list(questions(checkpoint, before, arguments.rounds))
        for name in arguments.classes:
            line = measure(checkpoint, start, end, name, asked)
            show(line)
            if arguments.model == MODEL:
                append(FILE, line, found, quick=arguments.rounds < 20)


if __name__ == "__main__":
    main()
