"""Metrics are those of scikit-learn, with weights and ties; the bootstrap draws patients."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from sklearn import metrics as known
from sklearn.linear_model import LogisticRegression

from training.inference import sigmoid
from training.metrics import (
    METRICS,
    Floats,
    Scores,
    all_metrics,
    fit_line,
    paired_difference,
    patient_weights,
    with_intervals,
)

SKLEARN = {
    "auroc": known.roc_auc_score,
    "auprc": known.average_precision_score,
    "brier": known.brier_score_loss,
    "log_loss": known.log_loss,
}


def scores(rows: int = 600, ties: bool = False, seed: int = 1) -> Scores:
    random = np.random.default_rng(seed)
    probability = random.beta(2, 10, rows)
    target = (random.random(rows) < probability).astype(np.int8)
    if ties:
        probability = np.clip(probability.round(1), 0.05, 0.95)
    return Scores(target, probability)


def weights(kind: str, rows: int = 600) -> Floats:
    random = np.random.default_rng(2)
    if kind == "ones":
        return np.ones(rows)
    if kind == "drawn":  # as in a bootstrap: many zeros
        return random.integers(0, 3, rows).astype(float)
    return random.exponential(size=rows)


def expected_outcomes(log_odds: Floats) -> tuple[Floats, Floats, Any, Floats]:
    """Each row once with either outcome, weighted by how likely: a sample without chance."""
    likely = sigmoid(log_odds)
    target = np.repeat([1, 0], len(log_odds)).astype(np.int8)
    return log_odds, likely, target, np.concatenate([likely, 1 - likely])


@pytest.mark.parametrize("kind", ["ones", "drawn", "fractions"])
@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("name", SKLEARN)
def test_metric_is_that_of_scikit_learn(name: str, ties: bool, kind: str) -> None:
    found, weight = scores(ties=ties), weights(kind)
    theirs = SKLEARN[name](found.target, found.probability, sample_weight=weight)
    assert METRICS[name](found, weight) == pytest.approx(theirs, rel=1e-12)


def test_a_weight_of_two_is_the_row_twice() -> None:
    found, weight = scores(ties=True), weights("drawn")
    rows = np.repeat(np.arange(600), weight.astype(int))
    copied = Scores(found.target[rows], found.probability[rows])
    for name in ("auroc", "auprc", "brier", "log_loss", "calibration_slope"):
        assert METRICS[name](found, weight) == pytest.approx(all_metrics(copied)[name]), name


@pytest.mark.parametrize(
    ("target", "probability", "auroc"),
    [([0, 1], [0.2, 0.8], 1.0), ([1, 0], [0.2, 0.8], 0.0), ([1, 0, 1], [0.3, 0.3, 0.3], 0.5)],
)
def test_auroc_of_the_extremes(target: list[int], probability: list[float], auroc: float) -> None:
    found = Scores(np.array(target, np.int8), np.array(probability))
    assert found.auroc(np.ones(len(target))) == auroc


def test_log_loss_of_certainty_is_finite() -> None:
    wrong = Scores(np.array([0, 1], np.int8), np.array([1.0, 0.0]))
    assert 30 < wrong.log_loss(np.ones(2)) < 40


def ten_bins() -> Scores:
    """Bins of two rows with mean probabilities 0.95, 0.85 ... 0.05; the upper five readmitted."""
    order = np.random.default_rng(3).permutation(20)
    probability = np.linspace(0.975, 0.025, 20)
    return Scores((np.arange(20) < 10).astype(np.int8)[order], probability[order])


def test_ece_by_hand() -> None:
    # |1 - 0.95|, |1 - 0.85| ... |1 - 0.55|, |0 - 0.45| ... |0 - 0.05|
    assert ten_bins().ece(np.ones(20)) == pytest.approx((0.05 + 0.15 + 0.25 + 0.35 + 0.45) / 5)


def test_ece_weighs_bins_by_their_rows() -> None:
    found = ten_bins()
    of_first_bin = np.where(found.probability > 0.9, 3.0, 1.0)
    assert found.ece(of_first_bin) == pytest.approx((5.0 - 2 * 0.05 + 3 * 2 * 0.05) / 24)


def test_ece_lets_errors_cancel_within_a_bin_only() -> None:
    target = np.tile([0, 1], 10).astype(np.int8)
    assert Scores(target, np.full(20, 0.5)).ece(np.ones(20)) == 0.0
    assert Scores(np.sort(target), np.full(20, 0.5)).ece(np.ones(20)) == 0.5


def top(target: list[int], weight: list[float] | None = None) -> tuple[float, float]:
    """Recall and lift of the top decile; rows come with falling probability."""
    found = Scores(np.array(target, np.int8), np.linspace(0.9, 0.1, len(target)))
    each = np.ones(len(target)) if weight is None else np.array(weight)
    return found.recall_top_decile(each), found.lift_top_decile(each)


def test_top_decile_by_hand() -> None:
    assert top([1, 0, 1, 1] + 16 * [0]) == pytest.approx((1 / 3, 10 / 3))
    assert top([0, 0, 1, 1] + 16 * [0]) == (0.0, 0.0)
    assert top([1, 1] + 18 * [0]) == pytest.approx((1.0, 10.0))


def test_row_at_the_edge_of_the_decile_counts_in_part() -> None:
    assert top([0, 1] + 12 * [0] + [1])[0] == pytest.approx(0.5 / 2)  # 1.5 of 15 rows


def test_top_decile_is_a_tenth_of_the_weight() -> None:
    assert top([1] + 8 * [0] + [1], [5.0] + 9 * [1.0])[0] == pytest.approx(1.4 / (5 + 1))
    assert top([1, 1] + 17 * [0] + [1], [0.0] + 19 * [1.0])[0] == pytest.approx(1 / 2)


def test_ties_at_the_edge_of_the_decile_are_taken_in_the_order_of_rows() -> None:
    target, same = np.array([1, 0] + 8 * [0] + 9 * [0] + [1], np.int8), np.full(20, 0.3)
    assert Scores(target, same).recall_top_decile(np.ones(20)) == 0.5
    assert Scores(np.roll(target, 5), same).recall_top_decile(np.ones(20)) == 0.0
    above = Scores(target, np.where(np.arange(20) > 17, 0.4, 0.3))
    assert above.recall_top_decile(np.ones(20)) == 0.5


@pytest.mark.parametrize("distortion", [0.5, 1.0, 2.0, -1.0])
def test_calibration_slope_undoes_a_known_distortion(distortion: float) -> None:
    log_odds, _, target, weight = expected_outcomes(np.linspace(-3, 2, 200))
    said = Scores(target, np.tile(sigmoid(distortion * log_odds), 2))
    assert said.calibration_slope(weight) == pytest.approx(1 / distortion, rel=1e-6)


def test_overconfidence_is_a_slope_below_one() -> None:
    found = scores(20_000)
    logit = np.log(found.probability / (1 - found.probability))
    assert found.calibration_slope(np.ones(20_000)) == pytest.approx(1.0, abs=0.06)
    too_sure = Scores(found.target, sigmoid(2 * logit))
    assert too_sure.calibration_slope(np.ones(20_000)) == pytest.approx(0.5, abs=0.03)


def test_constant_probability_has_no_slope() -> None:
    assert Scores(np.array([0, 1], np.int8), np.full(2, 0.3)).calibration_slope(np.ones(2)) == 0


@pytest.mark.parametrize("kind", ["ones", "drawn", "fractions"])
@pytest.mark.parametrize("scale", [0.1, 1.0, 8.0])
def test_fit_line_is_a_logistic_regression_without_penalty(scale: float, kind: str) -> None:
    found, weight = scores(), weights(kind)
    margin = scale * (np.log(found.probability / (1 - found.probability)) + 1)
    theirs = LogisticRegression(C=np.inf, tol=1e-10, solver="newton-cholesky").fit(
        margin[:, None], found.target, sample_weight=weight
    )
    expected = (float(theirs.coef_[0, 0]), float(theirs.intercept_[0]))
    assert fit_line(margin, found.target, weight) == pytest.approx(expected, rel=1e-5)


def test_fit_line_recovers_slope_and_intercept() -> None:
    log_odds, _, target, weight = expected_outcomes(np.linspace(-4, 3, 100))
    assert fit_line(np.tile((log_odds - 0.7) / 2, 2), target, weight) == pytest.approx((2.0, 0.7))


def test_fit_line_is_not_carried_away_by_an_outlier() -> None:
    """Whole steps of Newton's method end at a slope of -10^12 here."""
    margin = np.array([*np.linspace(-50, 50, 50), -230, -360, -16_700])
    target = np.array([0] * 50 + [1, 0, 1], np.int8)
    slope, intercept = fit_line(margin, target)
    # Where the likelihood is highest, errors and errors times score add up to nothing.
    error = target - sigmoid(slope * margin + intercept)
    assert error.sum() == pytest.approx(0, abs=1e-6)
    assert error @ margin == pytest.approx(0, abs=1e-3)
    assert -0.1 < slope < 0


