"""What the tasks of the DAG `diabetes_data_processing` do, each one function.

They take and return plain values that fit an XCom. Bad input fails its task at once; what may
pass by itself (a network, a database that restarts) is left to the task's retries.
"""

from __future__ import annotations

import logging
import re
import shutil
from collections.abc import Callable
from dataclasses import asdict
from functools import wraps
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

from airflow.sdk import BaseHook
from airflow.sdk.exceptions import AirflowFailException
from psycopg2.extensions import make_dsn

from ingestion.errors import IngestionError, SourceUnreachableError
from ingestion.load import load as load_file
from ingestion.load import validate as validate_file
from ingestion.source import Source, obtain
from settings import settings

log = logging.getLogger(__name__)

P = ParamSpec("P")
R = TypeVar("R")


def _bad_input_fails_at_once(function: Callable[P, R]) -> Callable[P, R]:
    @wraps(function)
    def wrapper(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return function(*args, **kwargs)
        except SourceUnreachableError:
            raise
        except IngestionError as error:
            raise AirflowFailException(str(error)) from error

    return wrapper


def prepare(run_id: str) -> str:
    """Make the run's temporary folder, empty, and return its path."""
    folder = settings().work_dir / re.sub(r"[^\w.-]+", "_", run_id)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return str(folder)


@_bad_input_fails_at_once
def download(folder: str, source: str) -> str:
    """Bring `source` to a local zip or csv and return its path (see `ingestion.source`)."""
    chosen = settings()
    expected = chosen.expected_sha256(source)
    return str(obtain(Source.parse(source), Path(folder), chosen.cache_dir, expected))


@_bad_input_fails_at_once
def validate(path: str, source: str, reject_limit_percent: float) -> dict[str, Any]:
    """Check the file against the contract and return what was found."""
    report = validate_file(
        Path(path),
        reject_limit_percent=reject_limit_percent,
        expected_sha256=settings().expected_sha256(source),
    )
    log.info("%s rows, %s rejected", f"{report.rows_read:,}", f"{report.rows_rejected:,}")
    return asdict(report)


@_bad_input_fails_at_once
def load(
    validated: dict[str, Any],
    source: str,
    run_id: str,
    conn_id: str,
    reject_limit_percent: float,
    full_refresh: bool,
) -> dict[str, Any]:
    """Load the validated file over an Airflow connection and return the load's counts.

    The SHA-256 seen by `validate` is demanded again, so that what was checked is what is loaded.
    """
    report = load_file(
        Path(validated["path"]),
        connection_dsn(conn_id, "ingestion"),
        source=source,
        run_id=run_id,
        reject_limit_percent=reject_limit_percent,
        expected_sha256=validated["sha256"],
        full_refresh=full_refresh,
    )
    log.info("%s", report)
    return asdict(report)


def connection_dsn(conn_id: str, application: str) -> str:
    """Connection string (libpq) of an Airflow connection.

    Not a PostgresHook: its psycopg 3 connections know no copy_expert.
    """
    connection = BaseHook.get_connection(conn_id)
    return str(
        make_dsn(
            host=connection.host,
            port=connection.port,
            user=connection.login,
            password=connection.password,
            dbname=connection.schema,
            application_name=application,
        )
    )


def clean_up(folder: str) -> None:
    """Remove the run's temporary folder; nothing to do where it is gone already."""
    shutil.rmtree(folder, ignore_errors=True)
