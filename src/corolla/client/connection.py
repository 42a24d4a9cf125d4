"""A client's connection to the swarm: one event loop on a thread of its own, one peer, one view.

Invariant: everything that touches the network runs on that loop; callers wait for it from any thread. The
loop starts when the first model is loaded and ends with `close()`, which nothing outlives.
"""

from __future__ import annotations

import random
import threading
from collections.abc import Collection, Coroutine, Sequence
from pathlib import Path
from typing import Any, TypeVar

from corolla.client.audits.auditor import Auditor, Own, check_share
from corolla.client.retry import DEFAULT_PATIENCE, Retry
from corolla.client.sessions.prefixes import PrefixIndex
from corolla.client.view import SwarmView
from corolla.swarm.node import EventLoopThread, Node
from corolla.wire.compression import WireFormat

T = TypeVar("T")


class SwarmConnection:
    """What a distributed model holds of the swarm."""

    def __init__(
        self,
        loop: EventLoopThread,
        node: Node,
        *,
        model: str,
        model_name: str,
        num_blocks: int,
        patience: float = DEFAULT_PATIENCE,
        wire: WireFormat = "compute",
        mixed: bool = False,
        trust: Collection[str] | None = None,
        owns_loop: bool = True,
    ) -> None:
        """`model` is the checkpoint's identity, `model_name` what people call it, `wire` how activations travel."""
        self._loop = loop
        self._node = node
        self._owns_loop = owns_loop
        self.view = SwarmView(
            node.transport,
            node.directory,
            model=model,
            model_name=model_name,
            num_blocks=num_blocks,
            wire=wire,
            mixed=mixed,
            introductions=node.introductions,
            trust=trust,
        )
        self.retry = Retry(self.view, patience=patience)
        self.prefixes = PrefixIndex()

    @classmethod
    def connect(
        cls,
        initial_peers: Sequence[str],
        *,
        model: str,
        model_name: str,
        num_blocks: int,
        patience: float = DEFAULT_PATIENCE,
        wire: WireFormat = "compute",
        mixed: bool = False,
        identity: Path | None = None,
        trust: Collection[str] | None = None,
    ) -> SwarmConnection:
        """Join through `initial_peers`. Raises `UsageError` for a malformed address, `SwarmUnavailable`.

        `identity` is a file with this client's key, `trust` the peer ids of the only servers to be used.
        """
        loop = EventLoopThread()
        try:
            node = loop.run(Node.create(initial_peers=initial_peers, identity=identity, client_only=True))
        except BaseException:
            loop.close()
            raise
        return cls(
            loop,
            node,
            model=model,
            model_name=model_name,
            num_blocks=num_blocks,
            patience=patience,
            wire=wire,
            mixed=mixed,
            trust=trust,
        )

    def start_audits(
        self, share: float, own: Own | None, *, routed: bool = False, draw: random.Random | None = None
    ) -> Auditor | None:
        """Have `share` of all answers checked from now on; `own` computes what no second server can.

        `routed` says that tokens choose experts. Nothing is started for a share of 0. Raises `UsageError`.
        """
        if not check_share(share):
            return None
        self.view.audits = auditor = Auditor(self.view, share, own=own, routed=routed, draw=draw)
        return auditor

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """Wait for `work` on the loop. Ctrl-C cancels it."""
        return self._loop.run(work)

    def run_soon(self, work: Coroutine[Any, Any, Any]) -> None:
        """Start `work` on the loop without waiting; for finalizers, which may run on any thread."""
        self._loop.run_soon(work)

    @property
    def is_open(self) -> bool:
        """False after `close()`."""
        return not self._loop.closed

    def check_complete(self, start: int = 0) -> None:
        """Raises `MissingBlocks` unless every block from `start` on is served now."""
        self.run(self.view.route(start, self.view.num_blocks))

    def close(self) -> None:
        """Leave the swarm and end the loop; safe to call twice.

        On the loop's own thread, where the collector may run a dropped model's finalizer, it is done soon after.
        """
        if not self.is_open:
            return
        if self._loop.is_current:
            self._close_soon()
            return
        self._loop.run(self._close())
        if self._owns_loop:
            self._loop.close()

    def _close_soon(self) -> None:
        if self._owns_loop:  # it ends with this connection, and cannot wait for its own end
            threading.Thread(target=self.close, name="corolla-close").start()
        else:
            self._loop.run_soon(self._close())

    async def _close(self) -> None:
        await self.view.audits.close()
        await self.view.close()
        if self._owns_loop:
            await self._node.close()
