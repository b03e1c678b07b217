"""A registered model in memory: checked against itself before it scores anybody."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from serving.errors import ModelRefusedError
from training.inference import definition_sha256, load_module

Floats = npt.NDArray[np.float64]
Row = tuple[Any, ...]

TOLERANCE = 1e-9
MODEL_FOLDER = "readmission"


@dataclass(frozen=True, slots=True)
class Scored:
    """What a model says of some encounters, in their order.

    Attributes:
        rows: their features.
        probability: (encounters,) of readmission within 30 days; NaN where excluded.
        percentile: (encounters,) share of all patients with a lower risk, 0 to 100; NaN where
            excluded.
        excluded: why an encounter can't be readmitted (died, hospice), by its place.
    """

    rows: list[Row]
    probability: Floats
    percentile: Floats
    excluded: dict[int, str]


class Model:
    """A version of the registered model, as `serving.fetch` left it in a folder.

    The scorer is the file that was shipped with the model, not the one of this checkout, so that
    a model computes what it computed when it was judged.

    Args:
        folder: holds `version.json`, `evaluation.json`, `model_card.html` and `readmission/`.

    Raises:
        ModelRefusedError: it is not what its registry says, or does not compute what it did.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        try:
            self.about: dict[str, Any] = _json(folder / "version.json")
            self.version = str(self.about["version"])
            self.facts: dict[str, Any] = _json(folder / "evaluation.json")
            files = folder / MODEL_FOLDER
            self.scorer: Any = load_module(files / "inference.py").Scorer(files)
            self._percentiles = np.array(_json(files / "reference.json")["percentiles"])
            self.examples: dict[str, Any] = _json(files / "examples.json")
            self._excluded = _exclusions(self.scorer.definition["tables"])
            self._check()
        except ModelRefusedError:
            raise
        except Exception as error:
            # Whatever a broken file does to whichever library reads it.
            raise ModelRefusedError(
                f"version in {folder.name} can't be loaded: {type(error).__name__}: {error}"
            ) from error

    @property
    def feature_sha256(self) -> str:
        """SHA-256 of the feature SQL and its lookups."""
        return str(self.scorer.definition["sha256"])

    @property
    def feature_names(self) -> tuple[str, ...]:
        """The features in the order of a row."""
        return tuple(self.scorer.feature_names)

    def score(self, columns: Mapping[str, Sequence[Any]], count: int) -> Scored:
        """Score raw encounters.

        Args:
            columns: values by field, see `Scorer.features`.
            count: number of encounters.
        """
        rows = self.scorer.features(columns, count)
        probability = self.scorer.probabilities(self.scorer.matrix(rows))
        percentile = np.interp(probability, self._percentiles, np.arange(101.0))
        excluded = {}
        for place, code in enumerate(columns.get("discharge_disposition_id", ())):
            if code is not None and (reason := self._excluded.get(str(code))):
                excluded[place] = reason
                probability[place] = percentile[place] = math.nan
        return Scored(rows, probability, percentile, excluded)

    def shares(self, rows: Sequence[Row]) -> Floats:
        """Share of each feature in the log odds, and their base last, (rows, features + 1)."""
        shares: Floats = self.scorer.contributions(self.scorer.matrix(rows))
        return shares

    def _check(self) -> None:
        """See whether it is the version it says it is, and computes what it did in training."""
        definition = self.scorer.definition
        found = definition_sha256(definition)
        named = self.about["tags"].get("feature_sha256", "")
        if not found == definition["sha256"] == named:
            raise ModelRefusedError(
                f"version {self.version}: its feature SQL has SHA-256 {found[:12]}, but it says "
                f"{definition['sha256'][:12]} and the registry {named[:12] or 'nothing'}"
            )
        records, expected = self.examples["records"], np.array(self.examples["probabilities"])
        if not len(records) == len(expected) > 0:
            raise ModelRefusedError(f"version {self.version}: it has no examples to test it with")
        columns = {name: [record.get(name) for record in records] for name in records[0]}
        rows = self.scorer.features(columns, len(records))
        answered = self.scorer.probabilities(self.scorer.matrix(rows))
        difference = np.abs(answered - expected)
        if not np.all(difference <= TOLERANCE):  # NaN is not
            worst = int(np.nanargmax(np.where(np.isnan(difference), np.inf, difference)))
            raise ModelRefusedError(
                f"version {self.version}: self-test failed; example {worst} scores "
                f"{answered[worst]:.6f}, was {expected[worst]:.6f}"
            )
        if np.any(np.diff(self._percentiles) < 0) or len(self._percentiles) != 101:
            raise ModelRefusedError(f"version {self.version}: reference.json holds no percentiles")


def _exclusions(tables: Mapping[str, Any]) -> dict[str, str]:
    """Why an encounter can't be readmitted, by discharge disposition: dbt's own rule."""
    table = tables["discharge_dispositions"]
    code = table["columns"].index("discharge_disposition_id")
    reason = table["columns"].index("exclusion_reason")
    return {str(row[code]): row[reason] for row in table["rows"] if row[reason]}


def _json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))
