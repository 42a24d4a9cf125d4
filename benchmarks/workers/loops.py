"""The demo's batches, for the distributed model and for the local one; other loops are `corolla.cli.measure`'s.

Invariant: both sides of a ratio get the same batches.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from functools import partial

from torch import Tensor

from benchmarks.sizes import DEMO
from corolla.cli.measure import Step


def demo_batches(count: int) -> list[dict[str, Tensor]]:
    """The first batches of a shuffled epoch of what `corolla demo` trains on, from the real collator."""
    from transformers import AutoTokenizer

    from corolla.data.render import RenderSettings
    from corolla.data.sources import load_conversations
    from corolla.models.checkpoints.checkpoint import open_checkpoint
    from corolla.tuning.batches import prepare
    from corolla.tuning.settings import TuneSettings

    settings = TuneSettings(
        steps=DEMO.steps,
        batch_size=DEMO.batch,
        held_out=DEMO.held_out,
        held_out_samples=DEMO.held_out,
        rendering=RenderSettings(max_length=DEMO.max_length),
    )
    tokenizer = AutoTokenizer.from_pretrained(open_checkpoint("smollm2").source.location)
    prepared = prepare(tokenizer, settings, load_conversations("chitchat")[0])
    order = random.Random(0).sample(prepared.train, len(prepared.train))
    return [prepared.batches(order[i * DEMO.batch : (i + 1) * DEMO.batch]) for i in range(count)]


def over_batches(
    step: Step, batches: Sequence[dict[str, Tensor]], loss: Callable[[dict[str, Tensor]], Tensor]
) -> float:
    """Real tokens/s over the batches: padding does not count, the time that it takes does."""
    seconds = 0.0
    for batch in batches:
        seconds += step.seconds(partial(loss, batch))
    return float(sum(int(batch["attention_mask"].sum()) for batch in batches) / seconds)
