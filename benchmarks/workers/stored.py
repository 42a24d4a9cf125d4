"""`python -m benchmarks.workers.stored FOLDER DTYPE`: loads all blocks as a server does; prints what that took."""

from __future__ import annotations

import json
import resource
import sys
import time

import psutil

from corolla.config import NodeConfig, ServerConfig
from corolla.server.serve import load_blocks, open_model


def silent(_line: str) -> None:
    """What a server says to its user."""


def main(folder: str, dtype: str) -> None:
    opened = open_model(ServerConfig(model=folder, dtype=dtype, node=NodeConfig()), silent)
    before, started = psutil.Process().memory_info().rss, time.perf_counter()
    span = load_blocks(opened, silent)
    loaded = time.perf_counter() - started
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before
    print(json.dumps({"kept": span.nbytes(), "most": most, "seconds": loaded}))


if __name__ == "__main__":
    main(*sys.argv[1:])
