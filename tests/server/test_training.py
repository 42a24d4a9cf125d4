"""Kept graphs: what may be kept, whose it is, how long; and that nothing but time depends on them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.reference import relative
from tests.server.world import (
    BLOCKS,
    END,
    HIDDEN,
    START,
    Clock,
    OneServer,
    backward,
    forward,
    noise,
    packed,
    span_of,
)
from torch import Tensor

from corolla.errors import RequestRefused
from corolla.models.lora import width
from corolla.models.prompts import as_tensor
from corolla.server import block_server
from corolla.server.memory import working_bytes
from corolla.server.peers import LEASE_SECONDS, Lease, Leases
from corolla.server.training import Saved, Sequences
from corolla.swarm.channel import Channel, request
from corolla.wire.frames import Packet
from corolla.wire.messages import Failure

NAME, OTHER = "a-lease-of-mine-", "another-of-mine-"
HIDDENS, GRAD = noise(2, 7, HIDDEN, seed=1), noise(2, 7, HIDDEN, seed=2)
PROMPTS = noise(BLOCKS, 3, HIDDEN, seed=3)


# --- the shelf ---------------------------------------------------------------------------------------------


def lease(nbytes: int = 10) -> Lease:
    return Lease((0, 1), torch.zeros(1), torch.zeros(1), {}, nbytes, tokens=1)


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def leases(clock: Clock) -> Leases:
    return Leases(30, clock)


def test_a_lease_is_taken_once_and_by_its_peer_alone(leases: Leases) -> None:
    mine, theirs = lease(), lease()
    leases.keep("me", NAME, mine)
    leases.keep("them", NAME, theirs)
    assert leases.take("me", OTHER) is None
    assert leases.take("somebody else", NAME) is None
    assert leases.take("me", NAME) is mine
    assert leases.take("me", NAME) is None
    assert leases.take("them", NAME) is theirs
    assert (len(leases), leases.held) == (0, 0)


def test_the_budget_is_kept_at_the_expense_of_the_oldest(leases: Leases) -> None:
    for name, nbytes in (("first", 10), ("second", 15), ("third", 5)):
        leases.keep("me", name, lease(nbytes))
    assert leases.held == 30
    leases.keep("them", "fourth", lease(11))  # the first and the second one go
    assert (leases.held, len(leases)) == (16, 2)
    assert leases.take("me", "first") is leases.take("me", "second") is None
    assert leases.take("me", "third") is not None
    leases.keep("me", "too large", lease(31))
    assert leases.take("me", "too large") is None
    assert leases.take("them", "fourth") is not None  # nobody had to go for it
    assert leases.held == 0


def test_a_name_used_again_means_the_newer_one(leases: Leases) -> None:
    newer = lease(20)
    leases.keep("me", NAME, lease(20))
    leases.keep("me", NAME, newer)
    assert (len(leases), leases.held) == (1, 20)
    assert leases.take("me", NAME) is newer


def test_leases_run_out(leases: Leases, clock: Clock) -> None:
    leases.keep("me", "early", lease())
    clock.now = LEASE_SECONDS - 1
    leases.keep("me", "late", lease())
    leases.expire()
    assert len(leases) == 2
    clock.now = LEASE_SECONDS
    assert leases.take("me", "early") is None
    assert leases.held == 10
    clock.now = 2 * LEASE_SECONDS
    leases.expire()
    assert (len(leases), leases.held) == (0, 0)


def test_what_a_graph_keeps_is_counted_once_and_weights_not_at_all() -> None:
    weight = torch.nn.Parameter(torch.ones(100, 8), requires_grad=False)
    hidden = torch.ones(5, 8, requires_grad=True)
    saved = Saved([weight])
    with saved.counting():
        squared = hidden * hidden
        product = squared @ weight.T  # a graph keeps the weight's view, which is nobody's own
        product.sin().view(10, 50)[1:].cos().sum()
    of_hidden, of_product = hidden.nbytes, product.nbytes
    assert saved.nbytes == of_hidden + 2 * of_product  # the squares need not be kept; the view adds nothing


# --- over the wire -----------------------------------------------------------------------------------------


async def gradients(channel: Channel, lease: str | None, **changes: Tensor) -> dict[str, Tensor]:
    """Of the blocks' outputs, with `GRAD`; from the inputs when no lease is given."""
    tensors = (
        packed(HIDDENS, grad=GRAD, prompts=PROMPTS) if lease is None else {"grad": packed(GRAD)["hidden"]}
    )
    message = backward(prompt_gradient=True, lease=lease)
    return (await request(channel, Packet(message, tensors | changes))).tensors


