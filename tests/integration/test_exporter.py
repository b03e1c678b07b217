"""The pipeline's exporter on a real PostgreSQL that dbt has filled, and that is taken away."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path

import psycopg2
import pytest
import requests
from prometheus_client import CollectorRegistry, generate_latest, start_http_server
from prometheus_client.core import Metric
from prometheus_client.parser import text_string_to_metric_families

from ingestion.synthetic import write_csv
from monitoring import exporter_airflow
from monitoring.exporter import Exporter, Source
from monitoring.exporter_database import DatabaseReader
from services.postgres import Postgres
from services.processes import free_port
from settings import PROJECT_ROOT
from tests.warehouse import Database, Dbt, ingest, new_database

Values = dict[str, dict[tuple[str, ...], float]]

DRIFT = """
create schema if not exists monitoring;
create table monitoring.drift (
    check_id text, checked_at timestamptz, window_name text, model_version text, feature text,
    rows bigint, psi double precision, missing_share double precision,
    missing_share_reference double precision, new_category_share double precision, drifted boolean
);
create table monitoring.drift_checks (
    check_id text, window_name text, checked_at timestamptz, model_version text, rows bigint,
    labelled_rows bigint, calibration_error double precision, drifted_features bigint,
    enough_rows boolean, drift_limit double precision
);
"""


def parsed(text: str) -> Values:
    """Values of a page by name and labels' values."""
    found: Values = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            found.setdefault(sample.name, {})[tuple(sample.labels.values())] = sample.value
    return found


def read(database: Database) -> Values:
    found: Values = {}
    for metric in DatabaseReader(database.dsn).read():
        for sample in metric.samples:
            found.setdefault(sample.name, {})[tuple(sample.labels.values())] = sample.value
    return found


def up(metric: Metric) -> dict[str, float]:
    """Whether each question was answered."""
    return {sample.labels["question"]: sample.value for sample in metric.samples}


@pytest.fixture(scope="module")
def dbt(server_port: int, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Dbt]:
    """dbt on a database with one load, of which it has built clean_data."""
    folder = tmp_path_factory.mktemp("exporter")
    with new_database(server_port, f"exporter_{os.getpid()}") as database:
        path = folder / "1000.csv"
        write_csv(path, rows=1_000)
        with path.open("a") as file:
            file.write("not,a,row\n")
        ingest(database, path)
        dbt = Dbt(database, folder / "target")
        dbt.build("--exclude-resource-type", "test", batch_size=300)
        yield dbt


@pytest.fixture
def built(dbt: Dbt) -> Database:
    return dbt.database


def test_values_are_what_sql_counts(built: Database) -> None:
    found = read(built)
    for split in ("train", "validation", "test", "excluded"):
        ((rows,),) = built.rows(f"select count(*) from clean_data.diabetes_{split}")
        assert found["pipeline_split_rows"][split,] == rows
    assert sum(found["pipeline_split_rows"].values()) == 1_000
    ((batches,),) = built.rows("select count(*) from clean_data.batch_info")
    assert found["pipeline_batches"] == {(): batches}
    assert found["pipeline_load_rows"] == {
        ("inserted",): 1_000,
        ("updated",): 0,
        ("unchanged",): 0,
        ("rejected",): 1,
    }
    assert found["pipeline_load_deleted_rows"] == {(): 0}
    ((loaded,),) = built.rows("select extract(epoch from finished_at) from raw_data.ingestion_log")
    assert found["pipeline_last_load_timestamp_seconds"][()] == float(str(loaded))
    for feature, lower, upper in built.rows(
        "select feature, sum(rows_raised), sum(rows_lowered) from clean_data.clip_report group by 1"
    ):
        assert found["pipeline_clipped_rows"][str(feature), "lower"] == lower
        assert found["pipeline_clipped_rows"][str(feature), "upper"] == upper
    assert len(found["pipeline_clipped_rows"]) == 10


