"""The pipeline's exporter where its sources lie, hang or are not there."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import requests
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import GaugeMetricFamily, Metric

from monitoring import __main__ as cli
from monitoring import exporter_airflow
from monitoring.exporter import Exporter, Source, disk, sources
from monitoring.exporter_airflow import AirflowReader
from monitoring.exporter_database import gauge
from settings import Settings, settings

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


def test_a_taken_port_is_one_message(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("DIABETES_DB_PORT", "1")
    settings.cache_clear()
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert cli.main(["exporter", "--port", str(port)]) == 1
        assert cli.main(["exporter", "--port", "99999"]) == 1
    settings.cache_clear()
    said = capsys.readouterr().err
    assert f"error: can't listen on 127.0.0.1:{port}: " in said
    assert "Traceback" not in said


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


class FakeAirflow(BaseHTTPRequestHandler):
    """Airflow's REST API, as far as the exporter asks; `dags` and `tokens` are the test's."""

    dags: tuple[str, ...] = ()
    tokens: tuple[str, ...] = ()
    logins: list[str]

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        if not self.tokens:
            self._say(401, {})
            return
        token = self.tokens[min(len(self.logins), len(self.tokens) - 1)]
        self.logins.append(token)
        self._say(201, {"access_token": token})

    def do_GET(self) -> None:
        if self.headers["Authorization"] != f"Bearer {self.tokens[-1]}":
            self._say(401, {})
        elif self.path.startswith("/api/v2/dags?"):
            self._say(200, {"dags": [{"dag_id": name} for name in self.dags]})
        else:
            self._say(200, {"dag_runs": [run("success", 1)]})

    def _say(self, status: int, content: object) -> None:
        body = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


@contextmanager
def airflow(**attributes: Any) -> Iterator[tuple[str, type[FakeAirflow]]]:
    handler = type("Handler", (FakeAirflow,), {"logins": [], **attributes})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}", handler
        server.shutdown()


def test_only_our_dags_and_not_without_end() -> None:
    names = ("diabetes_a", "somebody_elses", *(f"diabetes_{number}" for number in range(50)))
    with airflow(dags=names, tokens=("t",)) as (url, _):
        found = values(AirflowReader(f"{url}/", "admin", "x").read())
    told = {key[1] for key in found}
    assert len(told) == 20
    assert "somebody_elses" not in told


def test_an_expired_token_is_renewed_once() -> None:
    with airflow(dags=("diabetes_a",), tokens=("old", "new")) as (url, handler):
        reader = AirflowReader(url, "admin", "x")
        assert values(reader.read())["dag_run_success", "diabetes_a"] == 1
        assert handler.logins == ["old", "new"]
        reader.read()
        assert handler.logins == ["old", "new"]


def test_a_refused_login_means_down_and_says_why(caplog: pytest.LogCaptureFixture) -> None:
    with airflow() as (url, _):
        reader = AirflowReader(url, "admin", "wrong")
        with pytest.raises(requests.HTTPError, match="401"):
            reader.read()
        source = Source("Airflow", ("airflow_api_up", "Help"), reader.read)
        source.refresh()
        source.refresh()
    assert values(source.metrics()) == {("airflow_api_up",): 0.0}
    assert caplog.text.count("can't be read") == 1
    assert "wrong" not in caplog.text