def test_all_rows_of_a_patient_are_drawn_equally_often() -> None:
    patients = np.random.default_rng(4).integers(0, 50, 200) * 1_000_003
    found, first = np.unique(patients, return_index=True)
    for weight in patient_weights(patients, 5, resamples=20):
        assert all(np.ptp(weight[patients == patient]) == 0 for patient in found)
        assert weight[first].sum() == len(found)
        assert len(np.unique(weight)) > 1


def test_seed_decides_the_resamples() -> None:
    patients = np.repeat(np.arange(40), 2)

    def drawn(seed: int) -> Floats:
        return np.array(list(patient_weights(patients, seed, resamples=5)))

    np.testing.assert_array_equal(drawn(6), drawn(6))
    assert (drawn(6) != drawn(7)).any()
    assert (drawn(6)[0] != drawn(6)[1]).any()


def test_copies_of_encounters_do_not_narrow_an_interval() -> None:
    found = scores(300)
    copies = Scores(np.repeat(found.target, 5), np.repeat(found.probability, 5))
    patients = np.repeat(np.arange(300), 5)

    def width(of: Scores, owners: Any) -> float:
        each = with_intervals(of, owners, 8, resamples=200)["auroc"]
        assert each["low"] < each["value"] < each["high"]
        return each["high"] - each["low"]

    once = width(found, np.arange(300))
    assert width(copies, patients) == pytest.approx(once)
    # Were the rows independent, five times as many would narrow it by the root of five.
    assert width(copies, np.arange(1500)) == pytest.approx(once / 5**0.5, rel=0.25)


