"""The report that a person reads: distributions of a window beside those of training, in MLflow.

The figures of record are those in `monitoring.drift`, against the reference of the champion.
Evidently draws the rows: it bins them anew, so that its own values differ a little.
"""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import pandas as pd
from psycopg2.extensions import cursor as Cursor  # noqa: N812

from monitoring.drift import SCORE, DriftError, connect

EXPERIMENT = "diabetes_drift"
PAGE = "report.html"

ROWS = 5_000
"""Drawn of each side, by the hash of their ids: always the same."""

WORST = 10
"""Features whose PSI is told as a metric."""

MOST_LEVELS = 20
"""Of a nominal feature that are drawn; what is rarer among training rows, or new, is OTHER."""

OTHER = "(other)"

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Window:
    """What a check found in a window."""

    check_id: str
    name: str
    checked_at: datetime
    model_version: str
    rows: int
    drifted_features: int
    calibration_error: float | None
    psi: Mapping[str, float]


def publish(dsn: str, uri: str, check_id: str, limit: float) -> list[str]:
    """Draw each window that has enough rows, and store it as a run of MLflow.

    A check that is reported again takes the place of its run.

    Args:
        dsn: connection string (libpq) of the data database.
        uri: of MLflow.
        check_id: the check; its windows are still in place.
        limit: PSI above which a feature is said to have drifted.

    Returns:
        Ids of the runs.

    Raises:
        DriftError: there is no such check.
    """
    import mlflow

    mlflow.set_tracking_uri(uri)
    client = mlflow.MlflowClient(uri)
    runs = []
    with closing(connect(dsn)) as connection, connection:
        cursor = connection.cursor()
        for window in _windows(cursor, check_id):
            features = _features(cursor, window)
            learnt = _reference(cursor, window, list(features))
            if learnt.empty:
                log.warning(
                    "no report on window %s: of the rows that version %s learnt from, none is left",
                    window.name,
                    window.model_version,
                )
                continue
            current, reference = comparable(
                _current(cursor, window, list(features)), learnt, features
            )
            with tempfile.TemporaryDirectory(prefix="diabetes-drift-") as name:
                page = Path(name) / PAGE
                draw(current, reference, page, limit)
                run_id = _run(client, window)
                try:
                    for metric, value in _metrics(window).items():
                        client.log_metric(run_id, metric, value)
                    client.log_artifact(run_id, str(page))
                except Exception:
                    client.set_terminated(run_id, "FAILED")
                    raise
                client.set_terminated(run_id)
            log.info("window %s: run %s of experiment %s", window.name, run_id, EXPERIMENT)
            runs.append(run_id)
    return runs


def draw(current: pd.DataFrame, reference: pd.DataFrame, page: Path, limit: float) -> None:
    """Write Evidently's report on drift as one page that needs nothing else.

    Args:
        current: rows of the window, see `comparable`; text columns are nominal.
        reference: rows that they are compared with.
        page: the file to write.
        limit: PSI above which a feature is said to have drifted.
    """
    import warnings

    _give_pandas_its_old_name_back()
    with warnings.catch_warnings():
        # Of its own use of pandas, numpy and pydantic.
        warnings.simplefilter("ignore")
        from evidently import (  # type: ignore[import-untyped]
            DataDefinition,
            Dataset,
            Report,
        )
        from evidently.presets import DataDriftPreset  # type: ignore[import-untyped]

        numbers = [name for name in reference if pd.api.types.is_numeric_dtype(reference[name])]
        definition = DataDefinition(
            numerical_columns=numbers,
            categorical_columns=[name for name in reference if name not in numbers],
        )
        made = Report([DataDriftPreset(method="psi", threshold=limit)]).run(
            Dataset.from_pandas(current, data_definition=definition),
            Dataset.from_pandas(reference, data_definition=definition),
        )
        made.save_html(str(page))


def _give_pandas_its_old_name_back() -> None:
    """Let Evidently 0.7 be imported beside pandas 3.1.

    One of its old tests of data integrity, which nothing here calls, imports a private function
    that pandas 3.1 has no more; any function does. tests/unit/test_drift_report.py fails when
    this is no longer needed.
    """
    import pandas.core.dtypes.common as common

    if not hasattr(common, "infer_dtype_from_object"):
        common.infer_dtype_from_object = common.pandas_dtype  # type: ignore[attr-defined]


