"""Judging a model: metrics with intervals, slices, decision policy, behaviour on made-up cases."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from training.data import Encounters
from training.inference import Matrix
from training.metrics import RESAMPLES, Scores, calibration_bins, with_intervals

ALERT_RATES = (0.1, 0.2)
"""Shares of encounters that a team can look after; thresholds follow from them."""

SLICE_POSITIVES = 50
"""Slices with fewer readmissions are shown but not judged: their TPR is mostly noise."""

Records = Sequence[Mapping[str, Any]]
Predict = Callable[[Records], Matrix]
"""Raw encounters to probabilities."""


def choose_thresholds(probability: Matrix) -> dict[str, float]:
    """Probabilities from which the given shares of validation encounters are alerts."""
    return {str(rate): float(np.quantile(probability, 1 - rate)) for rate in ALERT_RATES}


def policy(
    target: npt.NDArray[np.int8], probability: Matrix, thresholds: Mapping[str, float]
) -> list[dict[str, float]]:
    """What each threshold gives: share of alerts, recall and precision."""
    rows = []
    for rate, threshold in thresholds.items():
        alerts = probability >= threshold
        hits = int(target[alerts].sum())
        rows.append(
            {
                "alert_rate": float(rate),
                "threshold": threshold,
                "alerts_share": float(alerts.mean()),
                "recall": hits / int(target.sum()),
                "precision": hits / max(int(alerts.sum()), 1),
            }
        )
    return rows


def report(
    split: str,
    encounters: Encounters,
    probability: Matrix,
    thresholds: Mapping[str, float],
    seed: int,
    resamples: int = RESAMPLES,
) -> dict[str, Any]:
    """All that is said of a model on one split; docs/experiments.md names the parts."""
    scores = Scores(encounters.target, probability)
    return {
        "split": split,
        "rows": len(encounters),
        "patients": len(np.unique(encounters.patients)),
        "positives": int(encounters.target.sum()),
        "metrics": with_intervals(scores, encounters.patients, seed, resamples),
        "slices": slices(
            dimensions(encounters.features), encounters.target, probability, thresholds
        ),
        "policy": policy(encounters.target, probability, thresholds),
        "calibration": calibration_bins(encounters.target, probability),
    }


def dimensions(features: pd.DataFrame) -> dict[str, npt.NDArray[np.object_]]:
    """Race, gender and age band of each row."""
    ages = pd.cut(
        features["age_midpoint"],
        [-np.inf, 30, 60, np.inf],
        right=False,
        labels=["under 30", "30 to 59", "60 and over"],
    )
    return {
        "race": features["race"].to_numpy(object),
        "gender": features["gender"].to_numpy(object),
        "age": ages.to_numpy(object),
    }


def slices(
    groups: Mapping[str, npt.NDArray[np.object_]],
    target: npt.NDArray[np.int8],
    probability: Matrix,
    thresholds: Mapping[str, float],
) -> list[dict[str, Any]]:
    """AUROC and TPR (recall at the largest alert rate) by slice, and gaps to the largest slice.

    Gaps are the slice's value less that of the slice with most rows in the same dimension.
    """
    threshold = thresholds[max(thresholds, key=float)]
    found: list[dict[str, Any]] = []
    for dimension, of_rows in groups.items():
        values = of_rows.astype(str)  # None and NaN too are a value to tell of
        kinds, counts = np.unique(values, return_counts=True)
        of_dimension: list[dict[str, Any]] = []
        for value in kinds[np.argsort(-counts, kind="stable")]:
            rows = values == value
            positives = int(target[rows].sum())
            both = 0 < positives < int(rows.sum())
            scores = Scores(target[rows], probability[rows])
            of_dimension.append(
                {
                    "dimension": dimension,
                    "value": str(value),
                    "rows": int(rows.sum()),
                    "positives": positives,
                    "auroc": scores.auroc(np.ones(int(rows.sum()))) if both else None,
                    "tpr": float((probability[rows] >= threshold)[target[rows] == 1].mean())
                    if positives
                    else None,
                    "judged": positives >= SLICE_POSITIVES and both,
                }
            )
        largest = of_dimension[0]
        for one in of_dimension:
            for metric in ("auroc", "tpr"):
                known = one[metric] is not None and largest[metric] is not None
                one[f"{metric}_gap"] = one[metric] - largest[metric] if known else None
        found += of_dimension
    return found


EASY: dict[str, Mapping[str, Any]] = {
    "low": {
        "race": "Caucasian", "gender": "Female", "age": "[30-40)", "admission_type_id": 3,
        "discharge_disposition_id": 1, "admission_source_id": 1, "time_in_hospital": 1,
        "num_lab_procedures": 20, "num_procedures": 1, "num_medications": 6,
        "number_outpatient": 0, "number_emergency": 0, "number_inpatient": 0, "diag_1": "250.01",
        "number_diagnoses": 3, "max_glu_serum": "None", "A1Cresult": "Norm", "metformin": "Steady",
        "insulin": "No", "change": "No", "diabetesMed": "Yes",
    },
    "high": {
        "race": "Caucasian", "gender": "Female", "age": "[70-80)", "admission_type_id": 1,
        "discharge_disposition_id": 22, "admission_source_id": 7, "time_in_hospital": 9,
        "num_lab_procedures": 60, "num_procedures": 1, "num_medications": 24,
        "number_outpatient": 2, "number_emergency": 3, "number_inpatient": 7, "diag_1": "428",
        "diag_2": "585", "diag_3": "250.4", "number_diagnoses": 9, "max_glu_serum": "None",
        "A1Cresult": "None", "insulin": "Up", "change": "Ch", "diabetesMed": "Yes",
    },
}  # fmt: skip
"""Two cases whose order no useful model gets wrong (rates by number_inpatient: 8 % and 45 %)."""

INPATIENT_VISITS = (0, 1, 2, 4, 8)


def behaviour(predict: Predict, records: Records, base_rate: float) -> list[dict[str, Any]]:
    """Behavioural tests on raw encounters (Ribeiro et al., ACL 2020: CheckList).

    Args:
        predict: the model.
        records: some hundred raw encounters, ids included.
        base_rate: of readmission, to compare the easy cases with.

    Returns:
        `name`, `passed` and `detail` of each test.
    """
    before = predict(records)
    other_ids = [
        {**record, "encounter_id": 900_000_000 + row, "patient_nbr": 7 * row + 1}
        for row, record in enumerate(records)
    ]
    moved = float(np.abs(predict(other_ids) - before).max())
    means = [
        float(predict([{**record, "number_inpatient": visits} for record in records]).mean())
        for visits in INPATIENT_VISITS
    ]
    low, high = (float(predict([EASY[name]])[0]) for name in ("low", "high"))
    return [
        {
            "name": "invariance: encounter and patient ids",
            "passed": moved == 0.0,
            "detail": f"other ids move a probability by at most {moved:.3g}",
        },
        {
            "name": "direction: more inpatient visits never lower the mean risk",
            "passed": all(later >= earlier for earlier, later in itertools.pairwise(means)),
            "detail": ", ".join(
                f"{visits}: {mean:.3f}"
                for visits, mean in zip(INPATIENT_VISITS, means, strict=True)
            ),
        },
        {
            "name": "minimum: known easy cases",
            "passed": low < base_rate and high > 2 * base_rate,
            "detail": f"low {low:.3f}, high {high:.3f}, base rate {base_rate:.3f}",
        },
    ]


def top_features(
    names: Sequence[str], contributions: Matrix, top: int = 20
) -> list[dict[str, Any]]:
    """The features with the largest mean absolute contribution to the log odds."""
    means = np.abs(contributions).mean(axis=0)
    order = np.argsort(-means, kind="stable")[:top]
    return [
        {"feature": names[index], "mean_abs_contribution": float(means[index])} for index in order
    ]


def three_class_auroc(
    readmitted: npt.NDArray[np.object_], probabilities: Mapping[str, Matrix]
) -> float:
    """Mean one-against-rest AUROC of the three outcomes (macro average)."""
    areas = []
    for outcome, probability in probabilities.items():
        target = (readmitted == outcome).astype(np.int8)
        areas.append(Scores(target, probability).auroc(np.ones(len(target))))
    return float(np.mean(areas))
