"""The picture of a run: training loss, and the held-out loss that matters.

Invariant: drawn without a display and from the logged figures alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

RAW, SMOOTH, HELD_OUT = "#9db8d9", "#1f5fa8", "#c8501e"


def draw_curve(history: Sequence[dict[str, float]], path: Path, *, title: str) -> None:
    """Write a PNG of `history` (lines with "step" and "loss" or "eval_loss"). Raises `OSError`."""
    # matplotlib takes a second to import, and only this needs it.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(7.5, 4.5), dpi=120, layout="constrained")
    axes = figure.add_subplot()
    _draw_training(axes, [(int(line["step"]), line["loss"]) for line in history if "loss" in line])
    _draw_held_out(axes, [(int(line["step"]), line["eval_loss"]) for line in history if "eval_loss" in line])
    axes.set_xlabel("step")
    axes.set_ylabel("loss (nats a token)")
    axes.set_title(f"Prompt tuning: {title}", loc="left")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.25)
    axes.margins(y=0.12)  # room for the figures beside the points
    axes.spines[["top", "right"]].set_visible(False)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(frameon=False)
    FigureCanvasAgg(figure).print_png(str(path))


def _draw_training(axes: Any, points: list[tuple[int, float]]) -> None:
    if not points:
        return
    steps, losses = zip(*points, strict=True)
    axes.plot(steps, losses, color=RAW, linewidth=1.0, alpha=0.8, label="training, each step")
    axes.plot(
        steps, smoothed(losses), color=SMOOTH, linewidth=2.0, label="training, smoothed (delimiters included)"
    )


def _draw_held_out(axes: Any, points: list[tuple[int, float]]) -> None:
    if not points:
        return
    steps, losses = zip(*points, strict=True)
    axes.plot(steps, losses, "o--", color=HELD_OUT, linewidth=1.2, label="held-out, replies only")
    for step, loss in (points[0], points[-1])[: len(points)]:
        axes.annotate(
            f"{loss:.3f}",
            (step, loss),
            xytext=(0, 8),
            textcoords="offset points",
            ha="center",
            color=HELD_OUT,
        )


def smoothed(values: Sequence[float], weight: float = 0.85) -> list[float]:
    """An exponential mean without the bias towards its beginning."""
    total = norm = 0.0
    result = []
    for value in values:
        total = weight * total + (1 - weight) * value
        norm = weight * norm + (1 - weight)
        result.append(total / norm)
    return result