def _windows(cursor: Cursor, check_id: str) -> list[Window]:
    cursor.execute(
        "select window_name, checked_at, model_version, rows, drifted_features, "
        "calibration_error, enough_rows from monitoring.drift_checks "
        "where check_id = %s order by window_name",
        (check_id,),
    )
    found = cursor.fetchall()
    if not found:
        raise DriftError(f"monitoring.drift_checks holds no check {check_id}")
    windows = []
    for name, checked_at, version, rows, drifted, error, enough in found:
        if not enough:
            log.info("window %s: %s rows are too few for a report", name, f"{rows:,}")
            continue
        cursor.execute(
            "select feature, psi from monitoring.drift "
            "where check_id = %s and window_name = %s and psi is not null "
            "order by psi desc, feature",
            (check_id, name),
        )
        psi = dict(cursor.fetchall())
        windows.append(Window(check_id, name, checked_at, version, rows, drifted, error, psi))
    return windows


def _features(cursor: Cursor, window: Window) -> dict[str, bool]:
    """The champion's features in the order of a row, and whether each is nominal."""
    cursor.execute(
        "select feature_names from monitoring.windows where check_id = %s and window_name = %s",
        (window.check_id, window.name),
    )
    found = cursor.fetchone()
    if found is None:
        raise DriftError(
            f"the rows of check {window.check_id} are gone: a later check took their place"
        )
    cursor.execute(
        "select distinct feature from monitoring.reference "
        "where model_version = %s and kind = 'level'",
        (window.model_version,),
    )
    nominal = {feature for (feature,) in cursor.fetchall()}
    return {name: name in nominal for name in found[0]}


def _reference(cursor: Cursor, window: Window, names: Sequence[str]) -> pd.DataFrame:
    """Rows that the champion may have learnt from, of the features that dbt still computes."""
    cursor.execute(
        "select column_name from information_schema.columns "
        "where table_schema = 'clean_data' and table_name = 'diabetes_train'"
    )
    there = {name for (name,) in cursor.fetchall()}
    used = [name for name in names if name in there]
    cursor.execute(
        f"select {', '.join(f't.{name}' for name in used)} from clean_data.diabetes_train as t "
        "inner join monitoring.windows as w on t.first_load_id <= w.learnt_load_id "
        "where w.check_id = %s and w.window_name = %s "
        "order by md5(t.encounter_id::text) limit %s",
        (window.check_id, window.name, ROWS),
    )
    return pd.DataFrame(cursor.fetchall(), columns=used)


def _current(cursor: Cursor, window: Window, names: Sequence[str]) -> pd.DataFrame:
    cursor.execute(
        "select features from monitoring.window_rows where check_id = %s and window_name = %s "
        "order by md5(row_id) limit %s",
        (window.check_id, window.name, ROWS),
    )
    return pd.DataFrame([row for (row,) in cursor.fetchall()], columns=list(names))


def comparable(
    current: pd.DataFrame, reference: pd.DataFrame, nominal: Mapping[str, bool]
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Both sides with equal columns: nominal values as text, the rarest as one, else numbers.

    A feature with one value on both sides is left out: it has no distribution to draw.
    """
    sides: tuple[dict[str, Any], dict[str, Any]] = ({}, {})
    for name in map(str, reference.columns):
        both = [current[name], reference[name]]
        if nominal[name]:
            both = [side.astype(str) for side in both]
            kept = set(both[1].value_counts().index[:MOST_LEVELS])
            both = [side.where(side.isin(kept), OTHER) for side in both]
        else:
            both = [pd.to_numeric(side).astype(float) for side in both]
        if pd.concat(both).nunique() > 1:
            for side, column in zip(sides, both, strict=True):
                side[name] = column
    return pd.DataFrame(sides[0]), pd.DataFrame(sides[1])


def _run(client: Any, window: Window) -> str:
    """A new run for the window; the one that it has already is deleted."""
    experiment = client.get_experiment_by_name(EXPERIMENT)
    number = experiment.experiment_id if experiment else client.create_experiment(EXPERIMENT)
    tags = {
        "check_id": window.check_id,
        "window": window.name,
        "model_version": window.model_version,
    }
    for before in client.search_runs(
        [number], f"tags.check_id = '{window.check_id}' and tags.window = '{window.name}'"
    ):
        client.delete_run(before.info.run_id)
    name = f"{window.name} {window.checked_at:%Y-%m-%d %H:%M}"
    return str(client.create_run(number, tags=tags, run_name=name).info.run_id)


def _metrics(window: Window) -> dict[str, float]:
    """Rows, drifted features, PSI of the score and of the features furthest away."""
    metrics = {"rows": float(window.rows), "drifted_features": float(window.drifted_features)}
    if window.calibration_error is not None:
        metrics["calibration_error"] = window.calibration_error
    if SCORE in window.psi:
        metrics["psi_score"] = window.psi[SCORE]
    worst = [(name, psi) for name, psi in window.psi.items() if name != SCORE][:WORST]
    return metrics | {f"psi_{name}": psi for name, psi in worst}
