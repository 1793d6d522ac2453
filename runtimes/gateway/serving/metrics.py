"""What a gateway counts, for Prometheus; a registry of its own, so that several can live in one process."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

__all__ = ["Metrics"]

SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)
IMAGES = (1, 2, 4, 8, 16, 32, 64)


class Metrics:
    """Counters, gauges and histograms; names begin with ``safevlm_gateway_``."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        name, registry = "safevlm_gateway", self.registry
        self.requests = Counter(
            f"{name}_requests", "Requests by path and outcome.", ["path", "outcome"], registry=registry
        )
        self.blocks = Counter(
            f"{name}_blocks", "Blocked images by class and stage.", ["label", "stage"], registry=registry
        )
        self.total = self._seconds("request", "Time of a whole request.")
        self.decode = self._seconds("decode", "Time to decode and re-encode an image, waiting included.")
        self.waited = self._seconds("queue", "Time that an image waits for the guard.")
        self.guard = self._seconds("guard", "Time of a guard call.")
        self.answer = self._seconds("upstream", "Time until the upstream begins to answer.")
        self.batch = Histogram(f"{name}_guard_batch", "Images of a guard call.", registry=registry, buckets=IMAGES)
        self.queue = Gauge(f"{name}_guard_queue", "Images that wait for the guard.", registry=registry)
        self.upstream = Counter(f"{name}_upstream_errors", "Failures of the upstream.", ["kind"], registry=registry)
        self.reloads = Counter(f"{name}_reloads", "Reloads by outcome.", ["outcome"], registry=registry)
        self.clients = Counter(
            f"{name}_client_requests", "Requests by client and outcome.", ["client", "outcome"], registry=registry
        )
        self.in_flight = Gauge(f"{name}_in_flight", "Requests being served.", registry=registry)

    def _seconds(self, what: str, description: str) -> Histogram:
        return Histogram(f"safevlm_gateway_{what}_seconds", description, registry=self.registry, buckets=SECONDS)

    def text(self) -> bytes:
        """Return the exposition format."""
        return generate_latest(self.registry)
