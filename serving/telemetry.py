"""Metrics of the service, named and measured as Prometheus asks; no label can grow without end."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

import numpy as np
from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    ProcessCollector,
    disable_created_metrics,
)
from prometheus_client.core import GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector
from prometheus_client.samples import Sample

from serving.model import Floats

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
_SCORES = np.array([0.02, 0.04, 0.06, 0.08, 0.1, 0.125, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5, 0.75])
_VERSIONS = 5
"""Versions that are told apart at once; the oldest is forgotten."""

_PREDICTIONS = ("/v1/predict", "/v1/explain", "/v1/predict/batch")
_SOURCES = ("single", "explain", "batch", "csv")
_RESULTS = ("scored", "excluded", "broken")


class Scores(Collector):
    """Distribution of the probabilities by model version; takes whole batches at a time."""

    def __init__(self) -> None:
        self._counts: dict[str, np.ndarray[tuple[int], np.dtype[np.int64]]] = {}
        self._sums: dict[str, float] = {}

    def add(self, version: str, scores: Floats) -> None:
        """Count probabilities that a version answered."""
        if version not in self._counts:
            if len(self._counts) >= _VERSIONS:
                oldest = next(iter(self._counts))
                del self._counts[oldest], self._sums[oldest]
            self._counts[version] = np.zeros(len(_SCORES) + 1, np.int64)
            self._sums[version] = 0.0
        bins = np.searchsorted(_SCORES, scores, side="left")
        self._counts[version] += np.bincount(bins, minlength=len(_SCORES) + 1)
        self._sums[version] += float(scores.sum())

    def collect(self) -> Iterator[Metric]:
        """As a histogram; its count is the number of predictions."""
        family = HistogramMetricFamily(
            "prediction_probability",
            "Predicted probabilities of readmission within 30 days",
            labels=["model_version"],
        )
        for version, counts in list(self._counts.items()):
            bounds = [*map(str, _SCORES.tolist()), "+Inf"]
            buckets = list(zip(bounds, np.cumsum(counts).astype(float).tolist(), strict=True))
            family.add_metric([version], buckets, self._sums[version])
        yield family


class Values(Collector):
    """Gauges that are read when they are asked for.

    Args:
        read: gives (name, help, value) of each.
    """

    def __init__(self, read: Callable[[], list[tuple[str, str, float]]]) -> None:
        self._read = read

    def collect(self) -> Iterator[Metric]:
        """One gauge each."""
        for name, text, value in self._read():
            yield GaugeMetricFamily(name, text, value=value)


class Telemetry:
    """All metrics of one service."""

    def __init__(self) -> None:
        # As many series again, which nobody asks for.
        disable_created_metrics()  # type: ignore[no-untyped-call]
        self.registry = CollectorRegistry()
        self.requests = Counter(
            "http_requests_total",
            "Requests by route and status",
            ["route", "method", "status"],
            registry=self.registry,
        )
        self.seconds = Histogram(
            "http_request_duration_seconds",
            "From a request's head to the end of its answer",
            ["route"],
            buckets=_SECONDS,
            registry=self.registry,
        )
        self.in_flight = Gauge(
            "http_requests_in_flight", "Requests being served", registry=self.registry
        )
        self.shed = Counter(
            "http_requests_shed_total",
            "Requests refused because too many were being served",
            registry=self.registry,
        )
        self.scores = Scores()
        self.registry.register(self.scores)
        self.rows = Counter(
            "prediction_rows_total",
            "Encounters by how they came and what became of them",
            ["source", "result"],
            registry=self.registry,
        )
        self.model = Gauge(
            "model_info",
            "1 for the version that an alias serves",
            ["alias", "model_version", "feature_sha256"],
            registry=self.registry,
        )
        self.loaded = Gauge(
            "model_loaded_timestamp_seconds",
            "When the version that is served took over",
            ["alias"],
            registry=self.registry,
        )
        self.trained = Gauge(
            "model_trained_timestamp_seconds",
            "When the version that is served was registered, which ends its training",
            ["alias"],
            registry=self.registry,
        )
        self.outcomes = Counter(
            "model_loads_total",
            "Versions tried, by result: swapped, refused (self-test), failed (download)",
            ["alias", "result"],
            registry=self.registry,
        )
        self.spooled = Counter(
            "prediction_log_spooled_rows_total",
            "Predictions put into the spool, of champion and challenger",
            registry=self.registry,
        )
        self.logged = Counter(
            "prediction_log_rows_total",
            "Predictions written to inference.predictions",
            registry=self.registry,
        )
        self.log_seconds = Histogram(
            "prediction_log_copy_duration_seconds",
            "Copying one file of the spool",
            buckets=_SECONDS,
            registry=self.registry,
        )
        self.shadow_dropped = Counter(
            "shadow_predictions_dropped_total",
            "Requests that the challenger did not score because it fell behind",
            registry=self.registry,
        )
        ProcessCollector(registry=self.registry)
        self._begin_at_zero()

    def _begin_at_zero(self) -> None:
        """Make the series that rules look at before their first case.

        A series that begins at 50 has not increased to Prometheus: it would never see what happens
        before its first look after a start.
        """
        for route in _PREDICTIONS:
            self.seconds.labels(route)
            for status in (200, 500, 503):
                self.requests.labels(route, "POST", str(status))
        for source in _SOURCES:
            for result in _RESULTS:
                self.rows.labels(source, result)

    def served(
        self, alias: str, version: str, feature_sha256: str, registered_at: float | None = None
    ) -> None:
        """Note which version an alias serves.

        Args:
            alias: of the registry.
            version: that takes over.
            feature_sha256: of its features' definition.
            registered_at: seconds since the epoch when it was registered, if that is known.
        """
        for labels in [
            tuple(sample.labels.values())
            for sample in self._samples(self.model)
            if sample.labels["alias"] == alias
        ]:
            self.model.remove(*labels)
        self.model.labels(alias, version, feature_sha256[:12]).set(1)
        self.loaded.labels(alias).set(time.time())
        if registered_at is not None:
            self.trained.labels(alias).set(registered_at)
        elif any(sample.labels["alias"] == alias for sample in self._samples(self.trained)):
            # Nothing is better than the age of the version before.
            self.trained.remove(alias)

    @staticmethod
    def _samples(gauge: Gauge) -> list[Sample]:
        return [sample for metric in gauge.collect() for sample in metric.samples]
