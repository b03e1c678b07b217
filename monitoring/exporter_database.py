"""What the data database says of the pipeline, as metrics.

Each group of metrics is one question to the tables it needs; where they are not there yet, or this
login may not read them, the group is absent. Nothing waits for longer than the timeouts.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Any

import psycopg2
from prometheus_client.core import GaugeMetricFamily, Metric
from psycopg2.extensions import make_dsn

from settings import CLEAN_DATA

CONNECT_SECONDS = 3
STATEMENT_SECONDS = 3
_BUDGET = 10.0

Rows = list[tuple[Any, ...]]

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Question:
    """One query and what its answer means.

    Attributes:
        tables: that it reads; it is not asked before all of them are there.
        sql: the query.
        made: makes metrics of its rows.
        arguments: of the query.
    """

    tables: tuple[str, ...]
    sql: str
    made: Callable[[Rows], list[Metric]]
    arguments: dict[str, Any] | None = None


class DatabaseReader:
    """Asks all questions over a connection of its own each time.

    Args:
        dsn: connection string (libpq) of the data database.
    """

    def __init__(self, dsn: str) -> None:
        self._dsn = str(
            make_dsn(
                dsn,
                application_name="exporter",
                connect_timeout=CONNECT_SECONDS,
                # A table that is being swapped is not waited for: the next reading comes soon.
                options=f"-c statement_timeout={STATEMENT_SECONDS}s -c lock_timeout=1s "
                "-c default_transaction_read_only=on",
            )
        )
        self._complained: set[str] = set()

    def read(self) -> list[Metric]:
        """Metrics of whatever is there.

        Raises:
            psycopg2.OperationalError: the database can't be reached, or went away.
        """
        deadline = time.monotonic() + _BUDGET
        found: list[Metric] = []
        with closing(psycopg2.connect(self._dsn)) as connection:
            connection.autocommit = True
            cursor = connection.cursor()
            there = self._readable(cursor)
            for question in QUESTIONS:
                if not there.issuperset(question.tables) or time.monotonic() > deadline:
                    continue
                try:
                    cursor.execute(question.sql, question.arguments)
                    found += question.made(cursor.fetchall())
                except (
                    psycopg2.errors.QueryCanceled,
                    psycopg2.errors.LockNotAvailable,
                    psycopg2.ProgrammingError,
                ) as error:
                    # Too slow, locked, dropped since, or with other columns than we know.
                    self._complain(question.tables[0], error)
        return found

    @staticmethod
    def _readable(cursor: psycopg2.extensions.cursor) -> set[str]:
        cursor.execute(
            """
            select n.nspname || '.' || c.relname
            from pg_catalog.pg_class as c
            inner join pg_catalog.pg_namespace as n on n.oid = c.relnamespace
            where c.relkind in ('r', 'v', 'm', 'p')
                and n.nspname || '.' || c.relname = any(%s)
                and has_schema_privilege(n.oid, 'usage')
                and has_table_privilege(c.oid, 'select')
            """,
            (sorted({table for question in QUESTIONS for table in question.tables}),),
        )
        return {name for (name,) in cursor.fetchall()}

    def _complain(self, table: str, error: psycopg2.Error) -> None:
        if table not in self._complained:
            self._complained.add(table)
            log.warning("%s: can't be read: %s", table, " ".join(str(error).split()))


def gauge(
    name: str, text: str, labels: Sequence[str], rows: Iterable[Sequence[Any]]
) -> GaugeMetricFamily:
    """A gauge of rows that hold a value after the labels; rows without a value are left out."""
    made = GaugeMetricFamily(name, text, labels=labels)
    for *values, value in rows:
        if value is not None and None not in values:
            made.add_metric([str(label) for label in values], float(value))
    return made


def _splits(rows: Rows) -> list[Metric]:
    return [gauge("pipeline_split_rows", "Encounters in each table of clean_data", ["split"], rows)]


def _batches(rows: Rows) -> list[Metric]:
    return [gauge("pipeline_batches", "Batches that the training rows are cut into", [], rows)]


def _load(rows: Rows) -> list[Metric]:
    if not rows:
        return []
    (row,) = rows
    results = zip(("inserted", "updated", "unchanged", "rejected"), row, strict=False)
    return [
        gauge(
            "pipeline_load_rows",
            "Rows that the newest load read, by what became of them",
            ["result"],
            results,
        ),
        gauge(
            "pipeline_load_deleted_rows",
            "Rows that the newest load removed because its file does not hold them",
            [],
            [row[4:5]],
        ),
        gauge("pipeline_last_load_timestamp_seconds", "When the newest load ended", [], [row[5:6]]),
    ]


def _clipped(rows: Rows) -> list[Metric]:
    return [
        gauge(
            "pipeline_clipped_rows",
            "Encounters beyond a feature's bound, which are clipped to it",
            ["feature", "bound"],
            [
                (feature, bound, number)
                for feature, raised, lowered in rows
                for bound, number in (("lower", raised), ("upper", lowered))
            ],
        )
    ]


def _published(rows: Rows) -> list[Metric]:
    return [
        gauge(
            "pipeline_published_timestamp_seconds",
            "When the tables of clean_data were last built, the oldest of them",
            [],
            rows,
        )
    ]


def _dbt(rows: Rows) -> list[Metric]:
    if not rows:
        return []
    return [
        gauge(
            "dbt_results",
            "Nodes of dbt's newest invocation, by what became of them",
            ["resource_type", "status"],
            [row[:3] for row in rows],
        ),
        gauge(
            "dbt_build_duration_seconds",
            "From the first node's begin to the last node's end in dbt's newest invocation",
            [],
            [rows[0][3:4]],
        ),
        gauge(
            "dbt_build_finished_timestamp_seconds",
            "When the last node of dbt's newest invocation ended",
            [],
            [rows[0][4:5]],
        ),
    ]


def _drift(rows: Rows) -> list[Metric]:
    """Of rows window, feature, version, psi, missing, missing in the reference, new categories."""
    features = [row for row in rows if row[1] != SCORE]
    return [
        gauge(
            "drift_psi",
            "Population stability index of a feature against the champion's reference",
            ["window", "feature", "model_version"],
            [(window, feature, version, psi) for window, feature, version, psi, *_ in features],
        ),
        gauge(
            "drift_score_psi",
            "Population stability index of the score against the champion's reference",
            ["window", "model_version"],
            [(row[0], row[2], row[3]) for row in rows if row[1] == SCORE],
        ),
        gauge(
            "drift_missing_share",
            "Share of a window's encounters where a feature is missing",
            ["window", "feature"],
            [(row[0], row[1], row[4]) for row in features],
        ),
        gauge(
            "drift_missing_share_reference",
            "Share of the champion's training encounters where a feature is missing",
            ["feature"],
            # Both windows name the same reference, unless the champion changed in between.
            {row[1]: (row[1], row[5]) for row in features}.values(),
        ),
        gauge(
            "drift_new_category_share",
            "Share of a window's encounters with a category that training never saw",
            ["window", "feature"],
            [(row[0], row[1], row[6]) for row in features],
        ),
    ]


def _checks(rows: Rows) -> list[Metric]:
    """Of rows window, moment, rows, rows with labels, calibration error."""
    return [
        gauge(
            "drift_checked_timestamp_seconds",
            "When a window was last compared with the champion's reference",
            ["window"],
            [(row[0], row[1]) for row in rows],
        ),
        gauge(
            "drift_window_rows",
            "Encounters in the window that was compared last",
            ["window"],
            [(row[0], row[2]) for row in rows],
        ),
        gauge(
            "drift_labelled_rows",
            "Of these, encounters whose outcome is known by now",
            ["window"],
            [(row[0], row[3]) for row in rows],
        ),
        gauge(
            "drift_calibration_error",
            "Expected calibration error over the encounters whose outcome is known",
            ["window"],
            [(row[0], row[4]) for row in rows],
        ),
    ]


SCORE = "(score)"
"""Stands for a feature's name where the score is meant."""

