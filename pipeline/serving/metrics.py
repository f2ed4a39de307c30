"""What `/metrics` shows, in Prometheus' format. Knows numbers; nothing of what they count."""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import Metric

from pipeline.serving.sampler import Sampler

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_STEP_SECONDS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 5)
_REQUEST_SECONDS = (0.01, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300)


class Metrics:
    """Counters of one server.

    Args:
        replica: its name among several servers behind one address. Each sample then has it as a
            label, so that a counter that is read from one after another never falls.
    """

    def __init__(self, replica: str | None = None) -> None:
        self._replica = replica
        self.registry = CollectorRegistry()
        self.requests = Counter(
            "minidalle_requests",
            "Requests by path, method and status",
            ("path", "method", "status"),
            registry=self.registry,
        )
        self.seconds = Histogram(
            "minidalle_request_seconds",
            "Seconds from a request's head to the end of its response",
            ("path",),
            buckets=_REQUEST_SECONDS,
            registry=self.registry,
        )
        self.images = Counter("minidalle_images", "Images returned", registry=self.registry)
        self.steps = Histogram(
            "minidalle_step_seconds",
            "Seconds of a sampling step",
            buckets=_STEP_SECONDS,
            registry=self.registry,
        )
        self.codes = Counter("minidalle_codes", "Codes sampled", registry=self.registry)

    def on_step(self, seconds: float, codes: int) -> None:
        """Counts a sampling step."""
        self.steps.observe(seconds)
        self.codes.inc(codes)

    def watch(self, sampler: Sampler) -> None:
        """Adds the sampler's queue and slots, read when they are asked for."""
        Gauge(
            "minidalle_slots", "Guided images that can be sampled at a time", registry=self.registry
        ).set_function(lambda: sampler.num_slots)
        Gauge(
            "minidalle_images_active", "Images being sampled", registry=self.registry
        ).set_function(lambda: sampler.num_active)
        Gauge(
            "minidalle_images_waiting", "Images that wait for a slot", registry=self.registry
        ).set_function(lambda: sampler.num_waiting)

    def text(self) -> bytes:
        """All metrics as text."""
        return generate_latest(self)

    def collect(self) -> Iterator[Metric]:
        """What `generate_latest` reads of a registry."""
        for metric in self.registry.collect():
            if self._replica is not None:
                own = {"replica": self._replica}
                metric.samples = [one._replace(labels=one.labels | own) for one in metric.samples]
            yield metric
