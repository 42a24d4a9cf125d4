"""What failures cost: how long a chat stands still, and how fast generation is when servers keep failing.

    python -m benchmarks.failures [--quick] [--only failover | generation] [--limit SECONDS] [--page-only]

The second part is the experiment that was published for Petals on BLOOM-7.1B: each server fails with a given
probability at every step, and ours stands beside the two simple ways (see `benchmarks/faulty.py`).

Invariant: raw lines are appended to `benchmarks/results/failures.jsonl`; the table in `docs/reliability.md` says
nothing that no line says. A quick run writes neither.
"""

from __future__ import annotations

import argparse
import logging
import os
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any

# Idle compute threads sleep, as in every process that the command line starts; read when torch is imported.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

from transformers import AutoTokenizer

from benchmarks.failover import measure
from benchmarks.faulty import Cacheless, Restarting, Resuming, Servers, Way, take_turns
from benchmarks.processes import ROOT
from benchmarks.report import put
from benchmarks.results import RESULTS, append, conditions, describe, newest
from benchmarks.sizes import MODEL

FILE = RESULTS / "failures.jsonl"
PAGE = ROOT / "docs" / "reliability.md"
MARKER = "failures"
FAILOVER, GENERATION = "failover", "failing servers"  # figures
STAGES, REPLICAS = 4, 2
RATES = (0.0, 1e-4, 1e-3, 1e-2)
COUNTS = (128, 1024)
TEXT = "Once upon a time, in a village far away,"
WANTED = {1e-3: 0.9, 1e-2: 0.5}  # of the speed without failures
PETALS = ("11.4", "10.6", "7.76", "2.17 to 3.38")
WORDS = {"ours": "Corolla", "restarting": "caches, from the beginning", "cacheless": "no caches, step again"}

Cells = list[dict[str, Any]]


def failover(quick: bool) -> dict[str, Any]:
    """A SIGKILL and a SIGSTOP, a replica being up; see `benchmarks/failover.py: measure`."""
    length = 64 if quick else 512
    found = {
        number.name: measure(MODEL, number, length=length) for number in (signal.SIGKILL, signal.SIGSTOP)
    }
    for name, seconds in found.items():
        print(f"{name}: " + ", ".join(f"{what} {value:.3f} s" for what, value in seconds.items()), flush=True)
    return {"figure": FAILOVER, "tokens": length, "seconds": found}


