"""What the tasks of the DAG `diabetes_model_training` do, each one function.

They take and return plain values that fit an XCom. What a retry can't mend fails at once; a lost
MLflow server is left to the task's retries.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import wraps
from typing import Any, ParamSpec, TypeVar

from airflow.sdk.exceptions import AirflowFailException, AirflowSkipException

from ingestion.tasks import connection_dsn
from settings import settings
from training import actions
from training.errors import TrackingLostError, TrainingError
from training.pipeline import Training
from training.plan import Spec

P = ParamSpec("P")
R = TypeVar("R")


def _fails_at_once(function: Callable[P, R]) -> Callable[P, R]:
    @wraps(function)
    def wrapper(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return function(*args, **kwargs)
        except TrackingLostError:
            raise
        except TrainingError as error:
            raise AirflowFailException(str(error)) from error

    return wrapper


def _training(conn_id: str, params: Mapping[str, Any] | None = None) -> Training:
    dsn = connection_dsn(conn_id, "training")
    training = actions.open_training(settings(), dsn=dsn, decided_by="DAG diabetes_model_training")
    training.override_by = (params or {}).get("leak_overridden_by") or ""
    return training


@_fails_at_once
def prepare(conn_id: str, params: Mapping[str, Any]) -> dict[str, Any]:
    """See `Training.prepare`; skips the run where there is nothing to do."""
    spec = Spec(
        candidates=tuple(params["candidates"]),
        trials=params["trials"],
        batches=params["batches"],
        seed=params["seed"],
        threads=settings().training_threads,
        classes=params["classes"],
        force=params["force"],
    )
    training = _training(conn_id)
    plan = training.prepare(spec)
    if plan["nothing_to_do"]:
        raise AirflowSkipException(plan["nothing_to_do"])
    training.tracker.require_all_sent()
    return plan


@_fails_at_once
def search(conn_id: str, plan: Mapping[str, Any], candidate: str) -> dict[str, Any]:
    """See `Training.search`."""
    training = _training(conn_id)
    outcome = training.search(plan, candidate)
    training.tracker.require_all_sent()
    return outcome


@_fails_at_once
def choose(conn_id: str, outcomes: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """See `Training.choose`."""
    return _training(conn_id).choose(list(outcomes))


@_fails_at_once
def learning_curve(
    conn_id: str, plan: Mapping[str, Any], outcome: Mapping[str, Any]
) -> list[dict[str, float]]:
    """See `Training.learning_curve`."""
    return _training(conn_id).learning_curve(plan, outcome)


@_fails_at_once
def judge(
    conn_id: str,
    params: Mapping[str, Any],
    plan: Mapping[str, Any],
    outcome: Mapping[str, Any],
    curve: Sequence[Mapping[str, float]],
) -> dict[str, Any]:
    """See `Training.judge`."""
    return _training(conn_id, params).judge(plan, outcome, curve)


@_fails_at_once
def close(conn_id: str, plan: Mapping[str, Any], succeeded: bool) -> None:
    """See `Training.close`."""
    _training(conn_id).close(plan, succeeded)
