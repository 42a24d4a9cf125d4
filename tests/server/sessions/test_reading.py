"""What a session's caches hold is read by its client, within what a server may have on its way."""

from __future__ import annotations

from tests.server.world import HIDDEN, forward, frame, limited, noise, opening, packed, until

from corolla.wire.messages import CacheContents, Failure, Opened, Output, ReadCache, Step

TOKENS, LARGE = 100, 800


async def test_an_answer_that_is_larger_than_its_request_is_counted() -> None:
    large = packed(noise(1, LARGE, HIDDEN))
    twice = 2 * large["hidden"].nbytes  # a request and its reply; half of all is a peer's share
    async with limited(200, bytes_in_flight=2 * twice + 4096) as world:
        account = world.server.limits.in_flight
        other, client = await world.raw(), await world.raw()
        assert (await client.ask(opening(tokens=TOKENS))).message == Opened()
        assert (await client.ask(Step(position=0), hidden=noise(1, TOKENS, HIDDEN))).message == Output()
        data = frame(forward(), **large)
        await other.stream.write([data[:-1]])
        await until(lambda: account.taken >= twice)
        refusal = (await client.ask(ReadCache(tokens=TOKENS))).message
        assert isinstance(refusal, Failure)
        assert refusal.code == "busy"
        await other.stream.write([data[-1:]])
        assert (await other.answer()).message == Output()
        await until(lambda: account.taken == 0)
        assert (await client.ask(ReadCache(tokens=TOKENS))).message == CacheContents()
        await until(lambda: account.taken == 0)
