"""The import rule of the house, and the size of its rooms.

Left may be imported by right: errors, config <- wire | models <- swarm (never models) <- server | client
(never each other) <- tuning | chat <- api <- cli. `data` imports the base only: errors, config, and what
handles text, places and files for all.
"""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "src" / "corolla"
MAX_LINES = 400

BASE = {"errors", "config", "text", "places", "json_files"}
BELOW_SERVER = BASE | {"wire", "models", "swarm"}
BELOW_TUNING = BELOW_SERVER | {"client", "server", "data"}
ALLOWED: dict[str, set[str]] = {
    "errors": set(),
    "config": {"errors"},
    "text": set(),
    "places": {"errors"},
    "json_files": {"errors", "text"},
    "wire": BASE,
    "models": BASE,
    "swarm": BASE | {"wire"},
    "data": BASE,
    "server": BELOW_SERVER,
    "client": BELOW_SERVER,
    "tuning": BELOW_TUNING,
    "chat": BELOW_TUNING,
    "api": BELOW_TUNING | {"tuning", "chat"},
    "__main__": {"cli"},
    "cli": BELOW_TUNING | {"tuning", "chat", "api"},
}

FILES = sorted(PACKAGE.rglob("*.py"))
MODULES = [path for path in FILES if path != PACKAGE / "__init__.py"]


def layer_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported_layers(source: str, path: Path) -> set[str]:
    """The layers of Corolla that a file imports, anywhere in it; "" stands for the package itself."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = _absolute(node, path)
            names.update(f"{base}.{alias.name}" for alias in node.names)
    parts = [name.split(".") for name in names]
    return {part[1] if len(part) > 1 else "" for part in parts if part[0] == "corolla"}


def _absolute(node: ast.ImportFrom, path: Path) -> str:
    if not node.level:
        return node.module or ""
    here = ["corolla", *path.relative_to(PACKAGE).parts[:-1]]
    return ".".join([*here[: len(here) - node.level + 1], *([node.module] if node.module else [])])


def violations(source: str, path: Path) -> set[str]:
    layer = layer_of(path)
    # `from corolla import __version__` is for everybody; the public names are for nobody inside.
    return imported_layers(source, path) - ALLOWED[layer] - {layer, "__version__"}


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_go_one_way(path: Path) -> None:
    assert not violations(path.read_text(), path)


@pytest.mark.parametrize(
    "line",
    [
        "import corolla.client.sessions.session",
        "from corolla.models import span",
        "from corolla import client",
        "from corolla import InferenceSession",
        "from ..models.span import Span",
        "from .. import models",
        "def f():\n    from corolla.server import serve",
    ],
)
def test_the_rule_sees_every_way_to_import(line: str) -> None:
    assert violations(line, PACKAGE / "swarm" / "example.py")


@pytest.mark.parametrize("line", ["from corolla.wire import frames", "from . import channel", "import torch"])
def test_the_rule_allows_what_it_should(line: str) -> None:
    assert not violations(line, PACKAGE / "swarm" / "example.py")


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_files_stay_small_and_say_what_they_keep(path: Path) -> None:
    source = path.read_text()
    assert len(source.splitlines()) < MAX_LINES
    assert not source or ast.get_docstring(ast.parse(source)), "a module opens with what it keeps true"