def generation(quick: bool, limit: float) -> dict[str, Any]:
    """Steps/s of the three ways at every rate and length."""
    cells: Cells = []
    with Servers(MODEL, stages=STAGES, replicas=REPLICAS) as servers:
        tokenizer = AutoTokenizer.from_pretrained(servers.checkpoint.source.location)
        prompt = tokenizer(TEXT, return_tensors="pt").input_ids
        take_turns([Resuming(servers, prompt, 32, 0.0, 0)], limit)  # the first passes are slower
        for seed, count in enumerate((16,) if quick else COUNTS):
            ours = [Resuming(servers, prompt, count, rate, seed) for rate in RATES]
            restarting = [Restarting(servers, prompt, count, rate, seed) for rate in RATES[1:]]
            cacheless = [Cacheless(servers, prompt, count, rate, seed, every=count // 16) for rate in RATES]
            # Ours take turns among themselves, with nothing in between that others' caches could gain from.
            for name, ways, most in (
                ("ours", ours, float("inf")),
                ("restarting", restarting, limit),
                ("cacheless", cacheless, float("inf")),
            ):
                take_turns(ways, most)
                cells += [_cell(name, way, ours[0]) for way in ways]
    return {"figure": GENERATION, "model": MODEL, "stages": STAGES, "replicas": REPLICAS, "cells": cells}


def _cell(name: str, way: Way, calm: Resuming) -> dict[str, Any]:
    finished = way.steps == way.wanted
    speed = way.wanted / way.seconds if finished else None
    cell = {
        "way": name,
        "tokens": way.wanted,
        "rate": way.failures.rate,
        "steps/s": speed,
        "of fault-free": None if speed is None else speed / (calm.wanted / calm.seconds),
        "seconds": way.seconds,
        "failures": way.failures.count,
    }
    if isinstance(way, Restarting):
        cell["restarts"] = way.restarts
    if isinstance(way, Resuming) and way is not calm:
        cell["same tokens"] = way.tokens == calm.tokens
    said = f"not done after {way.seconds:.0f} s" if speed is None else f"{speed:.2f} steps/s"
    share = "" if speed is None else f", {cell['of fault-free']:.2f} of ours without failures"
    print(f"{way.wanted} tokens at {way.failures.rate:g}, {name}: {said}{share}", flush=True)
    return cell


# --- the page -------------------------------------------------------------------------------------------


def page(lines: dict[str, dict[str, Any]]) -> str:
    """What stands between the markers, from the newest lines."""
    parts = []
    if (line := lines.get(FAILOVER)) is not None:
        parts.append(_standing_still(line))
    if (line := lines.get(GENERATION)) is not None:
        parts.append(_experiment(line))
    return "\n\n".join(parts) or "Nothing has been measured yet."


def _standing_still(line: dict[str, Any]) -> str:
    rows = [
        "| a server, a replica being up | noticed after | next token after | replay alone | a step |",
        "|---|---|---|---|---|",
    ]
    for name, one in line["seconds"].items():
        ms = [f"{1000 * one[what]:,.0f} ms" for what in ("noticed", "stood still", "replay", "step")]
        rows.append(f"| {'killed' if name == 'SIGKILL' else 'hangs'} ({name}) | {' | '.join(ms)} |")
    where = f"Real processes and signals, SmolLM2-135M, two stages, {line['tokens']} tokens into a chat."
    return "\n".join(rows) + f"\n\n{where} Measured {line['date'][:10]}: {describe(line)}."


def _experiment(line: dict[str, Any]) -> str:
    rows = [
        f"| steps/s at this probability of failure | {' | '.join(f'{rate:g}' for rate in RATES)} |",
        "|---" * (1 + len(RATES)) + "|",
    ]
    for count in COUNTS:
        for way, title in WORDS.items():
            rows.append(_row(f"{count:,} tokens, {title}", line["cells"], count, way))
    rows.append(f"| Petals on BLOOM-7.1B, published | {' | '.join(PETALS)} |")
    calm = "in brackets: of Corolla's own speed without failures"
    aims = ", ".join(f"over {share:g} at {rate:g}" for rate, share in WANTED.items())
    where = (
        f"{line['stages']} stages of SmolLM2-135M with {line['replicas']} servers each; real servers, weights and "
        "compute threads in one process, over the in-memory network. At every step each server fails with that "
        "probability: its sessions are lost, its streams end, and it is back at once. Runs at different "
        f"rates take turns; {calm} (aimed at: {aims}). A dash: not done within the limit. Published for "
        "caches with restarts on BLOOM-7.1B: down to 0.48. The simple ways ran after ours, so how busy the machine "
        "was differs between rows."
    )
    same = [cell["same tokens"] for cell in line["cells"] if "same tokens" in cell]
    exact = f"Runs with failures that gave the same tokens as the run without: {sum(same)} of {len(same)}. "
    source = f"Taken from {line['source']}. " if "source" in line else ""
    notes = (exact if same else "") + source
    return "\n".join(rows) + f"\n\n{where}\n\n{notes}Measured {line['date'][:10]}: {describe(line)}."


def _row(title: str, cells: Cells, count: int, way: str) -> str:
    shown = []
    for rate in RATES:
        wanted = "ours" if way == "restarting" and rate == 0 else way  # without failures they are the same
        key = (wanted, count, rate)
        cell = next((c for c in cells if (c["way"], c["tokens"], c["rate"]) == key), None)
        if cell is None:
            shown.append("not measured")
            continue
        speed = cell["steps/s"]
        shown.append("–" if speed is None else f"{speed:.2f}")  # noqa: RUF001
        if way == "ours":
            shown[-1] += f" ({cell['of fault-free']:.2f})"
    return f"| {title} | {' | '.join(shown)} |"


def write_page(file: Path = PAGE, results: Path = RESULTS) -> None:
    """Put the newest lines' table into the page."""
    if not file.exists():
        file.write_text(f"# Reliability\n\n<!-- {MARKER}:begin -->\n<!-- {MARKER}:end -->\n")
    file.write_text(put(file.read_text(), MARKER, page(newest(results))))


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--quick", action="store_true", help="tiny sizes: does it run at all?")
    parser.add_argument("--only", choices=("failover", "generation"))
    parser.add_argument(
        "--limit", type=float, default=120.0, help="seconds for a run that begins anew after every failure"
    )
    parser.add_argument("--page-only", action="store_true", help="measure nothing, write the page")
    options = parser.parse_args(arguments)
    logging.getLogger("corolla").setLevel(logging.WARNING)
    logging.getLogger("corolla.client.retry").propagate = False
    found = conditions()
    parts = {
        "failover": lambda: failover(options.quick),
        "generation": lambda: generation(options.quick, options.limit),
    }
    for name, run in parts.items():
        if options.page_only or options.only not in (None, name):
            continue
        line = run()
        if not options.quick:
            append(FILE, line, found, quick=False)
    if not options.quick:
        write_page()


if __name__ == "__main__":
    main()
