"""What the API costs, over a swarm of two server processes with SmolLM2-135M on this machine.

    python -m benchmarks.api [--streams 8 32] [--repeats 3] [--llama PYTHON] [--first]

--streams: total tokens/s of so many streams of the API, beside what the same sessions get from one Python client on
that swarm, in turns; the replies must be the same, token by token. --llama: beside llama.cpp's own server on the same
GGUF too, by a Python that has llama-cpp-python[server]. --first: the time to the first token of a conversation that
goes on with 2,000 tokens behind it, beside that of a new one with as many new tokens, of a short message and of a
longer one. It says how much arithmetic there is behind the 2,000 tokens beside that of the new ones alone: in a narrow
model attention is much of it.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch

from corolla.cli.local_swarm import local_swarm
from corolla.client.model.causal_lm import AutoDistributedModelForCausalLM
from corolla.client.model.loading import load_tokenizer
from corolla.models.checkpoints.gguf import embedded_gguf

MODEL = "smollm2"
TOKENS = 32  # of a reply
BEHIND, TURNS = 2000, 7  # tokens of the conversation that goes on, and how often each is measured
LENGTHS = {"a short message": 0, "a longer one": 1}  # in sentences
SENTENCE = "The harbour lies in the rain, and nobody is there but the lamp. "
MAIN = "from corolla.cli.main import main; main()"


@contextlib.contextmanager
def api(peers: Sequence[str]) -> Iterator[str]:
    """The URL of an API over that swarm, in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        ready = Path(folder) / "ready.json"
        kept = ("--ready-file", str(ready), "--conversations", str(Path(folder) / "kept.sqlite3"))
        joined = [word for peer in peers for word in ("--peers", peer)]
        command = [sys.executable, "-c", MAIN, "api", "--port", "0", *joined, *kept, "--die-with-parent"]
        process = subprocess.Popen([*command, MODEL], stdin=subprocess.PIPE, stdout=subprocess.DEVNULL)
        try:
            while not ready.exists():
                assert process.poll() is None
                time.sleep(0.05)
            yield json.loads(ready.read_text())["url"]
        finally:
            process.terminate()
            process.wait(60)