def test_every_node_is_stored_with_its_own_time(built: Database) -> None:
    before = time.time()
    counts = built.rows(
        "select resource_type, status, count(*) from monitoring.dbt_results group by 1, 2"
    )
    assert {row[:2] for row in counts} >= {("model", "success"), ("seed", "success")}
    assert not {row[0] for row in counts} & {"operation", "test"}
    found = read(built)
    assert found["dbt_results"] == {(str(kind), str(state)): n for kind, state, n in counts}
    # Nodes ended one after the other; with now() they would all have ended at once.
    ((moments, nodes),) = built.rows(
        "select count(distinct finished_at), count(finished_at) from monitoring.dbt_results"
    )
    assert int(str(moments)) > int(str(nodes)) / 2
    assert set(found["dbt_build_duration_seconds"]) == {("data",)}
    assert 0 < found["dbt_build_duration_seconds"]["data",] < 120
    finished = found["dbt_build_finished_timestamp_seconds"]["data",]
    assert before - 600 < finished <= before
    assert before - 600 < found["pipeline_published_timestamp_seconds"][()] <= finished


def invoked(database: Database, results: dict[str, str], count: int = 1) -> None:
    """So many made-up invocations of dbt, each a little later than all before."""
    values = ", ".join(f"('{node}', '{status}')" for node, status in results.items())
    database.rows(
        f"""insert into monitoring.dbt_results
        select 'made up ' || known + i, node, split_part(node, '.', 1), status, 1, 0,
            case when status <> 'skipped' then newest + i * interval '1 ms' end
        from generate_series(1, {count}) as i
        cross join (values {values}) as result (node, status)
        cross join (
            select count(*) as known, max(finished_at) as newest from monitoring.dbt_results
        ) as stored"""
    )


@pytest.fixture
def history(built: Database) -> Iterator[Database]:
    """What dbt has stored, for a test to add to."""
    built.rows("create table public.kept as select * from monitoring.dbt_results")
    yield built
    built.rows(
        "truncate monitoring.dbt_results; "
        "insert into monitoring.dbt_results select * from public.kept; drop table public.kept"
    )


DRIFT_BUILD = {"model.diabetes.drift": "success", "model.diabetes.drift_checks": "success"}


def test_a_failure_stays_until_the_node_runs_again(history: Database) -> None:
    before = read(history)
    tests = {"test.diabetes.clip_bounds_hold": "fail", "test.diabetes.lookups_are_total": "pass"}
    invoked(history, tests | {"model.diabetes.diabetes_train": "skipped"})
    invoked(history, DRIFT_BUILD, count=3)
    found = read(history)
    models = before["dbt_results"]["model", "success"]
    # What was skipped did not run: its last result stands.
    assert found["dbt_results"] == before["dbt_results"] | {
        ("model", "success"): models + 2,
        ("test", "fail"): 1,
        ("test", "pass"): 1,
    }
    took = found["dbt_build_duration_seconds"]
    assert took == before["dbt_build_duration_seconds"] | {("monitoring",): 1}
    invoked(history, {"test.diabetes.clip_bounds_hold": "pass"})
    found = read(history)
    assert found["dbt_results"]["test", "pass"] == 2
    assert ("test", "fail") not in found["dbt_results"]


def test_old_invocations_are_forgotten_but_not_what_failed_nor_when_a_model_was_built(
    history: Database, dbt: Dbt
) -> None:
    before = read(history)
    failed = {"test.diabetes.lookups_are_total": "fail", "model.diabetes.no_more": "error"}
    invoked(history, failed | {"model.diabetes.diabetes_test": "skipped"})
    invoked(history, DRIFT_BUILD, count=60)
    assert dbt("test", "--select", "clip_bounds_hold").returncode == 0
    made_up = history.rows(
        """select unique_id, status, count(*) from monitoring.dbt_results
        where invocation_id like 'made up%' group by 1, 2 order by 1"""
    )
    # One of the newest fifty is dbt's own. What the project has no more is forgotten.
    assert made_up == [
        ("model.diabetes.drift", "success", 49),
        ("model.diabetes.drift_checks", "success", 49),
        ("test.diabetes.lookups_are_total", "fail", 1),
    ]
    found = read(history)
    for name in ("pipeline_published_timestamp_seconds", "dbt_build_finished_timestamp_seconds"):
        assert found[name].items() >= before[name].items()
    assert found["dbt_results"]["test", "fail"] == 1