async def lend(channel: Channel, name: str = NAME, hidden: Tensor = HIDDENS, **changes: Any) -> Tensor:
    sent = packed(hidden, prompts=PROMPTS)
    reply = await request(channel, Packet(forward(lease=name, **changes), sent))
    return reply.tensors["hidden"]


async def test_a_kept_graph_gives_what_a_new_one_gives(world: OneServer) -> None:
    channel = await world.connect()
    plain = (await request(channel, Packet(forward(), packed(HIDDENS, prompts=PROMPTS)))).tensors["hidden"]
    assert relative(await lend(channel), plain) < 1e-12
    assert 0 < world.server.leases.held <= world.server.leases.budget
    kept = await gradients(channel, NAME)
    assert world.server.leases.held == 0
    assert world.server.counters.redeemed == 14
    anew = await gradients(channel, None)
    assert kept.keys() == anew.keys() == {"grad", "prompts"}
    for name, tensor in kept.items():
        assert relative(tensor, anew[name]) < 1e-6
    assert (world.server.counters.redeemed, world.server.counters.backward) == (14, 28)


async def test_what_a_lease_takes_grows_with_the_tokens_and_not_with_the_weights(world: OneServer) -> None:
    channel, sizes = await world.connect(), []
    for tokens in (32, 64, 96):
        await lend(channel, hidden=noise(1, tokens, HIDDEN))
        sizes.append(world.server.leases.held)
    # Less than in proportion would mean that something is counted that does not depend on the tokens.
    assert sizes[1] - sizes[0] >= 0.9 * sizes[0]
    assert sizes[2] - sizes[1] >= 0.9 * sizes[0]


async def test_without_a_graph_the_inputs_are_asked_for_and_the_stream_is_good(world: OneServer) -> None:
    """Never made; taken before; made by somebody else; too large; run out; of other blocks."""
    channel, stranger = await world.connect(), await another_peer(world)
    clock = Clock()
    world.server.leases = Leases(2**30, clock)

    async def refused(channel: Channel, lease: str, **changes: Any) -> bool:
        message = backward(prompt_gradient=True, lease=lease, **changes)
        with pytest.raises(RequestRefused) as refusal:
            await request(channel, Packet(message, {"grad": packed(GRAD)["hidden"]}))
        return (refusal.value.code, refusal.value.field) == ("no_lease", None)

    assert await refused(channel, NAME)
    await lend(channel)
    assert await refused(stranger, NAME)
    first = await gradients(channel, NAME)
    assert await refused(channel, NAME)
    await lend(channel)
    assert await refused(channel, NAME, start=START, end=END - 1)
    await lend(channel)
    clock.now += LEASE_SECONDS
    assert await refused(channel, NAME)
    world.server.leases.budget = 100
    await lend(channel)
    assert len(world.server.leases) == 0
    assert await refused(channel, NAME)
    assert relative((await gradients(channel, None))["grad"], first["grad"]) < 1e-6


async def another_peer(world: OneServer) -> Channel:
    client, world.client = world.client, world.network.transport("stranger")
    channel = await world.connect()
    world.client = client
    return channel


