"""The runs in the folder of bundles, as the page shows them."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from tests.api.browser import CHROMIUM, browser
from tests.api.test_access import asked
from tests.api.world import World, Worlds, write_bundle

from corolla.api.access import Keys
from corolla.api.runs import Runs
from corolla.api.starting import Starter

HOSTILE = "<script>document.title='hacked'</script>\x1b[2J"


@pytest.fixture(scope="module")
def served(worlds: Worlds) -> World:
    """With a finished run, one that goes on, and one that cannot be read."""
    world = worlds.make("runs")
    write_bundle(world.bundles / "poet", world.folder, world.swarm.checkpoint.identity)
    lines = [{"step": 0, "eval_loss": 4.5}, *({"step": at, "loss": 4 - at / 100} for at in range(1, 1001))]
    lines += [{"step": 1000, "eval_loss": 3.5}, {"step": 3, "loss": "odd"}]
    text = "".join(json.dumps(line) + "\n" for line in lines) + "no json\n"
    (world.bundles / "poet" / "metrics.jsonl").write_text(text)
    (world.bundles / "poet" / "report.html").write_text(f"<h1>Report</h1>{HOSTILE}")
    checkpoint = world.bundles / "novelist.run" / "checkpoint-20"
    checkpoint.mkdir(parents=True)
    (world.bundles / "novelist.run" / "run.json").write_text("{}")
    log = [{"step": 0, "eval_loss": 4.0}, {"step": 10, "loss": 3.9}, {"step": 20, "loss": 3.7}]
    state = {"global_step": 20, "max_steps": 100, "log_history": log}
    (checkpoint / "trainer_state.json").write_text(json.dumps(state))
    (world.bundles / "broken").mkdir()
    (world.bundles / "broken" / "bundle.json").write_text(HOSTILE)
    return world


def test_what_is_said_of_runs(served: World) -> None:
    found = {one["name"]: one for one in asked(served, "/api/runs")[1]}
    assert {name: one["state"] for name, one in found.items()} == {
        "poet": "finished",
        "novelist": "unfinished",
        "broken": "unreadable",
    }
    novelist = found["novelist"]
    assert (novelist["step"], novelist["steps"]) == (20, 100)
    assert novelist["loss"] == [[10, 3.9], [20, 3.7]]
    assert novelist["held_out"] == [[0, 4.0]]
    poet = found["poet"]
    assert poet["held_out"] == [[0, 4.5], [1000, 3.5]]
    assert len(poet["loss"]) <= 401
    assert poet["loss"][-1] == [1000, -6.0], "the last step is always there"
    assert poet["report"] is True
    assert "\x1b" not in json.dumps(found, ensure_ascii=False)


def test_a_folder_that_is_not_there_has_no_runs(tmp_path: Path) -> None:
    assert Runs(tmp_path / "none").all() == Runs(None).all() == []


def test_a_run_that_is_to_replace_a_bundle_hides_it_not(served: World, tmp_path: Path) -> None:
    write_bundle(tmp_path / "poet", served.folder, served.swarm.checkpoint.identity)
    (tmp_path / "poet.run").mkdir()
    (tmp_path / "poet.run" / "run.json").write_text("{}")
    starter = Starter(tmp_path, [], served.api.partners.base, environment={})
    found = Runs(tmp_path, starter).all()
    assert {(one["name"], one["state"]) for one in found} == {("poet", "finished"), ("poet", "unfinished")}


def test_a_run_that_goes_on_is_seen_as_it_went(tmp_path: Path) -> None:
    run = tmp_path / "poet.run"
    run.mkdir()
    (run / "run.json").write_text("{}")
    live = run / "live.jsonl"
    pace = {"tokens_per_second": 50.0, "seconds_left": 9.0}
    lines = [{"step": 0, "steps": 9, "eval_loss": 4.0}]
    lines += [{"step": at, "steps": 9, "loss": 4 - at / 10, **pace} for at in (1, 2, 3, 4, 2)]
    live.write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 3, "lo')
    runs = Runs(tmp_path)
    (found,) = runs.all()
    assert (found["state"], found["step"], found["steps"]) == ("running", 2, 9)
    assert (found["tokens_per_second"], found["seconds_left"]) == (50.0, 9.0)
    assert found["loss"] == [[1, 3.9], [2, 3.8]]  # 3 and 4 were taken back
    assert found["held_out"] == [[0, 4.0]]
    before = live.stat()
    live.write_bytes(b" " * before.st_size)
    os.utime(live, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert runs.all() == [found]  # what has not changed is not read again
    os.utime(live, (1, 1))
    (found,) = runs.all()
    assert (found["state"], found["loss"]) == ("unfinished", [])


def test_a_report_can_do_nothing(served: World) -> None:
    status, text, headers = asked(served, "/api/runs/poet/report")
    assert status == 200
    assert text.startswith("<h1>Report")
    assert headers["content-security-policy"].startswith("sandbox; default-src 'none'")
    for name in ("novelist", "none", "..", "%2e%2e%2fpoet", "broken%00"):
        assert asked(served, f"/api/runs/{name}/report")[0] in (400, 404)


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")
def test_the_page(served: World, tmp_path: Path) -> None:
    with browser(tmp_path) as page:
        page.size(390, 780)
        page.open(f"{served.url}/runs")
        page.wait("document.querySelectorAll('.run').length === 3")
        words = page.run("runs.textContent")
        assert "held-out loss 4.500 → 3.500" in words
        assert "20 of 100 steps" in words
        assert page.run("document.querySelectorAll('polyline').length") == 4
        assert not page.run("document.documentElement.scrollWidth > document.documentElement.clientWidth")
        assert page.run("document.title") == "Corolla: training runs"


@pytest.fixture(scope="module")
def keyed(worlds: Worlds) -> World:
    world = worlds.make("keyed-runs", keys=Keys.read(["master"], None))
    write_bundle(world.bundles / "poet", world.folder, world.swarm.checkpoint.identity)
    (world.bundles / "poet" / "report.html").write_text("<h1>Report</h1>")
    return world


@pytest.mark.nightly
@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")
def test_who_gives_no_key_is_asked_once(keyed: World, tmp_path: Path) -> None:
    with browser(tmp_path) as page:
        page.open(f"{keyed.url}/runs")  # nothing is typed
        page.wait("document.getElementById('state').className === 'bad'")
        page.run(
            "window.asked = 0; window.prompt = () => { asked += 1; return null; };"
            "window.calls = 0; const fetched = fetch;"
            "window.fetch = (...given) => { calls += 1; return fetched(...given); }"
        )
        page.wait("calls === 2")
        assert page.run("asked") == 0


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")
def test_a_report_behind_a_key_is_kept_as_a_file(keyed: World, tmp_path: Path) -> None:
    with browser(tmp_path) as page:
        page.open(f"{keyed.url}/page/icon.svg")
        page.run("localStorage.setItem('corolla-key', 'master')")
        page.open(f"{keyed.url}/runs")
        page.wait("document.querySelector('.run a')")
        page.run(
            "window.kept = [];"
            "HTMLAnchorElement.prototype.click = function () { kept.push([this.download, this.href]); }"
        )
        page.run(
            "document.querySelector('.run a').dispatchEvent(new MouseEvent('click', {cancelable: true}))"
        )
        page.wait("window.kept.length")
        assert page.run("kept[0][0]") == "poet.html"
        assert page.run("kept[0][1].startsWith('blob:')")
