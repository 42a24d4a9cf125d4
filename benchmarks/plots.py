"""The plots of how cost grows, drawn from a JSON line's points."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.growth import Growth

OURS, BASELINE = "#b5366f", "#6b7280"


def draw(item: Growth, points: Sequence[dict[str, Any]], file: Path) -> None:
    """Milliseconds a token over what grows: medians as lines, all runs as dots."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6.4, 3.8), dpi=120)
    for side, label, colour in (("ours", "Corolla", OURS), ("baseline", item.baseline, BASELINE)):
        xs = [point["x"] for point in points]
        axes.plot(xs, [statistics.median(point[side]) for point in points], color=colour, label=label)
        for point in points:
            axes.plot([point["x"]] * len(point[side]), point[side], ".", color=colour, alpha=0.5)
    if max(xs) > 40:  # doubled from point to point
        axes.set_xscale("log", base=2)
        axes.set_xticks(xs, [f"{x:,}" for x in xs])
        axes.minorticks_off()
    axes.set(xlabel=item.x, ylabel="ms a token", ylim=(0, None))
    axes.set_title(item.title, fontsize=10)
    axes.grid(alpha=0.25)
    axes.legend(frameon=False, fontsize=9)
    figure.tight_layout()
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, metadata={"Software": None})
    pyplot.close(figure)
