"""A bundle: a trained prompt with everything that is needed to talk with it.

Invariant: a bundle's folder appears whole or not at all, and one that loads is complete: its prompt belongs
to the model that `bundle.json` names.

    prompt.json, adapter_config.json, adapter_model.safetensors | prompts.safetensors
                     see `models/checkpoints/prompt_files.py`
    bundle.json      model, rendering, stop, sampling, training arguments, metrics
    metrics.jsonl    one line a logged step
    loss.png         the loss curve
    report.html      see `report.py`
    README.md        how to use it, here and elsewhere; see `card.py`
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PretrainedConfig

from corolla.data.render import RenderSettings
from corolla.errors import BundleError, CorollaError, UsageError
from corolla.files import leftovers, publish, write_atomically, write_json
from corolla.json_files import load_object
from corolla.models.checkpoints.prompt_files import (
    DEEP_WEIGHTS,
    PEFT_CONFIG,
    PEFT_WEIGHTS,
    is_pefts,
    read_pefts_info,
    read_prompt_info,
    save_prompt,
)
from corolla.models.prompts import Prompt
from corolla.tuning.described import BUNDLE_FILE as BUNDLE_FILE
from corolla.tuning.described import CARD_FILE as CARD_FILE
from corolla.tuning.described import CURVE_FILE as CURVE_FILE
from corolla.tuning.described import FORMAT_VERSION, Described, smoothed
from corolla.tuning.described import METRICS_FILE as METRICS_FILE
from corolla.tuning.described import SAMPLING as SAMPLING
from corolla.tuning.described import ModelInfo as ModelInfo

RAW, SMOOTH, HELD_OUT = "#9db8d9", "#1f5fa8", "#c8501e"  # colours of the curve


@dataclass(frozen=True)
class Bundle(Described):
    """What `bundle.json` says; the prompt itself is read with `from_pretrained(..., prompts=folder)`."""

    def push_to_hub(self, name: str, *, token: str | None = None, private: bool = False) -> str:
        """Share it as the repository `name` on the Hugging Face hub; gives its address.

        Without the swarm's addresses. Raises `UsageError`, and `BundleError` when the hub does not take it.
        """
        from corolla.tuning.sharing import push_bundle

        if self.folder is None:
            raise UsageError("This bundle is in no folder yet: read it with corolla.load_bundle(FOLDER).")
        return push_bundle(self, self.folder, name, token=token, private=private)


def save_bundle(
    out: Path,
    bundle: Bundle,
    prompt: Prompt,
    *,
    config: PretrainedConfig,
    history: Sequence[dict[str, float]],
    overwrite: bool = False,
    pages: Mapping[str, str] | None = None,
) -> None:
    """Write a bundle as the folder `out`. Raises `BundleError`, and leaves what was there, when it cannot.

    `history` is a line of figures a logged step: "step", and "loss" or "eval_loss"; `pages` are further files by
    name, for people to read.
    """
    temporary: Path | None = None
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(dir=out.parent, prefix=f".{out.name}."))
        save_prompt(
            temporary,
            prompt,
            config=config,
            model_name=bundle.model.name,
            identity=bundle.model.identity,
            revision=bundle.model.revision,
        )
        for name, text in (pages or {}).items():
            write_atomically(temporary / name, text.encode())
        lines = "".join(json.dumps(line) + "\n" for line in history)
        write_atomically(temporary / METRICS_FILE, lines.encode())
        draw_curve(history, temporary / CURVE_FILE, title=f"{bundle.model.name}, {bundle.mode}")
        write_json(temporary / BUNDLE_FILE, bundle.to_dict())
        temporary.chmod(0o755)
        _put_in_place(temporary, out, overwrite)
    except OSError as error:
        raise BundleError(f"The bundle could not be saved to {out}: {error.strerror or error}.") from error
    finally:
        if temporary is not None and temporary.exists():
            shutil.rmtree(temporary, ignore_errors=True)


def _put_in_place(temporary: Path, out: Path, overwrite: bool) -> None:
    if not out.exists():
        publish(temporary, out)
        return
    if not overwrite:
        raise UsageError(f"{out} exists already: give another --out, or --overwrite to replace it.")
    old = Path(tempfile.mkdtemp(dir=out.parent, prefix=f".{_replaced(out)}."))
    os.rename(out, old / out.name)
    try:
        publish(temporary, out)
    except OSError:
        os.rename(old / out.name, out)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _replaced(out: Path) -> str:
    return f"{out.name}.old"


def clear_leftovers(out: Path) -> None:
    """Put in order what a killed `save_bundle` left beside `out`: a bundle that it was replacing comes back.

    Nobody else may be saving to `out`. Raises `BundleError`.
    """
    try:
        for path in leftovers(out.parent, _replaced(out)):
            if not out.exists() and (path / out.name).exists():
                os.rename(path / out.name, out)
            shutil.rmtree(path, ignore_errors=True)
        for path in leftovers(out.parent, out.name):
            shutil.rmtree(path, ignore_errors=True)
    except OSError as error:
        raise BundleError(f"{out.parent} cannot be written: {error.strerror or error}.") from error


def load_bundle(folder: str | Path, *, revision: str | None = None, token: str | None = None) -> Bundle:
    """Read and check a bundle's description: of a folder, or of a repository on the hub, such as `user/name`.

    A folder that peft has written is a bundle for whatever model it fits; its `identity` is empty.
    Raises `BundleError` with one sentence.
    """
    if not os.path.exists(folder):
        from corolla.tuning.sharing import fetch_bundle

        folder = fetch_bundle(str(folder), revision=revision, token=token) or folder
    folder = Path(folder)
    path = folder / BUNDLE_FILE
    if not os.path.isdir(folder):
        raise BundleError(f"{folder} is no folder and no bundle on the hub.")
    if is_pefts(folder) and not path.is_file():
        return _pefts(folder)
    if not path.is_file():
        raise BundleError(
            f"{folder} holds no {BUNDLE_FILE}, so it is not a bundle; `corolla tune` writes one."
        )
    try:
        content = load_object(path)
        version = content["format"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise BundleError(f"{path} cannot be read; copy the bundle again.") from error
    if version != FORMAT_VERSION:
        raise BundleError(
            f"{path} has format {version}, and this Corolla reads format {FORMAT_VERSION}: "
            "use the version that wrote it, or train again."
        )
    try:
        bundle = _from_content(content, folder)
    except (KeyError, TypeError, ValueError, AttributeError, CorollaError) as error:
        raise BundleError(f"{path} lacks or garbles what a bundle says; copy the bundle again.") from error
    _check_prompt(bundle, folder)
    return bundle


def _pefts(folder: Path) -> Bundle:
    """What can be said of a folder that peft alone has written, which does not say what exactly its base was."""
    about = read_pefts_info(folder)
    return Bundle(
        model=ModelInfo(str(about.get("base_model_name_or_path") or ""), "", about.get("revision")),
        mode=about["mode"],
        prompt_tokens=about.get("num_virtual_tokens") or 0,
        rendering=RenderSettings(style="auto"),
        stop={},
        training={"rank": about.get("r")},
        metrics={},
        sampling={},
        folder=folder,
    )


def _from_content(content: dict[str, Any], folder: Path) -> Bundle:
    model = content["model"]
    for name, kind in {"mode": str, "prompt_tokens": int, "stop": dict, "sampling": dict}.items():
        if not isinstance(content[name], kind):
            raise TypeError(name)
    return Bundle(
        model=ModelInfo(str(model["name"]), str(model["identity"]), model["revision"]),
        mode=content["mode"],
        prompt_tokens=content["prompt_tokens"],
        rendering=RenderSettings.from_dict(content["rendering"]),
        stop=content["stop"],
        training=dict(content["training"]),
        metrics=dict(content["metrics"]),
        sampling=content["sampling"],
        folder=folder,
    )


def _check_prompt(bundle: Bundle, folder: Path) -> None:
    about = read_prompt_info(folder)
    if about["identity"] != bundle.model.identity or about["mode"] != bundle.mode:
        raise BundleError(
            f"In {folder} the prompt is for {about['model']} and the bundle for {bundle.model.name}: "
            "files of two bundles are mixed; copy one of them again."
        )
    needed = (DEEP_WEIGHTS,) if bundle.mode == "deep_ptune" else (PEFT_WEIGHTS, PEFT_CONFIG)
    for name in needed:
        if not (folder / name).is_file():
            raise BundleError(f"{folder} lacks {name}; copy the bundle again.")


# --- the loss curve ----------------------------------------------------------------------------------------


def draw_curve(history: Sequence[dict[str, float]], path: Path, *, title: str) -> None:
    """Write a PNG of `history`, as in `save_bundle`; needs no display. Raises `OSError`."""
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
