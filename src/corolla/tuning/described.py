"""What a bundle says of itself, and the names of its files: for the pages about it as for those who read it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from corolla.data.render import RenderSettings
from corolla.version import __version__

BUNDLE_FILE = "bundle.json"
METRICS_FILE = "metrics.jsonl"
CURVE_FILE = "loss.png"
CARD_FILE = "README.md"
FORMAT_VERSION = 1
SAMPLING = {"temperature": 0.6, "top_k": 100, "max_new_tokens": 64}


@dataclass(frozen=True)
class ModelInfo:
    """Which model a prompt was trained for; `identity` as in `Checkpoint.identity`."""

    name: str
    identity: str
    revision: str | None = None


@dataclass(frozen=True)
class Described:
    """What `bundle.json` says; the prompt itself is read with `from_pretrained(..., prompts=folder)`."""

    model: ModelInfo
    mode: str
    prompt_tokens: int
    rendering: RenderSettings
    stop: dict[str, Any]
    training: dict[str, Any]
    metrics: dict[str, Any]
    sampling: dict[str, Any] = field(default_factory=lambda: dict(SAMPLING))
    folder: Path | None = None

    @property
    def what(self) -> str:
        """What was trained, and how large it is."""
        rank = f"rank {self.training.get('rank')}"
        return f"{self.mode}, {rank if self.mode == 'lora' else f'{self.prompt_tokens} prompt tokens'}"

    def to_dict(self) -> dict[str, Any]:
        """The content of `bundle.json`."""
        content = asdict(self)
        del content["folder"]
        return {"format": FORMAT_VERSION, "corolla": __version__, **content}


def smoothed(values: Sequence[float], weight: float = 0.85) -> list[float]:
    """An exponential mean without the bias towards its beginning."""
    total = norm = 0.0
    result = []
    for value in values:
        total = weight * total + (1 - weight) * value
        norm = weight * norm + (1 - weight)
        result.append(total / norm)
    return result
