"""The import rule of the house: one way between the packages, no circle anywhere; and the size of its rooms.

Left may be imported by right: text <- errors, config <- wire | models <- swarm (never models) <- server | client
(never each other) <- tuning | chat <- api <- cli. `data` imports the base only: errors, config, and what
handles text, places and files for all.
"""

from __future__ import annotations

import ast
from collections.abc import Mapping
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "src" / "corolla"
MAX_LINES = 450  # see docs/decisions/house.md

BASE = {"errors", "version", "config", "text", "places", "files", "json_files", "shortage"}
BELOW_SERVER = BASE | {"wire", "models", "swarm"}
BELOW_TUNING = BELOW_SERVER | {"client", "server", "data"}
ALLOWED: dict[str, set[str]] = {
    "errors": {"text"},
    "version": set(),
    "config": {"errors"},
    "text": set(),
    "places": {"errors"},
    "files": {"errors"},
    "json_files": {"errors", "files"},
    "shortage": set(),
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


def imported_names(source: str, package: str) -> set[str]:
    """Everything that a file of `package` imports, anywhere in it and for types alone too, by full name."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                here = package.split(".")
                base = ".".join([*here[: len(here) - node.level + 1], *([base] if base else [])])
            names.update(f"{base}.{alias.name}" for alias in node.names)
    return names


def imported_layers(source: str, path: Path) -> set[str]:
    """The layers of Corolla that a file imports, anywhere in it; "" stands for the package itself."""
    package = ".".join(["corolla", *path.relative_to(PACKAGE).parts[:-1]])
    parts = [name.split(".") for name in imported_names(source, package)]
    return {part[1] if len(part) > 1 else "" for part in parts if part[0] == "corolla"}


def violations(source: str, path: Path) -> set[str]:
    layer = layer_of(path)
    return imported_layers(source, path) - ALLOWED[layer] - {layer}  # the public names are for nobody inside


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
        "from corolla import __version__",
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


def modules_in(folder: Path) -> dict[str, str]:
    """The source of each module below a package's folder, by full name; that of a package ends in `__init__`."""
    return {
        ".".join(path.relative_to(folder.parent).with_suffix("").parts): path.read_text()
        for path in folder.rglob("*.py")
    }


def imports_between(sources: Mapping[str, str]) -> dict[str, set[str]]:
    """Which of these modules each imports. `from package import module` imports the module, not the package."""
    graph: dict[str, set[str]] = {}
    for module, source in sources.items():
        graph[module] = set()
        for name in imported_names(source, module.rpartition(".")[0]):
            package = name.rpartition(".")[0]
            found = (name, f"{name}.__init__", package, f"{package}.__init__")
            graph[module].update(next(([one] for one in found if one in sources), []))
        graph[module].discard(module)
    return graph


def circle(graph: Mapping[str, set[str]]) -> list[str]:
    """Modules each of which imports the next, and the last the first; nothing where there is no circle."""
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return list(error.args[1])
    return []


@pytest.mark.parametrize(
    "folder", [PACKAGE, PACKAGE.parents[1] / "benchmarks"], ids=lambda folder: folder.name
)
def test_no_circles(folder: Path) -> None:
    assert not circle(imports_between(modules_in(folder)))


@pytest.mark.parametrize(
    "line",
    [
        "import corolla.b",
        "from corolla.b import something",
        "from corolla import b",
        "from . import b",
        "from .b import something",
        "def later():\n    from corolla import b",
        "if TYPE_CHECKING:\n    from corolla.b import Something",
    ],
)
def test_every_circle_is_noticed(line: str) -> None:
    sources = {"corolla.a": line, "corolla.b": "from corolla.c import d", "corolla.c.d": "import corolla.a"}
    assert not circle(imports_between({**sources, "corolla.a": ""}))
    assert set(circle(imports_between(sources))) == set(sources)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_files_stay_small_and_say_what_they_keep(path: Path) -> None:
    source = path.read_text()
    assert len(source.splitlines()) < MAX_LINES
    assert not source or ast.get_docstring(ast.parse(source)), "a module opens with what it keeps true"
