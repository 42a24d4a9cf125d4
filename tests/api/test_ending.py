"""A server that is told to end: what is under way comes to its end, what has none is ended, nothing more is begun."""

from __future__ import annotations

import http.client

from tests.api.world import BASE, Worlds


def test_an_endless_stream_does_not_hold_up_the_end(worlds: Worlds) -> None:
    world = worlds.make("ending")
    line = http.client.HTTPConnection(*world.address, timeout=30)
    line.request("GET", "/api/swarm/events")
    answer = line.getresponse()
    assert answer.readline().startswith(b"data: ")
    talk = [{"role": "user", "content": "At length, please."}]
    stream = world.client().chat.completions.create(
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
