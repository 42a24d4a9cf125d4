"""A server that is told to end: what is under way comes to its end, what has none is ended, nothing more is begun."""

from __future__ import annotations

import http.client
import json
import socket
import time
from typing import Any

import pytest
from tests.api.test_bad_clients import is_cut_off
from tests.api.world import BASE, World, Worlds


def test_an_endless_stream_does_not_hold_up_the_end(worlds: Worlds) -> None:
    world = worlds.make("ending")
    line = http.client.HTTPConnection(*world.address, timeout=30)
    line.request("GET", "/api/swarm/events")
    answer = line.getresponse()
    assert answer.readline().startswith(b"data: ")
    talk = [{"role": "user", "content": "At length, please."}]
    stream: Any = world.client().chat.completions.create(
        model=BASE, messages=talk, temperature=0, max_tokens=30, stream=True
    )
    text = next(iter(stream)).choices[0].delta.content or ""
    world.running.stop()
    text += "".join(chunk.choices[0].delta.content or "" for chunk in stream)
    assert text == world.text(world.greedy(world.prompt(talk), 30))
    assert answer.read() is not None, "the endless stream has an end"
    line.close()
    world.running.close()
    assert world.api.generator.draining
    assert world.api.generator.pool.count == 0


def long_stream(world: World) -> socket.socket:
    """A client that has asked for more than sockets hold, and reads nothing of it."""
    about = {
        "stream": True,
        "max_tokens": 900,
        "logprobs": True,
        "top_logprobs": 20,
        "logit_bias": {"2": -100},
    }
    body = json.dumps({"model": BASE, "messages": [{"role": "user", "content": "On"}], **about}).encode()
    line = socket.socket()
    line.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    line.settimeout(60)
    line.connect(world.address)
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n"
    line.sendall(f"{head}Content-Type: application/json\r\n\r\n".encode() + body)
    assert line.recv(12) == b"HTTP/1.1 200"
    return line


@pytest.mark.parametrize("asked", [True, False], ids=["second", "alone"])
def test_whoever_is_served_is_cut_off_by_a_second_ctrl_c(
    worlds: Worlds, caplog: pytest.LogCaptureFixture, asked: bool
) -> None:
    world = worlds.make(f"ending at once {asked}", send_buffer=8192)
    with long_stream(world) as mute, long_stream(world) as reader:
        runs = world.api.generator.runs
        assert len(runs) == 2
        if asked:
            world.running.stop()
        began = time.monotonic()
        world.running.stop_at_once()
        assert is_cut_off(reader)
        world.running.wait()
        assert time.monotonic() - began < 20, "nobody waits for clients"
        assert is_cut_off(mute)
    assert all(run.done.is_set() and run.cancelled for run in runs)
    assert world.api.generator.pool.count == 0
    assert not caplog.records, "no tracebacks"
