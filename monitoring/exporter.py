"""The pipeline's metrics for Prometheus: rows, loads, dbt, DAGs, drift and the disk.

Two threads read the database and Airflow every few seconds; a scrape answers with what they read
last and so never waits for either. What was read too long ago, because a source hangs, counts as
nothing: the source is down then, and no old value stands for it.
"""

from __future__ import annotations

import logging
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from prometheus_client import (
    CollectorRegistry,
    PlatformCollector,
    ProcessCollector,
    start_http_server,
)
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from monitoring.exporter_airflow import AirflowReader
from monitoring.exporter_database import DatabaseReader
from settings import Settings

READ_SECONDS = 10.0
"""Between two readings of the database."""

_AIRFLOW_READ_SECONDS = 20.0
"""Between two readings of Airflow, whose server writes each of them to its log."""

_FIRST_ANSWER_SECONDS = 4.0
"""That the very first scrape waits for the first reading."""

log = logging.getLogger(__name__)


class ExporterError(Exception):
    """The exporter can't start; the message says why."""


class Source:
    """Something that is read in a thread of its own, and the answer it gave last.

    Args:
        name: for the log.
        up: metric that is 1 while it answers, 0 while it does not, and its help.
        read: gives its metrics; raises whatever it likes where it can't.
        seconds: between two readings; an answer counts for three times as long.
    """

    def __init__(
        self,
        name: str,
        up: tuple[str, str],
        read: Callable[[], list[Metric]],
        seconds: float = READ_SECONDS,
    ) -> None:
        self._name = name
        self._up = up
        self._read = read
        self._seconds = seconds
        self._answer: tuple[float, list[Metric]] | None = None
        self._asked = threading.Event()
        self._stopping = threading.Event()
        self._away = False

    def start(self) -> None:
        """Begin to read."""
        threading.Thread(target=self._work, name=f"read-{self._name}", daemon=True).start()

    def stop(self) -> None:
        """Read no more."""
        self._stopping.set()

    def refresh(self) -> None:
        """Read once."""
        try:
            self._answer = (time.monotonic(), self._read())
            if self._away:
                log.info("%s: answers again", self._name)
            self._away = False
        except Exception as error:
            self._answer = None
            if not self._away:
                said = " ".join(str(error).split())
                log.warning("%s: can't be read: %s: %s", self._name, type(error).__name__, said)
            self._away = True
        self._asked.set()

    def metrics(self) -> list[Metric]:
        """What was read last, if it is not too old, and whether the source answers."""
        self._asked.wait(_FIRST_ANSWER_SECONDS)
        answer = self._answer
        fresh = answer is not None and time.monotonic() - answer[0] < 3 * self._seconds
        up = GaugeMetricFamily(*self._up, value=float(fresh))
        return [up, *(answer[1] if answer and fresh else ())]

    def _work(self) -> None:
        while not self._stopping.is_set():
            self.refresh()
            self._stopping.wait(self._seconds)


class Exporter(Collector):
    """All metrics of the pipeline.

    Args:
        sources: what is read in threads.
        state: the platform's state folder, whose file system is told of.
    """

    def __init__(self, sources: Iterable[Source], state: Path) -> None:
        self._sources = list(sources)
        self._state = state

    def describe(self) -> Iterable[Metric]:
        """Nothing: to be registered must not wait for anybody."""
        return ()

    def collect(self) -> Iterator[Metric]:
        """What the sources said last, and the disk as it is now."""
        for source in self._sources:
            yield from source.metrics()
        yield from disk(self._state)


def disk(state: Path) -> list[Metric]:
    """Size of the file system that the state folder lies on; nothing where there is no folder."""
    try:
        usage = shutil.disk_usage(state)
    except OSError:
        return []
    free = GaugeMetricFamily(
        "disk_free_bytes", "Free on the file system that a volume lies on", labels=["volume"]
    )
    size = GaugeMetricFamily(
        "disk_size_bytes", "Size of the file system that a volume lies on", labels=["volume"]
    )
    free.add_metric(["state"], float(usage.free))
    size.add_metric(["state"], float(usage.total))
    return [free, size]


def sources(chosen: Settings, seconds: float = READ_SECONDS) -> list[Source]:
    """The database, and Airflow if its address is set."""
    found = [
        Source(
            "database",
            ("pipeline_database_up", "1 if the data database answered the last question"),
            DatabaseReader(chosen.dsn).read,
            seconds,
        )
    ]
    if chosen.airflow_url:
        reader = AirflowReader(
            chosen.airflow_url, chosen.airflow_user, chosen.airflow_password.get_secret_value()
        )
        found.append(
            Source(
                "Airflow",
                ("airflow_api_up", "1 if Airflow's REST API answered the last question"),
                reader.read,
                _AIRFLOW_READ_SECONDS,
            )
        )
    return found


def serve(chosen: Settings, host: str, port: int) -> None:
    """Answer Prometheus until SIGTERM or Ctrl-C.

    Raises:
        ExporterError: the port can't be listened on.
    """
    registry = CollectorRegistry()
    ProcessCollector(registry=registry)
    PlatformCollector(registry=registry)
    read = sources(chosen)
    registry.register(Exporter(read, chosen.state_dir))
    stopping = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stopping.set())
    try:
        server, thread = start_http_server(port, host, registry)
    except (OSError, OverflowError) as error:
        raise ExporterError(f"can't listen on {host}:{port}: {error}") from error
    for source in read:
        source.start()
    log.info("http://%s:%d/metrics", host, server.server_port)
    stopping.wait()
    for source in read:
        source.stop()
    server.shutdown()
    server.server_close()
    thread.join()