async def test_leases_of_two_micro_batches_do_not_mix(world: OneServer) -> None:
    channel = await world.connect()
    await lend(channel, NAME)
    await lend(channel, OTHER, hidden=2 * HIDDENS)
    second = await gradients(channel, OTHER)
    first = await gradients(channel, NAME)
    double = packed(2 * HIDDENS)["hidden"]
    assert relative(second["grad"], (await gradients(channel, None, hidden=double))["grad"]) < 1e-6
    assert relative(first["grad"], (await gradients(channel, None))["grad"]) < 1e-6
    assert relative(first["grad"], second["grad"]) > 1e-2


async def test_a_graph_that_would_not_fit_memory_is_not_kept(world: OneServer) -> None:
    """The forward itself does fit, so it is answered."""
    channel = await world.connect()
    wanted = await lend(channel)
    world.server.leases.take("client", NAME)
    sizes = {"rows": 2, "tokens": 7} if not world.span.packable else {"rows": 1, "tokens": 14}
    world.server.working_bytes = working_bytes(world.span, total=7, with_gradients=True, **sizes) - 1
    assert relative(await lend(channel), wanted) < 1e-12
    assert len(world.server.leases) == 0


def test_a_prefix_before_code_that_cannot_be_packed_is_in_the_caches_of_all_blocks() -> None:
    span, rows = span_of("falcon", torch.float32), 64
    assert not span.packable
    assert span.key_values is not None
    prefix = torch.zeros(BLOCKS, 500, span.key_values.width)
    tensors = packed(noise(rows, 1, HIDDEN).float()) | {"prefix": prefix}
    cache = span.new_cache()
    cache.begin_with(prefix, rows, span.key_values)
    assert cache.nbytes < working_bytes(span, **Sequences(span, tensors).sizes, with_gradients=False)


def test_what_an_adapter_makes_is_counted() -> None:
    span = span_of("llama", torch.float32)
    names = tuple(sorted({name for layers in span.linear_layers for name in layers}))
    lora = torch.ones(BLOCKS, HIDDEN, width(span.linear_layers, names))
    given = {"lora": lora, "targets": as_tensor(names)}
    sequences = Sequences(span, packed(noise(2, 40, HIDDEN).float()) | given)
    kept = sequences.forward_kept()[1].nbytes - lora.nbytes
    counted = working_bytes(span, **sequences.sizes, with_gradients=True)
    without = working_bytes(span, **sequences.sizes | {"adapted": 0}, with_gradients=True)
    assert without < kept <= counted


async def test_a_gradient_of_another_shape_is_refused(world: OneServer) -> None:
    """The graph is gone then, as after any other try."""
    client = await world.raw()
    await client.ask(forward(lease=NAME), **packed(HIDDENS))
    refusal = (await client.ask(backward(lease=NAME), grad=noise(1, 13, HIDDEN))).message
    assert isinstance(refusal, Failure)
    assert (refusal.code, refusal.field) == ("malformed", "grad")
    assert len(world.server.leases) == 0
    await world.all_streams_ended()


async def test_the_gradients_for_prompts_may_be_left_out(world: OneServer) -> None:
    channel = await world.connect()
    await lend(channel)
    grad = packed(GRAD)["hidden"]
    reply = await request(channel, Packet(backward(lease=NAME), {"grad": grad}))
    assert set(reply.tensors) == {"grad"}
    assert relative(reply.tensors["grad"], (await gradients(channel, None))["grad"]) < 1e-6


# --- memory that was freed ---------------------------------------------------------------------------------


async def test_it_is_given_back_a_rest_after_training(
    world: OneServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    given_back: list[bool] = []
    monkeypatch.setattr(block_server, "_return_freed_memory", lambda: given_back.append(True))
    client, server = await world.raw(), world.server

    def after_a_rest() -> int:
        if server._trained is not None:
            server._trained -= 1 + block_server.REST_SECONDS
        server._tidy_up()
        return len(given_back)

    assert after_a_rest() == 1  # weights were loaded
    assert after_a_rest() == 1
    await client.ask(forward(lease=NAME), **packed(HIDDENS))
    server._tidy_up()
    assert len(given_back) == 1  # the next step may come
    assert after_a_rest() == 2
    await client.ask(forward(), **packed(HIDDENS))
    assert after_a_rest() == 3
