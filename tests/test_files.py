"""Folders of a process that ends in the middle of its work."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path


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
