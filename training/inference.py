"""What a registered model runs: raw encounter fields -> features -> probability and reasons.

This file is shipped inside every model, beside the candidate that was trained, so that a model
computes tomorrow what it computed when it was judged. It therefore imports nothing of this
repository. Training uses the same classes: there is one way from a table to a matrix.
"""

from __future__ import annotations

import importlib.util
import json
import math
import sqlite3
import threading
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from hashlib import sha256
from importlib.machinery import SourceFileLoader
from itertools import repeat
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import numpy.typing as npt

Matrix = npt.NDArray[np.float64]

_NOT_USED = frozenset({"encounter_id", "patient_nbr", "readmitted"})
"""Fields of the publisher's file that a caller may send and no model sees."""

_MISSING = (None, "?", "")
_PLAIN_TEXT = {str, type(None)}
_PLAIN_NUMBERS = {int, str, type(None)}
_END = 2**63  # of SQLite's integers


class FeatureQuery:
    """The feature SQL of dbt, run by SQLite on raw encounters.

    Args:
        definition: what `training.features.read` made: `fields` (name, column and kind of each
            raw field), `tables` (statistics and lookups), `query` and `features`.
    """

    def __init__(self, definition: Mapping[str, Any]) -> None:
        self.fields: dict[str, dict[str, str]] = {
            field["name"]: field for field in definition["fields"]
        }
        self.names = tuple(feature["name"] for feature in definition["features"])
        self._lock = threading.Lock()
        self._query = definition["query"]
        self._database = sqlite3.connect(
            ":memory:", isolation_level=None, check_same_thread=False, cached_statements=8
        )
        # As on PostgreSQL: `like 'V%'` is not to match `v10`.
        self._database.execute("pragma case_sensitive_like = on")
        for name, table in definition["tables"].items():
            columns = list(table["columns"])
            key = f", primary key ({table['key']})" if table["key"] else ""
            without = " without rowid" if table["key"] else ""
            self._database.execute(f"create table {name} ({', '.join(columns)}{key}){without}")
            self._insert(name, len(columns), table["rows"])
        columns = [field["column"] for field in self.fields.values()]
        self._width = len(columns) + 1
        self._database.execute(
            f"create table diabetes (encounter_id integer primary key, {', '.join(columns)})"
        )

    def _insert(self, table: str, width: int, rows: Iterable[Sequence[Any]]) -> None:
        self._database.executemany(f"insert into {table} values ({', '.join('?' * width)})", rows)

    def rows(self, columns: Mapping[str, Sequence[Any]], count: int) -> list[tuple[Any, ...]]:
        """Features of raw encounters.

        Args:
            columns: values by the field's name in the publisher's header; a field that is left
                out, `?`, None and NaN all mean missing.
            count: number of encounters.

        Returns:
            One tuple an encounter, in the order given, its features in the order of `names`.

        Raises:
            ValueError: a field that does not exist, or a value of the wrong type.
        """
        unknown = sorted(set(columns) - self.fields.keys() - _NOT_USED)
        if unknown:
            raise ValueError(
                f"unknown field {', '.join(unknown)}; known are {', '.join(self.fields)}"
            )
        missing = [None] * count
        parsed = [
            _parsed(field, columns[name]) if name in columns else missing
            for name, field in self.fields.items()
        ]
        with self._lock:
            try:
                # The number of the row stands for encounter_id: it keeps the order, and no
                # feature can come from an id that the model is never given.
                self._insert("diabetes", self._width, zip(range(count), *parsed, strict=True))
                return [row[1:] for row in self._database.execute(self._query)]
            finally:
                self._database.execute("delete from diabetes")


def _parsed(field: Mapping[str, str], values: Sequence[Any]) -> list[Any]:
    is_text = field["kind"] in ("category", "icd9")
    types = set(map(type, values))
    # Nearly all there is, in a tenth of the time: whole columns of what needs no second look.
    if is_text and types <= _PLAIN_TEXT:
        return [None if value in _MISSING else value for value in values]
    if not is_text and types <= _PLAIN_NUMBERS:
        with suppress(ValueError):
            numbers = [None if value in _MISSING else int(value) for value in values]
            if all(number is None or -_END < number < _END for number in numbers):
                return numbers
    convert = str if is_text else _integer
    parsed: list[Any] = []
    for row, value in enumerate(values):
        if value in _MISSING or value != value:
            parsed.append(None)
            continue
        try:
            parsed.append(convert(value))
        except (TypeError, ValueError, OverflowError):
            raise ValueError(
                f"row {row}, field {field['name']}: expected an integer, got {value!r}"
            ) from None
    return parsed


def _integer(value: Any) -> int:
    number = int(value)
    if number != float(value) or abs(number) >= _END:
        raise ValueError(value)
    return number


class Encoder:
    """Features as a matrix: numbers as they are, nominal values as codes, NaN where unknown.

    Args:
        names: the features in order.
        vocabularies: for each nominal feature its values in the order of their codes.
    """

    def __init__(self, names: Sequence[str], vocabularies: Mapping[str, Sequence[Any]]) -> None:
        self.names = tuple(names)
        self.vocabularies = {name: list(values) for name, values in vocabularies.items()}
        self.nominal = tuple(i for i, name in enumerate(names) if name in vocabularies)
        self._codes = {
            name: {value: float(code) for code, value in enumerate(values)}
            for name, values in vocabularies.items()
        }

    def matrix(self, columns: Sequence[Sequence[Any] | npt.NDArray[Any]]) -> Matrix:
        """Encode columns of values, in the order of `names`, into (rows, features)."""
        encoded = np.empty((len(columns[0]), len(self.names)))
        for index, (name, values) in enumerate(zip(self.names, columns, strict=True)):
            if name in self._codes:
                codes = map(self._codes[name].get, values, repeat(math.nan))
                encoded[:, index] = np.fromiter(codes, np.float64, len(encoded))
            else:
                encoded[:, index] = values
        return encoded


