"""Figures draw whatever an evaluation brings, say what the metrics say, and repeat themselves."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.figure import Figure

from training import figures
from training.metrics import Scores, all_metrics

RANDOM = np.random.default_rng(130)
PROBABILITY = RANDOM.beta(2, 14, 3000)
TARGET = (RANDOM.random(3000) < PROBABILITY).astype(np.int8)
CURVES: tuple[Callable[..., Figure], ...] = (
    figures.calibration,
    figures.roc,
    figures.precision_recall,
    figures.gain,
    lambda target, probability: figures.confusion(target, probability, 0.2, "Alerts"),
)
CASES: dict[str, tuple[Any, Any]] = {
    "usual": (TARGET, PROBABILITY),
    "all equal": (TARGET, np.full(3000, 0.11)),
    "all zero": (TARGET, np.zeros(3000)),
    "all one": (TARGET, np.ones(3000)),
    "perfect": (TARGET, TARGET.astype(np.float64)),
    "two rows": (np.array([0, 1], np.int8), np.array([0.4, 0.3])),
    "three equal rows": (np.array([0, 1, 0], np.int8), np.full(3, 0.5)),
}


def point(batches: int) -> dict[str, Any]:
    return {
        "batches": batches,
        "rows": 15_000 * batches,
        "train_auroc": 0.75,
        "auroc": 0.66 + 0.001 * batches,
        "auroc_low": 0.65,
        "auroc_high": 0.68,
        "auprc": 0.22,
    }


def slice_of(dimension: str, value: str, rows: int, **others: Any) -> dict[str, Any]:
    return {
        "dimension": dimension,
        "value": value,
        "rows": rows,
        "positives": rows // 9,
        "auroc": 0.66,
        "auroc_gap": 0.0,
        "tpr": 0.35,
        "tpr_gap": 0.0,
        "judged": True,
    } | others


UNJUDGED = {"auroc": None, "auroc_gap": None, "tpr": None, "tpr_gap": None, "judged": False}


def drawn(figure: Figure, folder: Path) -> bytes:
    """The PNG; drawing it is what fails on what can't be drawn."""
    path = folder / "figure.png"
    figures.save(figure, path)
    return path.read_bytes()


def texts(figure: Figure) -> list[str]:
    """Every legend entry and text within the axes."""
    found = []
    for axes in figure.axes:
        found += [text.get_text() for text in axes.texts]
        if legend := axes.get_legend():
            found += [text.get_text() for text in legend.get_texts()]
    return found


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("draw", CURVES, ids=["calibration", "roc", "pr", "gain", "confusion"])
def test_curves_draw(draw: Callable[..., Figure], case: str, tmp_path: Path) -> None:
    assert drawn(draw(*CASES[case]), tmp_path).startswith(b"\x89PNG")


@pytest.mark.parametrize("case", ["usual", "all equal", "two rows"])
def test_the_legends_say_what_the_report_says(case: str) -> None:
    target, probability = CASES[case]
    metrics = all_metrics(Scores(target, probability))
    assert f"AUROC {metrics['auroc']:.3f}" in texts(figures.roc(target, probability))
    assert f"AUPRC {metrics['auprc']:.3f}" in texts(figures.precision_recall(target, probability))
    found = f"top 10 %: {100 * metrics['recall_top_decile']:.1f} % found"
    assert found in texts(figures.gain(target, probability))
    calibration = texts(figures.calibration(target, probability))
    assert any(text.startswith(f"ECE {metrics['ece']:.4f} ") for text in calibration)


def test_the_reliability_diagram_shows_the_bins_that_ece_is_made_of() -> None:
    axes = figures.calibration(TARGET, PROBABILITY).axes[0]
    expected, observed = axes.containers[0].lines[0].get_data()  # type: ignore[attr-defined]
    assert len(expected) == 10
    ece = Scores(TARGET, PROBABILITY).ece(np.ones(3000))
    assert np.abs(expected - observed).mean() == pytest.approx(ece)


