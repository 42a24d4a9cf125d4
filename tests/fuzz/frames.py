"""Frames of strangers: honest messages with changed fields and tensors, and honest bytes with changed bytes.

Everything is drawn from one `random.Random`, which may be hypothesis's own, so that a failure shrinks.
"""

from __future__ import annotations

import math
import random
import struct
from typing import Any

import msgspec
import torch
from torch import Tensor

from corolla.wire.messages import PROTOCOL_VERSION, State
from tests.server.world import BLOCKS, DTYPES, END, HIDDEN, MODEL, PREAMBLE, START, noise

Tensors = dict[str, Tensor]
Frame = tuple[dict[str, Any], Tensors]

NAMES = ("a-name-of-sixteen", "another-of-sixteen", "x" * 16)
BUNDLE = "b" * 64
NUMBERS = (0, 1, 2, 3, 7, 16, 255, 65535, 65536, 2**31 - 1, 2**31, 2**63 - 1, 2**64 - 1, -1, -(2**63))
ODD: tuple[Any, ...] = (
    None, True, False, 0.5, math.nan, math.inf, "", "x", "\x00" * 16, "ü" * 70, "x" * 3000, b"bytes", [], [[]], {},
    {"a": {"b": [1]}}, [1] * 50, "Step", "OpenSession", MODEL,
)  # fmt: skip
ODD_NUMBERS = (math.nan, math.inf, -math.inf, 3e38, -3e38, 0.0, 1e-45)
OTHER_DTYPES = (
    torch.float16,
    torch.bfloat16,
    torch.float32,
    torch.float64,
    torch.int8,
    torch.bool,
    torch.int64,
)
WIRE_NAMES = {**DTYPES, torch.float16: "float16", torch.bfloat16: "bfloat16", torch.int8: "int8"}
KINDS = {
    State.IDLE: ("open", "open", "open", "steps", "forward", "backward", "ping"),
    State.OPEN: ("step", "step", "step", "step", "close", "ping"),
}
ALL_KINDS = ("open", "step", "steps", "close", "forward", "backward", "ping")


def honest(rng: random.Random, kind: str, cached: tuple[int, int]) -> Frame:
    """A message of that kind that a server takes; `cached` is what the session holds, rows and tokens."""
    span: dict[str, Any] = {"model": MODEL, "start": START, "end": END}
    seed = rng.randrange(100)
    prompts = {"prompts": noise(BLOCKS, 2, HIDDEN, seed=seed)} if rng.random() < 0.3 else {}
    if kind == "open":
        body = {
            "type": "OpenSession",
            **span,
            "rows": rng.choice((1, 2)),
            "max_tokens": rng.choice((4, 20, 40)),
        }
        if rng.random() < 0.3:
            body["name"] = rng.choice(NAMES)
        if rng.random() < 0.2:
            tokens, epoch = rng.choice((1, 2, 5)), rng.choice((0, 0, 1))
            body["origin"] = {"name": rng.choice(NAMES), "tokens": tokens, "epoch": epoch}
        elif rng.random() < 0.2:
            body["bundle"] = {"digest": rng.choice((BUNDLE, BUNDLE, "f" * 64)), "deep": rng.random() < 0.5}
            prompts = {}
        return body, prompts
    if kind == "step":
        return _step(rng, cached, seed)
    if kind == "steps":
        return _steps(rng, cached, seed)
    if kind == "close":
        return {"type": "CloseSession", "keep": rng.random() < 0.5}, {}
    if kind == "ping":
        return {"type": "Ping"}, {}
    lengths = [rng.choice((1, 2, 5)) for _ in range(rng.choice((1, 2, 3)))]
    tensors = {
        "hidden": noise(1, sum(lengths), HIDDEN, seed=seed),
        "lengths": torch.tensor(lengths),
    } | prompts
    if rng.random() < 0.3:
        tensors["positions"] = torch.arange(sum(lengths)).unsqueeze(0)
    lease = {"lease": rng.choice(NAMES)} if rng.random() < 0.5 else {}
    if kind == "forward":
        return {"type": "Forward", **span, **lease}, _compressed(rng, tensors)
    grad = {"grad": noise(1, sum(lengths), HIDDEN, seed=seed + 1)}
    body = {"type": "Backward", **span, **lease, "prompt_gradient": rng.random() < 0.5}
    return body, _compressed(rng, grad if lease else tensors | grad)


