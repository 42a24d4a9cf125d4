"""What `corolla serve --metrics` shows: a server's figures for Prometheus, at an address of this machine only."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterator
from concurrent.futures import CancelledError
from typing import TYPE_CHECKING, Any

from corolla.errors import UsageError

if TYPE_CHECKING:
    from corolla.server.block_server import BlockServer

READ_SECONDS = 5.0


class ServerFigures:
    """Reads a server when it is asked for its figures, on any thread. Made on the server's event loop."""

    def __init__(self, server: BlockServer) -> None:
        self._server, self._loop = server, asyncio.get_running_loop()

    def collect(self) -> list[Any]:
        """The figures, in Prometheus's own classes; none where the server ends just now."""

        async def read() -> list[Any]:
            return list(self._read())

        reading = asyncio.run_coroutine_threadsafe(read(), self._loop)
        try:
            return reading.result(READ_SECONDS)
        except (TimeoutError, CancelledError):
            return []

    def _read(self) -> Iterator[Any]:
        from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, InfoMetricFamily

        server, status = self._server, self._server.status()
        about = {"blocks": f"{status.start}:{status.end}", "dtype": status.dtype, "version": status.version}
        yield InfoMetricFamily("corolla_server", "What this server is.", value=about)
        tokens = CounterMetricFamily(
            "corolla_server_tokens", "Tokens computed, by what they were part of.", labels=["kind"]
        )
        for kind in ("inference", "forward", "backward"):
            tokens.add_metric([kind], getattr(status, f"tokens_{kind}"))
        yield tokens
        gauges = {
            "sessions": ("Sessions that are open.", status.sessions),
            "cache_free_tokens": ("Tokens of attention cache that still fit.", status.free_cache_tokens),
            "requests_waiting": ("Requests that wait for the compute thread.", server.engine.waiting),
            "draining": ("1 while it takes nothing new.", int(server.draining)),
        }
        for name, (words, value) in gauges.items():
            yield GaugeMetricFamily(f"corolla_server_{name}", words, value=value)


@contextlib.contextmanager
def shown(server: BlockServer, port: int) -> Iterator[int]:
    """Serve its figures at /metrics of that port (0: any that is free), which it gives. Raises `UsageError`."""
    from prometheus_client import CollectorRegistry, start_http_server

    registry = CollectorRegistry(auto_describe=False)
    registry.register(ServerFigures(server))
    try:
        http, thread = start_http_server(port, addr="127.0.0.1", registry=registry)
    except (OSError, OverflowError) as error:
        raise UsageError(f"Figures cannot be served at port {port}: give another --metrics.") from error
    try:
        yield http.server_port
    finally:
        http.shutdown()
        http.server_close()
        thread.join()
