"""The page and the card of a bundle: all of it is there, and nothing on it is more than text."""

from __future__ import annotations

import json
import math
import re
import shlex
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from typer.main import get_command

from corolla.cli.main import app
from corolla.data.render import RenderSettings
from corolla.errors import BundleError
from corolla.tuning.bundle import Bundle, ModelInfo
from corolla.tuning.card import model_card
from corolla.tuning.report import again_command, read_history, report_page, verdict, write_report
from corolla.tuning.settings import TuneSettings

HOSTILE = (
    "</pre><script>alert(1)</script> <img src=x onerror=alert(2)> ``` \x1b[31m\u202eback' \" onload=x {{7*7}}"
)
HISTORY: list[dict[str, Any]] = [
    {"step": 0, "eval_loss": 4.0},
    *({"step": step, "loss": 4.0 - 0.05 * step} for step in range(1, 21)),
    {"step": 20, "eval_loss": 3.25},
]


def bundle(**changes: Any) -> Bundle:
    said: dict[str, Any] = {
        "model": ModelInfo("org/model", "1234567890abcdef", "main"),
        "mode": "ptune",
        "prompt_tokens": 8,
        "rendering": RenderSettings(style="delimiter", delimiter="\n--\n", max_length=96, loss_on="all"),
        "stop": {},
        "training": {
            **TuneSettings(steps=20, batch_size=3, learning_rate=0.02, seed=7, stop_after=2).to_dict(),
            "data": "talks.jsonl",
            "speaker": None,
            "persona": True,
            "split": None,
            "prompt_init": "text",
            "prompt_text": "be 'kind', \"please\"",
            "swarm": {"peers": ["/ip4/203.0.113.9/tcp/1/p2p/x"]},
        },
        "metrics": {
            "before": {"eval_loss": 4.0, "eval_perplexity": math.exp(4), "eval_marker_loss": 1.0},
            "after": {"eval_loss": 3.25, "eval_perplexity": math.exp(3.25), "eval_marker_loss": 0.5},
            "difference": {"mean": -0.75, "low": -0.9, "high": -0.6},
            "held_out_conversations": 5,
            "step": 15,
            "fell_back": 1,
            "samples": {
                "degenerate": None,
                "replies": [
                    {"said": "hello", "reply": "hi there", "base": "goodbye", "problem": None},
                    {"said": "and?", "reply": "", "base": "what?", "problem": "empty"},
                ],
            },
        },
    }
    return Bundle(**said | changes)


