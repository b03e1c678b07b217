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

    Skips the run where there is no champion to compare with.
    """
    from monitoring.champion import fetch

    chosen = settings()
    with tempfile.TemporaryDirectory(prefix="diabetes-drift-") as folder:
        champion = fetch(chosen.mlflow_tracking_uri, chosen.api_alias, Path(folder))
        if champion is None:
            raise AirflowSkipException(
                f"no version has the alias {chosen.api_alias}: there is nothing to compare with"
            )
        check = drift.Check(
            check_id=check_id,
            checked_at=checked_at,
            hours=params["hours"],
            key=chosen.prediction_log_key.get_secret_value().encode()[:64],
        )
        return drift.prepare(connection_dsn(conn_id, "monitoring"), check, champion)


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


def decide(conn_id: str, check_id: str, retrain: bool) -> bool:
    """Say what has drifted, and whether to train anew for it."""
    found = drift.drifted(connection_dsn(conn_id, "monitoring"), check_id)
    for window, feature, psi in found:
        log.warning("DRIFT: %s of window %s has a PSI of %.3f", feature, window, psi)
    if not found:
        log.info("nothing has drifted")
    elif not retrain:
        log.info("not training anew: the Param `retrain` is off")
    return bool(found) and retrain
