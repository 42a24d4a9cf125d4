"""For mkdocs: the README is the first page, public names are the reference, files outside docs/ are only named."""

from __future__ import annotations

import ast
import posixpath
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
LINK = re.compile(r"(!?)\[([^\]]+)\]\(([^)#\s]+)(#[^)\s]*)?\)")


def on_config(config: Any) -> Any:
    """With all pages that mkdocs.yml does not name."""
    pages = [
        path.relative_to(config.docs_dir).as_posix() for path in sorted(Path(config.docs_dir).rglob("*.md"))
    ]
    missing = [page for page in pages if page not in str(config.nav)]
    for name, group in (("Decisions", True), ("More", False)):
        found = [page for page in missing if page.startswith("decisions/") == group]
        config.nav += [{name: found}] if found else []
    return config


def on_page_markdown(markdown: str, *, page: Any, **_: Any) -> str:
    """The page's text as the site has it."""
    place = posixpath.dirname(page.file.src_uri)
    if page.file.src_uri == "index.md":
        markdown = LINK.sub(_from_root, (ROOT / "README.md").read_text(encoding="utf-8"))
    if page.file.src_uri == "reference.md":
        names = [f"::: corolla.{name}\n" for name in public_names()]
        markdown = "\n".join([markdown, *names])
    return LINK.sub(lambda link: _kept_inside(link, place), markdown)


def public_names() -> list[str]:
    """What `corolla.__all__` says, without importing it."""
    tree = ast.parse((ROOT / "src/corolla/__init__.py").read_text(encoding="utf-8"))
    for node in tree.body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            return [name for name in ast.literal_eval(node.value) if not name.startswith("_")]
    raise AssertionError("corolla names nothing")


def _from_root(link: re.Match[str]) -> str:
    """A link of the README, as docs/ has it."""
    mark, text, target, anchor = link.groups()
    if "://" in target:
        return link[0]
    inside = target.removeprefix("docs/") if target.startswith("docs/") else f"../{target}"
    return f"{mark}[{text}]({inside}{anchor or ''})"


def _kept_inside(link: re.Match[str], place: str) -> str:
    """A link, or its text where what it leads to is not on the site. Raises `FileNotFoundError` where nothing is."""
    _, text, target, _ = link.groups()
    path = posixpath.normpath(posixpath.join("docs", place, target))
    if "://" in target or (path.startswith("docs/") and not (ROOT / path).is_dir()):
        return link[0]
    if not (ROOT / path).exists():
        raise FileNotFoundError(f"{place}: {target}")
    return f"{text} (`{path}`)"
