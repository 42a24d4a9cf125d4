"""Fuzzing that is guided by coverage: scripts that reach new lines are kept, and others grow from them.

A script is a list of seeds. Each draws the next frame from what the conversation is at that moment
(`frames.strangers`), so a script that is cut or grown still says things that fit.
"""

from __future__ import annotations

import random
import sys
import threading
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

import corolla
from corolla.wire.messages import PROTOCOL_NAME
from tests.fuzz.target import Stranger, Target
from tests.server.world import RawClient

Script = tuple[int, ...]

ROOT = Path(corolla.__file__).parent
WATCHED = tuple(
    str(ROOT / place)
    for place in (
        "wire/",
        "server/",
        "swarm/channel.py",
        "models/attention/pages.py",
        "models/attention/packing.py",
    )
)
LONGEST = 14  # messages of a script


class Lines:
    """Lines of the watched files that have run, in all threads started after `watch`."""

    def __init__(self) -> None:
        self.count = 0
        self._missing: dict[CodeType, set[int] | None] = {}  # None for what is not watched

    def watch(self) -> None:
        threading.settrace(self._called)
        sys.settrace(self._called)

    @staticmethod
    def stop() -> None:
        sys.settrace(None)
        threading.settrace(None)  # type: ignore[arg-type]

    def _called(self, frame: FrameType, _event: str, _argument: Any) -> Any:
        code = frame.f_code
        if code not in self._missing:
            watched = code.co_filename.startswith(WATCHED)
            self._missing[code] = {line for _, _, line in code.co_lines() if line} if watched else None
        # Functions that ran in full are not slowed down any more.
        return self._line if self._missing[code] else None

    def _line(self, frame: FrameType, event: str, _argument: Any) -> Any:
        missing = self._missing[frame.f_code]
        if event == "line" and missing and frame.f_lineno in missing:
            missing.discard(frame.f_lineno)
            self.count += 1
        return self._line


class Guided:
    """The loop: pick a script, change it, run it, keep it if it reached something new."""

    def __init__(self, target: Target, lines: Lines, seed: int) -> None:
        self.target = target
        self.corpus: list[Script] = [()]
        self._lines = lines
        self._rng = random.Random(seed)
        self._answers: set[tuple[str, ...]] = set()

    async def once(self) -> None:
        """Run one new script against the server, on a stream of its own or several."""
        script = self._grown(self._rng.choice(self.corpus[-50:] if self._rng.random() < 0.5 else self.corpus))
        reached, answers = self._lines.count, len(self._answers)
        await self._run(script)
        if self._lines.count > reached or len(self._answers) > answers:
            self.corpus.append(script)

    def _grown(self, parent: Script) -> Script:
        rng, kept = self._rng, list(parent)
        if kept and rng.random() < 0.4:
            del kept[rng.randrange(len(kept)) :]
        elif kept and rng.random() < 0.4:
            kept[rng.randrange(len(kept))] = rng.getrandbits(48)
        fresh = [rng.getrandbits(48) for _ in range(rng.randint(1, 5))]
        return tuple((kept + fresh)[-LONGEST:])

    async def _run(self, script: Script) -> None:
        stranger: Stranger | None = None
        said: tuple[str, ...] = ()
        for seed in script:
            if stranger is None or stranger.ended:
                stream = await self.target.world.client.open("server", PROTOCOL_NAME)
                stranger = Stranger(self.target, RawClient(stream))
            await stranger.send(random.Random(seed))
            said = (*said, stranger.last)[-2:]  # pairs of answers count as something new
            self._answers.add(said)
        if stranger is not None:
            await stranger.leave()
