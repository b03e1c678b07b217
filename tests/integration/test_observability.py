"""Prometheus, Alertmanager and the exporters of others, for real where this machine has them."""

from __future__ import annotations

import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psycopg2
import pytest
import requests
import yaml
from prometheus_client import CollectorRegistry, Gauge, start_http_server

from monitoring.exporter import Exporter, sources
from services import processes
from services.databases import ensure_monitor
from services.observability import (
    ALERTMANAGER,
    POSTGRES_EXPORTER,
    PROMETHEUS,
    RULES,
    STATSD_EXPORTER,
    Alertmanager,
    Observability,
    ObservabilityError,
    PostgresExporter,
    Prometheus,
    StatsdExporter,
    Tool,
    find_tool,
)
from services.web import EXPORTER
from settings import Settings
from tests.warehouse import Database

if TYPE_CHECKING:
    from tests.served import Api

NOBODY = {"route": {"receiver": "nobody"}, "receivers": [{"name": "nobody"}]}


def needs(*tools: Tool) -> pytest.MarkDecorator:
    missing = [tool.programs[0] for tool in tools if not find_tool(tool, "")]
    return pytest.mark.skipif(bool(missing), reason=f"not on the PATH: {', '.join(missing)}")


def program(tool: Tool) -> Path:
    found = find_tool(tool, "")
    assert found
    return found


@pytest.fixture
def state(tmp_path: Path) -> Iterator[Path]:
    yield tmp_path
    processes.stop(tmp_path)


@pytest.fixture
def receiver(tmp_path: Path) -> Path:
    file = tmp_path / "alertmanager.yaml"
    file.write_text(yaml.safe_dump(NOBODY))
    return file


@pytest.fixture
def page() -> Iterator[str]:
    """host:port of a page of metrics."""
    registry = CollectorRegistry()
    Gauge("of_a_test", "A value", registry=registry).set(1)
    server, thread = start_http_server(0, "127.0.0.1", registry)
    yield f"127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()
    thread.join()


def ask(url: str, path: str, **parameters: str) -> Any:
    return requests.get(f"{url}/api/v1/{path}", params=parameters, timeout=5).json()["data"]


def value(url: str, query: str) -> float | None:
    found = ask(url, "query", query=query)["result"]
    return float(found[0]["value"][1]) if found else None


def wait_until(condition: Callable[[], bool], seconds: float = 20) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def health(url: str) -> dict[str, str]:
    return {
        target["labels"]["job"]: target["health"] for target in ask(url, "targets")["activeTargets"]
    }


def addresses(state: Path) -> set[str]:
    return {
        connection.laddr.ip
        for process in processes.find(state)
        for connection in process.net_connections("inet")
        if not connection.raddr
    }


@needs(PROMETHEUS, ALERTMANAGER)
def test_it_starts_follows_its_targets_and_ends(state: Path, receiver: Path, page: str) -> None:
    alertmanager = Alertmanager(state, program(ALERTMANAGER))
    told = f"127.0.0.1:{alertmanager.start(receiver, preferred_port=56610)}"
    prometheus = Prometheus(state, program(PROMETHEUS))
    with closing(socket.create_server(("127.0.0.1", 0))) as taken:
        preferred = taken.getsockname()[1]
        port = prometheus.start(
            {"api": "127.0.0.1:1"},
            alertmanager=told,
            rules=[],
            preferred_port=preferred,
            scrape_interval="1s",
        )
        assert port != preferred
    assert prometheus.wait_until_ready() == port
    alertmanager.wait_until_ready()
    assert addresses(state) == {"127.0.0.1"}
    before = [process.pid for process in processes.find(state)]
    assert len(before) == 2
    assert alertmanager.start(receiver) == alertmanager.port
    again = {"alertmanager": told, "rules": [], "scrape_interval": "1s"}
    assert prometheus.start({"api": page}, **again) == port  # type: ignore[arg-type]
    # The same processes, with the new target.
    assert [process.pid for process in processes.find(state)] == before
    wait_until(
        lambda: (
            health(prometheus.url) == {"prometheus": "up", "alertmanager": "up", "api": "up"}
            and value(prometheus.url, "of_a_test") == 1
        )
    )
    assert len(ask(prometheus.url, "alertmanagers")["activeAlertmanagers"]) == 1
    flags = ask(prometheus.url, "status/flags")
    assert flags["storage.tsdb.retention.size"] in ("1GB", "1GiB")
    begin = time.monotonic()
    assert processes.stop(state) == 2
    assert time.monotonic() - begin < 10
    assert (prometheus.port, prometheus.url) == (None, "")
    # What it knew is there when it is back.
    assert prometheus.start({}, rules=[], preferred_port=56600) != 0
    prometheus.wait_until_ready()
    assert ask(prometheus.url, "label/job/values") == ["alertmanager", "api", "prometheus"]


