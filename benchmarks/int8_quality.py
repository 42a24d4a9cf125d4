"""What 8-bit weights cost in held-out loss: SmolLM2 on the replies of chitchat, without a swarm.

Variants: float32; int8 blocks with activations in one and in two pieces (by fbgemm, as where there is neither a C
compiler nor VNNI); int8 blocks and head, with the embedding in 16 bit. The same replies for all, so differences are
paired by conversation.

    python benchmarks/int8_quality.py --held-out 200
"""

from __future__ import annotations

import argparse
import json
import time
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from corolla.cli.common import set_up_libraries
from corolla.data.render import RenderSettings
from corolla.data.sources import load_conversations
from corolla.models.checkpoints.checkpoint import open_checkpoint
from corolla.models.kernels.apply import pack_linears, weight_bytes
from corolla.models.kernels.client import quantize_client
from corolla.tuning.batches import Prepared, prepare
from corolla.tuning.evaluate import Evaluation, compare, evaluate
from corolla.tuning.settings import TuneSettings

# name -> (blocks in int8, head in int8, pieces of an activation in blocks)
VARIANTS = {
    "fp32": (False, False, 1),
    "fp32 packed": (False, False, 1),
    "int8 blocks": (True, False, 1),
    "int8 blocks, 2 pieces": (True, False, 2),
    "int8 blocks+head": (True, True, 1),
}


class Evaluated(nn.Module):
    """A base model and a head's product behind the interface that `evaluate` uses."""

    def __init__(self, model: Any, product: Any) -> None:
        super().__init__()
        self.base = model.model
        self.product = [product]
        self.device = model.device

    def forward(self, *, input_ids: Tensor, attention_mask: Tensor, logits_to_keep: Tensor, **_: Any) -> Any:
        """Logits [n, V] of the positions that are to be kept."""
        output = self.base(input_ids=input_ids, attention_mask=attention_mask, use_cache=False)
        return SimpleNamespace(logits=self.product[0](output.last_hidden_state[logits_to_keep]))


def load(source: Any, variant: str) -> Evaluated:
    """The model with the kernels of one of `VARIANTS`."""
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval().requires_grad_(False)
    product: Any = model.lm_head
    blocks, head, pieces = VARIANTS[variant]
    if variant != "fp32":
        pack_linears(model.model, quantization="int8" if blocks else "none", pieces=pieces)
        product = quantize_client(model, "int8" if head else "none")
    return Evaluated(model, product)


def held_out(model_name: str, data: str, count: int, max_length: int, seed: int) -> tuple[Any, Prepared]:
    """Where the model's files are, and the examples of `count` held-out conversations."""
    settings = TuneSettings(
        steps=1,
        held_out=count,
        held_out_samples=count,
        seed=seed,
        rendering=RenderSettings(max_length=max_length),
    )
    source = open_checkpoint(model_name).source.location
    tokenizer = AutoTokenizer.from_pretrained(source)
    conversations, _ = load_conversations(data)
    return source, prepare(tokenizer, settings, conversations)


def main() -> None:
    """Evaluate every variant on the same examples; print a JSON line for each."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--data", default="chitchat")
    parser.add_argument("--held-out", type=int, default=200)
    parser.add_argument("--max-length", type=int, default=96)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    set_up_libraries()
    source, prepared = held_out(
        options.model, options.data, options.held_out, options.max_length, options.seed
    )
    plain: Evaluation | None = None
    for variant in VARIANTS:
        model = load(source, variant)
        begun = time.perf_counter()
        found = evaluate(model, prepared.held_out, prepared.batches, 8)
        seconds = time.perf_counter() - begun
        plain = plain or found
        change = compare(plain, found, seed=options.seed)
        line = {
            "variant": variant,
            "reply_loss": round(found.reply_loss, 5),
            "change": round(change.mean, 5),
            "interval": [None if one is None else round(one, 5) for one in (change.low, change.high)],
            "conversations": found.conversations,
            "block_bytes": weight_bytes(model.base.layers),
            "seconds": round(seconds, 1),
        }
        print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
