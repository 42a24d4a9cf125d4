"""`README.md` of a bundle: what it is, what it is worth and how to use it, as the hub shows it.

Invariant: what comes from data or a model stands in fences that it cannot close.
"""

from __future__ import annotations

import html
import json
import re
from collections.abc import Mapping
from typing import Any

from corolla.models.checkpoints.prompt_files import PEFT_CONFIG
from corolla.text import one_line, printable
from corolla.tuning.described import Described
from corolla.tuning.report import again_command, chat_command, figures, replies, summary, verdict
from corolla.version import __version__

EXCHANGES = 3
HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")


def model_card(bundle: Described, base: str, place: str = "THIS_FOLDER") -> str:
    """Markdown with the hub's front matter.

    `base` is where the whole model can be loaded from, `place` what `corolla chat` is to be given.
    """
    name = _plain(bundle.model.name)
    prompts = f'"{place}"' if HUB_NAME.fullmatch(place) is None else f'corolla.load_bundle("{place}").folder'
    load = f'from_pretrained("{name}", initial_peers=[…], prompts={prompts})'
    rows = [
        f"| {row['name']} | {row['before']} | {row['after']} | {row['change']} |" for row in figures(bundle)
    ]
    lines = [
        *_front_matter(bundle),
        f"# {name}, tuned",
        "",
        f"A prompt ({_plain(summary(bundle))}) for the language model `{name}` (identity "
        f"{_plain(bundle.model.identity[:12])}), trained with Corolla {__version__}.",
        "",
        "| held-out conversations | before training | after | change |",
        "|---|---|---|---|",
        *rows,
        "",
        verdict(bundle.metrics),
        "",
        *_transcript(bundle.metrics),
        "## How to use it",
        "",
        "Through a swarm that serves this model:",
        "",
        _fenced(chat_command(place) + " --peers ADDRESS"),
        "",
        f"or `AutoDistributedModelForCausalLM.{load}`.",
        "",
        *_with_peft(bundle, base, place),
        "## How to make it again",
        "",
        _fenced(again_command(bundle)),
    ]
    return "\n".join(lines) + "\n"


def _front_matter(bundle: Described) -> list[str]:
    kind = {} if bundle.mode == "deep_ptune" else {"library_name": "peft"}
    base = {"base_model": bundle.model.name} if HUB_NAME.fullmatch(bundle.model.name) else {}
    fields = {**base, **kind, "tags": ["corolla", "prompt-tuning"], "pipeline_tag": "text-generation"}
    # JSON is YAML, whatever is in a name.
    return ["---", *(f"{name}: {json.dumps(value)}" for name, value in fields.items()), "---", ""]


def _with_peft(bundle: Described, base: str, place: str) -> list[str]:
    if bundle.mode == "deep_ptune":
        return []
    lines = [
        "On a machine that holds the whole model, with peft: "
        f'`PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(BASE), "{place}")`, or '
        f'`AutoPeftModelForCausalLM.from_pretrained("{place}")` where `base_model_name_or_path` of '
        f"{PEFT_CONFIG} names a model that can be loaded there.",
        "",
    ]
    name = _plain(bundle.model.name)
    if base != bundle.model.name:
        lines += [
            f"`{name}` is no name of the Hugging Face hub. Where Corolla can open it, "
            f'`corolla.load_tokenizer("{name}").name_or_path` is a folder with the same weights that '
            "everything else can load: use it as BASE.",
            "",
        ]
    return lines


def _transcript(metrics: Mapping[str, Any]) -> list[str]:
    said = []
    for one in replies(metrics)[:EXCHANGES]:
        said.append(f"You:  {one_line(one.get('said') or '')}")
        if one.get("base") is not None:
            said.append(f"Base: {one_line(one['base'])}")
        said += [f"Bot:  {one_line(one.get('reply') or '')}", ""]
    return ["Replies to held-out conversations:", "", _fenced("\n".join(said).rstrip()), ""] if said else []


def _plain(text: str) -> str:
    """One line that is neither Markdown's nor HTML's, but for a name's own dashes."""
    return html.escape(re.sub(r"[`*\\\[\]|]", "'", one_line(text)), quote=False)


def _fenced(text: str) -> str:
    text = printable(text)
    longest = max((len(run) for run in re.findall("`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}\n{text}\n{fence}"