@needs(PROMETHEUS)
def test_a_broken_rule_is_refused_and_the_old_ones_go_on(state: Path, tmp_path: Path) -> None:
    rules = tmp_path / "rules.yaml"

    def write(expression: str) -> None:
        group = {"name": "of_a_test", "rules": [{"alert": "Down", "expr": expression}]}
        rules.write_text(yaml.safe_dump({"groups": [group]}))

    prometheus = Prometheus(state, program(PROMETHEUS))
    write("up ==")
    prometheus.start({}, rules=[rules], preferred_port=56620)
    with pytest.raises(
        ObservabilityError,
        match=r"see .*/prometheus\.log, .*DIABETES_PROMETHEUS=off",
    ):
        prometheus.wait_until_ready()
    assert "parse error" in (state / "logs" / "prometheus.log").read_text()
    write("up == 0")
    prometheus.start({}, rules=[rules], preferred_port=56620)
    prometheus.wait_until_ready()
    write("up ==")
    with pytest.raises(ObservabilityError, match="goes on with its old configuration"):
        prometheus.start({}, rules=[rules])
    (group,) = ask(prometheus.url, "rules")["groups"]
    assert [rule["query"] for rule in group["rules"]] == ["up == 0"]
    # Mended, it is taken: what failed before the signal is no answer to it. With the real rules,
    # which take longer to read than the metrics do.
    write("up == 1")
    prometheus.start({}, rules=[rules, *RULES])
    queries = {
        rule["query"] for group in ask(prometheus.url, "rules")["groups"] for rule in group["rules"]
    }
    assert len(queries) > 40
    assert "up == 1" in queries


@needs(ALERTMANAGER)
def test_a_receiver_that_is_not_there_or_broken(
    state: Path, receiver: Path, caplog: pytest.LogCaptureFixture
) -> None:
    alertmanager = Alertmanager(state, program(ALERTMANAGER))
    alertmanager.start(state / "missing.yaml", preferred_port=56640)
    alertmanager.wait_until_ready()
    assert "alerts are shown, nobody is told" in caplog.text
    (first,) = processes.find(state)
    # Another file is another command line.
    alertmanager.start(receiver)
    alertmanager.wait_until_ready()
    (second,) = processes.find(state)
    assert first.pid != second.pid
    receiver.write_text("route: 3")
    with pytest.raises(ObservabilityError, match="goes on with its old configuration"):
        alertmanager.start(receiver)


@needs(PROMETHEUS, POSTGRES_EXPORTER)
def test_real_targets_are_up_and_the_password_stays_private(
    state: Path, page: str, database: Database
) -> None:
    password = "only-for-tests:100%/@?"
    with closing(psycopg2.connect(database.dsn)) as connection:
        connection.autocommit = True
        ensure_monitor(connection, "an old one")
        ensure_monitor(connection, password)
    exporter = PostgresExporter(state, program(POSTGRES_EXPORTER))
    registry = CollectorRegistry()
    (source,) = sources(
        Settings(
            db_port=database.port,
            db_user="monitoring",
            db_password=password,  # type: ignore[arg-type]
            db_name=database.name,
        ),
        seconds=0.5,
    )
    registry.register(Exporter([source], state))
    source.start()
    server, thread = start_http_server(0, "127.0.0.1", registry)
    try:
        port = exporter.start(database.port, password, database=database.name, preferred_port=56650)
        exporter.wait_until_ready()
        prometheus = Prometheus(state, program(PROMETHEUS))
        prometheus.start(
            {
                "api": page,
                "pipeline": f"127.0.0.1:{server.server_port}",
                "postgres": f"127.0.0.1:{port}",
            },
            rules=[],
            preferred_port=56660,
            scrape_interval="1s",
        )
        prometheus.wait_until_ready()
        wait_until(lambda: set(health(prometheus.url).values()) == {"up"})
        assert len(health(prometheus.url)) == 4
        wait_until(lambda: value(prometheus.url, "pg_up") == 1)
        wait_until(lambda: value(prometheus.url, "pipeline_database_up") == 1)
        size = f'pg_database_size_bytes{{datname="{database.name}"}}'
        wait_until(lambda: (value(prometheus.url, size) or 0) > 1e6)
        said = [" ".join(process.cmdline()) for process in processes.find(state)]
        log = (state / "logs" / "postgres-exporter.log").read_text()
        assert not any(password in text for text in (*said, log))
        # Every scrape would write it, and the log has no end.
        assert "level=error" not in log
        assert addresses(state) == {"127.0.0.1"}
        (before,) = processes.find(state, "postgres-exporter")
        assert exporter.start(database.port, password, database=database.name) == port
        assert processes.find(state, "postgres-exporter") == [before]
        exporter.start(database.port, "another", database=database.name)
        (after,) = processes.find(state, "postgres-exporter")
        assert before.pid != after.pid
    finally:
        source.stop()
        server.shutdown()
        server.server_close()
        thread.join()