_WINDOWS = "('predictions', 'load')"
_SPLITS = ("train", "validation", "test", "excluded")
_NEWEST_CHECKS = f"""
select distinct on (window_name) window_name, check_id, checked_at, rows, labelled_rows,
    calibration_error
from monitoring.drift_checks
where window_name in {_WINDOWS}
order by window_name asc, checked_at desc
"""

QUESTIONS = (
    Question(
        tuple(f"clean_data.diabetes_{split}" for split in _SPLITS),
        " union all ".join(
            f"select '{split}', count(*) from clean_data.diabetes_{split}" for split in _SPLITS
        ),
        _splits,
    ),
    Question(("clean_data.batch_info",), "select count(*) from clean_data.batch_info", _batches),
    Question(
        ("raw_data.ingestion_log",),
        """
        select rows_inserted, rows_updated, rows_unchanged, rows_rejected, rows_deleted,
            extract(epoch from finished_at)
        from raw_data.ingestion_log
        order by load_id desc
        limit 1
        """,
        _load,
    ),
    Question(
        ("clean_data.clip_report",),
        """
        select feature, sum(rows_raised), sum(rows_lowered)
        from clean_data.clip_report
        group by feature
        order by feature
        limit 100
        """,
        _clipped,
    ),
    Question(
        ("monitoring.dbt_results",),
        """
        select case when count(*) = %(number)s then extract(epoch from min(built_at)) end
        from (
            select max(finished_at) as built_at
            from monitoring.dbt_results
            where unique_id = any(%(models)s) and status = 'success'
            group by unique_id
        ) as newest
        """,
        _published,
        {
            "number": len(CLEAN_DATA),
            "models": [f"model.diabetes.{name}" for name in CLEAN_DATA],
        },
    ),
    Question(
        ("monitoring.dbt_results",),
        """
        with newest as (
            select invocation_id
            from monitoring.dbt_results
            where finished_at is not null
            order by finished_at desc
            limit 1
        ),
        nodes as (
            select resource_type, status, finished_at,
                finished_at - execution_seconds * interval '1 second' as started_at
            from monitoring.dbt_results
            where invocation_id = (select invocation_id from newest)
        ),
        build as (
            select extract(epoch from max(finished_at) - min(started_at)) as seconds,
                extract(epoch from max(finished_at)) as finished
            from nodes
        )
        select resource_type, status, count(*), max(seconds), max(finished)
        from nodes
        cross join build
        group by resource_type, status
        order by resource_type, status
        limit 100
        """,
        _dbt,
    ),
    Question(
        ("monitoring.drift_checks", "monitoring.drift"),
        f"""
        with newest as ({_NEWEST_CHECKS})
        select drift.window_name, drift.feature, drift.model_version, drift.psi,
            drift.missing_share, drift.missing_share_reference, drift.new_category_share
        from newest
        inner join monitoring.drift as drift
            on drift.check_id = newest.check_id and drift.window_name = newest.window_name
        order by newest.checked_at, drift.window_name, drift.feature
        limit 500
        """,
        _drift,
    ),
    Question(
        ("monitoring.drift_checks",),
        f"""
        select window_name, extract(epoch from checked_at), rows, labelled_rows, calibration_error
        from ({_NEWEST_CHECKS}) as newest
        """,
        _checks,
    ),
)
