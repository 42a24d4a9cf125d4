"""The whole table, and docs/compatibility.md as it says it."""

from __future__ import annotations

from importlib import import_module

from tests.client.ways.table import COLUMNS, WAYS

# In the document's order; each adds its rows when it is imported.
SECTIONS = (
    "forward",
    "losses",
    "loops",
    "generate",
    "generate_more",
    "sessions",
    "libraries",
    "trainers",
    "adapters",
)
for _name in SECTIONS:
    import_module(f"tests.client.ways.{_name}")


def document() -> str:
    """docs/compatibility.md."""
    head = (
        "# Which calls work\n\n"
        "Every public way to call a distributed model either equals the local Hugging Face model, or is refused in\n"
        "one sentence before anything is computed. `tests/client/test_ways_in.py` tries each row in each column, on\n"
        "models of several families, and this page is written from the same table\n"
        "(`python -m tests.client.ways`). “=”: equal (tokens, or logits and losses within 1e-4 in float32). The\n"
        'columns: without a prompt, with `tuning_mode="ptune"`, with `"deep_ptune"`, with `"prefix"`, and wrapped by\n'
        "peft (`get_peft_model(model, PromptTuningConfig(…))`). “-”: not peft's to do.\n\n"
        "Rows of `lm_eval` are tried every night, where it is installed. With transformers 5.24, peft up to 0.21 is\n"
        "wrong in `generate` on a local model (it looks for the cache under its former name and puts its prompt in\n"
        "front of every token); on a distributed model it finds the cache, and is as with earlier releases.\n"
    )
    lines, section = [head], ""
    for one in WAYS:
        if one.section != section:
            section = one.section
            lines += [
                f"\n## {section}\n",
                f"| call | {' | '.join(COLUMNS)} | |",
                "|---|" + "---|" * (len(COLUMNS) + 1),
            ]
        cells, notes = [], [one.note] if one.note else []
        for column in COLUMNS:
            sentence = one.sentence(column)
            cells.append("=" if sentence is None else "-" if not sentence else "refused")
            if sentence:
                quoted = f"“{sentence} …”"
                notes += [] if quoted in notes else [quoted]
        lines.append(f"| {one.name} | {' | '.join(cells)} | {'; '.join(notes)} |")
    return "\n".join(lines) + "\n"
