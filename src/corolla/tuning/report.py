"""`report.html`: what a bundle is and what it is worth, on one page that needs no network and no script.

Invariant: whatever is on it and comes from data, a model or a stranger's bundle is text: it is escaped, and it steers
nothing.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import shlex
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, get_type_hints

import jinja2

from corolla.data.render import RenderSettings
from corolla.errors import BundleError
from corolla.files import write_atomically
from corolla.json_files import parse
from corolla.text import printable
from corolla.tuning.described import METRICS_FILE, Described, smoothed
from corolla.tuning.settings import StudySettings, TuneSettings
from corolla.version import __version__

REPORT_FILE = "report.html"
TEMPLATE = Path(__file__).with_name("report.html")
ROWS = (
    ("loss of replies (nats a token)", "eval_loss", ".3f"),
    ("perplexity of replies", "eval_perplexity", ".1f"),
    ("loss of delimiters and ends", "eval_marker_loss", ".3f"),
)
WIDTH, HEIGHT = 760, 320
LEFT, RIGHT, TOP, BOTTOM = 48, 740, 16, 270
SHOWN_ON_CURVE = 600  # points; more are no longer told apart
MOST = 1e12  # of steps, nats and perplexities that mean something
UNSAID = "(nothing)"


def report_page(
    bundle: Described, history: Sequence[Mapping[str, Any]], place: str, *, evaluated_on: str | None = None
) -> str:
    """The page, of what a bundle says of itself and its log.

    `place` is where the bundle is; `evaluated_on` names the data of `bundle.metrics` where they are not the run's own.
    """
    environment = jinja2.Environment(autoescape=True, finalize=_clean, undefined=jinja2.StrictUndefined)
    metrics = bundle.metrics
    title = f"{bundle.model.name}, tuned"
    return environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(
        version=__version__,
        title=title if evaluated_on is None else f"{title}: evaluated on {evaluated_on}",
        summary=f"{summary(bundle)}.",
        columns=("before training", "after") if evaluated_on is None else ("base model", "tuned"),
        figures=list(figures(bundle)),
        verdict=verdict(metrics),
        better=_number(_mapping(metrics.get("difference")).get("high")) < 0,
        curve=_curve(history),
        replies=[_exchange(one) for one in replies(metrics)],
        recall=list(recall(metrics)),
        recalled_of=_mapping(metrics.get("recall")).get("of"),
        worth=recall_verdict(metrics),
        problem=_mapping(metrics.get("samples")).get("degenerate"),
        chat=chat_command(place),
        again=again_command(bundle),
        settings=[(name, value) for name, value in _shown(bundle.training) if value not in (None, "")],
    )


def check_place(path: Path) -> None:
    """Raises `BundleError` where no page could be written; its folder is there afterwards."""
    with _saving(path), tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}."):
        pass


def write_report(path: Path, page: str) -> None:
    """Raises `BundleError` when it cannot be written."""
    with _saving(path):
        write_atomically(path, page.encode())


@contextlib.contextmanager
def _saving(path: Path) -> Iterator[None]:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield
    except OSError as error:
        raise BundleError(f"The page could not be saved to {path}: {error.strerror or error}.") from error


def read_history(folder: Path) -> list[dict[str, Any]]:
    """A bundle's log; nothing where there is none, or none that can be read."""
    try:
        lines = (folder / METRICS_FILE).read_text(encoding="utf-8").splitlines()
        found = [parse(line) for line in lines if line.strip()]
    except (OSError, ValueError):
        return []
    return [line for line in found if isinstance(line, dict)]


def chat_command(place: str) -> str:
    """How to talk with the bundle at `place`."""
    return shlex.join(["corolla", "chat", place])


def again_command(bundle: Described) -> str:
    """The command whose run would come to the same bundle."""
    said, studied = bundle.training, documents(bundle)
    if studied:
        words = ["corolla", "study", *studied, "--model", bundle.model.name]
    else:
        words = ["corolla", "tune", bundle.model.name, "--mode", bundle.mode]
    if bundle.mode == "lora":
        words += _option("rank", said.get("rank"))
    else:
        words += ["--prompt-tokens", str(bundle.prompt_tokens)]
    if bundle.model.revision is not None:
        words += ["--revision", bundle.model.revision]
    if not studied:
        words += _option("data", said.get("data") or "DATA")
        for name in ("speaker", "persona", "split", "prompt_init", "prompt_text"):
            words += _option(name, said.get(name))
    defaults = StudySettings() if studied else TuneSettings()
    for name, flag in _flags(type(defaults)):
        value = said.get(name)
        if name in said and value != getattr(defaults, name) and name not in ("epochs", "report_to"):
            words += _option(name, value, flag)
    if "learning_rate" in said and "warmup" not in said:  # as earlier versions did
        words += ["--warmup", "0", "--keep", "last"]
    if said.get("steps") is None:
        words += _option("epochs", said.get("epochs"))
    plain, rendering = RenderSettings(), bundle.rendering
    if not studied:  # which has one way
        words += ["--style", rendering.style]
        if rendering.style == "delimiter":
            words += ["--delimiter", rendering.delimiter.replace("\n", "\\n").replace("\t", "\\t")]
        words += [] if rendering.loss_on == plain.loss_on else ["--loss-on", rendering.loss_on]
    words += [] if rendering.max_length == plain.max_length else ["--max-length", str(rendering.max_length)]
    return shlex.join(words)


