"""clean_data as training reads it: by split, train by batches, always in the same order."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pandas as pd
import psycopg2

from training.errors import TrainingError
from training.inference import Encoder, Matrix

Split = Literal["train", "validation", "test"]
TARGET = "readmitted_within_30_days"
_KEYS = ("encounter_id", "patient_nbr", "readmitted", TARGET)
_RUN_THE_DAG = "run the DAG diabetes_data_processing (or dbt build) first"

RARE = 20
"""A nominal value seen in fewer training rows gets no code of its own: it would be learnt by heart
by one model and break another (a level that XGBoost has never seen is an error there)."""


@dataclass(frozen=True, slots=True)
class Encounters:
    """Encounters of one split, one row each, in the order of their ids.

    Attributes:
        features: DataFrame, the columns named by dbt as features, in its order.
        target: (rows,) 1 where the patient was readmitted within 30 days, else 0.
        readmitted: (rows,) the outcome as published: NO, >30 or <30.
        patients: (rows,) patient_nbr, for grouping only.
        ids: (rows,) encounter_id, for joining only.
    """

    features: pd.DataFrame
    target: npt.NDArray[np.int8]
    readmitted: npt.NDArray[np.object_]
    patients: npt.NDArray[np.int64]
    ids: npt.NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.target)

    def matrix(self, encoder: Encoder) -> Matrix:
        """The features as (rows, features)."""
        return encoder.matrix([self.features[name].to_numpy() for name in encoder.names])


@dataclass(frozen=True, slots=True)
class DataFacts:
    """What was learnt from, so that the same can be found, or told to be gone, later."""

    batches: int
    train_rows: int
    train_hash: str
    validation_rows: int
    validation_hash: str
    load_id: int
    source: str
    is_synthetic: bool

    @property
    def sha(self) -> str:
        """Name of this state of the data: both content hashes, short enough for MLflow."""
        return f"{self.train_hash[:16]}{self.validation_hash[:16]}"

    def as_dict(self) -> dict[str, Any]:
        """Plain values for tags and JSON."""
        return asdict(self) | {"sha": self.sha}


def facts(dsn: str, batches: int = 0) -> DataFacts:
    """Describe the data that a training on the first `batches` batches (0: all) would use.

    Raises:
        TrainingError: a table is missing or empty, or there are fewer batches.
    """
    with closing(connect(dsn)) as connection:
        cursor = connection.cursor()
        _execute(
            cursor,
            "select batch_id, rows, content_hash from clean_data.batch_info order by batch_id",
        )
        found = cursor.fetchall()
        if not found:
            raise TrainingError(f"clean_data.diabetes_train is empty; {_RUN_THE_DAG}")
        if batches > len(found):
            raise TrainingError(
                f"{batches} batches asked for, clean_data.batch_info knows {len(found)}"
            )
        used = found[: batches or len(found)]
        _execute(
            cursor,
            "select md5(string_agg(content_hash, '' order by batch_id)) "
            "from clean_data.batch_info where batch_id <= %s",
            (used[-1][0],),
        )
        (train_hash,) = cursor.fetchone() or ("",)
        _execute(
            cursor,
            "select count(*), md5(string_agg(md5(v::text), '' order by encounter_id)) "
            "from clean_data.diabetes_validation as v",
        )
        validation_rows, validation_hash = cursor.fetchone() or (0, "")
        if not validation_rows:
            raise TrainingError(f"clean_data.diabetes_validation is empty; {_RUN_THE_DAG}")
        _execute(
            cursor,
            "select load_id, source, is_synthetic from raw_data.ingestion_log "
            "order by load_id desc limit 1",
        )
        load_id, source, is_synthetic = cursor.fetchone() or (0, "", False)
    return DataFacts(
        batches=len(used),
        train_rows=sum(rows for _, rows, _ in used),
        train_hash=train_hash,
        validation_rows=validation_rows,
        validation_hash=validation_hash,
        load_id=load_id,
        source=source,
        is_synthetic=bool(is_synthetic),
    )


def read(
    dsn: str, split: Split, features: Sequence[Mapping[str, Any]], batches: int = 0
) -> Encounters:
    """Read a split of clean_data.

    Args:
        dsn: connection string (libpq) of the data database.
        split: train, validation or test.
        features: the definition's `features`: name, type and nominal of each.
        batches: of train, how many batches from the first on (0: all). Each is read by itself, so
            that memory holds one batch as text at most.

    Raises:
        TrainingError: the table is missing or empty, a column has vanished, or only one outcome
            occurs.
    """
    table = f"clean_data.diabetes_{split}"
    names = [str(feature["name"]) for feature in features]
    with closing(connect(dsn)) as connection:
        cursor = connection.cursor()
        _check_columns(cursor, table, [*_KEYS, *names])
        where = [""]
        if split == "train":
            _execute(cursor, f"select distinct batch_id from {table} order by 1")
            numbers = [number for (number,) in cursor.fetchall()]
            where = [f"where batch_id = {number}" for number in numbers[: batches or None]]
        types = {
            str(feature["name"]): "category"
            if feature["type"] == "text"
            else ("int32" if feature["type"] == "integer" else "float64")
            for feature in features
        }
        parts = [
            _copy(cursor, f"select {', '.join([*_KEYS, *names])} from {table} {each}", types)
            for each in where
        ]
    if not parts or not sum(len(part) for part in parts):
        raise TrainingError(f"{table} is empty; {_RUN_THE_DAG}")
    frame = _joined(parts, [name for name, kind in types.items() if kind == "category"])
    target = frame[TARGET].to_numpy(np.int8)
    if target.min() == target.max():
        raise TrainingError(
            f"{table} holds one class only ({TARGET} is {target[0]} in all {len(target):,} rows); "
            "a model needs encounters with and without readmission"
        )
    return Encounters(
        features=frame[names],
        target=target,
        readmitted=frame["readmitted"].to_numpy(object),
        patients=frame["patient_nbr"].to_numpy(np.int64),
        ids=frame["encounter_id"].to_numpy(np.int64),
    )


def fit_encoder(train: Encounters, features: Sequence[Mapping[str, Any]]) -> Encoder:
    """Give each nominal value that is not rare among training rows a code, the commonest first."""
    vocabularies = {}
    for feature in features:
        if feature["nominal"]:
            counts = train.features[feature["name"]].astype(object).value_counts()
            seen = sorted(
                ((-int(count), str(value), value) for value, count in counts.items()),
                key=lambda entry: entry[:2],
            )
            vocabularies[feature["name"]] = [
                value if isinstance(value, str) else int(value)
                for count, _, value in seen
                if -count >= RARE
            ]
    return Encoder([str(feature["name"]) for feature in features], vocabularies)


def connect(dsn: str) -> psycopg2.extensions.connection:
    """Connect to the data database.

    Raises:
        TrainingError: it does not answer.
    """
    try:
        return psycopg2.connect(dsn)
    except psycopg2.Error as error:
        raise TrainingError(f"the data database does not answer: {str(error).strip()}") from error


def _execute(
    cursor: psycopg2.extensions.cursor, query: str, arguments: tuple[object, ...] | None = None
) -> None:
    try:
        cursor.execute(query, arguments)
    except psycopg2.errors.UndefinedTable as error:
        raise TrainingError(f"{str(error).splitlines()[0]}; {_RUN_THE_DAG}") from error


def _check_columns(cursor: psycopg2.extensions.cursor, table: str, wanted: list[str]) -> None:
    schema, name = table.split(".")
    cursor.execute(
        "select column_name from information_schema.columns "
        "where table_schema = %s and table_name = %s",
        (schema, name),
    )
    there = {column for (column,) in cursor.fetchall()}
    if not there:
        raise TrainingError(f"{table} does not exist; {_RUN_THE_DAG}")
    if vanished := [column for column in wanted if column not in there]:
        raise TrainingError(
            f"{table} has no column {', '.join(vanished)}, which dbt_diabetes declares; "
            "run dbt build so that table and project agree"
        )


def _copy(cursor: psycopg2.extensions.cursor, query: str, types: Mapping[str, str]) -> pd.DataFrame:
    buffer = io.BytesIO()
    cursor.copy_expert(
        f"copy ({query} order by encounter_id) to stdout (format csv, header)", buffer
    )
    buffer.seek(0)
    # `None` is a value ("not measured"), not a missing one.
    return pd.read_csv(buffer, keep_default_na=False, dtype=dict(types))


def _joined(parts: list[pd.DataFrame], nominal: list[str]) -> pd.DataFrame:
    if len(parts) == 1:
        return parts[0]
    for name in nominal:
        union = pd.api.types.union_categoricals([part[name] for part in parts])
        for part in parts:
            part[name] = part[name].cat.set_categories(union.categories)
    return pd.concat(parts, ignore_index=True)
