"""A client's connection to the swarm: one event loop on a thread of its own, one peer, one view.

Invariant: everything that touches the network runs on that loop; callers wait for it from any thread. The
loop starts when the first model is loaded and ends with `close()`, which nothing outlives.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import TypeVar

from corolla.client.audits.audit import Observer
from corolla.client.retry import Retry
from corolla.client.sessions.prefix_cache import PrefixCache
from corolla.client.view import SwarmView
from corolla.config import SwarmConfig
from corolla.models.cut_layout import CutLayout
from corolla.swarm.loop import EventLoopThread
from corolla.swarm.node import Node

T = TypeVar("T")


class SwarmConnection:
    """What a distributed model holds of the swarm."""

    def __init__(
        self,
        loop: EventLoopThread,
        node: Node,
        config: SwarmConfig | None = None,
        *,
        model: str,
        model_name: str,
        num_blocks: int,
        cuts: CutLayout | None = None,
        steps_differ: bool = False,
        observe: Callable[[SwarmView], Observer] | None = None,
        owns_loop: bool = True,
    ) -> None:
        """`model` is the checkpoint's identity, `model_name` what people call it; for `cuts` and
        `steps_differ` see `SwarmView`.

        `observe` makes what is told of every answer, if anything.
        """
        self.config = config or SwarmConfig()
        self._loop = loop
        self.run = loop.run  # waits for work on the loop; Ctrl-C cancels it
        self.run_soon = loop.run_soon  # does not wait; for finalizers, which may run on any thread
        self._node = node
        self._owns_loop = owns_loop
        self.view = SwarmView(
            node.transport,
            node.directory,
            self.config,
            model=model,
            model_name=model_name,
            num_blocks=num_blocks,
            cuts=cuts,
            steps_differ=steps_differ,
            introductions=node.introductions,
        )
        self.retry = Retry(self.view, patience=self.config.patience)
        self.prefix_cache = PrefixCache()
        self.audits = None if observe is None else observe(self.view)

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
        if self.audits is not None:
            await self.audits.close()
        await self.view.close()
        if self._owns_loop:
            await self._node.close()