def _step(rng: random.Random, cached: tuple[int, int], seed: int) -> Frame:
    rows, held = cached[0] or 1, cached[1]
    count, position = rng.choice((1, 1, 2, 9)), held if rng.random() < 0.7 else rng.randint(0, held)
    tensors: Tensors = {}
    if held and rng.random() < 0.2:
        order = [rng.randrange(rows) for _ in range(rng.choice((1, 2, 3)))]
        tensors["rows"], rows = torch.tensor(order), len(order)
    tensors = {"hidden": noise(rows, count, HIDDEN, seed=seed)} | tensors
    if rng.random() < 0.2:
        tensors["mask"] = torch.ones(rows, position + count, dtype=torch.bool)
        tensors["mask"][rng.randrange(rows), position + rng.randrange(count)] = False
    if rng.random() < 0.2:
        tensors["positions"] = torch.arange(position, position + count).repeat(rows, 1)
    body = {"type": "Step", "position": position, "reserve": rng.choice((0, 0, position + count, 30))}
    return body, _compressed(rng, tensors)


def _steps(rng: random.Random, cached: tuple[int, int], seed: int) -> Frame:
    """Of sessions that may be open on other streams of this peer."""
    names = rng.sample(NAMES, rng.choice((1, 2, 3)))
    parts = [
        {
            "name": name,
            "position": rng.choice((0, cached[1], 1, 2)),
            "rows": rng.choice((1, 1, 2)),
            "reserve": 0,
        }
        for name in names
    ]
    hidden = noise(sum(part["rows"] for part in parts), rng.choice((1, 1, 1, 2)), HIDDEN, seed=seed)
    return {"type": "Steps", "parts": parts}, _compressed(rng, {"hidden": hidden})


def _compressed(rng: random.Random, tensors: Tensors) -> Tensors:
    if rng.random() < 0.8:
        return tensors
    changed = dict(tensors)
    for name in ("hidden", "grad"):
        if name in changed:
            changed[f"{name}_scales"] = changed[name].abs().amax(-1, keepdim=True).float()
            changed[name] = (changed[name] * 40).clamp(-127, 127).to(torch.int8)
    return changed


def with_odd_field(rng: random.Random, body: dict[str, Any]) -> dict[str, Any]:
    """One field changed, dropped or added."""
    changed = dict(body)
    name = rng.choice([*body, "colour", "lease", "name", "origin", "bundle", "reserve"])
    kind = rng.random()
    if kind < 0.15:
        changed.pop(name, None)
    elif kind < 0.6 and isinstance(changed.get(name, 0), int):
        changed[name] = rng.choice(NUMBERS)
    else:
        changed[name] = rng.choice(ODD)
    return changed


def with_odd_tensor(rng: random.Random, tensors: Tensors) -> Tensors:
    """One tensor changed in values, shape or dtype, dropped, or put under another name."""
    if not tensors:
        return {rng.choice(("prompts", "hidden", "soul")): noise(1, 1, HIDDEN)}
    changed = dict(tensors)
    name = rng.choice(list(changed))
    kind, tensor = rng.random(), changed.pop(name)
    if kind < 0.3:
        changed[name] = _with_odd_values(rng, tensor)
    elif kind < 0.5:
        changed[name] = _reshaped(rng, tensor)
    elif kind < 0.6:
        changed[name] = tensor.to(rng.choice(OTHER_DTYPES))
    elif kind < 0.7:
        changed[rng.choice(("soul", "rows", "mask", "hidden_scales", "grad_scales"))] = tensor
    elif kind < 0.8:
        changed = {name: tensor, **changed, rng.choice(("rows", "lengths")): torch.tensor([0, 1])}
    elif kind < 0.9:
        changed = {one: value.nan_to_num() * math.nan if value.is_floating_point() else value
                   for one, value in {name: tensor, **changed}.items()}  # fmt: skip
    return changed