def test_confusion_counts_an_alert_at_the_threshold_itself() -> None:
    target = np.array([0, 0, 0, 1, 1], np.int8)
    probability = np.array([0.1, 0.2, 0.3, 0.2, 0.1])
    shown = texts(figures.confusion(target, probability, 0.2, "Alerts"))
    assert shown == [
        "1", "33.3 % of the row", "2", "66.7 % of the row",
        "1", "50.0 % of the row", "1", "50.0 % of the row",
    ]  # fmt: skip


def test_confusion_without_alerts(tmp_path: Path) -> None:
    figure = figures.confusion(TARGET, PROBABILITY, 2.0, "None")
    assert "precision no alert, recall 0.0 %" in figure.axes[0].get_xlabel()
    drawn(figure, tmp_path)


@pytest.mark.parametrize("rows", [1, 2, 50, 4000])
def test_shap_summary_draws(rows: int, tmp_path: Path) -> None:
    matrix = RANDOM.normal(size=(rows, 5))
    matrix[:, 1] = np.nan
    matrix[: rows // 2, 2] = np.nan
    matrix[:, 3] = 1.0
    contributions = RANDOM.normal(size=(rows, 5))
    contributions[:, 4] = 0.0
    names = ["a", "a $b$ _c", "x" * 80, "constant", "without effect"]
    drawn(figures.shap_summary(names, contributions, matrix), tmp_path)


def test_shap_summary_orders_by_strength_and_keeps_the_top() -> None:
    contributions = np.tile([0.1, -0.3, 0.2], (40, 1))
    figure = figures.shap_summary(["low", "high", "middle"], contributions, contributions, top=2)
    labels = [label.get_text() for label in figure.axes[0].get_yticklabels()]
    assert labels == ["high  0.300", "middle  0.200"]


def test_ranks_of_values() -> None:
    ranks = figures._rank(np.array([5.0, np.nan, 0.0, 0.0, 9.0]))
    assert ranks == pytest.approx([0.6, np.nan, 0.0, 0.0, 1.0], nan_ok=True)


@pytest.mark.parametrize("count", [1, 2, 5, 40])
def test_learning_curve_draws_and_names_the_last_batch(count: int, tmp_path: Path) -> None:
    figure = figures.learning_curve([point(batches) for batches in range(1, count + 1)])
    drawn(figure, tmp_path)
    labels = [label.get_text() for label in figure.axes[1].get_xticklabels()]
    assert len(labels) <= 8
    assert labels[-1] == f"{count}\n{15_000 * count:,}"


@pytest.mark.parametrize(
    "rows",
    [
        [],
        [slice_of("race", "Other", 20, **UNJUDGED)],
        [slice_of("race", "A", 90), slice_of("race", "B", 9, **UNJUDGED)],
        [slice_of("race", "race", 90), slice_of("x" * 60, "y $z$ " * 20, 9, tpr=None)],
        [slice_of(f"dimension {n // 9}", f"value {n}", n) for n in range(60)],
    ],
    ids=["none", "none judged", "some judged", "names", "many"],
)
def test_slices_draw(rows: list[dict[str, Any]], tmp_path: Path) -> None:
    drawn(figures.slices(rows), tmp_path)


def test_slices_that_are_not_judged_are_hollow() -> None:
    rows = [slice_of("race", "A", 90), slice_of("race", "B", 9, judged=False)]
    for axes in figures.slices(rows).axes:
        judged, other = axes.get_lines()
        assert judged.get_markerfacecolor() == judged.get_color()
        assert other.get_markerfacecolor() == "white"


def test_the_same_numbers_give_the_same_bytes(tmp_path: Path) -> None:
    matrix = RANDOM.normal(size=(4000, 3))

    def all_figures() -> list[bytes]:
        return [
            *(drawn(draw(TARGET, PROBABILITY), tmp_path) for draw in CURVES),
            drawn(figures.shap_summary(["a", "b", "c"], matrix, matrix), tmp_path),
            drawn(figures.learning_curve([point(1), point(2)]), tmp_path),
            drawn(figures.slices([slice_of("race", "A", 90)]), tmp_path),
        ]

    first = all_figures()
    assert first == all_figures()
    assert len(set(first)) == len(first)
    assert not any(word in png for png in first for word in (b"Software", b"tIME", b"Date"))
