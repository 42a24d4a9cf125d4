"""What a request takes beside weights and caches, and whether a server has it.

Invariant: an estimate is on the high side, and is made before anything is computed.
"""

from __future__ import annotations

from corolla.errors import RequestRefused
from corolla.models.attention.latent import MOST_EXPANDED
from corolla.models.attention.one_sequence import QUERY_TOKENS
from corolla.models.attention.one_token_rows import kernel_attends
from corolla.models.span import Span


def check_memory(needed: int, *, rows: int, tokens: int, limit: int) -> None:
    """That `rows` of `tokens` new tokens, for which `working_bytes` are `needed`, can be computed in `limit` bytes.

    Raises `RequestRefused` (too_large). Without it, one client's single long request would end the process:
    memory that the kernel takes back is no exception that could be answered.
    """
    if needed > limit:
        raise RequestRefused(
            f"Computing {rows} x {tokens} tokens here would take about {needed / 2**30:.1f} GiB of "
            f"{limit / 2**30:.1f}: send fewer rows or shorter sequences.",
            code="too_large",
            field="hidden",
        )


def working_bytes(
    span: Span,
    *,
    rows: int,
    tokens: int,
    total: int,
    with_gradients: bool,
    copied: int = 0,
    adapted: int = 0,
) -> int:
    """About what a computation takes beyond weights and cache; an estimate on the high side.

    Gradients keep every block's activations, and those of a backward come on top; otherwise one block's at a time
    are there. Attention code that writes its weights out takes rows x heads x tokens x total of them, or as many as
    there are of the queries that are computed at once (`one_sequence.py`), fused code only a mask, our kernel neither.
    `copied` are numbers of a prefix that each block puts before its sequences; code that cannot be packed has them in
    a cache, of all blocks at once. `adapted` are numbers that an adapter makes in a block.
    """
    size = span.dtype.itemsize
    blocks = span.end - span.start + 1 if with_gradients else 1
    numbers = 7 * max(span.hidden_size, span.heads * span.head_size) + span.width
    activations = rows * tokens * (numbers + 3 * span.experts * span.feed_forward_size) * size
    attention = _attention(span, rows, tokens, total, with_gradients)
    holding = blocks if span.packable else span.end - span.start + 1
    expanded = blocks * _expanded(span, tokens, total, copied, with_gradients) * size
    activations += adapted * max(4, size)
    return blocks * (activations + attention) + holding * copied * size + expanded


def _attention(span: Span, rows: int, tokens: int, total: int, with_gradients: bool) -> int:
    """Bytes that one block's scores and weights take, or a mask, or the copies that our kernel is given and makes."""
    size, in_parts = span.dtype.itemsize, span.packable and not with_gradients
    if in_parts and not span.latent_blocks and kernel_attends(span.dtype, span.device, span.head_size):
        return rows * span.heads * (total + 6 * tokens * span.head_size) * size
    if getattr(span.config, "_attn_implementation", "eager") != "eager":
        return rows * tokens * total * size
    # The products, masked ones, and their softmax, which is computed in float32 at least.
    queries, copies = (min(tokens, QUERY_TOKENS), 2) if in_parts else (tokens, 1)
    return rows * span.heads * queries * total * (copies * size + max(4, size))


def _expanded(span: Span, tokens: int, total: int, copied: int, with_gradients: bool) -> int:
    """Numbers that a block makes of latents: of one sequence after the other, or of all where a backward follows."""
    form = span.key_values
    if form is None or not form.expanded:
        return 0
    if with_gradients:
        return form.expanded * max(tokens, copied // form.width)
    return min(form.expanded * total, MOST_EXPANDED)
