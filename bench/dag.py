"""Job (d): the DAG on a real platform of its own, from the trigger to the end of its run."""

from __future__ import annotations

import os
import time
from collections.abc import Generator, Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import psutil
import psycopg2
from psycopg2 import sql

from bench.errors import BenchError
from bench.figures import Sample
from bench.server import stop_and_remove
from bench.usage import cpu_seconds, postgres_cpu_seconds, sampled
from services import processes
from services.airflow import COMPONENTS, Airflow
from services.platform import DAG_ID, TRAINING_DAG_ID, Platform
from services.postgres import Postgres
from services.state import Secrets
from settings import settings

_PREFERRED_POSTGRES_PORT = 57532
_PREFERRED_AIRFLOW_PORT = 58080
_PREFERRED_MLFLOW_PORT = 55000
_SAMPLE_SECONDS = 4.0
_TIMEOUT_SECONDS = 1800.0


def measure_dag(folder: Path, csv: Path, rows: int, rounds: int) -> Generator[Sample, None, None]:
    """Bring up a platform, run the DAG once for warming up and then `rounds` times, take it down.

    Before each run the data database is emptied, so that every run does the whole work, as the
    ingestion and the first dbt build do that it is held against. The first run is yielded as
    `dag_first`: Airflow's processes import most of their code in it.

    Args:
        folder: temporary folder; the platform's state goes below it.
        csv: the file, which is the DAG's Param `source`.
        rows: how many it has.
        rounds: counted runs.

    Raises:
        BenchError: a run failed.
        PostgresError, MlflowError, DbtError, AirflowError: the platform did not start or answer.
    """
    with running_platform(folder / "platform", csv) as (state, airflow, port):
        # Or each run would have a training beside it that the assets of the one before started.
        airflow.wait_for_dag(TRAINING_DAG_ID, newer_than=0)
        airflow.call("PATCH", f"dags/{TRAINING_DAG_ID}", json={"is_paused": True})
        password = Secrets(state)["diabetes"]
        data = Postgres(state).data
        for number in range(rounds + 1):
            _empty(port, password)
            sample = _run(airflow, state, data, csv, rows, "dag" if number else "dag_first")
            _check_rows(port, password, rows)
            yield sample


@contextmanager
def running_platform(state: Path, csv: Path) -> Iterator[tuple[Path, Airflow, int]]:
    """A platform of its own: state folder, Airflow and PostgreSQL's port; gone afterwards."""
    state.mkdir()
    chosen = settings().model_copy(
        update={
            "state_dir": state,
            "source": str(csv),
            "db_port": processes.free_port(_PREFERRED_POSTGRES_PORT),
            "airflow_port": processes.free_port(_PREFERRED_AIRFLOW_PORT),
            "mlflow_port": processes.free_port(_PREFERRED_MLFLOW_PORT),
            "mlflow_tracking_uri": "",
        }
    )
    # Cosmos would leave its cache in /tmp and share it with every other Airflow of this machine.
    os.environ["AIRFLOW__COSMOS__CACHE_DIR"] = str(state / "cosmos")
    platform = Platform(chosen)
    begin = time.time()
    try:
        airflow = platform.up()
        airflow.wait_for_dag(DAG_ID, newer_than=begin)
        yield state, airflow, platform.start_postgres()
    finally:
        try:
            platform.down()
        finally:
            stop_and_remove(Postgres(state))


def _run(airflow: Airflow, state: Path, data: Path, csv: Path, rows: int, job: str) -> Sample:
    cpu = cpu_seconds(processes.find(state, *COMPONENTS))
    postgres_cpu = postgres_cpu_seconds(data)
    failed, removed = [], []
    with sampled(lambda: _memory_mib(state), _SAMPLE_SECONDS) as peak:
        begin = time.perf_counter()
        run_id = airflow.trigger(DAG_ID, {"source": str(csv), "full_refresh": False})
        for task in airflow.follow(DAG_ID, run_id, _TIMEOUT_SECONDS):
            if task.state == "failed":
                failed.append(task.task_id)
            elif task.state == "removed":
                removed.append(task.task_id)
        wall = time.perf_counter() - begin
    if airflow.run_state(DAG_ID, run_id) != "success":
        lines = airflow.task_log(DAG_ID, run_id, failed[0]) if failed else []
        raise BenchError("\n".join([f"the DAG's run failed at {failed[:1]}; its log:", *lines]))
    if removed:
        raise BenchError(
            f"the DAG changed while it ran (tasks removed: {', '.join(removed[:3])}), so its time "
            "means nothing; leave dags/ and dbt_diabetes/ alone and measure again"
        )
    return Sample(
        job,
        rows,
        wall=wall,
        command=wall,
        cpu=cpu_seconds(processes.find(state, *COMPONENTS)) - cpu,
        postgres_cpu=postgres_cpu_seconds(data) - postgres_cpu,
        peak_mib=max(peak, default=0.0),
    )


def _memory_mib(state: Path) -> float:
    """Memory of all Airflow processes together: pages that they share count once."""
    return sum(map(_pss_bytes, processes.find(state, *COMPONENTS))) / (1 << 20)


def _pss_bytes(process: psutil.Process) -> int:
    try:
        memory = process.memory_full_info()
    except psutil.Error:
        return 0  # ended meanwhile
    return int(getattr(memory, "pss", memory.rss))


def _connect(port: int, password: str) -> psycopg2.extensions.connection:
    connection = psycopg2.connect(
        host="127.0.0.1", port=port, user="diabetes", password=password, dbname="diabetes"
    )
    connection.autocommit = True
    return connection


def _empty(port: int, password: str) -> None:
    """Drop every schema of the data database that its owner made."""
    with closing(_connect(port, password)) as connection:
        cursor = connection.cursor()
        cursor.execute("select nspname from pg_namespace where nspowner = current_user::regrole")
        for (schema,) in cursor.fetchall():
            cursor.execute(sql.SQL("drop schema {} cascade").format(sql.Identifier(schema)))


def _check_rows(port: int, password: str, rows: int) -> None:
    with closing(_connect(port, password)) as connection:
        cursor = connection.cursor()
        cursor.execute("select count(*) from raw_data.diabetes")
        (loaded,) = cursor.fetchone() or (0,)
    if loaded != rows:
        raise BenchError(f"the DAG loaded {loaded:,} rows, expected {rows:,}")