class Seen(HTMLParser):
    """The tags, the attributes and the text of a page."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.attributes: set[str] = set()
        self.text = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes |= {name for name, _ in attrs}

    def handle_data(self, data: str) -> None:
        self.text += data


def test_the_page_says_what_came_of_a_run() -> None:
    page = report_page(bundle(), HISTORY, "my-bot")
    seen = Seen(page)
    for words in (
        "org/model, tuned",
        "20 steps; the prompt is that of step 15, the best on held-out conversations; went back 1 time",
        "4.000",
        "3.250",
        "-0.750",
        "Better on 5 held-out conversations: the change of the replies' loss is between -0.900 and -0.600",
        "corolla chat my-bot",
        "hello",
        "hi there",
        "goodbye",
        "(nothing)",
        "(empty)",
        "learning rate",
    ):
        assert words in seen.text, words
    assert "203.0.113.9" not in page  # a page is shown to others
    points = re.findall(r'<polyline class="(\w+)" points="([^"]+)"', page)
    assert [(kind, len(line.split())) for kind, line in points] == [("raw", 21), ("smooth", 21), ("held", 3)]
    (first, *_, last) = [float(pair.split(",")[1]) for pair in points[0][1].split()]
    assert first < last  # a falling loss goes down on the page


def test_nothing_on_the_page_is_fetched_or_run_and_strangers_words_are_text() -> None:
    training = {**bundle().training, "data": HOSTILE, "prompt_text": HOSTILE}
    replies = [{"said": HOSTILE, "reply": HOSTILE, "base": HOSTILE, "problem": HOSTILE}]
    metrics = {**bundle().metrics, "samples": {"degenerate": HOSTILE, "replies": replies}}
    hostile = bundle(model=ModelInfo(HOSTILE, HOSTILE), training=training, metrics=metrics)
    plain = Seen(report_page(bundle(), HISTORY, "my-bot"))
    page = report_page(hostile, [*HISTORY, {"step": HOSTILE, "loss": HOSTILE}], HOSTILE, evaluated_on=HOSTILE)
    seen = Seen(page)
    assert seen.tags <= plain.tags
    assert seen.attributes <= plain.attributes
    assert not plain.tags & {"script", "link", "img", "iframe", "form", "a"}
    assert not plain.attributes & {"src", "href", "onload", "srcset", "action"}
    assert "url(" not in page
    assert "@import" not in page
    assert seen.text.count("<script>alert(1)</script>") >= 8
    assert "{{7*7}}" in seen.text
    assert "\x1b" not in page
    assert "\u202e" not in page
    card = model_card(hostile, HOSTILE)
    fences = re.findall(r"^(`{3,})$", card, re.M)
    assert fences
    outside = re.sub(r"^(`{3,})$.*?^\1$", "", card, flags=re.M | re.S)
    assert not re.search(r"<\w", outside)
    assert "{{7" in outside


@pytest.mark.parametrize(
    "garbled",
    [
        {},
        {"samples": 3, "before": "x", "difference": []},
        {"samples": {"replies": 5}, "before": {"eval_loss": 10**400}, "after": {"eval_loss": 1.0}},
    ],
)
def test_a_strangers_bundle_that_says_odd_things_of_itself_still_has_a_page(garbled: dict[str, Any]) -> None:
    odd = bundle(metrics=garbled, training={"steps": "many", "data": ["x"], "seed": {}})
    assert "org/model, tuned" in report_page(odd, [], "x")
    history = [
        {"step": one, "loss": loss} for one in (1, -1, 10**400) for loss in (1e308, -1e308, 2, 10**400)
    ]
    assert "The run" in report_page(odd, history, "x")
    assert "org/model" in model_card(odd, "x")


def test_the_command_to_do_it_again_is_one_that_does_it_again() -> None:
    found = bundle()
    words = shlex.split(again_command(found))
    assert words[:2] == ["corolla", "tune"]
    commands: Any = get_command(app)
    given = commands.commands["tune"].make_context("tune", words[2:]).params
    for name in ("learning_rate", "steps", "batch_size", "seed", "stop_after", "warmup", "keep", "held_out"):
        assert given[name] == found.training[name], name
    for name in ("data", "persona", "prompt_init", "prompt_text"):
        assert given[name] == found.training[name], name
    assert given["model"] == "org/model"
    assert given["revision"] == "main"
    assert (given["mode"], given["prompt_tokens"]) == ("ptune", 8)
    assert given["delimiter"].replace("\\n", "\n") == "\n--\n"
    assert (given["loss_on"], given["max_length"], given["style"]) == ("all", 96, "delimiter")


def test_a_bundle_of_an_earlier_version_is_made_again_as_it_was() -> None:
    training = {name: bundle().training[name] for name in ("learning_rate", "steps", "batch_size", "seed")}
    words = again_command(bundle(training=training))
    assert "--warmup 0 --keep last" in words
    assert "--data DATA" in words, "nobody has noted which"


@pytest.mark.parametrize(
    ("low", "high", "words"),
    [(-0.2, -0.1, "Better"), (-0.1, 0.1, "No clear change"), (0.1, 0.2, "Worse"), (None, None, "too few")],
)
def test_the_verdict_follows_the_interval(low: float | None, high: float | None, words: str) -> None:
    assert words in verdict({"difference": {"low": low, "high": high}, "held_out_conversations": 3})


def test_the_card_has_the_hubs_front_matter_and_a_transcript() -> None:
    card = model_card(bundle(), "org/model")
    _, front, rest = card.split("---\n", 2)
    fields = dict(line.split(": ", 1) for line in front.splitlines())
    assert json.loads(fields["base_model"]) == "org/model"
    assert json.loads(fields["library_name"]) == "peft"
    assert "prompt-tuning" in json.loads(fields["tags"])
    for words in (
        "| 4.000 | 3.250 | -0.750 |",
        "You:  hello",
        "Base: goodbye",
        "Bot:  hi there",
        "corolla tune",
    ):
        assert words in rest
    assert "203.0.113.9" not in card
    local = model_card(bundle(model=ModelInfo("/home/me/model", "0" * 32)), "/home/me/model")
    assert "base_model:" not in local


def test_a_log_that_cannot_be_read_gives_no_curve(tmp_path: Path) -> None:
    assert read_history(tmp_path) == []
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0}\n3\n')
    assert read_history(tmp_path) == [{"step": 1, "loss": 2.0}]
    (tmp_path / "metrics.jsonl").write_text("{")
    assert read_history(tmp_path) == []
    assert "<svg" not in report_page(bundle(), [], "x")
    assert "<svg" in report_page(bundle(), [{"step": 1, "loss": 2.0}], "x")


def test_a_page_that_cannot_be_written_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(BundleError, match="could not be saved"):
        write_report(tmp_path / "file" / "report.html", "")
