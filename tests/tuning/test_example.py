"""The seed's six steps as one flat script, on both kinds of data."""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.e2e.processes import corolla, environment, processes
from tests.tuning.tiny_setup import WORDS, write_model

from corolla.models.checkpoints.prompt_files import read_prompt_info

SENTIMENT = Path(__file__).parents[2] / "examples" / "sentiment.py"
NOTEBOOKS = sorted(SENTIMENT.parent.glob("*.ipynb"))
SCRIPT = Path(__file__).parents[2] / "examples" / "personachat_loop.py"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("example") / "model", family="bloom")


@pytest.fixture(scope="module")
def address(tiny: Path) -> Iterator[str]:
    with processes(tiny.parent) as started:
        yield started.swarm(tiny, ["0:2", "2:4"])[0]


def persona_chat(path: Path) -> Path:
    """Dialogue turns as the published data set has them: the gold reply is the last of the candidates."""
    rows = [
        {
            "personality": [f"i like the {word} ."],
            "candidates": ["something else .", "wrong again .", f"the {word} is mine ."],
            "history": ["hello !", f"what of the {word} ?"],
            "conv_id": index,
            "utterance_idx": 0,
        }
        for index, word in enumerate(WORDS)
    ]
    path.write_text(json.dumps(rows))
    return path


@pytest.mark.parametrize("kind", ["chitchat", "personachat"])
def test_the_six_steps(kind: str, tiny: Path, address: str, tmp_path: Path) -> None:
    data = "chitchat" if kind == "chitchat" else str(persona_chat(tmp_path / "rows.json"))
    chosen = "DistributedBloomForCausalLM" if kind == "chitchat" else "AutoDistributedModelForCausalLM"
    arguments = ["--model", str(tiny), "--model-class", chosen, "--peers", address, "--data", data]
    arguments += ["--steps", "3", "--batch-size", "4", "--prefix-tokens", "4", "--max-length", "48"]
    arguments += ["--reply-tokens", "6", "--out", str(tmp_path / "prompt")]
    ended = corolla(*arguments, module=f"examples.{SCRIPT.stem}", text="hello there\nand then?\n")
    assert ended.returncode == 0, ended.stderr
    losses = [float(loss) for loss in re.findall(r"step \d/3: loss (\S+)", ended.stdout)]
    assert len(losses) == 3
    assert all(math.isfinite(loss) for loss in losses)
    assert len(set(losses)) == 3
    assert re.findall(r"you: (.*)", ended.stdout) == ["hello there", "and then?"]
    assert ended.stdout.count("\nbot: ") == 2
    assert read_prompt_info(tmp_path / "prompt")["prompt_tokens"] == 4


@pytest.mark.nightly  # tests/client/test_classifier.py looks at all but the script
def test_a_classifier_of_sentences(tiny: Path, address: str, tmp_path: Path) -> None:
    arguments = [
        "--model",
        str(tiny),
        "--peers",
        address,
        "--prompt-tokens",
        "4",
        "--out",
        str(tmp_path / "out"),
    ]
    ended = subprocess.run(
        [sys.executable, str(SENTIMENT), *arguments, "--steps", "12", "--lr", "5e-2"],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert ended.returncode == 0, ended.stderr
    losses = [float(loss) for loss in re.findall(r"step \d+/12: loss (\S+)", ended.stdout)]
    assert len(losses) == 12
    assert sum(losses[-3:]) < sum(losses[:3])
    after, back = re.findall(r"(?:after|read back): (\d+)%", ended.stdout)
    assert after == back
    assert "['negative', 'positive']" in ended.stdout
    assert read_prompt_info(tmp_path / "out")["prompt_tokens"] == 4


def test_the_scripts_stay_short_enough_to_be_read() -> None:
    assert all(len(script.read_text().splitlines()) < 100 for script in (SCRIPT, SENTIMENT))


def code_of(notebook: Path, changes: str = "") -> str:
    """Its cells as one script, `changes` behind those that are tagged as parameters."""
    cells = [cell for cell in json.loads(notebook.read_text())["cells"] if cell["cell_type"] == "code"]
    assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in cells)
    assert sum("parameters" in cell["metadata"].get("tags", ()) for cell in cells) == 1
    parts = [
        "".join(cell["source"]) + ("\n" + changes if "parameters" in cell["metadata"].get("tags", ()) else "")
        for cell in cells
    ]
    return "\n\n".join(parts) + "\n"


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=[one.stem for one in NOTEBOOKS])
def test_a_notebook_is_clean_and_its_code_is_code(notebook: Path) -> None:
    compile(code_of(notebook), notebook.name, "exec")


@pytest.mark.nightly
@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=[one.stem for one in NOTEBOOKS])
def test_a_notebook_runs(notebook: Path, tiny: Path, address: str, tmp_path: Path) -> None:
    changes = f"MODEL, DATA, STEPS = {str(tiny)!r}, {str(persona_chat(tmp_path / 'rows.json'))!r}, 3\n"
    changes += "MAX_LENGTH, REPLY_TOKENS, BATCH_SIZE, CLASSIFIER_STEPS, PROMPT_TOKENS = 48, 6, 4, 4, 4\n"
    script = tmp_path / "notebook.py"
    script.write_text(code_of(notebook, changes))
    ended = subprocess.run(
        [sys.executable, str(script)],
        capture_output=True,
        text=True,
        timeout=240,
        cwd=tmp_path,
        env=environment() | {"COROLLA_PEERS": address},
    )
    assert ended.returncode == 0, ended.stderr[-3000:]
    written = {"my-bot": 16} if notebook.stem == "personachat" else {"my-prefix": 4, "my-classifier": 4}
    for name, tokens in written.items():
        assert read_prompt_info(tmp_path / name)["prompt_tokens"] == tokens
