"""Stability: what becomes of runs at learning rates from far too low to far too high, each with several seeds.

Runs through a swarm of two processes, with the data of `corolla tune`; for each mode and rate prints the held-out loss
of the replies before and after, how often a run went back, and whether it ended better than it began.

    python benchmarks/rates.py --modes ptune --rates 1e-3 1e-2 1e-1 --seeds 3 --steps 20
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

from corolla import (
    AutoDistributedModelForCausalLM,
    TuneSettings,
    load_conversations,
    load_tokenizer,
    prepare,
    tune,
)
from corolla.cli.common import set_up_libraries
from corolla.cli.local_swarm import local_swarm
from corolla.data.render import RenderSettings
from corolla.tuning.bundle import load_bundle
from corolla.tuning.tune import TuneResult

PROMPT_TOKENS = 16


def main() -> None:
    """Run all and print a line for each."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--data", default="chitchat")
    parser.add_argument("--modes", nargs="+", default=["ptune", "deep_ptune", "prefix"])
    parser.add_argument("--rates", nargs="+", type=float, default=[1e-3, 1e-2, 3e-2, 1e-1])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--max-length", type=int, default=96)
    parser.add_argument("--held-out", type=int, default=32)
    options = parser.parse_args()
    set_up_libraries()
    tokenizer, conversations = load_tokenizer(options.model), load_conversations(options.data)[0]
    with local_swarm(options.model) as swarm, tempfile.TemporaryDirectory() as temporary:
        for mode in options.modes:
            for rate in options.rates:
                for seed in range(options.seeds):
                    settings = TuneSettings(
                        learning_rate=rate,
                        steps=options.steps,
                        batch_size=options.batch_size,
                        seed=seed,
                        held_out=options.held_out,
                        held_out_samples=options.held_out,
                        eval_every=max(1, options.steps // 4),
                        keep="last",  # what becomes of the run, not of the bundle
                        rendering=RenderSettings(style="auto", max_length=options.max_length),
                    )
                    with AutoDistributedModelForCausalLM.from_pretrained(
                        options.model,
                        initial_peers=swarm.peers,
                        tuning_mode=mode,
                        pre_seq_len=PROMPT_TOKENS,
                        seed=seed,
                    ) as model:
                        prepared = prepare(tokenizer, settings, conversations)
                        out = Path(temporary, f"{mode}-{rate}-{seed}")
                        result = tune(model, settings, prepared, out)
                    assert isinstance(result, TuneResult)
                    before, after = result.before.reply_loss, result.after.reply_loss
                    print(
                        f"{mode:10} rate {rate:<7g} seed {seed}  {before:.3f} -> {after:.3f}  "
                        f"went back {load_bundle(out).metrics['fell_back']} times  "
                        f"{'better' if after < before else 'NOT better'}",
                        flush=True,
                    )


if __name__ == "__main__":
    main()
