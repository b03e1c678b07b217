"""What is said of a model: policy and slices by hand, and behaviour that only it can spoil."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import pytest
from sklearn.metrics import roc_auc_score

from training import evaluate
from training.data import Encounters
from training.evaluate import Records
from training.inference import Matrix, sigmoid

RANDOM = np.random.default_rng(21)
THRESHOLDS = {"0.1": 0.8, "0.2": 0.5}


def bits(*values: int) -> Any:
    return np.array(values, np.int8)


def test_policy_by_hand() -> None:
    target = bits(1, 0, 1, 0, 1)
    probability = np.array([0.9, 0.8, 0.5, 0.49, 0.1])
    assert evaluate.policy(target, probability, THRESHOLDS) == [
        {
            "alert_rate": 0.1,
            "threshold": 0.8,
            "alerts_share": 0.4,
            "recall": pytest.approx(1 / 3),
            "precision": 0.5,
        },
        {
            "alert_rate": 0.2,
            "threshold": 0.5,
            "alerts_share": pytest.approx(0.6),
            "recall": pytest.approx(2 / 3),
            "precision": pytest.approx(2 / 3),
        },
    ]


def test_policy_without_an_alert() -> None:
    (row,) = evaluate.policy(bits(1, 0), np.array([0.1, 0.2]), {"0.1": 0.9})
    assert (row["alerts_share"], row["recall"], row["precision"]) == (0.0, 0.0, 0.0)


@pytest.mark.parametrize("rows", [1000, 1003, 50])
def test_thresholds_give_the_alert_rates(rows: int) -> None:
    probability = RANDOM.beta(2, 14, rows)
    thresholds = evaluate.choose_thresholds(probability)
    assert list(thresholds) == ["0.1", "0.2"]
    for row in evaluate.policy(bits(*([1] * rows)), probability, thresholds):
        assert row["alerts_share"] == pytest.approx(row["alert_rate"], abs=1 / rows)


def sliced(
    groups: list[Any], target: list[int], probability: list[float]
) -> dict[str, dict[str, Any]]:
    found = evaluate.slices(
        {"race": np.array(groups, object)}, bits(*target), np.array(probability), THRESHOLDS
    )
    return {one["value"]: one for one in found}


def test_slices_by_hand() -> None:
    found = sliced(
        ["A", "A", "A", "A", "B", "B", "B"],
        [1, 1, 0, 0, 1, 0, 0],
        [0.9, 0.3, 0.4, 0.1, 0.6, 0.7, 0.2],
    )
    assert list(found) == ["A", "B"]
    assert found["A"] == {
        "dimension": "race",
        "value": "A",
        "rows": 4,
        "positives": 2,
        "auroc": 0.75,  # of the four pairs only (0.3, 0.4) is in the wrong order
        "auroc_gap": 0.0,
        "tpr": 0.5,  # 0.9 is above the threshold of the larger alert rate, 0.3 is not
        "tpr_gap": 0.0,
        "judged": False,
    }
    assert (found["B"]["auroc"], found["B"]["auroc_gap"]) == (0.5, -0.25)
    assert (found["B"]["tpr"], found["B"]["tpr_gap"]) == (1.0, 0.5)


def test_slices_with_one_outcome_have_no_auroc() -> None:
    found = sliced(["A", "A", "B", "C"], [1, 0, 0, 1], [0.9, 0.1, 0.9, 0.9])
    assert (found["B"]["auroc"], found["B"]["tpr"]) == (None, None)
    assert (found["B"]["auroc_gap"], found["B"]["tpr_gap"]) == (None, None)
    assert (found["C"]["auroc"], found["C"]["tpr"], found["C"]["tpr_gap"]) == (None, 1.0, 0.0)
    assert found["C"]["auroc_gap"] is None


def test_largest_slice_without_positives_leaves_no_gap() -> None:
    found = sliced(["A", "A", "A", "B", "B"], [0, 0, 0, 1, 0], [0.9, 0.1, 0.2, 0.9, 0.1])
    assert (found["B"]["tpr"], found["B"]["tpr_gap"], found["B"]["auroc_gap"]) == (1.0, None, None)


def test_missing_values_are_a_slice_too() -> None:
    found = sliced(["A", None, None], [1, 0, 1], [0.9, 0.1, 0.9])
    assert (found["None"]["rows"], found["None"]["auroc"]) == (2, 1.0)


def test_slice_is_judged_from_fifty_readmissions_and_both_outcomes() -> None:
    found = sliced(
        ["A"] * 51 + ["B"] * 50 + ["C"] * 50,
        [1] * 50 + [0] + [1] * 49 + [0] + [1] * 50,
        [0.9] * 151,
    )
    assert [found[name]["judged"] for name in "ABC"] == [True, False, False]


def test_age_bands() -> None:
    features = pd.DataFrame(
        {"race": ["x"] * 5, "gender": ["y"] * 5, "age_midpoint": [5, 29.9, 30, 59, 60]}
    )
    found = evaluate.dimensions(features)
    assert list(found) == ["race", "gender", "age"]
    assert found["age"].tolist() == [
        "under 30", "under 30", "30 to 59", "30 to 59", "60 and over",
    ]  # fmt: skip


def encounters(rows: int = 400) -> tuple[Encounters, Matrix]:
    features = pd.DataFrame(
        {
            "race": RANDOM.choice(["Asian", "Caucasian"], rows, p=[0.2, 0.8]),
            "gender": RANDOM.choice(["Female", "Male"], rows),
            "age_midpoint": RANDOM.choice([25, 45, 75], rows),
        }
    )
    probability = RANDOM.beta(2, 5, rows)
    target = (RANDOM.random(rows) < probability).astype(np.int8)
    outcome = np.where(target == 1, "<30", "NO").astype(object)
    patients = np.arange(rows) // 2
    return Encounters(features, target, outcome, patients, np.arange(rows)), probability


def test_report_counts_rows_patients_and_positives() -> None:
    given, probability = encounters()
    thresholds = evaluate.choose_thresholds(probability)
    report = evaluate.report("validation", given, probability, thresholds, 1, resamples=20)
    assert (report["split"], report["rows"], report["patients"]) == ("validation", 400, 200)
    assert report["positives"] == int(given.target.sum())
    assert sum(one["rows"] for one in report["slices"]) == 3 * 400
    assert [row["alerts_share"] for row in report["policy"]] == [0.1, 0.2]
    assert report["metrics"]["auroc"]["value"] == pytest.approx(
        roc_auc_score(given.target, probability)
    )


RECORDS: Records = [
    {"encounter_id": 10 + row, "patient_nbr": row, "number_inpatient": row % 3, "age": "[50-60)"}
    for row in range(30)
]


def log_odds(record: Any) -> float:
    """Of a model that behaves: risk grows with visits of each kind."""
    visits, emergency = float(record["number_inpatient"]), float(record.get("number_emergency", 0))
    return -2.5 + 0.3 * visits + 0.5 * emergency


def well_behaved(records: Records) -> Matrix:
    return sigmoid(np.array([log_odds(record) for record in records]))


def knows_ids(records: Records) -> Matrix:
    moved = [1e-9 * record.get("encounter_id", 0) for record in records]
    return sigmoid(np.array([log_odds(record) for record in records]) + moved)


def knows_patients(records: Records) -> Matrix:
    moved = [1e-9 * record.get("patient_nbr", 0) for record in records]
    return sigmoid(np.array([log_odds(record) for record in records]) + moved)


def falls_with_visits(records: Records) -> Matrix:
    moved = [-0.4 * record["number_inpatient"] for record in records]
    emergency = [1.5 * record.get("number_emergency", 0) for record in records]
    return sigmoid(np.array([log_odds(record) for record in records]) + moved + emergency)


def constant(records: Records) -> Matrix:
    return np.full(len(records), 0.11)


def undecided(records: Records) -> Matrix:
    return np.full(len(records), np.nan)


@pytest.mark.parametrize(
    ("predict", "fails"),
    [
        (well_behaved, []),
        (knows_ids, ["invariance"]),
        (knows_patients, ["invariance"]),
        (falls_with_visits, ["direction"]),
        (constant, ["minimum"]),
        (undecided, ["invariance", "direction", "minimum"]),
    ],
)
def test_behaviour_fails_where_it_is_bad_and_nowhere_else(predict: Any, fails: list[str]) -> None:
    found = evaluate.behaviour(predict, RECORDS, 0.11)
    assert len(found) == 3
    assert [test["name"].split(":")[0] for test in found if not test["passed"]] == fails
    assert all(test["detail"] for test in found)


@pytest.mark.parametrize(("low", "high"), [(0.11, 0.5), (0.05, 0.22)])
def test_easy_cases_have_to_lie_clearly_apart(low: float, high: float) -> None:
    def predict(records: Records) -> Matrix:
        sick = [record["number_inpatient"] > 4 for record in records]
        return np.where(sick, high, low)

    passed = [test["passed"] for test in evaluate.behaviour(predict, RECORDS, 0.11)]
    assert passed == [True, True, False]


def test_behaviour_leaves_the_records_alone() -> None:
    before = [dict(record) for record in RECORDS]
    evaluate.behaviour(well_behaved, RECORDS, 0.11)
    assert before == RECORDS


def test_top_features_are_the_strongest_on_average() -> None:
    contributions = np.array([[0.1, -0.5, 0.2, 0.0], [-0.1, 0.3, 0.2, 0.0]])
    assert evaluate.top_features(("a", "b", "c", "d"), contributions, top=2) == [
        {"feature": "b", "mean_abs_contribution": pytest.approx(0.4)},
        {"feature": "c", "mean_abs_contribution": pytest.approx(0.2)},
    ]


def test_three_class_auroc_is_the_macro_average_of_scikit_learn() -> None:
    outcome = RANDOM.choice(["<30", ">30", "NO"], 300, p=[0.2, 0.3, 0.5]).astype(object)
    shares = RANDOM.dirichlet([1, 1, 1], 300)
    names = ["<30", ">30", "NO"]
    found = evaluate.three_class_auroc(outcome, dict(zip(names, shares.T, strict=True)))
    theirs = roc_auc_score(outcome.astype(str), shares, multi_class="ovr", labels=names)
    assert found == pytest.approx(theirs)
