"""The arguments of a base model's forward, by name, as they are changed before its own code runs."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from corolla.errors import UsageError
from corolla.models import prompts as prompt_math
from corolla.models.attention.padding_free import FlatRows
from corolla.models.prompts import SoftPrompt


def shape(named: dict[str, Any], *, may_be_empty: bool = False) -> tuple[int, int]:
    """Rows and tokens of a call. `may_be_empty` allows none: of a prompt alone (`front.py`)."""
    ids, embeddings = named.get("input_ids"), named.get("inputs_embeds")
    shaped = ids if ids is not None else embeddings
    if (
        not isinstance(shaped, Tensor)
        or shaped.ndim != (2 if ids is not None else 3)
        or not (may_be_empty or (shaped.shape[0] and shaped.shape[1]))
    ):
        raise UsageError(
            "Give the model input_ids [rows, tokens] or inputs_embeds [rows, tokens, hidden size], of at least one "
            "token."
        )
    return int(shaped.shape[0]), int(shaped.shape[1])


def split(named: dict[str, Any], flat: FlatRows) -> None:
    """One sequence a row, and padding behind the shorter ones."""
    for name in ("input_ids", "inputs_embeds", "position_ids"):
        value = named.get(name)
        if value is not None:
            whole = value.expand(flat.shape) if name == "position_ids" else value
            named[name] = flat.split(whole)
            device = value.device
    named["attention_mask"] = flat.mask().to(device)


def place_prompt(base: nn.Module, named: dict[str, Any], prompt: SoftPrompt, *, prepend: bool) -> None:
    """Rewrite the base model's arguments for a prompt that comes before the user's first token."""
    mask, positions = named.get("attention_mask"), named.get("position_ids")
    if mask is not None:
        named["attention_mask"] = prompt_math.prepend_mask(mask, prompt.length)
    if not prepend:
        if positions is not None:
            named["position_ids"] = positions + prompt.length
        return
    embeddings = named.get("inputs_embeds")
    if embeddings is None:
        embeddings = base.get_input_embeddings()(named["input_ids"])  # type: ignore[operator]
    named["inputs_embeds"] = prompt_math.prepend(embeddings, prompt.input)
    named["input_ids"] = None
    if positions is not None:
        rows = positions.expand(embeddings.shape[0], -1)
        named["position_ids"] = prompt_math.prepend_positions(rows, prompt.length)