def test_a_reader_is_not_disturbed_and_stores_nothing(dbt: Dbt, built: Database) -> None:
    built.rows(
        """create role reader login password 'only for tests';
        grant usage on schema clean_data, intermediate, monitoring to reader;
        grant select on all tables in schema clean_data, intermediate to reader"""
    )
    count = "select count(*) from monitoring.dbt_results"
    before = built.rows(count)
    reader = Dbt(replace(built, user="reader", password="only for tests"), dbt.target)
    try:
        assert reader("test", "--select", "clip_bounds_hold").returncode == 0
        assert built.rows(count) == before
        # Nor does the exporter need more than it may see.
        told = {metric.name: metric for metric in DatabaseReader(reader.database.dsn).read()}
        assert "pipeline_split_rows" in told
        assert not told.keys() & {"pipeline_load_rows", "dbt_results"}
        assert up(told["pipeline_question_up"]) == {
            "splits": 1,
            "batches": 1,
            "clipped": 1,
            "load": 0,
            "published": 0,
            "dbt_results": 0,
            "dbt_builds": 0,
        }
    finally:
        built.rows("drop owned by reader; drop role reader")


def test_the_newest_check_of_each_window_is_told(database: Database) -> None:
    database.rows(DRIFT)
    database.rows(
        """insert into monitoring.drift_checks values
        ('1', 'predictions', '2026-01-01', '7', 100, 0, null, 5, true, 0.2),
        ('2', 'predictions', '2026-01-02', '7', 200, 50, 0.02, 1, true, 0.25),
        ('1', 'load', '2026-01-01', '7', 300, 300, 0.01, 0, true, null),
        ('9', 'of somebody else', '2026-01-03', '7', 1, 1, 1, 1, true, 1)"""
    )
    database.rows(
        """insert into monitoring.drift values
        ('1', '2026-01-01', 'predictions', '7', 'age', 100, 9, 0.9, 0.9, 0.9, true),
        ('2', '2026-01-02', 'predictions', '7', 'age', 200, 0.3, 0.01, 0.02, 0.03, true),
        ('2', '2026-01-02', 'predictions', '7', '(score)', 200, 0.1, null, null, null, false),
        ('1', '2026-01-01', 'load', '7', 'age', 300, 0.05, 0.02, 0.02, null, false),
        ('9', '2026-01-03', 'of somebody else', '7', 'age', 1, 1, 1, 1, 1, true)"""
    )
    found = read(database)
    assert found["drift_psi"] == {
        ("predictions", "age", "7"): 0.3,
        ("load", "age", "7"): 0.05,
    }
    assert found["drift_score_psi"] == {("predictions", "7"): 0.1}
    assert found["drift_missing_share"] == {("predictions", "age"): 0.01, ("load", "age"): 0.02}
    assert found["drift_missing_share_reference"] == {("age",): 0.02}
    assert found["drift_new_category_share"] == {("predictions", "age"): 0.03}
    assert found["drift_window_rows"] == {("predictions",): 200, ("load",): 300}
    assert found["drift_labelled_rows"] == {("predictions",): 50, ("load",): 300}
    assert found["drift_calibration_error"] == {("predictions",): 0.02, ("load",): 0.01}
    # A check from before the limit was written down tells none.
    assert found["drift_limit"] == {("predictions",): 0.25}
    assert set(found["drift_checked_timestamp_seconds"]) == {("predictions",), ("load",)}


def test_an_empty_database_is_up_and_has_nothing_to_tell(database: Database) -> None:
    assert read(database) == {}


def test_tables_of_another_shape_or_locked_are_left_out(
    database: Database, caplog: pytest.LogCaptureFixture
) -> None:
    database.rows(
        """create schema clean_data; create schema raw_data;
        create table clean_data.batch_info (batch_id integer);
        create table clean_data.clip_report (something integer);
        create table raw_data.ingestion_log (load_id integer)"""
    )
    reader = DatabaseReader(database.dsn)
    with closing(psycopg2.connect(database.dsn)) as connection:
        connection.cursor().execute("lock table clean_data.batch_info")
        begin = time.monotonic()
        (told,) = reader.read()
        assert up(told) == {"batches": 0, "load": 0, "clipped": 0}
        assert time.monotonic() - begin < 3
    batches, told = reader.read()
    assert [sample.value for sample in batches.samples] == [0]
    assert up(told) == {"batches": 1, "load": 0, "clipped": 0}
    assert caplog.text.count("load: can't be read") == 1


