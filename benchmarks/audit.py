"""What honest servers differ by, which is what the tolerances of audits must allow, and what lies look like.

For each class of arithmetic pairs of honest servers answer the same: with one thread and with two, alone and in
company, packed and token by token with a cache, with and without our kernels, with the int8 arithmetic of machines
that have VNNI and of those that have not. Printed: how many comparisons, the distribution of differences in parts of
what the blocks do (`corolla.client.audit.Deviation`), and the margin below the tolerance that stands in the code;
then how many tolerances each kind of lie is.

    python benchmarks/audit.py                        # SmolLM2, blocks 0:15 and 15:30
    python benchmarks/audit.py --model FOLDER --rounds 20
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from corolla.cli.common import quiet_libraries
from corolla.client.audit import Answer, Deviation, deviation, tolerance_of
from corolla.models.checkpoint import Checkpoint, open_checkpoint
from corolla.models.kernels.apply import Quantization, pack_linears
from corolla.models.selfcheck import check_family
from corolla.models.span import Span, load_span
from corolla.server.sequences import Sequences
from corolla.swarm.routing import Hop

PROMPT = 4
UNLIMITED = 2**60


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
            sequences = Sequences(self.span, inputs, with_gradients=True, memory_limit=UNLIMITED)
            if what == "forward":
                return {"hidden": sequences.forward()}
            return sequences.backward(True, inputs["grad"])
        finally:
            torch.set_num_threads(1)

    def _decoded(self, inputs: dict[str, Tensor]) -> Tensor:
        """The first part as a prefill, the rest token by token."""
        hidden = inputs["hidden"].to(self.span.dtype)
        cache, half = self.span.new_cache(), hidden.shape[1] // 2
        parts = [hidden[:, :half], *hidden[:, half:].split(1, dim=1)]
        with torch.inference_mode():
            outputs = [self.span.forward(part, cache=cache, prompts=inputs["prompts"]) for part in parts]
        return torch.cat(outputs, dim=1).to(inputs["hidden"].dtype)


def ways(checkpoint: Checkpoint, start: int, end: int) -> dict[str, list[Honest]]:
    """Honest servers by class; all of a class may audit each other."""

    def made(dtype: torch.dtype, quantization: Quantization | None, pieces: int | None = None) -> Span:
        span = load_span(checkpoint, start, end, dtype=dtype)
        span.packable = check_family(checkpoint.config)
        if quantization is not None:
            pack_linears(span.model, quantization=quantization, pieces=pieces)
        return span

    plain, packed = made(torch.float32, None), made(torch.float32, "none")
    floats = [Honest(packed, "float32"), Honest(packed, "float32", 2), Honest(plain, "float32")]
    one, two = made(torch.float32, "int8", 1), made(torch.float32, "int8", 2)
    double = made(torch.float64, None)
    return {
        "float32": floats,
        "int8, any two machines": [Honest(one, "float32+int8"), Honest(two, "float32+int8")],
        "int8, two alike": [Honest(two, "float32+int8"), Honest(two, "float32+int8", 2)],
        "int8 and float32": [Honest(two, "float32+int8"), floats[0]],
        "float64": [Honest(double, "float64"), Honest(double, "float64", 2)],
        "bfloat16": [Honest(made(torch.bfloat16, None), "bfloat16"), floats[0]],
        "float16": [Honest(made(torch.float16, None), "float16"), floats[0]],
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
            with torch.inference_mode():
                hidden = before.forward(hidden).clone()
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

    def line(self, name: str, tolerance: Deviation) -> str:
        """Median, 99th percentile and largest, and how many times the largest fits into the tolerance."""
        cells = []
        for part in ("typical", "worst"):
            values = torch.tensor([getattr(one, part) for one in self.found], dtype=torch.float64)
            top = float(values.max())
            cells.append(
                f"{part} {float(values.median()):.1e} {float(values.quantile(0.99)):.1e} {top:.1e} "
                f"margin {getattr(tolerance, part) / max(top, 1e-300):6.3g}"
            )
        return f"{name:32} {len(self.found):5}  " + "   ".join(cells)


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
    answer = Answer(hop, what, given, claimed, newest)  # type: ignore[arg-type]
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


def measure(checkpoint: Checkpoint, start: int, end: int, rounds: int) -> None:
    """Print the distributions for one span."""
    before = load_span(checkpoint, 0, start, dtype=torch.float32) if start else None
    asked = list(questions(checkpoint, before, rounds))
    blocks, width = end - start, int(checkpoint.config.hidden_size)
    for name, servers in ways(checkpoint, start, end).items():
        told: dict[str, list[float]] = {}
        for what in ("forward", "step", "backward"):
            tolerance = tolerance_of({one.kind for one in servers}, gradient=what == "backward")
            seen = Seen()
            for question in asked:
                draw = torch.Generator().manual_seed(int(question["draw"]))
                scale = 0.1 * float(question["hidden"].std())
                prompts = torch.randn(blocks, PROMPT, width, generator=draw) * scale
                inputs = {key: one for key, one in question.items() if key != "draw"} | {"prompts": prompts}
                if servers[0].kind == "float64":
                    inputs["hidden"], inputs["grad"] = inputs["hidden"].double(), inputs["grad"].double()
                pair = random.Random(int(question["draw"])).sample(servers, 2)
                answer, reference = compared(pair[0], pair[1], inputs, what)
                seen.found.append(deviation(answer, answer.claimed, reference))
                for lie, change in LIES.items():
                    off = deviation(answer, change(pair[0], answer), reference)
                    told.setdefault(f"{what}: {lie}", []).append(off.times(tolerance))
            print(seen.line(f"{name} {what}", tolerance), flush=True)
        for lie, times in told.items():
            found = sum(one > 1 for one in times)
            print(f"    {lie:24} {found}/{len(times)} found; {min(times):.2g} to {max(times):.2g} tolerances")


def main() -> None:
    """Measure every class on the model's two halves."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--rounds", type=int, default=20)
    arguments = parser.parse_args()
    quiet_libraries()
    torch.set_num_threads(1)
    checkpoint = open_checkpoint(arguments.model)
    half = checkpoint.num_blocks // 2
    for start, end in ((0, half), (half, checkpoint.num_blocks)):
        print(f"\n{checkpoint.name}, blocks {start}:{end}: comparisons, then median, 99 %, largest")
        measure(checkpoint, start, end, arguments.rounds)


if __name__ == "__main__":
    main()
