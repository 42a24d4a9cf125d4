"""Prompts that a server has computed by itself, as a session begins with them.

Invariant: what a session knows afterwards is what it would know had it sent its prompt: the inputs of the
prompt's columns for each span, which are the span's before it outputs, and their outputs. So replays, audits, forks
and rollbacks need not know of bundles.
"""

from __future__ import annotations

from collections.abc import MutableMapping
from dataclasses import dataclass

import msgspec
import torch
from torch import Tensor

from corolla.errors import ProtocolError, RequestRefused
from corolla.models.prompts import digest
from corolla.swarm.channel import Channel, request
from corolla.wire.failures import Remedy, meaning
from corolla.wire.frames import Packet
from corolla.wire.messages import Opened, OpenSession, Prefilled, Step


@dataclass(frozen=True)
class NamedPrompt:
    """A prompt of `columns` tokens that enters the blocks `width` wide, and the name that servers know it by."""

    name: Prefilled
    columns: int
    width: int
    dtype: torch.dtype

    @staticmethod
    def of(vectors: Tensor, deep: Tensor | None, hidden: Tensor) -> NamedPrompt:
        """The prompt of `vectors` [P, E] and `deep` [blocks, P, H], with which `hidden` [R, T, H] begins."""
        name = Prefilled(digest=digest(vectors, deep, hidden.dtype), deep=deep is not None)
        return NamedPrompt(name, int(vectors.shape[0]), int(hidden.shape[2]), hidden.dtype)

    def prefilled(self, reply: Packet, peer_id: str) -> PromptOutputs | None:
        """What a server's answer to an opening holds of the prompt, if anything. Raises `ProtocolError`."""
        if not isinstance(reply.message, Opened) or not reply.message.position:
            return None
        outputs = reply.tensors.get("hidden")
        shape = (1, self.columns, self.width)
        if reply.message.position != self.columns or outputs is None or outputs.shape != shape:
            raise ProtocolError(
                f"{peer_id} began with something else than the {self.columns} prompt tokens that were named.",
                field="position",
                peer_id=peer_id,
            )
        return PromptOutputs(outputs.to(self.dtype))


@dataclass(frozen=True)
class PromptOutputs:
    """A prompt's columns that a session's server holds before the first step; `outputs` are [1, P, H]."""

    outputs: Tensor

    @property
    def columns(self) -> int:
        """Tokens of the prompt."""
        return int(self.outputs.shape[1])

    def begins(self, step: Step, hidden: Tensor) -> bool:
        """Whether a session's step begins with these columns, and goes on behind them."""
        return step.position == 0 and hidden.shape[1] > self.columns

    def left_to_send(self, step: Step, tensors: dict[str, Tensor]) -> tuple[Step, dict[str, Tensor]]:
        """What is left of such a step to send."""
        cut = {name: tensors[name][:, self.columns :] for name in ("hidden", "positions") if name in tensors}
        return msgspec.structs.replace(step, position=self.columns), tensors | cut

    def with_outputs(self, output: Tensor) -> Tensor:
        """The whole step's outputs [R, P + T, H], given those of what was sent."""
        return torch.cat([self.outputs.expand(output.shape[0], -1, -1), output], dim=1)


async def ask_to_open(
    channel: Channel, packet: Packet, bundle: NamedPrompt, lacking: MutableMapping[str, str]
) -> tuple[Packet, PromptOutputs | None]:
    """The answer to an opening that names `bundle`, and what the server has of that.

    Deep prompts are sent only to a server that has not got them; which ones those are stands in `lacking`, peers
    with the digest that each refused last, so that it is asked once.
    """
    peer, message = channel.peer_id, packet.message
    assert isinstance(message, OpenSession)
    if lacking.get(peer) == bundle.name.digest:
        return await request(channel, packet), None
    named = msgspec.structs.replace(message, bundle=bundle.name)
    try:
        reply = await request(channel, Packet(named, {} if bundle.name.deep else packet.tensors))
    except RequestRefused as refusal:
        if meaning(refusal).remedy is not Remedy.SEND_MORE:
            raise
        lacking[peer] = bundle.name.digest
        return await request(channel, packet), None
    return reply, bundle.prefilled(reply, peer) if message.origin is None else None
