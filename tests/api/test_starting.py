"""A run that a page starts: its data is shown first, it outlives the API, and what is wrong with it is said."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, get_args

import psutil
import pytest
from tests.api.browser import CHROMIUM, browser
from tests.api.test_access import asked
from tests.api.world import BASE, World, Worlds
from tests.e2e.processes import environment
from tests.tuning.tiny_setup import conversations

from corolla.api.access import Keys
from corolla.api.failures import ApiFailure
from corolla.api.starting import NewRun, Starter
from corolla.config import TuningMode
from corolla.tuning.bundle import load_bundle

TALKS = "".join(
    json.dumps({"messages": [{"role": turn.role, "content": turn.text} for turn in talk.turns]}) + "\n"
    for talk in conversations()
)
SMALL = {"steps": 3, "batch_size": 2, "prompt_tokens": 4}
KEYS = """
ann = {key = "ann"}
bob = {key = "bob", tokens_per_day = 9}
cid = {key = "cid"}
eve = {key = "eve", operator = true}
"""


def asking(name: str = "poet", **changes: Any) -> dict[str, Any]:
    return {"name": name, "file": "talks.jsonl", "content": TALKS, **SMALL, **changes}


def tune(model: Path) -> list[str]:
    return [sys.executable, "-m", "corolla", "tune", str(model), "--dtype", "float32"]


@pytest.fixture(scope="module")
def served(worlds: Worlds) -> World:
    """Its runs cannot begin: there is no such model."""
    return worlds.make("starting", tune=tune(Path("/none/such")))


def until(true: Callable[[], Any]) -> Any:
    for _ in range(1200):
        if found := true():
            return found
        time.sleep(0.1)
    raise AssertionError("never true")


def run_of(world: World, name: str) -> dict[str, Any]:
    return next((one for one in asked(world, "/api/runs")[1] if one["name"] == name), {"state": None})


def test_what_a_run_would_learn_is_shown_first(served: World) -> None:
    status, found, _ = asked(served, "/api/runs/preview", method="POST", body=asking())
    assert (status, found["steps"], len(found["examples"])) == (200, 3, 3)
    for example in found["examples"]:
        text = "".join(piece["text"] for piece in example)
        assert "<|user|>" in text
        learnt = "".join(piece["text"] for piece in example if piece["learnt"])
        assert learnt
        assert "<|user|>" not in learnt
    assert any("conversations used" in note for note in found["notes"])
    assert asked(served, "/api/runs")[1] == []


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"content": "no json"}, "talks.jsonl"),
        ({"content": json.dumps({"odd": 1})}, "talks.jsonl"),
        ({"file": "talks.exe"}, ".jsonl"),
        ({"file": "../../x.jsonl\u0000", "content": "{"}, ""),
        ({"name": "../poet"}, "name"),
        ({"name": ".poet"}, "name"),
        ({"name": "poet.run"}, "name"),
        ({"name": BASE}, "already"),
        ({"prompt_tokens": 0}, "prompt_tokens"),
        ({"prompt_tokens": 5000}, "1024"),
        ({"learning_rate": -1.0}, "learning_rate"),
        ({"mode": "qlora"}, "mode"),
        ({"mode": "lora", "rank": 0}, "rank"),
        ({"content": "\udcff"}, "unicode"),
        ({"more": 1}, "more"),
    ],
)
def test_what_is_wrong_is_said_before_anything_begins(
    served: World, changes: dict[str, Any], words: str
) -> None:
    for path in ("/api/runs/preview", "/api/runs"):
        status, found, _ = asked(served, path, method="POST", body=asking(**changes))
        assert status == 400, found
        assert words in found["error"]["message"] + str(found["error"]["param"])
        assert "/tmp" not in found["error"]["message"]
    assert not (served.bundles / ".started").exists()


def test_a_run_that_cannot_begin_says_why_and_can_be_asked_again(served: World) -> None:
    assert asked(served, "/api/runs", method="POST", body=asking("novel"))[0] == 200
    until(lambda: run_of(served, "novel")["state"] == "stopped")
    found = run_of(served, "novel")
    assert found["started_here"] is True
    assert "/none/such" in found["why"]
    assert asked(served, "/api/runs/novel/stop", method="POST")[0] == 404
    assert asked(served, "/api/runs/none/resume", method="POST")[0] == 404
    assert asked(served, "/v1/models")[1]["data"][1:] == []  # what lies beside the bundles is none of them


def test_a_frame_is_no_word(served: World, tmp_path: Path) -> None:
    starter = Starter(tmp_path, [], served.api.partners.base, environment={})
    (tmp_path / ".started/framed").mkdir(parents=True)
    (tmp_path / ".started/framed/log.txt").write_text("╭──╮\n│ hi │\n╰──╯\n\n", encoding="utf-8")
    assert starter.last_words("framed") == "│ hi │"


def test_a_run_that_cannot_be_noted_is_ended_and_refused(served: World) -> None:
    (served.bundles / ".started/drama/process.json/odd").mkdir(parents=True)
    status, found, _ = asked(served, "/api/runs", method="POST", body=asking("drama"))
    assert (status, found["error"]["message"][:26]) == (503, "The run cannot begin here:")
    assert not [one for one in psutil.Process().children() if "drama" in " ".join(one.cmdline())]


def test_a_process_is_known_by_its_birth_also_after_the_clock_was_set(served: World, tmp_path: Path) -> None:
    mine = psutil.Process()
    starter = Starter(tmp_path, [], served.api.partners.base, environment={})
    for name, seconds in {"moved": 5, "another": 3600}.items():
        (tmp_path / ".started" / name).mkdir(parents=True)
        about = {"pid": mine.pid, "born": mine.create_time() - seconds, "command": []}
        (tmp_path / ".started" / name / "process.json").write_text(json.dumps(about))
    assert [starter.running(name) for name in starter.names()] == [False, True]


def test_who_may_not_start_one(worlds: Worlds, tmp_path: Path) -> None:
    assert asked(worlds.make("no-starter"), "/api/runs", method="POST", body=asking())[0] == 403
    path = tmp_path / "keys.toml"
    path.write_text(KEYS)
    guarded = worlds.make("guarded", keys=Keys.read([], path), tune=tune(Path("/none/such")))
    for key, status in (("bob", 403), ("none", 401), ("ann", 200)):
        headers = {"Authorization": f"Bearer {key}"}
        for path_ in ("/api/runs/preview", "/api/runs/x/stop"):
            found = asked(guarded, path_, method="POST", body=asking(), headers=headers)[0]
            assert found == (404 if (key, path_[-4:]) == ("ann", "stop") else status)
    folderless = Starter(None, [], guarded.api.partners.base, environment={})
    with pytest.raises(ApiFailure, match="--bundles"):
        folderless._check_name("poet")


def test_who_has_started_a_run_stops_it_or_the_operator(worlds: Worlds, tmp_path: Path) -> None:
    path = tmp_path / "keys.toml"
    path.write_text(KEYS)
    waits = [sys.executable, "-c", "import time; time.sleep(600)"]
    world = worlds.make("owned", keys=Keys.read([], path), tune=waits)

    def ask(key: str, path: str, **more: Any) -> tuple[int, Any]:
        return asked(world, path, headers={"Authorization": f"Bearer {key}"}, **more)[:2]

    def yours(key: str) -> list[bool]:
        return [one["yours"] for one in ask(key, "/api/runs")[1]]

    assert world.api.starter is not None
    try:
        assert ask("ann", "/api/runs", method="POST", body=asking("poem"))[0] == 200
        assert [yours(key) for key in ("ann", "bob", "cid", "eve")] == [[True], [False], [False], [True]]
        status, found = ask("cid", "/api/runs/poem/stop", method="POST")
        assert (status, "another key" in found["error"]["message"]) == (403, True)
        assert world.api.starter.running("poem")
        assert ask("eve", "/api/runs/poem/stop", method="POST")[0] == 200
        until(lambda: world.api.starter is not None and not world.api.starter.running("poem"))
        assert ask("cid", "/api/runs/poem/resume", method="POST")[0] == 403
        # Nor does another's data come into the place of hers.
        assert ask("cid", "/api/runs", method="POST", body=asking("poem"))[0] == 400
        assert ask("eve", "/api/runs/poem/resume", method="POST")[0] == 200
        assert ask("ann", "/api/runs/poem/stop", method="POST")[0] == 200
        until(lambda: world.api.starter is not None and not world.api.starter.running("poem"))
    finally:
        for child in psutil.Process().children():
            if "time.sleep(600)" in " ".join(child.cmdline()):
                child.kill()


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")
def test_the_button_comes_after_the_examples(served: World, tmp_path: Path) -> None:
    with browser(tmp_path) as page:
        page.size(390, 780)
        page.open(f"{served.url}/runs")
        page.wait("document.getElementById('state').textContent !== 'Reading…'")
        page.run("document.querySelector('#new summary').focus()")
        page.press("Enter")
        page.wait("document.getElementById('new').open")
        assert page.run("start.disabled")
        page.run(
            f"document.getElementById('name').value = 'sonnet'; steps.value = 3;"
            f"const given = new DataTransfer(); given.items.add(new File([{json.dumps(TALKS)}], 'talks.jsonl'));"
            "file.files = given.files; document.querySelector('#train button').focus()"
        )
        page.press("Enter")
        page.wait("document.querySelectorAll('figure').length === 3 && !start.disabled")
        assert page.run("document.querySelectorAll('mark').length") >= 3
        assert not page.run("document.documentElement.scrollWidth > document.documentElement.clientWidth")
        page.run("document.getElementById('steps').focus()")
        page.type("1")
        page.wait("start.disabled")
        page.run("document.querySelector('#train button').focus()")
        page.press("Enter")
        page.wait("!start.disabled")
        assert page.run("rank.offsetParent === null && prompt_tokens.offsetParent !== null")
        page.run("mode.value = 'lora'; mode.dispatchEvent(new Event('input', {bubbles: true}))")
        assert page.run("rank.offsetParent !== null && prompt_tokens.offsetParent === null && start.disabled")
        page.run("document.querySelector('#train button').focus()")
        page.press("Enter")
        page.wait("!start.disabled")
        page.run("start.focus()")
        page.press("Enter")
        page.wait("about.textContent.includes('sonnet has begun')")
        page.wait("[...document.querySelectorAll('.run h2')].some(one => one.textContent === 'sonnet')")
        until(lambda: run_of(served, "sonnet")["state"] == "stopped")


@pytest.fixture
def training(worlds: Worlds, request: pytest.FixtureRequest) -> Iterator[World]:
    world = worlds.make(request.node.name, tune=tune(worlds.folder))
    yield world
    for name in world.api.starter.names() if world.api.starter else ():
        if world.api.starter and world.api.starter.running(name):
            world.api.starter.stop(name)
            until(lambda name=name: not world.api.starter.running(name))


@pytest.mark.parametrize("mode", get_args(TuningMode))
def test_every_mode_of_the_command_can_be_asked_for(mode: TuningMode) -> None:
    made = NewRun(name="x", file="x.json", content="x", mode=mode, prompt_tokens=5, rank=3)
    words = made.words()
    assert words[:2] == ["--mode", mode]
    sized = ["--rank", "3"] if mode == "lora" else ["--prompt-tokens", "5"]
    assert words[2:4] == sized
    assert len({"--rank", "--prompt-tokens"} & set(words)) == 1


@pytest.mark.nightly
def test_an_adapter_is_trained_and_served(training: World) -> None:
    body = asking("adapter", mode="lora", rank=2)
    assert asked(training, "/api/runs", method="POST", body=body)[0] == 200
    until(lambda: not training.api.starter or not training.api.starter.running("adapter"))
    assert (training.bundles / "adapter").is_dir(), run_of(training, "adapter")
    reply = training.client().chat.completions.create(
        model="adapter", messages=[{"role": "user", "content": "Hi"}], temperature=0, max_tokens=4
    )
    assert reply.choices[0].message.content is not None
    assert load_bundle(training.bundles / "adapter").mode == "lora"


@pytest.mark.nightly
def test_a_run_outlives_the_api_and_can_be_stopped_and_gone_on_with(
    training: World, worlds: Worlds, tmp_path: Path
) -> None:
    body = asking("poet", steps=400, batch_size=1)
    assert asked(training, "/api/runs", method="POST", body=body)[0] == 200
    again = asked(training, "/api/runs", method="POST", body=body)
    assert (again[0], again[1]["error"]["param"]) == (400, "name")
    until(lambda: len(run_of(training, "poet").get("loss", ())) > 3)
    found = run_of(training, "poet")
    assert (found["state"], found["steps"]) == ("running", 400)
    assert found["tokens_per_second"] > 0
    assert found["seconds_left"] > 0
    pid = json.loads((training.bundles / ".started/poet/process.json").read_text())["pid"]
    training.running.close()
    assert psutil.pid_exists(pid)
    other = Starter(
        training.bundles, tune(worlds.folder), training.api.partners.base, environment=environment()
    )
    assert other.running("poet")
    other.stop("poet")
    until(lambda: not other.running("poet"))
    assert (training.bundles / "poet.run" / "run.json").is_file()
    steps = len((training.bundles / "poet.run" / "live.jsonl").read_text().splitlines())
    other.resume("poet")
    until(lambda: not other.running("poet"))
    assert load_bundle(training.bundles / "poet").training["steps"] == 400, other.last_words("poet")
    assert steps < 400
