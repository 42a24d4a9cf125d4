"""The docs site is built without a warning, and a link that leads nowhere is one."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PARTS = ("README.md", "mkdocs.yml", "docs", "deploy", "src", "examples", "CHANGELOG.md", "LICENSE", "tests")


def built(folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict"],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=200,
    )


@pytest.mark.nightly
def test_the_site_has_no_dead_link(tmp_path: Path) -> None:
    pytest.importorskip("mkdocstrings", reason="the extra docs is not installed")
    for name in PARTS:
        path = ROOT / name
        if path.is_dir() and name != "docs":
            (tmp_path / name).symlink_to(path)
        elif path.is_dir():
            shutil.copytree(path, tmp_path / name)
        elif path.exists():
            shutil.copy(path, tmp_path / name)
    done = built(tmp_path)
    assert done.returncode == 0, done.stderr
    page = (tmp_path / ".docs-site/reference/index.html").read_text(encoding="utf-8")
    assert "AutoDistributedModelForCausalLM" in page
    (tmp_path / "docs/python.md").write_text("[nothing](nowhere.md)", encoding="utf-8")
    broken = built(tmp_path)
    assert broken.returncode != 0
    assert "nowhere.md" in broken.stderr