def _with_odd_values(rng: random.Random, tensor: Tensor) -> Tensor:
    changed = tensor.clone().reshape(-1)
    if not changed.numel():
        return tensor
    place = rng.randrange(changed.numel())
    if tensor.is_floating_point():
        changed[place] = rng.choice(ODD_NUMBERS)
    elif tensor.dtype == torch.int64:
        changed[place] = rng.choice((0, 1, 2, -1, 1000, 2**31 - 1, 2**31, 2**63 - 1, -(2**63)))
    elif tensor.dtype == torch.bool:
        changed[:] = rng.random() < 0.5
    return changed.reshape(tensor.shape)


def _reshaped(rng: random.Random, tensor: Tensor) -> Tensor:
    shape = list(tensor.shape)
    kind = rng.randrange(4)
    if kind == 0:
        shape.insert(rng.randrange(len(shape) + 1), 1)
        return tensor.reshape(shape)
    if kind == 1:
        return tensor.reshape(-1)
    axis = rng.randrange(len(shape))
    if kind == 2:
        return tensor.narrow(axis, 0, shape[axis] - 1)
    return torch.cat([tensor, tensor], dim=axis)


def written(body: dict[str, Any], tensors: Tensors, described: list[Any] | None = None) -> bytes:
    """The frame's bytes, whatever is in it; `described` may say other things of the tensors than are true."""
    payload = b""
    for tensor in tensors.values():
        data = bytes(tensor.contiguous().flatten().view(torch.uint8).numpy()) if tensor.numel() else b""
        payload += data + bytes(-len(data) % 16)
    if described is None:
        described = [[name, WIRE_NAMES[one.dtype], list(one.shape)] for name, one in tensors.items()]
    header = msgspec.msgpack.encode({"tensors": described, "message": body})
    return struct.pack(PREAMBLE, b"CRLA", PROTOCOL_VERSION, 0, len(header), len(payload)) + header + payload


def with_odd_bytes(rng: random.Random, data: bytes) -> bytes:
    """A few bytes changed, dropped, or added."""
    changed = bytearray(data)
    # Most of a frame is payload, in which a changed byte does little.
    place = rng.randrange(min(len(changed), rng.choice((4, 20, 100, len(changed)))))
    kind = rng.random()
    if kind < 0.6:
        changed[place] = rng.randrange(256)
    elif kind < 0.75:
        del changed[place:]
    else:
        changed[place : place + rng.randrange(3)] = bytes(rng.randrange(256) for _ in range(rng.randrange(4)))
    return bytes(changed)


def strangers(rng: random.Random, state: State, cached: tuple[int, int]) -> bytes:
    """A stranger's next frame: often legal at this moment, often changed in one place, sometimes in many."""
    kinds = KINDS.get(state, ALL_KINDS) if rng.random() < 0.8 else ALL_KINDS
    body, tensors = honest(rng, rng.choice(kinds), cached)
    luck = rng.random()
    if luck < 0.40:
        return written(body, tensors)
    if luck < 0.55:
        return written(with_odd_field(rng, body), tensors)
    if luck < 0.80:
        return written(body, with_odd_tensor(rng, tensors))
    if luck < 0.90:
        return with_odd_bytes(rng, written(body, tensors))
    described = [[name, WIRE_NAMES[one.dtype], list(one.shape)] for name, one in tensors.items()]
    if described and luck < 0.95:
        rng.choice(described)[rng.randrange(3)] = rng.choice(
            (*ODD, [], [0], [1, -1], [2**31 - 1] * 4, "int8")
        )
        return written(body, tensors, described)
    return with_odd_bytes(rng, written(with_odd_field(rng, body), with_odd_tensor(rng, tensors)))
