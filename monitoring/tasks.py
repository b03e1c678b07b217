"""What the tasks of the DAG `diabetes_drift_monitoring` do, each one function.

They take and return plain values that fit an XCom. What a retry can't mend fails at once; a lost
MLflow server or database is left to the task's retries.
"""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Callable, Mapping
from datetime import datetime
from functools import wraps
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

from airflow.sdk.exceptions import AirflowFailException, AirflowSkipException

from ingestion.tasks import connection_dsn
from monitoring import drift
from monitoring.drift import DriftError
from settings import settings

log = logging.getLogger(__name__)

P = ParamSpec("P")
R = TypeVar("R")


def _fails_at_once(function: Callable[P, R]) -> Callable[P, R]:
    @wraps(function)
    def wrapper(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return function(*args, **kwargs)
        except DriftError as error:
            raise AirflowFailException(str(error)) from error

    return wrapper


@_fails_at_once
def prepare(
    conn_id: str, check_id: str, checked_at: datetime, params: Mapping[str, Any]
) -> dict[str, int]:
    """Put the champion's reference and both windows in place, see `monitoring.drift.prepare`.

    A check that was made before is made again with the version of then. Skips the run where there
    is no champion to compare with.
    """
    from monitoring.champion import fetch

    chosen = settings()
    dsn = connection_dsn(conn_id, "monitoring")
    alias = drift.version_of(dsn, check_id) or chosen.api_alias
    with tempfile.TemporaryDirectory(prefix="diabetes-drift-") as folder:
        champion = fetch(chosen.mlflow_tracking_uri, alias, Path(folder))
        if champion is None:
            raise AirflowSkipException(
                f"there is no version {alias} in the registry: there is nothing to compare with"
            )
        check = drift.Check(
            check_id=check_id,
            checked_at=checked_at,
            hours=params["hours"],
            outcome_days=params["outcome_days"],
            key=chosen.prediction_log_key.get_secret_value().encode()[:64],
        )
        return drift.prepare(dsn, check, champion)


@_fails_at_once
def report(conn_id: str, check_id: str) -> list[str]:
    """Draw the windows and store them in MLflow, see `monitoring.report.publish`."""
    from monitoring.report import publish

    chosen = settings()
    return publish(
        connection_dsn(conn_id, "monitoring"),
        chosen.mlflow_tracking_uri,
        check_id,
        chosen.drift_limit,
    )


@_fails_at_once
def decide(conn_id: str, check_id: str, retrain: bool) -> bool:
    """Say what has drifted, and whether to train anew for it."""
    windows = drift.found(connection_dsn(conn_id, "monitoring"), check_id)
    for window in windows:
        for feature, psi in window.drifted.items():
            log.warning("DRIFT: %s of window %s has a PSI of %.3f", feature, window.window, psi)
        if not window.enough:
            log.info("window %s: %s rows are too few to tell", window.window, f"{window.rows:,}")
        elif not window.drifted:
            log.info("window %s: nothing has drifted", window.window)
    drifted = any(window.drifted for window in windows)
    if drifted and not retrain:
        log.info("not training anew: the Param `retrain` is off")
    return drifted and retrain
