"""Instructions in Alpaca's format, made of texts that every Python ships: the standard library's own documentation.

Each row shows the signature of a function or method and asks what it does; the answer is the first paragraph of its
docstring, as its authors wrote it. The modules, the order and the rows are the same at every call, for one version of
Python. `benchmarks.quality` takes the file like any other data:

    python -m benchmarks.instructions instructions.jsonl
    python -m benchmarks.quality --data instructions.jsonl --max-length 96 --steps 20
"""

from __future__ import annotations

import argparse
import importlib
import inspect
import json
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

MODULES = """
argparse ast asyncio base64 bisect calendar collections configparser contextlib copy csv datetime decimal
difflib email.message fileinput fnmatch fractions ftplib functools gettext glob gzip hashlib heapq html
http.client http.server imaplib inspect io ipaddress itertools json linecache locale logging mailbox math
mimetypes operator os os.path pathlib pickle platform plistlib poplib pprint queue random re sched selectors
shelve shlex shutil smtplib socket sqlite3 ssl statistics string subprocess tarfile tempfile textwrap threading
timeit tokenize trace traceback types typing unittest unittest.mock urllib.parse urllib.request
urllib.robotparser uuid warnings wave weakref xml.dom.minidom xml.etree.ElementTree zipfile
"""
INSTRUCTIONS = (
    "What does this Python function do?",
    "Write the documentation of this Python function.",
    "Explain in a sentence or two what happens when this is called.",
)
SHORTEST, LONGEST = 20, 240  # characters of an answer
FEWEST = 4  # words of it


def rows() -> Iterator[dict[str, str]]:
    """All rows, each answer once."""
    answered = set[str]()
    for module in MODULES.split():
        for name, one in documented(importlib.import_module(module), module):
            answer = " ".join((inspect.getdoc(one) or "").partition("\n\n")[0].split())
            signature = signature_of(one)
            told = SHORTEST <= len(answer) <= LONGEST and len(answer.split()) >= FEWEST
            if signature is None or not told or answer in answered:
                continue
            instruction = INSTRUCTIONS[len(answered) % len(INSTRUCTIONS)]
            answered.add(answer)
            yield {"instruction": instruction, "input": f"{name}{signature}", "output": answer}


def documented(module: ModuleType, path: str) -> Iterator[tuple[str, Any]]:
    """Public functions of a module and methods of its classes, by name."""
    for name, one in sorted(vars(module).items()):
        if name.startswith("_") or getattr(one, "__module__", None) != module.__name__:
            continue
        if inspect.isclass(one):
            for method, its in sorted(vars(one).items()):
                if not method.startswith("_") and callable(its):
                    yield f"{path}.{name}.{method}", its
        elif callable(one):
            yield f"{path}.{name}", one


def signature_of(one: Any) -> str | None:
    """How it is called, in one line; None where that is not told, or names a place in memory."""
    try:
        found = " ".join(str(inspect.signature(one)).split())
    except (TypeError, ValueError):
        return None
    return None if " at 0x" in found else found


def main() -> None:
    """Write the file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("out", type=Path)
    out = parser.parse_args().out
    made = list(rows())
    out.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in made), encoding="utf-8")
    print(f"{len(made):,} rows in {out}")


if __name__ == "__main__":
    main()