def test_intervals_are_given_of_every_metric_and_repeat() -> None:
    found, patients = scores(), np.arange(600) // 2
    first = with_intervals(found, patients, 9, resamples=50)
    assert first == with_intervals(found, patients, 9, resamples=50)
    assert first != with_intervals(found, patients, 10, resamples=50)
    assert set(first) == set(METRICS)
    assert {name: each["value"] for name, each in first.items()} == all_metrics(found)


def test_resamples_with_one_outcome_only_are_passed_over() -> None:
    found = Scores(np.array([1, 0, 0], np.int8), np.array([0.6, 0.5, 0.2]))
    assert with_intervals(found, np.arange(3), 11, resamples=50)["auroc"]["low"] == 1.0


def test_model_compared_with_itself_differs_by_nothing() -> None:
    found = scores()
    same = paired_difference(found, found, np.arange(600) // 3, 12, resamples=50)
    assert same == {"value": 0.0, "low": 0.0, "high": 0.0}


def test_paired_difference_has_the_sign_of_the_challenger() -> None:
    good = scores()
    noise = np.random.default_rng(13).random(600)
    bad = Scores(good.target, noise)
    patients = np.arange(600) // 3
    better = paired_difference(good, bad, patients, 14, resamples=100)
    assert 0 < better["low"] < better["value"] < better["high"]
    assert better["value"] == pytest.approx(
        known.roc_auc_score(good.target, good.probability) - known.roc_auc_score(bad.target, noise)
    )
    worse = paired_difference(bad, good, patients, 14, resamples=100)
    assert worse["high"] == pytest.approx(-better["low"])