def verdict(metrics: Mapping[str, Any]) -> str:
    """One sentence: whether the change is more than chance."""
    difference = _mapping(metrics.get("difference"))
    low, high = _number(difference.get("low")), _number(difference.get("high"))
    count = metrics.get("held_out_conversations")
    among = f"on {count} held-out conversations" if isinstance(count, int) else "on held-out conversations"
    among = "on 1 held-out conversation" if count == 1 else among
    if not (math.isfinite(low) and math.isfinite(high)):
        return f"Measured {among}; too few to say how sure that is."
    interval = f"the change of the replies' loss is between {low:+.3f} and {high:+.3f} (paired, 95 %)"
    if high < 0:
        return f"Better {among}: {interval}."
    return f"{'Worse' if low > 0 else 'No clear change'} {among}: {interval}."


def summary(bundle: Described) -> str:
    """How it was trained, in half a sentence or more."""
    steps, best = bundle.training.get("steps"), bundle.metrics.get("step")
    parts = [bundle.what]
    if isinstance(steps, int):
        parts.append(f"{steps:,} steps")
    if isinstance(best, int) and best != steps:
        parts.append(f"the prompt is that of step {best}, the best on held-out conversations")
    times = bundle.metrics.get("fell_back")
    if isinstance(times, int) and times:
        parts.append(f"went back {times} time{'s' if times > 1 else ''} where it diverged")
    data = bundle.training.get("data") or ", ".join(documents(bundle))
    if data:
        parts.append(f"learnt from {data}")
    return "; ".join(parts)


def figures(bundle: Described) -> Iterator[dict[str, str]]:
    """Held-out losses: `name`, `before`, `after` and `change`."""
    before, after = (_mapping(bundle.metrics.get(name)) for name in ("before", "after"))
    for name, key, form in ROWS:
        old, new = _number(before.get(key)), _number(after.get(key))
        if math.isfinite(old) and math.isfinite(new):
            yield {
                "name": name,
                "before": format(old, form),
                "after": format(new, form),
                "change": format(new - old, "+" + form),
            }


