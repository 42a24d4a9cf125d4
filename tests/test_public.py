"""The public names: what `import corolla` gives, and that nobody is told to reach past it."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest

import corolla
from corolla import errors

ROOT = Path(__file__).parents[1]
DOCUMENTS = [
    ROOT / "README.md",
    *sorted((ROOT / "docs").rglob("*.md")),
    *sorted(path for path in (ROOT / "examples").rglob("*") if "__pycache__" not in path.parts),
]
ERRORS = {
    name for name, one in vars(errors).items() if isinstance(one, type) and one.__module__ == errors.__name__
}


def test_all_is_sorted_and_can_be_had() -> None:
    assert corolla.__all__ == sorted(set(corolla.__all__))
    for name in corolla.__all__:
        assert getattr(corolla, name) is not None
        assert name in dir(corolla)


def test_nothing_else_is_public() -> None:
    fetched = {name for name in vars(corolla) if not name.startswith("_") and name[0].isupper()}
    assert fetched - set(corolla.__all__) <= {"Any", "TYPE_CHECKING"}
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = corolla.nothing


def test_type_checkers_and_completion_see_the_same_names() -> None:
    tree = ast.parse(Path(corolla.__file__).read_text())
    imported = {
        alias.name
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("corolla.")
        for alias in node.names
    }
    assert imported - {"distributed_named"} == set(corolla.__all__)
    assert set(corolla.__all__) == {*corolla._HOMES, *ERRORS, "__version__"}


@pytest.mark.parametrize(
    "name", ["load_bundle", "load_conversations", "prepare", "read_documents", "study", "tune"]
)
def test_what_functions_take_and_give_has_a_public_name(name: str) -> None:
    def classes(kind: Any) -> set[str]:
        own = {kind.__name__} if getattr(kind, "__module__", "").startswith("corolla.") else set()
        return own.union(*map(classes, get_args(kind)))

    hints = get_type_hints(getattr(corolla, name))
    assert "return" in hints
    assert set().union(*map(classes, hints.values())) <= set(corolla.__all__)


def test_the_error_tree_is_written_down() -> None:
    """At the top of `errors.py`, and in the docs."""
    assert errors.__doc__ is not None
    lines = [line for line in errors.__doc__.splitlines() if re.match(r" {4}\S|    [│ ]", line)]
    path: list[str] = []
    drawn: dict[str, str] = {}
    for line in lines:
        found = re.match(r"[│├└─ ]*(\w+)", line[4:])
        assert found is not None
        depth = found.start(1) // 4
        path[depth:] = [found[1]]
        drawn[found[1]] = path[depth - 1] if depth else "Exception"
    assert drawn == {name: getattr(errors, name).__base__.__name__ for name in ERRORS}
    tree = "\n".join(line[4:] for line in lines)
    assert tree in (ROOT / "docs" / "python.md").read_text()


@pytest.mark.parametrize(
    "path", [*DOCUMENTS, ROOT / "src/corolla/tuning/bundle.py"], ids=lambda path: path.name
)
def test_nobody_is_told_of_a_deep_path(path: Path) -> None:
    text = path.read_text()
    if path.suffix == ".py" and "src" in path.parts:
        text = "\n".join(re.findall(r"`[^`]*`", text))  # what it writes for people
    assert not re.findall(r"(?:from|import) +corolla\.\w+|`corolla\.\w+\.\w[^`]*`", text)
    for names in re.findall(r"^from corolla import \(?([\w, \n]+)", text, re.MULTILINE):
        for name in re.findall(r"\w+", names.split("\n\n")[0]):
            assert hasattr(corolla, name), name


@pytest.mark.parametrize("line", ["import corolla", "from corolla import load_conversations, UsageError"])
def test_what_is_not_used_is_not_loaded(line: str) -> None:
    program = f"{line}; import sys; print({{'torch', 'transformers', 'hivemind'}} & set(sys.modules))"
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert ended.stdout.strip() == "set()"


@pytest.mark.parametrize(
    "path", [one for one in DOCUMENTS if one.suffix == ".md"], ids=lambda path: path.name
)
def test_links_lead_somewhere(path: Path) -> None:
    text = re.sub(r"```.*?```|`[^`\n]*`", "", path.read_text(), flags=re.DOTALL)
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", text):
        assert "://" in target or (path.parent / target).exists(), target
