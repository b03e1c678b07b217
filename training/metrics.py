"""How good a probability is: point values and patient-bootstrap intervals.

Every metric takes row weights, so that a bootstrap of patients is a vector of how often each
patient was drawn, not a copy of the rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]

RESAMPLES = 1000
TOP_SHARE = 0.1
ECE_BINS = 10


@dataclass(frozen=True)
class Scores:
    """Targets and probabilities, sorted once; the metrics then cost one pass each.

    Args:
        target: (rows,) 0 or 1, both occurring.
        probability: (rows,) of class 1.
    """

    target: npt.NDArray[np.int8]
    probability: Floats

    @cached_property
    def _order(self) -> npt.NDArray[np.intp]:
        return np.argsort(-self.probability, kind="stable")

    @cached_property
    def _last_of_tie(self) -> npt.NDArray[np.bool_]:
        """Where a threshold can stand: after the last row of each probability."""
        ranked = self.probability[self._order]
        return np.append(ranked[1:] != ranked[:-1], True)

    @cached_property
    def _bins(self) -> npt.NDArray[np.intp]:
        """Ten bins of equal count, by rank."""
        bins = np.empty(len(self.target), np.intp)
        bins[self._order] = np.arange(len(self.target)) * ECE_BINS // len(self.target)
        return bins

    def _cumulated(self, weights: Floats) -> tuple[Floats, Floats]:
        ranked = weights[self._order]
        positives = ranked * self.target[self._order]
        ends = self._last_of_tie
        return np.cumsum(positives)[ends], np.cumsum(ranked - positives)[ends]

    def auroc(self, weights: Floats) -> float:
        """Area under the ROC curve; ties count half."""
        hits, false = self._cumulated(weights)
        height = hits - np.diff(hits, prepend=0.0) / 2
        return float((np.diff(false, prepend=0.0) * height).sum() / (hits[-1] * false[-1]))

    def auprc(self, weights: Floats) -> float:
        """Average precision: the step-wise area under the precision-recall curve."""
        hits, false = self._cumulated(weights)
        alerts = hits + false
        precision = np.divide(hits, alerts, out=np.zeros_like(hits), where=alerts > 0)
        return float((np.diff(hits, prepend=0.0) * precision).sum() / hits[-1])

    def brier(self, weights: Floats) -> float:
        """Mean squared difference of probability and outcome (Brier 1950)."""
        return float(np.average((self.probability - self.target) ** 2, weights=weights))

    def log_loss(self, weights: Floats) -> float:
        """Mean negative log likelihood."""
        return float(np.average(self._losses, weights=weights))

    @cached_property
    def _losses(self) -> Floats:
        kept = np.clip(self.probability, 1e-15, 1 - 1e-15)
        return np.where(self.target == 1, -np.log(kept), -np.log1p(-kept))

    def ece(self, weights: Floats) -> float:
        """Expected calibration error over ten bins of equal count (Naeini et al. 2015)."""
        difference = weights * (self.probability - self.target)
        return float(np.abs(np.bincount(self._bins, difference)).sum() / weights.sum())

    def recall_top_decile(self, weights: Floats) -> float:
        """Share of the readmitted who are among the tenth of encounters with the highest risk."""
        ranked = weights[self._order]
        # The row at the edge counts with the part of its weight that lies within the tenth.
        before = np.cumsum(ranked) - ranked
        taken = np.clip(TOP_SHARE * ranked.sum() - before, 0, ranked)
        target = self.target[self._order]
        return float((taken * target).sum() / (ranked * target).sum())

    def lift_top_decile(self, weights: Floats) -> float:
        """How many times more often than on average the top tenth is readmitted."""
        return self.recall_top_decile(weights) / TOP_SHARE

    def calibration_slope(self, weights: Floats) -> float:
        """Slope of the outcome on the log odds (Cox 1958); 1: neither over- nor underconfident."""
        log_odds = _logit(self.probability)
        if np.ptp(log_odds) == 0:
            return 0.0
        return fit_line(log_odds, self.target, weights)[0]


METRICS: Mapping[str, Callable[[Scores, Floats], float]] = {
    "auroc": Scores.auroc,
    "auprc": Scores.auprc,
    "brier": Scores.brier,
    "log_loss": Scores.log_loss,
    "ece": Scores.ece,
    "lift_top_decile": Scores.lift_top_decile,
    "recall_top_decile": Scores.recall_top_decile,
    "calibration_slope": Scores.calibration_slope,
}


def calibration_bins(target: npt.NDArray[np.int8], probability: Floats) -> list[dict[str, float]]:
    """What was predicted and what was observed, in ten bins of equal count.

    Returns:
        For each bin, the highest risk first, the mean `predicted` probability, the `observed`
        share with its 95 % interval (`low`, `high`), and its `rows`.
    """
    order = np.argsort(-probability, kind="stable")
    bins = np.arange(len(target)) * ECE_BINS // len(target)
    count = np.bincount(bins).astype(np.float64)
    used = count > 0  # fewer encounters than bins leave some empty
    count = count[used]
    predicted = np.bincount(bins, probability[order])[used] / count
    observed = np.bincount(bins, target[order])[used] / count
    low, high = _wilson(observed, count)
    columns = (predicted, observed, low, high, count)
    names = ("predicted", "observed", "low", "high", "rows")
    return [dict(zip(names, map(float, row), strict=True)) for row in zip(*columns, strict=True)]


def _wilson(share: Floats, count: Floats) -> tuple[Floats, Floats]:
    """95 % interval of a share (Wilson 1927)."""
    z = 1.959964
    center = (share + z**2 / (2 * count)) / (1 + z**2 / count)
    half = z * np.sqrt(share * (1 - share) / count + (z / (2 * count)) ** 2) / (1 + z**2 / count)
    # Rounding must not put a share outside its own interval.
    return np.minimum(center - half, share), np.maximum(center + half, share)


def fit_line(
    log_odds: Floats, target: npt.NDArray[np.int8], weights: Floats | None = None
) -> tuple[float, float]:
    """Logistic regression of the outcome on one score (Platt 1999), by Newton's method.

    A step that would lose likelihood is halved: far from the answer (a score that is much too
    sure, say) whole steps jump back and forth for ever.

    Returns:
        Slope and intercept.
    """
    weights = np.ones(len(target)) if weights is None else weights
    design = np.column_stack([log_odds, np.ones(len(target))])
    sign = np.where(target == 1, 1.0, -1.0)

    def of_what_happened(line: Floats) -> Floats:
        return 1 / (1 + np.exp(np.clip(-sign * (design @ line), -500, 500)))

    line = np.zeros(2)
    probability = of_what_happened(line)
    for _ in range(100):
        gradient = design.T @ (weights * sign * (1 - probability))
        hessian = (design * (weights * probability * (1 - probability))[:, None]).T @ design
        step = np.linalg.solve(hessian + 1e-9 * np.eye(2), gradient)
        likelihood = weights @ np.log(probability)
        for _ in range(40):
            probability = of_what_happened(line + step)
            # Both are below 0; rounding is no loss.
            if weights @ np.log(probability) >= likelihood * (1 + 1e-12):
                break
            step /= 2
        line += step
        if np.abs(step).max() < 1e-10:
            break
    return float(line[0]), float(line[1])


def all_metrics(scores: Scores) -> dict[str, float]:
    """Every metric on all rows."""
    weights = np.ones(len(scores.target))
    return {name: metric(scores, weights) for name, metric in METRICS.items()}


def patient_weights(
    patients: npt.NDArray[np.int64], seed: int, resamples: int = RESAMPLES
) -> Iterator[Floats]:
    """Bootstrap of patients: how often each row is drawn, (rows,) for each resample.

    Patients, not rows: the encounters of one patient are not independent.
    """
    _, owner = np.unique(patients, return_inverse=True)
    count = int(owner.max()) + 1
    random = np.random.default_rng(seed)
    for _ in range(resamples):
        drawn = np.bincount(random.integers(0, count, count), minlength=count)
        yield drawn[owner].astype(np.float64)


def with_intervals(
    scores: Scores, patients: npt.NDArray[np.int64], seed: int, resamples: int = RESAMPLES
) -> dict[str, dict[str, float]]:
    """Every metric with its 95 % patient-bootstrap interval: `value`, `low`, `high`."""
    drawn: dict[str, list[float]] = {name: [] for name in METRICS}
    for weights in patient_weights(patients, seed, resamples):
        if _has_both(scores.target, weights):
            for name, metric in METRICS.items():
                drawn[name].append(metric(scores, weights))
    return {
        name: {"value": value, **_interval(drawn[name])}
        for name, value in all_metrics(scores).items()
    }


def paired_difference(
    challenger: Scores,
    champion: Scores,
    patients: npt.NDArray[np.int64],
    seed: int,
    resamples: int = RESAMPLES,
) -> dict[str, float]:
    """AUROC of the challenger less that of the champion, on the same resamples of patients."""
    differences = [
        challenger.auroc(weights) - champion.auroc(weights)
        for weights in patient_weights(patients, seed, resamples)
        if _has_both(champion.target, weights)
    ]
    ones = np.ones(len(patients))
    value = challenger.auroc(ones) - champion.auroc(ones)
    return {"value": value, **_interval(differences)}


def _has_both(target: npt.NDArray[np.int8], weights: Floats) -> bool:
    """A resample with one outcome only has no AUROC, and says nothing about a real sample."""
    positives = float(weights @ target)
    return 0 < positives < float(weights.sum())


def _interval(values: list[float]) -> dict[str, float]:
    low, high = np.quantile(values, [0.025, 0.975])
    return {"low": float(low), "high": float(high)}


def _logit(probability: Floats) -> Floats:
    kept = np.clip(probability, 1e-12, 1 - 1e-12)
    return np.log(kept) - np.log1p(-kept)
