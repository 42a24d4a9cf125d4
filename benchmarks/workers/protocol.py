"""What a worker process and the run say to each other: one JSON object a line, over stdin and stdout.

Invariant: every command gets one answer, in order. This module needs nothing but Python itself, since one
worker runs in an interpreter that has neither torch nor corolla.
"""

from __future__ import annotations

import json
import os
import sys
import traceback
from collections.abc import Callable, Mapping
from typing import Any


def obey(commands: Mapping[str, Callable[..., Any]]) -> None:
    """Answer commands until stdin ends, which it also does when the run is killed."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever libraries print must not mix with the answers
    for line in sys.stdin:
        print(json.dumps(_answer(commands, json.loads(line))), file=answers, flush=True)


def _answer(commands: Mapping[str, Callable[..., Any]], asked: Mapping[str, Any]) -> dict[str, Any]:
    try:
        return {"result": commands[asked["do"]](**asked["with"])}
    except Exception as error:  # the run goes on with its other figures
        traceback.print_exc()
        return {"error": f"{type(error).__name__}: {error}"}