@contextmanager
def served(database: Database, state: Path) -> Iterator[Callable[[], Values]]:
    """The page of an exporter that reads every half second; a call fetches it, in five seconds."""
    source = Source(
        "database", ("pipeline_database_up", "Help"), DatabaseReader(database.dsn).read, 0.5
    )
    registry = CollectorRegistry()
    registry.register(Exporter([source], state))
    server, thread = start_http_server(0, "127.0.0.1", registry)
    source.start()
    try:
        yield lambda: parsed(
            requests.get(f"http://127.0.0.1:{server.server_port}/metrics", timeout=5).text
        )
    finally:
        source.stop()
        server.shutdown()
        server.server_close()
        thread.join()


def wait_for(page: Callable[[], Values], up: float, seconds: float) -> Values:
    deadline = time.monotonic() + seconds
    while (found := page())["pipeline_database_up"] != {(): up}:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    return found


def test_a_database_that_goes_or_hangs_is_told_within_seconds(
    reachable_tmp: Path, tmp_path: Path
) -> None:
    server = Postgres(reachable_tmp / "exporter-server")
    port = server.start(56300, "only-for-tests")
    database = Database(port, "postgres")
    try:
        database.rows(
            "create schema clean_data; create table clean_data.batch_info (batch_id integer)"
        )
        with served(database, tmp_path) as page:
            assert wait_for(page, 1, 5)["pipeline_batches"] == {(): 0}
            server.stop()
            found = wait_for(page, 0, 5)
            assert "pipeline_batches" not in found
            assert "disk_free_bytes" in found
            server.start(port, "only-for-tests")
            wait_for(page, 1, 5)
            # It accepts connections and answers nobody.
            postmaster = int((server.data / "postmaster.pid").read_text().splitlines()[0])
            os.kill(postmaster, signal.SIGSTOP)
            try:
                assert "pipeline_batches" not in wait_for(page, 0, 8)
            finally:
                os.kill(postmaster, signal.SIGCONT)
            wait_for(page, 1, 8)
    finally:
        server.stop()


@pytest.mark.skipif(not shutil.which("promtool"), reason="no promtool on the PATH")
def test_the_page_keeps_prometheus_conventions(
    built: Database, database: Database, tmp_path: Path
) -> None:
    database.rows(DRIFT)
    runs = {"diabetes_a": [{"state": "success", "start_date": None, "end_date": None}]}

    def everything() -> list[Metric]:
        # Drift of one, the rest of the other: how dbt builds it is no matter of this test.
        found = {metric.name: metric for metric in DatabaseReader(built.dsn).read()}
        found |= {metric.name: metric for metric in DatabaseReader(database.dsn).read()}
        return [*found.values(), *exporter_airflow.metrics(runs)]

    source = Source("all", ("pipeline_database_up", "1 if it answers"), everything)
    source.refresh()
    registry = CollectorRegistry()
    registry.register(Exporter([source], tmp_path))
    text = generate_latest(registry).decode()
    done = subprocess.run(
        ["promtool", "check", "metrics"], input=text, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout + done.stderr) == (0, "")


def test_the_program_answers_and_ends_as_asked(database: Database, tmp_path: Path) -> None:
    unused_port = free_port(56400)
    with subprocess.Popen(
        [sys.executable, "-m", "monitoring", "exporter", "--port", str(unused_port)],
        cwd=PROJECT_ROOT,
        env={**os.environ, **database.environment, "DIABETES_STATE_DIR": str(tmp_path)},
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        deadline = time.monotonic() + 20
        while True:
            try:
                found = parsed(
                    requests.get(f"http://127.0.0.1:{unused_port}/metrics", timeout=5).text
                )
                break
            except requests.ConnectionError:
                assert time.monotonic() < deadline
                time.sleep(0.1)
        assert found["pipeline_database_up"] == {(): 1}
        assert "airflow_api_up" not in found
        assert found["process_resident_memory_bytes"][()] < 150e6
        process.terminate()
        assert process.wait(10) == 0