@needs(STATSD_EXPORTER)
def test_what_airflow_counts_is_told(state: Path) -> None:
    exporter = StatsdExporter(state, program(STATSD_EXPORTER))
    mappings = state / "mappings.yaml"
    port = exporter.start(56670, preferred_port=56680, mappings=mappings)
    exporter.wait_until_ready()
    udp = exporter.udp_port
    assert udp
    assert addresses(state) == {"127.0.0.1"}
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as client:
        client.sendto(b"airflow.of_a_test,dag_id=diabetes_a:3|c", ("127.0.0.1", udp))
        wait_until(
            lambda: (
                'airflow_of_a_test{dag_id="diabetes_a"} 3'
                in requests.get(f"http://127.0.0.1:{port}/metrics", timeout=5).text
            )
        )
    (before,) = processes.find(state)
    assert exporter.start(mappings=mappings) == port
    assert processes.find(state) == [before]
    # With names of its own it is another one; Airflow goes on sending to where it knows.
    mappings.write_text("mappings: []")
    exporter.start(mappings=mappings)
    exporter.wait_until_ready()
    assert processes.find(state) != [before]
    assert exporter.udp_port == udp


@needs(PROMETHEUS)
def test_off_ends_what_runs(state: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Prometheus(state, program(PROMETHEUS)).start({}, rules=[], preferred_port=56690)
    assert processes.find(state, "prometheus")
    off = dict.fromkeys(("alertmanager", "postgres_exporter", "statsd_exporter"), "off")
    made = Observability(Settings(state_dir=state, prometheus="off", **off))  # type: ignore[arg-type]
    made.start(1, "password", {})
    assert processes.find(state) == []


def test_a_program_that_never_answers_is_an_error(state: Path) -> None:
    stub = state / "prometheus"
    stub.mkdir()
    file = state / "stub"
    file.write_text("#!/bin/sh\nexec sleep 60\n")
    file.chmod(0o755)
    prometheus = Prometheus(state, file)
    prometheus.start({}, preferred_port=56700)
    with pytest.raises(ObservabilityError, match="does not answer after 1 s; see"):
        prometheus.wait_until_ready(timeout=1)


def test_the_pipelines_exporter_is_one_of_the_services(state: Path, database: Database) -> None:
    variables = {**database.environment, "DIABETES_STATE_DIR": str(state)}
    port = EXPORTER.port(state, 56710, variables)
    EXPORTER.start(state, port, variables)
    EXPORTER.wait_until_up(state, port)
    assert EXPORTER.port(state, 56710, variables) == port
    (process,) = processes.find(state, EXPORTER.name)
    # Idle is idle: less than a tenth of a processor, and a loop would take all of one.
    begin = process.cpu_times()
    time.sleep(3)
    end = process.cpu_times()
    assert (end.user + end.system) - (begin.user + begin.system) < 0.3
    assert EXPORTER.port(state, 56710, {**variables, "DIABETES_DB_PORT": "1"}) == port
    assert not processes.find(state, EXPORTER.name)


@pytest.mark.skipif(not shutil.which("promtool"), reason="no promtool on the PATH")
def test_the_apis_page_keeps_prometheus_conventions(api: Api) -> None:
    text = api.get("/metrics").text
    for name in (
        "model_trained_timestamp_seconds{",
        "prediction_log_disk_free_bytes ",
        "prediction_log_disk_size_bytes ",
        "prediction_log_spool_files ",
    ):
        assert f"\n{name}" in text
    trained = api.metric('model_trained_timestamp_seconds{alias="champion"}')
    assert time.time() - 3600 < trained <= time.time()
    assert trained <= api.metric('model_loaded_timestamp_seconds{alias="champion"}')
    done = subprocess.run(
        ["promtool", "check", "metrics"], input=text, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout + done.stderr) == (0, "")
