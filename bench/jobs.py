"""The measured jobs but the DAG: (a) plain COPY, (b) ingestion, (c) dbt build, (e) pandas."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

from bench.errors import BenchError
from bench.figures import JOBS, Sample, pipeline
from bench.server import Server
from bench.usage import Usage, run
from services.dbt import PROJECT
from settings import PROJECT_ROOT

_OURS, _COPY, _PANDAS = "bench", "bench_copy", "bench_pandas"

Columns = dict[str, dict[str, list[str]]]
"""Columns by table, by side (`ours`, `pandas`)."""

log = logging.getLogger(__name__)


class Bench:
    """Measures jobs on one server.

    Args:
        server: holds the databases; each job starts on an empty one.
        folder: for dbt's target and logs.
    """

    def __init__(self, server: Server, folder: Path) -> None:
        self._server = server
        self._target = folder / "dbt"
        self._warm = False

    def round(self, csv: Path, rows: int, jobs: Collection[str]) -> Iterator[Sample]:
        """Measure the wanted jobs once, one after the other, and yield each when it is done.

        Each starts after a checkpoint.

        Args:
            csv: the file.
            rows: how many it has; a job that handled fewer fails.
            jobs: keys of `JOBS`; `dbt` without `ingest` loads without measuring it.

        Raises:
            BenchError: a job failed or did not do its work.
        """
        if "copy" in jobs:
            self._server.fresh(_COPY)
            yield self._child("copy", "copy", csv, rows, _COPY, changed=rows)
            self._server.drop(_COPY)
        if not {"ingest", "dbt"}.isdisjoint(jobs):
            self._server.fresh(_OURS)
            ingested = self._child("ingest", "ingest", csv, rows, _OURS, changed=rows)
            if "ingest" in jobs:
                yield ingested
            if "reload" in jobs:
                yield self._child("reload", "ingest", csv, rows, _OURS, changed=0)
            if "dbt" in jobs:
                built = self._dbt("dbt", rows)
                yield built
                if "ingest" in jobs:
                    yield pipeline(ingested, built)
            if "rebuild" in jobs:
                yield self._dbt("rebuild", rows)
        if "pandas" in jobs:
            self._server.fresh(_PANDAS)
            yield self._pandas(csv, rows)

    def clean_tables(self) -> Columns:
        """Columns by table of schema clean_data, ours and the pandas job's, as the last round left.

        A side whose tables are not there is left out.
        """
        databases = {"ours": _OURS, "pandas": _PANDAS}
        there = {
            name for (name,) in self._server.rows("postgres", "select datname from pg_database")
        }
        found: Columns = {}
        for side, database in databases.items():
            if database not in there:
                continue
            columns: dict[str, list[str]] = {}
            for table, column in self._server.rows(
                database,
                "select table_name, column_name from information_schema.columns"
                " where table_schema = 'clean_data' order by table_name, ordinal_position",
            ):
                columns.setdefault(table, []).append(column)
            if columns:
                found[side] = columns
        return found

    def discard(self) -> None:
        """Drop the databases of the last round."""
        for database in (_OURS, _COPY, _PANDAS):
            self._server.drop(database)

    def _measure(
        self, command: list[str], environment: dict[str, str], cwd: Path = PROJECT_ROOT
    ) -> tuple[Usage, float]:
        self._server.settle()
        before = self._server.cpu_seconds()
        usage = run(command, environment, cwd)
        self._server.settle_backends()
        return usage, self._server.cpu_seconds() - before

    def _child(
        self, job: str, program: str, csv: Path, rows: int, database: str, changed: int
    ) -> Sample:
        usage, postgres_cpu = self._measure(
            [sys.executable, "-m", "bench.child", program, str(csv)],
            self._server.environment(database),
        )
        report = _last_line(usage)
        if (report["rows"], report["changed"]) != (rows, changed):
            raise BenchError(
                f"{JOBS[job]} handled {report['rows']:,} rows and changed {report['changed']:,}, "
                f"expected {rows:,} and {changed:,}"
            )
        return Sample(
            job,
            rows,
            wall=report["wall"],
            command=usage.wall,
            cpu=report["cpu"],
            postgres_cpu=postgres_cpu,
            peak_mib=report["peak_mib"],
        )

    def _dbt(self, job: str, rows: int) -> Sample:
        environment = self._server.environment(_OURS) | {
            "DBT_EXCLUDE_RESOURCE_TYPES": "unit_test",  # as the DAG runs it
            "DBT_SEND_ANONYMOUS_USAGE_STATS": "False",
            "DO_NOT_TRACK": "1",
        }
        folders = ["--target-path", str(self._target), "--log-path", str(self._target)]
        if not self._warm:
            self._target.mkdir(parents=True, exist_ok=True)
            log.info("dbt parse, so that the builds find a partial parse as they would at home")
            run(["dbt", "parse", *folders], environment, PROJECT)
            self._warm = True
        usage, postgres_cpu = self._measure(["dbt", "build", *folders], environment, PROJECT)
        return Sample(job, rows, usage.wall, usage.wall, usage.cpu, postgres_cpu, usage.peak_mib)

    def _pandas(self, csv: Path, rows: int) -> Sample:
        usage, postgres_cpu = self._measure(
            [
                sys.executable,
                "-m",
                "bench.pandas_job",
                str(csv),
                self._server.sqlalchemy_url(_PANDAS),
            ],
            self._server.environment(_PANDAS),
        )
        handled = _last_line(usage)["rows"]
        if handled != rows:
            raise BenchError(f"{JOBS['pandas']} read {handled:,} rows, expected {rows:,}")
        return Sample(
            "pandas", rows, usage.wall, usage.wall, usage.cpu, postgres_cpu, usage.peak_mib
        )


def _last_line(usage: Usage) -> dict[str, Any]:
    try:
        return dict(json.loads(usage.output.strip().rsplit("\n", 1)[-1]))
    except ValueError as error:
        raise BenchError(f"expected a line of JSON at the end of:\n{usage.output}") from error
