"""What the data database says of the pipeline, as metrics.

Each group of metrics is one question to the tables it needs; where they are not there yet, the
group is absent. So it is where it can't be answered, and `pipeline_question_up` says so: no value
ends without anybody being told. Nothing waits for longer than the timeouts.
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
        name: what it asks for.
        tables: that it reads; it is not asked before all of them are there.
        sql: the query.
        made: makes metrics of its rows.
        arguments: of the query.
    """

    name: str
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
        up: list[tuple[str, bool]] = []
        with closing(psycopg2.connect(self._dsn)) as connection:
            connection.autocommit = True
            cursor = connection.cursor()
            there = self._tables(cursor)
            for question in QUESTIONS:
                if there.keys() >= set(question.tables):
                    readable = all(there[table] for table in question.tables)
                    answer = self._ask(cursor, question, readable, deadline)
                    found += answer or ()
                    up.append((question.name, answer is not None))
        text = "1 if what is asked of the database was answered, of tables that are there"
        return [*found, gauge("pipeline_question_up", text, ["question"], up)]

    def _ask(
        self,
        cursor: psycopg2.extensions.cursor,
        question: Question,
        readable: bool,
        deadline: float,
    ) -> list[Metric] | None:
        """Metrics of one question; None where it can't be answered now."""
        if not readable:
            self._complain(question.name, "this login may not read its tables")
            return None
        if time.monotonic() > deadline:
            self._complain(question.name, "the questions before it took too long")
            return None
        try:
            cursor.execute(question.sql, question.arguments)
            return question.made(cursor.fetchall())
        except (
            psycopg2.errors.QueryCanceled,
            psycopg2.errors.LockNotAvailable,
            psycopg2.ProgrammingError,
        ) as error:
            # Too slow, locked, dropped since, or with other columns than we know.
            self._complain(question.name, str(error))
            return None

    @staticmethod
    def _tables(cursor: psycopg2.extensions.cursor) -> dict[str, bool]:
        """Tables that are there, and whether this login may read them."""
        cursor.execute(
            """
            select n.nspname || '.' || c.relname,
                has_schema_privilege(n.oid, 'usage') and has_table_privilege(c.oid, 'select')
            from pg_catalog.pg_class as c
            inner join pg_catalog.pg_namespace as n on n.oid = c.relnamespace
            where c.relkind in ('r', 'v', 'm', 'p')
                and n.nspname || '.' || c.relname = any(%s)
            """,
            (sorted({table for question in QUESTIONS for table in question.tables}),),
        )
        return dict(cursor.fetchall())

    def _complain(self, name: str, why: str) -> None:
        if name not in self._complained:
            self._complained.add(name)
            log.warning("%s: can't be read: %s", name, " ".join(why.split()))


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


def _dbt_results(rows: Rows) -> list[Metric]:
    return [
        gauge(
            "dbt_results",
            "Nodes of the dbt project by what became of each when it last ran",
            ["resource_type", "status"],
            rows,
        )
    ]


def _dbt_builds(rows: Rows) -> list[Metric]:
    """Of rows selection, seconds, end."""
    return [
        gauge(
            "dbt_build_duration_seconds",
            "From the first node's begin to the last node's end in the newest build",
            ["selection"],
            [row[:2] for row in rows],
        ),
        gauge(
            "dbt_build_finished_timestamp_seconds",
            "When the last node of the newest build ended",
            ["selection"],
            [(row[0], row[2]) for row in rows],
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
    """Of rows window, moment, rows, rows with labels, calibration error, limit."""
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
        gauge(
            "drift_limit",
            "Population stability index from which a feature or the score has drifted",
            ["window"],
            [(row[0], row[5]) for row in rows],
        ),
    ]


SCORE = "(score)"
"""Stands for a feature's name where the score is meant."""

_WINDOWS = "('predictions', 'load')"
_CLEAN_DATA_MODELS = [f"model.diabetes.{name}" for name in CLEAN_DATA]
_SPLITS = ("train", "validation", "test", "excluded")
_NEWEST_CHECKS = f"""
select distinct on (window_name) window_name, check_id, checked_at, rows, labelled_rows,
    calibration_error, drift_limit
from monitoring.drift_checks
where window_name in {_WINDOWS}
order by window_name asc, checked_at desc
"""

QUESTIONS = (
    Question(
        "splits",
        tuple(f"clean_data.diabetes_{split}" for split in _SPLITS),
        " union all ".join(
            f"select '{split}', count(*) from clean_data.diabetes_{split}" for split in _SPLITS
        ),
        _splits,
    ),
    Question(
        "batches",
        ("clean_data.batch_info",),
        "select count(*) from clean_data.batch_info",
        _batches,
    ),
    Question(
        "load",
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
        "clipped",
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
        "published",
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
            "models": _CLEAN_DATA_MODELS,
        },
    ),
    # Builds follow one another, and each runs only a part of the project: what failed stays failed
    # until it runs again. A node that was skipped did not run.
    Question(
        "dbt_results",
        ("monitoring.dbt_results",),
        """
        select resource_type, status, count(*)
        from (
            select distinct on (unique_id) resource_type, status
            from monitoring.dbt_results
            where finished_at is not null
            order by unique_id asc, finished_at desc
        ) as newest
        group by resource_type, status
        order by resource_type, status
        limit 100
        """,
        _dbt_results,
    ),
    Question(
        "dbt_builds",
        ("monitoring.dbt_results",),
        """
        with builds as (
            select invocation_id,
                array_agg(unique_id) as nodes,
                max(finished_at) as finished_at,
                min(finished_at - execution_seconds * interval '1 second') as started_at
            from monitoring.dbt_results
            group by invocation_id
        ),
        selections as (
            select 'data' as selection, %(data)s as models
            union all
            select 'monitoring', %(monitoring)s
        )
        select distinct on (selection) selection,
            extract(epoch from finished_at - started_at),
            extract(epoch from finished_at)
        from selections
        inner join builds on nodes @> models
        where finished_at is not null
        order by selection asc, finished_at desc
        """,
        _dbt_builds,
        {"data": _CLEAN_DATA_MODELS, "monitoring": ["model.diabetes.drift_checks"]},
    ),
    Question(
        "drift",
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
        "drift_checks",
        ("monitoring.drift_checks",),
        f"""
        select window_name, extract(epoch from checked_at), rows, labelled_rows, calibration_error,
            drift_limit
        from ({_NEWEST_CHECKS}) as newest
        """,
        _checks,
    ),
)
