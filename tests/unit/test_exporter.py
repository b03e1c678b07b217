"""The pipeline's exporter where its sources lie, hang or are not there."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import GaugeMetricFamily, Metric

from monitoring import exporter_airflow
from monitoring.exporter import Exporter, Source, disk, sources
from monitoring.exporter_database import gauge
from settings import Settings

UP = ("thing_up", "1 if it answers")


def values(found: list[Metric]) -> dict[tuple[str, ...], float]:
    """Values by name and labels' values."""
    return {
        (sample.name, *sample.labels.values()): sample.value
        for metric in found
        for sample in metric.samples
    }


def answer() -> list[Metric]:
    return [GaugeMetricFamily("thing_rows", "Rows", value=3)]


def test_an_answer_is_told_until_the_source_fails() -> None:
    replies: list[Callable[[], list[Metric]]] = [answer, lambda: [][0], answer]
    source = Source("thing", UP, lambda: replies.pop(0)())
    told = []
    for _ in range(3):
        source.refresh()
        told.append(values(source.metrics()))
    there = {("thing_up",): 1.0, ("thing_rows",): 3.0}
    assert told == [there, {("thing_up",): 0.0}, there]


def test_a_hanging_source_holds_nobody_up_and_its_values_end() -> None:
    hanging, begun = threading.Event(), []

    def read() -> list[Metric]:
        if begun:
            hanging.wait(30)
        begun.append(1)
        return answer()

    source = Source("thing", UP, read, seconds=0.1)
    source.start()
    try:
        assert values(source.metrics())["thing_up",] == 1
        time.sleep(0.5)
        begin = time.monotonic()
        assert values(source.metrics()) == {("thing_up",): 0.0}
        assert time.monotonic() - begin < 5
    finally:
        source.stop()
        hanging.set()


def test_the_first_scrape_waits_a_little_and_no_longer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("monitoring.exporter._FIRST_ANSWER_SECONDS", 0.2)
    begin = time.monotonic()
    assert values(Source("thing", UP, answer).metrics()) == {("thing_up",): 0.0}
    assert 0.1 < time.monotonic() - begin < 2


def test_the_disk_is_told_of_without_any_source(tmp_path: Path) -> None:
    registry = CollectorRegistry()
    registry.register(Exporter([], tmp_path))
    text = generate_latest(registry).decode()
    assert 'disk_free_bytes{volume="state"}' in text
    assert disk(tmp_path / "missing") == []


def test_without_an_address_airflow_is_not_told_of() -> None:
    assert len(sources(Settings())) == 1
    assert len(sources(Settings(airflow_url="http://127.0.0.1:1"))) == 2


def test_rows_without_a_value_or_a_label_are_left_out() -> None:
    made = gauge("of_a_test", "Help", ["feature"], [("a", 1), ("b", None), (None, 2)])
    assert values([made]) == {("of_a_test", "a"): 1.0}


def run(state: str, minutes: int, seconds: int | None = 60) -> dict[str, Any]:
    """A run as the REST API describes it, that began so many minutes ago."""
    start = datetime(2026, 5, 1, tzinfo=UTC) - timedelta(minutes=minutes)
    end = start + timedelta(seconds=seconds) if seconds is not None else None
    return {
        "state": state,
        "start_date": start.isoformat(),
        "end_date": end.isoformat() if end else None,
    }


def test_runs_of_a_dag() -> None:
    found = values(
        exporter_airflow.metrics(
            {
                "diabetes_a": [
                    run("running", 1, None),
                    run("failed", 5, 30),
                    run("success", 10, 90),
                    run("success", 20),
                ],
                "diabetes_b": [run("queued", 1, None)],
                "diabetes_c": [],
            }
        )
    )
    assert found["dag_run_success", "diabetes_a"] == 0
    assert found["dag_run_duration_seconds", "diabetes_a"] == 30
    last = datetime(2026, 5, 1, tzinfo=UTC) - timedelta(minutes=10, seconds=-90)
    assert found["dag_run_last_success_timestamp_seconds", "diabetes_a"] == last.timestamp()
    counts = {
        key[2]: value for key, value in found.items() if key[:2] == ("dag_runs", "diabetes_a")
    }
    assert counts == {"queued": 0, "running": 1, "success": 2, "failed": 1}
    # What has not ended tells of nothing that has.
    assert {key for key in found if key[1] != "diabetes_a"} == {
        ("dag_runs", name, state)
        for name in ("diabetes_b", "diabetes_c")
        for state in ("queued", "running", "success", "failed")
    }


def test_a_run_marked_by_hand_before_it_began() -> None:
    marked = {"state": "success", "start_date": None, "end_date": run("", 1)["end_date"]}
    found = values(exporter_airflow.metrics({"diabetes_a": [marked]}))
    assert found["dag_run_success", "diabetes_a"] == 1
    assert ("dag_run_duration_seconds", "diabetes_a") not in found
