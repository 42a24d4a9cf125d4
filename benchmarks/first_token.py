"""Chat: how long the first token takes behind a prefix that the servers hold, beside one without a prefix.

Turns with and without are taken one after the other, through a swarm of two processes; each turn is a session of its
own with tokens of its own, so nothing but the prefix is known beforehand.

    python benchmarks/first_token.py --prefix-tokens 512
"""

from __future__ import annotations

import argparse
import time
from statistics import median

import torch

from corolla import AutoDistributedModelForCausalLM
from corolla.cli.common import set_up_libraries
from corolla.cli.local_swarm import local_swarm


def main() -> None:
    """Measure, and print one line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--prefix-tokens", type=int, default=512)
    parser.add_argument("--turn", type=int, default=32, help="tokens of a chat's first turn")
    parser.add_argument("--repeats", type=int, default=9)
    options = parser.parse_args()
    set_up_libraries()
    with (
        local_swarm(options.model) as swarm,
        AutoDistributedModelForCausalLM.from_pretrained(
            options.model,
            initial_peers=swarm.peers,
            tuning_mode="prefix",
            pre_seq_len=options.prefix_tokens,
        ) as model,
    ):
        prefix = model.prompts
        seconds: dict[bool, list[float]] = {False: [], True: []}
        for turn in range(2 * (2 + options.repeats)):
            prefixed = bool(turn % 2)
            model.prompts = prefix if prefixed else None
            ids = torch.randint(100, 10_000, (1, options.turn))
            begun = time.monotonic()
            with model.inference_session() as session:
                model.generate(ids, max_new_tokens=1, do_sample=False, session=session)
                took = time.monotonic() - begun
            if turn > 3:  # the first ones bring the prefix to the servers, and wake them
                seconds[prefixed].append(took)
    without, behind = (median(seconds[prefixed]) for prefixed in (False, True))
    print(
        f"first token of a chat of {options.turn} tokens: {1e3 * behind:.0f} ms behind a prefix of "
        f"{options.prefix_tokens}, {1e3 * without:.0f} ms without: {behind / without:.2f} times"
    )


if __name__ == "__main__":
    main()