def replies(metrics: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Exchanges with `said`, `reply` and perhaps `base` and `problem`."""
    found = _mapping(metrics.get("samples")).get("replies")
    return [one for one in found if isinstance(one, Mapping)] if isinstance(found, list) else []


def documents(bundle: Described) -> list[str]:
    """The names of the files that were studied."""
    found = bundle.training.get("documents")
    return [str(one) for one in found] if isinstance(found, list) else []


def recall(metrics: Mapping[str, Any]) -> Iterator[dict[str, str]]:
    """What is known of a text that was studied, in each `way` of knowing it: `loss` of answers, share `recalled`."""
    ways = _mapping(metrics.get("recall")).get("ways")
    for one in ways if isinstance(ways, list) else []:
        loss, recalled = (_number(_mapping(one).get(name)) for name in ("loss", "recalled"))
        yield {
            "way": str(_mapping(one).get("way")),
            "loss": format(loss, ".3f") if math.isfinite(loss) else "",
            "recalled": format(recalled, ".0%") if math.isfinite(recalled) else "",
        }


def recall_verdict(metrics: Mapping[str, Any]) -> str | None:
    """What to say where a study was worth nothing; None where it was, or where no facts were asked."""
    ways = _mapping(metrics.get("recall")).get("ways")
    shares = {
        _mapping(one).get("way"): _number(_mapping(one).get("recalled"))
        for one in (ways if isinstance(ways, list) else [])
    }
    plain, studied = shares.get("plain prompt", math.nan), shares.get("studied prompt", math.nan)
    if not studied <= plain:
        return None
    return (
        f"For these questions the study was worth nothing: the studied prefix recalls {studied:.0%}, one that only "
        f"holds the beginning of the text {plain:.0%}. Try a larger model, more --questions, a lower --lr, or more "
        "--prompt-tokens: a prefix of as many as the text has begins with all of it."
    )


def _exchange(one: Mapping[str, Any]) -> dict[str, Any]:
    texts = {name: str(one.get(name) or "").strip() or UNSAID for name in ("said", "reply")}
    base = one.get("base")
    texts["base"] = "(not tried)" if base is None else str(base).strip() or UNSAID
    return {**texts, "problem": one.get("problem")}


# --- the curve -----------------------------------------------------------------------------------------------


def _curve(history: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """Lines in the page's coordinates; None where there is nothing to draw."""
    training, held_out = (_points(history, key) for key in ("loss", "eval_loss"))
    if not training:
        return None
    smooth = list(zip([step for step, _ in training], smoothed([loss for _, loss in training]), strict=True))
    values = [loss for _, loss in (*training, *held_out)]
    low, high = min(values), max(values)
    margin = 0.08 * (high - low) or 0.1
    low, high = low - margin, high + margin
    last = max(1, *(step for step, _ in (*training, *held_out)))

    def at(step: float, loss: float) -> tuple[float, float]:
        x = LEFT + (RIGHT - LEFT) * step / last
        return round(x, 1), round(BOTTOM - (BOTTOM - TOP) * (loss - low) / (high - low), 1)

    def line(kind: str, points: Sequence[tuple[int, float]]) -> dict[str, str]:
        every = -(-len(points) // SHOWN_ON_CURVE)
        kept = [*points[::every], points[-1]] if points else []
        return {"kind": kind, "points": " ".join(f"{x},{y}" for x, y in (at(*one) for one in kept))}

    ends = held_out[:1] + held_out[1:][-1:]
    return {
        "width": WIDTH,
        "height": HEIGHT,
        "left": LEFT,
        "right": RIGHT,
        "bottom": BOTTOM,
        "label": f"Loss by step, from {training[0][1]:.2f} to {training[-1][1]:.2f}",
        "rows": [{"at": at(0, one)[1], "text": f"{one:g}"} for one in _ticks(low, high)],
        "columns": [
            {"at": at(one, low)[0], "text": f"{one:g}"} for one in _ticks(0, last) if one == int(one)
        ],
        "lines": [line("raw", training), line("smooth", smooth), line("held", held_out)],
        "dots": [
            {
                "x": at(step, loss)[0],
                "y": at(step, loss)[1],
                "text": f"{loss:.3f}",
                "anchor": "end" if step == last else "start",
            }
            for step, loss in ends
        ],
    }


def _points(history: Sequence[Mapping[str, Any]], key: str) -> list[tuple[int, float]]:
    pairs = ((_number(line.get("step")), _number(line.get(key))) for line in history)
    return [(int(step), loss) for step, loss in pairs if math.isfinite(step) and math.isfinite(loss)]


def _ticks(low: float, high: float) -> list[float]:
    """Four to nine round numbers between the two."""
    size = 10.0 ** math.floor(math.log10((high - low) / 4))
    step = next(size * factor for factor in (1, 2, 5, 10) if (high - low) / (size * factor) <= 9)
    first = math.ceil(low / step)
    return [round(index * step, 10) for index in range(first, math.floor(high / step) + 1)]


# --- words ---------------------------------------------------------------------------------------------------


def _flags(settings: type[TuneSettings]) -> Iterator[tuple[str, str | None]]:
    """The settings that are options of a command, and their flags where these have other names."""
    hints = get_type_hints(settings, include_extras=True)
    for one in dataclasses.fields(settings):
        about = getattr(hints[one.name], "__metadata__", ())
        if about:
            yield one.name, about[0] if len(about) > 1 else None


def _option(name: str, value: Any, flag: str | None = None) -> list[str]:
    flag = flag or "--" + name.replace("_", "-")
    if value is None or value is False:
        return []
    return [flag] if value is True else [flag, str(value)]


def _shown(training: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """Without the addresses of the swarm: a page is shown to others."""
    return sorted(_flat({name: value for name, value in training.items() if name != "swarm"}))


def _flat(content: Mapping[str, Any], before: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in content.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{before}{name}.")
        else:
            yield (
                f"{before}{name}".replace("_", " "),
                repr(value) if isinstance(value, list | tuple) else value,
            )


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _number(value: Any) -> float:
    """NaN for what is no number, or none that can be drawn."""
    good = isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < MOST
    return float(value) if good else math.nan


def _clean(value: Any) -> Any:
    return printable(value) if isinstance(value, str) else value
