"""`corolla doctor`: does this machine, or its card, compute what it should, and how fast?"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated

import typer

from corolla.cli.common import set_up_libraries
from corolla.cli.terminal import say
from corolla.errors import CorollaError

if TYPE_CHECKING:
    from corolla.cli.checkup import Finding

# Some of all kinds: rotary and learned places, ALiBi, norms and windows, experts, latents, states, streams.
FAMILIES = (
    "llama", "qwen3", "gemma3_text", "gpt2", "bloom", "falcon", "phi3", "mixtral", "gpt_oss", "deepseek_v3",
    "qwen3_next", "gemma3n_text"
)  # fmt: skip
NO_MODEL = "none"


def doctor(
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1, …")] = "cpu",
    dtype: Annotated[str, typer.Option(help="Of the model whose speed is measured.")] = "float32",
    model: Annotated[
        str, typer.Option(help="Whose speed is measured, as for corolla serve; none for nobody's.")
    ] = "smollm2",
    family: Annotated[
        list[str] | None,
        typer.Option(
            help="Family that is compared, by its model_type; may be repeated (default: some of all kinds)."
        ),
    ] = None,
) -> None:
    """Compare what a device computes here, and how fast, with transformers on that device."""
    set_up_libraries()
    from corolla.cli.checkup import beside_transformers, compared, find_device, find_dtype

    found = find_device(device)
    find_dtype(dtype)  # before the families, which take a while
    say(f"Tiny models cut into spans, beside whole ones, on {device} in float32:")
    bad = _shown(compared(family or FAMILIES, found))
    if model != NO_MODEL:
        say(f"{model} through a server and a client, beside transformers alone, on {device} in {dtype}:")
        bad += _shown(beside_transformers(model, found, dtype))
    if bad:
        raise CorollaError(
            f"On {device} these are not as with transformers: {', '.join(bad)}. Do not serve there."
        )


def _shown(findings: Iterator[Finding]) -> list[str]:
    """Print each as it comes; gives the names of those that are not as they should be."""
    bad = []
    for one in findings:
        say(f"  {one.name:36} {one.said}")
        bad += [] if one.good else [one.name]
    return bad