@contextlib.contextmanager
def llama_server(python: str) -> Iterator[str]:
    """The URL of llama.cpp's own server, on the same file."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    options: dict[str, object] = {
        "model": embedded_gguf(),
        "port": port,
        "n_ctx": 1024,
        "n_threads": os.cpu_count(),
    }
    # By default a new request ends the one that is under way.
    options |= {"interrupt_requests": False, "verbose": False}
    words = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    process = subprocess.Popen(
        [python, "-m", "llama_cpp.server", *words], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        while True:
            assert process.poll() is None
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port)):
                break
            time.sleep(0.1)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait(60)


async def stream(url: str, model: str, messages: Sequence[Any], most: int) -> tuple[float, str, Any]:
    """Seconds to the first text, the text, and the usage. By hand, so that nothing of the CPU is spent here."""
    host, _, port = url.removeprefix("http://").partition(":")
    asked = {"model": model, "messages": messages, "max_tokens": most, "temperature": 0, "stream": True}
    body = json.dumps(asked | {"stream_options": {"include_usage": True}}).encode()
    head = "POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    reader, writer = await asyncio.open_connection(host, int(port), limit=2**20)
    began, first, text, usage, pieces = time.perf_counter(), 0.0, "", None, 0
    writer.write(f"{head}Content-Length: {len(body)}\r\nConnection: close\r\n\r\n".encode() + body)
    async for line in reader:
        if line.startswith(b"data: [DONE]"):  # not every server closes the connection then
            break
        if line.startswith(b"data: {"):
            chunk = json.loads(line[6:])
            usage = chunk.get("usage") or usage
            said = (chunk["choices"][0]["delta"].get("content") or "") if chunk["choices"] else ""
            first = first or (time.perf_counter() - began if said else 0.0)
            text, pieces = text + said, pieces + bool(said)
    writer.close()
    # llama.cpp's server tells no usage in a stream, which has a piece for each token.
    return first, text, usage or {"completion_tokens": pieces}


def talks(count: int, turn: int) -> list[list[dict[str, str]]]:
    """So many short chats, none like another, nor like one of another turn: what was kept of those would be known."""
    words = "Tell me {} things about the number {}."
    return [[{"role": "user", "content": words.format(n + 3, 1000 * turn + n)}] for n in range(count)]


async def streams(url: str, model: str, count: int, turn: int) -> tuple[float, list[str]]:
    """Tokens/s in all, and the replies."""
    began = time.perf_counter()
    found = await asyncio.gather(*(stream(url, model, talk, TOKENS) for talk in talks(count, turn)))
    seconds = time.perf_counter() - began
    return sum(usage["completion_tokens"] for _, _, usage in found) / seconds, [text for _, text, _ in found]


def sessions(model: Any, tokenizer: Any, count: int, turn: int) -> tuple[float, list[str]]:
    """The same from one Python client, a thread each."""
    prompts = [
        tokenizer.apply_chat_template(talk, tokenize=False, add_generation_prompt=True)
        for talk in talks(count, turn)
    ]

    def one(prompt: str) -> tuple[int, str]:
        ids = torch.tensor([tokenizer(prompt, add_special_tokens=False).input_ids])
        with model.inference_session(max_length=512) as session:
            said = model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                session=session,
                max_new_tokens=TOKENS,
                do_sample=False,
            )[0, ids.shape[1] :]
        return len(said), tokenizer.decode(said, skip_special_tokens=True)

    with ThreadPoolExecutor(count) as pool:
        began = time.perf_counter()
        found = list(pool.map(one, prompts))
        seconds = time.perf_counter() - began
    return sum(tokens for tokens, _ in found) / seconds, [text for _, text in found]


def compare_streams(
    url: str, peers: Sequence[str], counts: Sequence[int], repeats: int, beside: str | None
) -> None:
    """Print the rates."""
    tokenizer = load_tokenizer(MODEL)
    with AutoDistributedModelForCausalLM.from_pretrained(MODEL, initial_peers=list(peers)) as model:
        for count in counts:
            ours, own, others = [], [], []
            for turn in range(repeats + 1):
                many = count if turn else min(count, 8)  # the first warms up
                rate, texts = asyncio.run(streams(url, MODEL, many, turn))
                python, expected = sessions(model, tokenizer, many, turn)
                assert texts == expected, "the API says something else"
                if turn:
                    ours.append(rate)
                    own.append(python)
                    if beside:
                        others.append(asyncio.run(streams(beside, MODEL, count, turn))[0])
            print(
                f"{count} streams: {median(ours):.1f} tokens/s; one Python client {median(own):.1f}: "
                f"{median(ours) / median(own):.2f} (bar 0.9)",
                flush=True,
            )
            if others:
                print(
                    f"  llama.cpp's server: {median(others):.1f}: {median(ours) / median(others):.2f}",
                    flush=True,
                )


@dataclass(frozen=True)
class Firsts:
    """Seconds to the first token, and how many tokens were new, of turns that go on and of new chats."""

    goes_on: list[float]
    new: list[float]
    known: int  # tokens of the conversation at the end
    news: int  # of a turn


async def first_tokens(url: str, model: str, tokenizer: Any, sentences: int) -> Firsts:
    """Of turns of so many sentences."""
    talk: list[dict[str, str]] = [{"role": "user", "content": SENTENCE * (BEHIND // 15)}]
    _, said, usage = await stream(url, model, talk, 4)
    assert usage["prompt_tokens"] > BEHIND
    goes_on, new, news, known = [], [], 0, 0
    for turn in range(TURNS):
        asked = f"{turn}: {SENTENCE * sentences}" if sentences else f"Why {turn}?"
        talk += [{"role": "assistant", "content": said}, {"role": "user", "content": asked}]
        seconds, said, usage = await stream(url, model, talk, 4)
        known = usage["prompt_tokens_details"]["cached_tokens"]
        news = usage["prompt_tokens"] - known
        assert known > BEHIND
        goes_on.append(seconds)
        # Nothing of it is known, not from other turns either, but for the tokens with which all chats begin.
        start = f"{chr(ord('A') + turn + TURNS * sentences)}{turn} {SENTENCE * 20}"
        fresh = [{"role": "user", "content": clipped(tokenizer, start, news - 6)}]
        seconds, _, usage = await stream(url, model, fresh, 4)
        own = usage["prompt_tokens"] - usage["prompt_tokens_details"]["cached_tokens"]
        if turn:  # all of the first one is new
            assert abs(own - news) <= 3, (own, news)
        new.append(seconds)
    return Firsts(goes_on[1:], new[1:], known, news)


def arithmetic(config: Any, news: int, behind: int) -> float:
    """Multiply-adds of `news` tokens behind `behind` others in all blocks."""
    width = config.head_dim * config.num_attention_heads
    kept = config.head_dim * config.num_key_value_heads
    products = config.hidden_size * (2 * width + 2 * kept + 3 * config.intermediate_size)
    attention = 2 * width * (behind + (news + 1) / 2)
    return float(config.num_hidden_layers * news * (products + attention))


def compare_firsts(url: str, model: Any, tokenizer: Any) -> None:
    """Print the times."""
    for what, sentences in LENGTHS.items():
        found = asyncio.run(first_tokens(url, MODEL, tokenizer, sentences))
        behind, alone = median(found.goes_on), median(found.new)
        # What stands before every chat is behind the new one too.
        work, own = (arithmetic(model.config, found.news, known) for known in (found.known, 24))
        print(
            f"first token, {what} ({found.news} new tokens), {found.known} behind: {behind:.3f} s; a new chat "
            f"of as many {alone:.3f} s: {behind / alone:.2f} (bar 1.3). Arithmetic {2 * work / 1e9:.1f} and "
            f"{2 * own / 1e9:.1f} G: {work / own:.2f}",
            flush=True,
        )
        behind, alone = python_first(model, found.news)
        print(f"  the same from Python: {behind:.3f} s and {alone:.3f} s: {behind / alone:.2f}", flush=True)


@torch.no_grad()
def python_first(model: Any, news: int) -> tuple[float, float]:
    """The same two from a Python client: seconds to a token behind `news` new ones, with and without 2,000 behind."""
    goes_on, new = [], []
    ids = torch.randint(100, 40_000, (1, BEHIND + news * TURNS), generator=torch.Generator().manual_seed(1))

    def once(session: Any, first: int, last: int) -> float:
        began = time.perf_counter()
        mask = torch.ones(1, last, dtype=torch.long)
        model.generate(
            ids[:, first:last], attention_mask=mask, session=session, max_new_tokens=1, do_sample=False
        )
        return time.perf_counter() - began

    with model.inference_session(max_length=4096) as session:
        once(session, 0, BEHIND)
        for turn in range(TURNS):
            session.position = BEHIND + turn * news
            goes_on.append(once(session, session.position, session.position + news))
            with model.inference_session(max_length=512) as fresh:
                new.append(once(fresh, 0, news))
    return median(goes_on[1:]), median(new[1:])


def clipped(tokenizer: Any, text: str, tokens: int) -> str:
    """Its first tokens."""
    return str(tokenizer.decode(tokenizer(text, add_special_tokens=False).input_ids[:tokens]))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--streams", type=int, nargs="*", default=[])
    parser.add_argument("--first", action="store_true")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--llama", metavar="PYTHON", help="one that has llama-cpp-python[server]")
    chosen = parser.parse_args()
    with local_swarm(MODEL) as swarm, api(swarm.peers) as url:
        if chosen.first:
            peers = list(swarm.peers)
            with AutoDistributedModelForCausalLM.from_pretrained(MODEL, initial_peers=peers) as model:
                compare_firsts(url, model, load_tokenizer(MODEL))
        if chosen.streams:
            with contextlib.ExitStack() as stack:
                beside = stack.enter_context(llama_server(chosen.llama)) if chosen.llama else None
                compare_streams(url, swarm.peers, chosen.streams, chosen.repeats, beside)


if __name__ == "__main__":
    main()
