"""A client process of the load test: many chats, or tuning, each on a thread of its own, until time is up.

    python -m tests.e2e.load_client MODEL ADDRESS SECONDS CHATS TUNING_MODE...

Prints one line of JSON when it is ready and begins at the next line on its stdin; then one with what it has
seen. Every token and every step is compared with the local model.
"""

from __future__ import annotations

import json
import random
import sys
import threading
import time
import traceback
from collections.abc import Callable
from typing import Any

import torch
from tests.reference import TIE, Prompted, local_model, relative

import corolla

TURNS = 4
REPLY = 12  # tokens
EXACT = 1e-4


class Reports:
    """What the threads have seen; any of them may write."""

    def __init__(self) -> None:
        self.local = threading.Lock()  # one comparison at a time: the local model serves all threads
        self.tokens: dict[str, int] = {}
        self.steps: dict[str, int] = {}
        self.ties = 0
        self.longest_wait = 0.0
        self.errors: list[str] = []

    def guard(self, name: str, work: Callable[[], None]) -> None:
        try:
            work()
        except BaseException:
            self.errors.append(f"{name}: {traceback.format_exc(limit=-4)}")


def chat(name: str, model: Any, local: Any, until: float, reports: Reports) -> None:
    """Conversations of a few turns, one after the other; each is compared when it is over."""
    choose = random.Random(name)
    reports.tokens[name] = 0
    while time.monotonic() < until:
        said: list[bool] = []  # which tokens are the model's
        with model.inference_session() as session:
            for _ in range(TURNS):
                ids = torch.tensor([[choose.randrange(3, 250) for _ in range(choose.randrange(3, 12))]])
                started = time.monotonic()
                model.generate(ids, max_new_tokens=REPLY, do_sample=False, session=session)
                reports.longest_wait = max(reports.longest_wait, time.monotonic() - started)
                reports.tokens[name] += REPLY
                said += [False] * ids.shape[1] + [True] * REPLY
            whole = session.output_ids
        with reports.local:
            compare(whole, said, local, reports)


@torch.no_grad()
def compare(ids: Any, said: list[bool], local: Any, reports: Reports) -> None:
    """Every token that the model said is the local model's best, or one of two within `TIE`."""
    places = torch.tensor([place - 1 for place, own in enumerate(said) if own])
    logits = local(ids).logits[0, places]
    behind = logits.max(-1).values - logits.gather(1, ids[0, places + 1, None])[:, 0]
    reports.ties += int(((behind > 0) & (behind <= TIE)).sum())
    if float(behind.max()) > TIE:
        raise AssertionError(f"a token is {float(behind.max()):.4f} behind the local model's best")


def tune(mode: str, model: Any, local: Any, until: float, reports: Reports) -> None:
    """Steps of prompt tuning; each loss and gradient is compared with the local model's at the same prompts."""
    generator = torch.Generator().manual_seed(7)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    reports.steps[mode] = 0
    while time.monotonic() < until:
        ids = torch.randint(3, 250, (6, 40), generator=generator)
        twin = Prompted(local, model.prompts.input, model.prompts.deep)
        optimizer.zero_grad()
        loss = model(ids, labels=ids).loss
        loss.backward()
        with reports.local:
            expected = twin.loss(ids, ids)
            expected.backward()
        assert abs(loss.item() - expected.item()) < EXACT
        assert relative(model.prompts.input.grad, twin.vectors.grad) < EXACT
        if twin.deep is not None:
            assert relative(model.prompts.deep.grad, twin.deep.grad) < EXACT
        optimizer.step()
        reports.steps[mode] += 1


def main(folder: str, address: str, seconds: float, chats: int, modes: list[str]) -> None:
    torch.set_num_threads(1)
    reports, local = Reports(), local_model(folder)

    def load(mode: str | None) -> Any:
        model = corolla.AutoDistributedModelForCausalLM.from_pretrained(
            folder, initial_peers=[address], tuning_mode=mode, pre_seq_len=4
        )
        model.generation_config.eos_token_id = None
        model.generation_config.pad_token_id = 0
        return model

    talker = load(None) if chats else None
    tuners = {mode: load(mode) for mode in modes}
    print(json.dumps({"ready": True}), flush=True)
    sys.stdin.readline()
    until = time.monotonic() + seconds
    prefix = f"{random.randrange(2**32):08x}"
    work: list[tuple[str, Callable[[], None]]] = [
        (name, lambda name=name: chat(name, talker, local, until, reports))  # type: ignore[misc]
        for name in (f"{prefix}-{number}" for number in range(chats))
    ]
    work += [
        (mode, lambda mode=mode: tune(mode, tuners[mode], local, until, reports))  # type: ignore[misc]
        for mode in modes
    ]
    threads = [threading.Thread(target=reports.guard, args=one) for one in work]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for model in [talker, *tuners.values()]:
        if model is not None:
            model.close()
    seen = {name: value for name, value in vars(reports).items() if name != "local"}
    print(json.dumps(seen), flush=True)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], float(sys.argv[3]), int(sys.argv[4]), sys.argv[5:])
