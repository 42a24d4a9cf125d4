"""A real server that turns bad when it is told: `odd_server.py FOLDER serve …`.

Files in FOLDER tell it: `slow` makes every pass take `SLOW_SECONDS` longer; `wrong shape` makes the next answer with
hidden states or gradients one number too short, and is removed by it.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

from corolla.cli.main import main
from corolla.server import handlers
from corolla.server.scheduler.engine import Engine
from corolla.wire.frames import Packet

SLOW_SECONDS = 0.5


def plant(folder: Path) -> None:
    """Have the server look at the folder."""
    honest = handlers._Stream._reply

    async def reply(self: Any, packet: Packet) -> Packet:
        answer = await honest(self, packet)
        told = folder / "wrong shape"
        if not answer.tensors or not told.exists():
            return answer
        told.unlink()
        return Packet(answer.message, {name: one[..., :-1] for name, one in answer.tensors.items()})

    iterate = Engine._iterate

    def slowly(self: Any) -> None:
        if (folder / "slow").exists():
            time.sleep(SLOW_SECONDS)
        iterate(self)

    handlers._Stream._reply = reply  # type: ignore[method-assign]
    Engine._iterate = slowly  # type: ignore[method-assign]


if __name__ == "__main__":
    plant(Path(sys.argv.pop(1)))
    main()