class Scorer:
    """A trained model as its folder holds it.

    Args:
        folder: `features.json`, `encoder.json`, `scoring.json`, `candidate.py` and what the
            candidate saved in `fitted/` (and `fitted_later/` for three classes).
    """

    def __init__(self, folder: Path) -> None:
        self.definition = _json(folder / "features.json")
        self.query = FeatureQuery(self.definition)
        self.encoder = Encoder(**_json(folder / "encoder.json"))
        self.scoring = _json(folder / "scoring.json")
        self.thresholds: dict[str, float] = self.scoring["thresholds"]
        self._candidate = load_module(folder / "candidate.py")
        self._fitted = self._candidate.load(folder / "fitted")
        later = folder / "fitted_later"
        self._later = self._candidate.load(later) if later.exists() else None

    @property
    def feature_names(self) -> tuple[str, ...]:
        """The features in the order of the matrix."""
        return self.query.names

    def features(self, columns: Mapping[str, Sequence[Any]], count: int) -> list[tuple[Any, ...]]:
        """Features of raw encounters, see `FeatureQuery.rows`."""
        return self.query.rows(columns, count)

    def matrix(self, rows: Sequence[tuple[Any, ...]]) -> Matrix:
        """Encode feature rows into (rows, features)."""
        if not rows:
            return np.empty((0, len(self.query.names)))
        return self.encoder.matrix(list(zip(*rows, strict=True)))

    def log_odds(self, matrix: Matrix) -> Matrix:
        """Calibrated log odds of readmission within 30 days, (rows,)."""
        margin = self._margin(self._fitted, matrix)
        return float(self.scoring["slope"]) * margin + float(self.scoring["intercept"])

    def probabilities(self, matrix: Matrix) -> Matrix:
        """Probability of readmission within 30 days, (rows,)."""
        return sigmoid(self.log_odds(matrix))

    def later(self, matrix: Matrix) -> Matrix | None:
        """Probability of a readmission after 30 days, (rows,), where the model knows it."""
        if self._later is None:
            return None
        margin = self._margin(self._later, matrix)
        return (1 - self.probabilities(matrix)) * sigmoid(margin)

    def _margin(self, fitted: Any, matrix: Matrix) -> Matrix:
        if not len(matrix):  # an error in most libraries
            return np.empty(0)
        margin: Matrix = self._candidate.margin(fitted, matrix)
        return margin

    def contributions(self, matrix: Matrix) -> Matrix:
        """Exact share of each feature in the calibrated log odds, (rows, features + 1).

        The last column is what every encounter starts from; a row adds up to its log odds.
        """
        if not len(matrix):
            return np.empty((0, len(self.query.names) + 1))
        shares: Matrix = self.scoring["slope"] * self._candidate.contributions(self._fitted, matrix)
        shares[:, -1] += self.scoring["intercept"]
        return shares

    def reasons(
        self, rows: Sequence[tuple[Any, ...]], matrix: Matrix, top: int
    ) -> list[list[dict[str, Any]]]:
        """The `top` features that move each encounter most, the strongest first."""
        if not top or not rows:
            # Contributions cost many times what the probability does; of nothing, most can't tell.
            return [[] for _ in rows]
        shares = self.contributions(matrix)[:, :-1]
        order = np.argsort(-np.abs(shares), axis=1, kind="stable")[:, :top]
        return [
            [
                {
                    "feature": self.query.names[index],
                    "value": str(row[index]),
                    "contribution": float(share[index]),
                }
                for index in best
            ]
            for row, share, best in zip(rows, shares, order, strict=True)
        ]

    def threshold(self, alert_rate: float) -> float:
        """Probability from which an encounter is an alert, at a rate chosen on validation.

        Raises:
            ValueError: for a rate that no threshold was chosen for.
        """
        for rate, threshold in self.thresholds.items():
            if math.isclose(float(rate), alert_rate):
                return threshold
        raise ValueError(
            f"no threshold for an alert rate of {alert_rate}; known are "
            + ", ".join(self.thresholds)
        )


def sigmoid(log_odds: Matrix) -> Matrix:
    """Probability of log odds, without overflow for large ones."""
    return np.exp(-np.logaddexp(0.0, -log_odds))


def definition_sha256(definition: Mapping[str, Any]) -> str:
    """SHA-256 of all that determines a feature but the values of the fitted statistics."""
    lookups = {
        name: table for name, table in definition["tables"].items() if name != "int_statistics"
    }
    identity = json.dumps([definition["query"], definition["features"], lookups], sort_keys=True)
    return sha256(identity.encode()).hexdigest()


class _Loader(SourceFileLoader):
    """Leaves no bytecode beside the file: a model's folder stays what was stored."""

    def set_data(self, path: str, data: bytes, *, _mode: int = 0o666) -> None:  # type: ignore[override]
        """Write nothing."""


def load_module(path: Path) -> ModuleType:
    """Import a Python file by its path, under a name that no other file can take."""
    name = f"readmission_{path.stem}_{abs(hash(path))}"
    spec = importlib.util.spec_from_file_location(name, path, loader=_Loader(name, str(path)))
    if spec is None or spec.loader is None:
        raise ImportError(f"{path} is no Python file")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))
