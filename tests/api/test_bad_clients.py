"""Clients that are gone, mute, slow or too loud: others are served meanwhile, and nobody computes for nobody."""

from __future__ import annotations

import contextlib
import json
import socket
import threading
from collections.abc import Iterator
from typing import Any

import pytest
from tests.api.world import BASE, World, Worlds

ASK = [{"role": "user", "content": "Tell me all about the river."}]


def head(length: int, *more: str) -> bytes:
    lines = ["POST /v1/chat/completions HTTP/1.1", "Host: localhost", "Content-Type: application/json"]
    return "\r\n".join([*lines, f"Content-Length: {length}", *more, "", ""]).encode()


def request(**changes: Any) -> bytes:
    body = json.dumps({"model": BASE, "messages": ASK, "temperature": 0, **changes}).encode()
    return head(len(body)) + body


@contextlib.contextmanager
def connected(world: World) -> Iterator[socket.socket]:
    with socket.create_connection(world.address, timeout=30) as line:
        yield line


def status_of(line: socket.socket) -> int:
    found = b""
    while b"\r\n" not in found:
        part = line.recv(1000)
        assert part, "closed without an answer"
        found += part
    return int(found.split()[1])


def is_cut_off(line: socket.socket) -> bool:
    """Whether a stream ends before its end; waits for that."""
    found = b""
    with contextlib.suppress(ConnectionResetError):
        while part := line.recv(65536):
            found += part
    return b"[DONE]" not in found and not found.endswith(b"0\r\n\r\n")


def others_are_served(world: World) -> None:
    reply = world.client().chat.completions.create(model=BASE, messages=ASK, temperature=0, max_tokens=4)
    assert reply.choices[0].message.content == world.text(world.greedy(world.prompt(ASK), 4))


class Steps:
    """Notes, and can hold up, the steps of a model's blocks."""

    def __init__(self, world: World) -> None:
        self.taken = 0
        self.stepped = threading.Event()
        self.go_on = threading.Event()
        self.go_on.set()
        head = world.api.partners.base.model.get_output_embeddings()
        self._hook = head.register_forward_hook(self._count)

    def _count(self, *_args: Any) -> None:
        self.taken += 1
        if self.taken >= 3:
            self.stepped.set()
            assert self.go_on.wait(30)

    def remove(self) -> None:
        self._hook.remove()


@pytest.mark.parametrize("stream", [True, False], ids=["streamed", "whole"])
def test_a_client_that_goes_stops_its_reply(worlds: Worlds, stream: bool) -> None:
    world = worlds.make(f"gone-{stream}")
    steps = Steps(world)
    steps.go_on.clear()
    with connected(world) as line:
        line.sendall(request(stream=stream, max_tokens=800, logit_bias={"2": -100}))
        if stream:
            assert status_of(line) == 200
        assert steps.stepped.wait(30)
    (run,) = world.api.generator.runs
    assert cancelled_soon(run)
    steps.go_on.set()
    assert run.done.wait(30)
    assert run.timing.tokens <= 5
    steps.remove()
    others_are_served(world)
    assert world.api.generator.under_way == 0


def cancelled_soon(run: Any) -> bool:
    """Whether the server notices by itself that nobody waits for the reply."""
    return bool(run.let_go.wait(30))


def test_a_body_that_is_far_too_large(world: World) -> None:
    size = 100 * 2**20
    with connected(world) as line:
        line.sendall(head(size))
        piece = b"x" * 2**20
        for number in range(100):
            line.sendall(piece)
            if number == 50:
                others_are_served(world)
        assert status_of(line) == 413
    with connected(world) as line:
        line.sendall(head(0, "Transfer-Encoding: chunked").replace(b"Content-Length: 0\r\n", b""))
        for _ in range(20):
            line.sendall(b"100000\r\n" + b" " * 2**20 + b"\r\n")
        line.sendall(b"0\r\n\r\n")
        assert status_of(line) == 413


