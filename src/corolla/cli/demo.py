"""`corolla demo`: all of it on one machine, in a few minutes.

Invariant: every step is the real one, with real server processes, a real model and human conversations; at
its end nothing is left running.
"""

from __future__ import annotations

import asyncio
import shlex
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer
from rich.text import Text

from corolla.cli.common import set_up_libraries
from corolla.cli.terminal import console, say_plainly
from corolla.errors import UsageError

MODEL = "smollm2"
# Sized so that two cores need less than four minutes, and that the held-out loss falls beyond doubt.
STEPS, BATCH, LONGEST = 28, 6, 128
HELD_OUT = 32  # conversations, one example of each
# A small model repeats what it was asked, unless that costs it something.
SAMPLING = {"temperature": 0.7, "top_p": 0.9, "repetition_penalty": 1.15, "max_new_tokens": 40, "seed": 1}
SCRIPT = (
    "Hi! How was your day?",
    "What do you like to do on the weekend?",
    "Nice. Do you have any music to recommend?",
)


def demo(
    out: Annotated[Path, typer.Option(help="Where the bundle goes.")] = Path("demo-run"),
    steps: Annotated[int, typer.Option(help="Training steps.")] = STEPS,
) -> None:
    """Start a swarm here, prompt-tune a small model on human conversations, and chat with the result."""
    set_up_libraries()
    from corolla.cli.local_swarm import local_swarm
    from corolla.tuning.bundle import BUNDLE_FILE

    if out.exists() and not (out / BUNDLE_FILE).is_file():
        raise UsageError(f"{out} exists and is no bundle of an earlier demo: give another --out.")
    started = time.monotonic()
    _heading(1, "A swarm on this machine: two servers, each with half of the model's blocks")
    with local_swarm(MODEL) as swarm:
        _show_map(swarm.peers)
        _heading(2, "Human conversations to learn from (marked: what the model learns to say)")
        _train(out, steps, swarm.peers)
        say_plainly(f"So far: {time.monotonic() - started:.0f} s.")
        _heading(5, "A chat with the tuned model, over the same swarm")
        _chat(out, swarm.peers)


def _show_map(peers: Sequence[str]) -> None:
    from corolla.cli.status import fetch
    from corolla.cli.swarm_map import swarm_map

    console.print(swarm_map(asyncio.run(fetch(list(peers)))))


def _train(out: Path, steps: int, peers: Sequence[str]) -> None:
    from corolla.cli.tune import TuneJob, prepare_data, train_and_report
    from corolla.data.render import RenderSettings
    from corolla.tuning.settings import TuneSettings

    job = TuneJob(model=MODEL, data="chitchat", out=out, mode="prefix")
    settings = TuneSettings(
        steps=steps,
        batch_size=BATCH,
        held_out=HELD_OUT,
        held_out_samples=HELD_OUT,
        rendering=RenderSettings(style="auto", max_length=LONGEST),
    )
    prepared = prepare_data(job, settings, shown=2)
    _heading(3, f"Training a prefix of {job.prompt_tokens} tokens; the model itself stays as it is")
    result = train_and_report(job, settings, prepared, peers, overwrite=True)
    _heading(4, "What came of it")
    say_plainly(f"The bundle, ready to chat with or to share:  {out}/")
    say_plainly(f"The loss curve:                              {result.curve}")


def _chat(out: Path, peers: Sequence[str]) -> None:
    from corolla.chat.sampling import SamplingSettings
    from corolla.cli.chat import opened
    from corolla.cli.partner import find_partner, prepare
    from corolla.config import SwarmConfig

    partner = find_partner(str(out))
    sampling = SamplingSettings.from_dict({**partner.sampling, **SAMPLING})
    client = SwarmConfig(peers=tuple(peers))
    with opened(prepare(partner, sampling, client), client) as repl:
        if sys.stdin.isatty():
            say_plainly("Type something; /help lists the commands, /quit ends.")
            repl.run()
        else:
            repl.run(SCRIPT)
    say_plainly(f"Chat again whenever you like:\n  {shlex.join(['corolla', 'chat', str(out)])}")
    serving = shlex.join(["corolla", "api", "--bundles", str(out.resolve().parent)])
    say_plainly(f"In a browser, and for whatever speaks OpenAI's API (it prints the address):\n  {serving}")


def _heading(number: int, text: str) -> None:
    console.print()
    console.rule(Text.assemble((str(number), "bold"), f"  {text}"), align="left", style="dim")
