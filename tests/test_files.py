"""Folders of a process that ends in the middle of its work."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from threading import Barrier, Thread

from corolla.files import made_once


def test_a_process_that_ends_at_once_leaves_no_scratch_folder() -> None:
    code = (
        "from corolla.files import exit_at_once, scratch_folder\n"
        "with scratch_folder() as folder:\n"
        "    (folder / 'half').write_text('')\n"
        "    print(folder, flush=True)\n"
        "    exit_at_once(3)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 3
    assert done.stdout
    assert not Path(done.stdout.strip()).exists()


def test_what_is_not_whole_is_made_again_by_one_of_many(tmp_path: Path) -> None:
    target, start, calls = tmp_path / "target", Barrier(8), []

    def whole(folder: Path) -> bool:
        return (folder / "content").exists()

    def make(folder: Path) -> None:
        calls.append(folder)
        (folder / "content").touch()

    def wanted() -> None:
        start.wait()
        made_once(target, make, whole=whole)

    target.mkdir()
    (target / "half").touch()
    all_at_once = [Thread(target=wanted) for _ in range(start.parties)]
    for one in all_at_once:
        one.start()
    for one in all_at_once:
        one.join()
    assert len(calls) == 1
    assert [path.name for path in target.iterdir()] == ["content"]
    assert sorted(path.name for path in tmp_path.iterdir()) == [".target.lock", "target"]


def test_a_file_that_stands_where_a_folder_should_is_replaced(tmp_path: Path) -> None:
    target = tmp_path / "target"
    target.touch()
    made_once(target, lambda folder: (folder / "content").touch(), whole=Path.is_dir)
    assert (target / "content").exists()