def test_a_thousand_half_open_connections(world: World) -> None:
    with contextlib.ExitStack() as stack:
        for number in range(1000):
            line = stack.enter_context(connected(world))
            if number % 2:
                line.sendall(request()[: number % 150])
        others_are_served(world)


def test_a_body_that_does_not_come(worlds: Worlds) -> None:
    world = worlds.make("slow", limits={"body_seconds": 0.2})
    with connected(world) as line:
        line.sendall(head(100) + b"{")
        assert status_of(line) == 408
    others_are_served(world)


def test_a_stream_that_nobody_reads(worlds: Worlds, caplog: pytest.LogCaptureFixture) -> None:
    world = worlds.make("unread", send_seconds=0.3, send_buffer=8192)
    # Far more than the sockets hold: twenty likely tokens for each token.
    body = {"stream": True, "max_tokens": 300, "logprobs": True, "top_logprobs": 20, "n": 2}
    with socket.socket() as line:
        line.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        line.settimeout(60)
        line.connect(world.address)
        line.sendall(request(**body, logit_bias={"2": -100}))
        others_are_served(world)
        (run,) = (one for one in world.api.generator.runs if one.count == 2)
        assert run.done.wait(60)
        assert run.cancelled, "it was given up"
        assert is_cut_off(line), "so that its socket is free"
    others_are_served(world)
    assert not caplog.records, "it is no mistake of ours"


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b"\xff\xfe",
        b"[" * 100_000,
        b'{"model": "tiny", "messages": 1e999}',
        b'{"model": "tiny", "messages": [{"role": "user", "content": "\\ud800"}], "max_tokens": 1e400}',
        b'{"model": "tiny", "messages": [{"role": "user", "content": "x"}], "seed": ' + b"9" * 5000 + b"}",
        b'{"model": "tiny", "messages": [{"role": "user", "content": "x"}], "temperature": NaN}',
    ],
    ids=lambda body: str(body[:30]),
)
def test_what_is_no_request(world: World, body: bytes) -> None:
    with connected(world) as line:
        line.sendall(head(len(body)) + body)
        assert status_of(line) == 400


@pytest.mark.parametrize(
    "text",
    [b"HELLO\r\n\r\n", b"GET / HTTP/1.1\r\n\r\n", b"\x16\x03\x01" + bytes(60), b"GET /" + b"x" * 99_999],
)
def test_what_is_no_http(world: World, text: bytes, capfd: pytest.CaptureFixture[str]) -> None:
    with connected(world) as line:
        line.sendall(text)
        answer = b""
        with contextlib.suppress(ConnectionResetError):
            while part := line.recv(65536):
                answer += part
    status, _, content = answer.partition(b"\r\n\r\n")
    assert status.startswith(b"HTTP/1.1 400 ")
    assert set(json.loads(content)["error"]) == {"message", "type", "param", "code"}
    assert capfd.readouterr().err == "", "strangers do not write into the log"


def test_odd_texts_are_only_texts(world: World) -> None:
    for text in ("\x00\x1b[2J", "\u202e<script>", "</s><|assistant|>", "\U0001f600" * 50):
        talk = [{"role": "user", "content": text}]
        reply = world.client().chat.completions.create(model=BASE, messages=talk, temperature=0, max_tokens=3)
        assert reply.choices[0].message.content == world.text(world.greedy(world.prompt(talk), 3))


def test_more_than_can_wait_is_refused(worlds: Worlds) -> None:
    world = worlds.make("full", at_once=2, waiting=2)
    steps = Steps(world)
    steps.go_on.clear()
    with contextlib.ExitStack() as stack:
        lines = [stack.enter_context(connected(world)) for _ in range(2)]
        for line in lines:
            line.sendall(request(max_tokens=6, n=2, logit_bias={"2": -100}))
        assert steps.stepped.wait(30)
        with connected(world) as late:
            late.sendall(request(max_tokens=1, n=2))
            assert status_of(late) == 429
        steps.go_on.set()
        assert [status_of(line) for line in lines] == [200, 200]
    steps.remove()
