"""What a process has done, for Prometheus; names and units as it has them by convention."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from prometheus_client import (
    CONTENT_TYPE_LATEST,
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    generate_latest,
)
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

from corolla.api.generation import Generator, Run

SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0)


class Metrics:
    """For any thread."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        self._requests = Counter(
            "corolla_api_requests",
            "Requests by route and status.",
            ["route", "status"],
            registry=self._registry,
        )
        self._replies = Counter(
            "corolla_api_replies",
            "Runs of replies by model and end.",
            ["model", "end"],
            registry=self._registry,
        )
        self._tokens = Counter(
            "corolla_api_tokens",
            "Tokens by model: read of prompts (prompt), of them known already (cached), and computed (completion).",
            ["model", "kind"],
            registry=self._registry,
        )
        self._first = self._seconds("time_to_first_token", "From a request to the first token.")
        self._between = self._seconds("inter_token", "From a token of a reply to the next.")
        self._waited = self._seconds("queue", "From a request to the beginning of its computation.")
        self._whole = self._seconds("request", "From a request to its end.")
        self._running = self._gauge("replies_running", "Replies that are computed.")
        self._queued = self._gauge("replies_waiting", "Replies that wait for that.")
        self._sessions = self._gauge("sessions_kept", "Sessions that are kept to be gone on with.")
        self._bytes = self._gauge("sessions_kept_bytes", "Memory that they take here.")

    def watch(self, connection: Any) -> None:
        """Show what a client has met in its swarm, too."""
        self._registry.register(_Swarm(connection))

    def _seconds(self, name: str, about: str) -> Histogram:
        return Histogram(f"corolla_api_{name}_seconds", about, buckets=SECONDS, registry=self._registry)

    def _gauge(self, name: str, about: str) -> Gauge:
        return Gauge(f"corolla_api_{name}", about, registry=self._registry)

    def answered(self, route: str, status: int) -> None:
        """A request has had its answer; 0 where nobody waited for it."""
        self._requests.labels(route, str(status)).inc()

    def finished(self, run: Run) -> None:
        """A run is over."""
        timing, model = run.timing, run.wishes[0].partner.name
        end = "failed" if run.error is not None else "cancelled" if run.cancelled else "whole"
        self._replies.labels(model, end).inc()
        prompt = sum(len(wish.ids) for wish in run.wishes)
        for kind, count in (("prompt", prompt), ("cached", timing.cached), ("completion", timing.tokens)):
            self._tokens.labels(model, kind).inc(count)
        if timing.began is not None:
            self._waited.observe(timing.began - timing.asked)
        if timing.first is not None:
            self._first.observe(timing.first - timing.asked)
        if timing.ended is not None:
            self._whole.observe(timing.ended - timing.asked)
        for gap in timing.gaps:
            self._between.observe(gap)

    def page(self, generator: Generator) -> tuple[bytes, str]:
        """All of it as Prometheus reads it, and of what kind that is."""
        self._running.set(generator.under_way - generator.queued)
        self._queued.set(generator.queued)
        self._sessions.set(generator.pool.count)
        self._bytes.set(generator.pool.nbytes)
        return generate_latest(self._registry), CONTENT_TYPE_LATEST


class _Swarm:
    """Reads a client's connection when it is asked for figures."""

    def __init__(self, connection: Any) -> None:
        self._connection = connection

    def collect(self) -> Iterator[Any]:
        retries = CounterMetricFamily(
            "corolla_api_retries", "Requests to servers that were repeated, by cause.", labels=["cause"]
        )
        for cause, count in sorted(dict(self._connection.retry.causes).items()):
            retries.add_metric([cause], count)
        yield retries
        servers = GaugeMetricFamily(
            "corolla_api_servers", "Servers that are known, by state.", labels=["state"]
        )
        known = [record.state for record in list(self._connection.view.records.known)]
        for state in ("serving", "draining"):
            servers.add_metric([state], known.count(state))
        yield servers
