"""Figures of an evaluation.

matplotlib's object API only: nothing global, no window, and the same bytes for the same numbers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt

from training.metrics import Scores, calibration_bins

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Floats = npt.NDArray[np.float64]
Target = npt.NDArray[np.int8]

_WIDTH, _HEIGHT, _DPI = 6.0, 4.5, 120

# Okabe and Ito's palette: told apart with any kind of colour blindness.
_BLUE, _ORANGE, _GREEN, _GREY = "#0072b2", "#d55e00", "#009e73", "#8a9099"
_INK, _FAINT = "#24292f", "#e4e7eb"

_Place = Literal["upper left", "upper right", "lower right", "best"]

_TITLE, _LABEL, _TICK = 10.5, 9, 8

_MOST_POINTS = 3000
"""Encounters drawn in a SHAP summary; its order and its numbers come from all."""

_MOST_TICKS = 8


def calibration(target: Target, probability: Floats) -> Figure:
    """Reliability diagram in ten bins of equal count above the histogram of probabilities."""
    bins = calibration_bins(target, probability)
    expected, observed, low, high = (
        np.array([found[name] for found in bins])
        for name in ("predicted", "observed", "low", "high")
    )
    ece = Scores(target, probability).ece(np.ones(len(target)))
    # A rare outcome has most probabilities far from 1, where the diagram would be empty.
    reach = max(float(np.quantile(probability, 0.99)), float(high.max()), 0.02)
    limit = min(float(np.ceil(reach * 1.02 * 20) / 20), 1.0)

    figure = _figure()
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=[3, 1])
    upper.plot([0, 1], [0, 1], color=_GREY, linestyle="--", linewidth=1, label="perfect")
    upper.errorbar(
        expected,
        observed,
        yerr=[observed - low, high - observed],
        color=_BLUE,
        marker="o",
        markersize=4.5,
        linewidth=1.4,
        elinewidth=1,
        capsize=2,
        label=f"ECE {ece:.4f} (bars: 95 % Wilson interval)",
    )
    _dress(upper, "Calibration, ten bins of equal count", "", "readmitted (share)")
    upper.set_xlim(0, limit)
    upper.set_ylim(0, limit)
    _legend(upper, "upper left")
    lower.hist(np.clip(probability, 0, limit), bins=40, range=(0, limit), color=_BLUE, alpha=0.75)
    beyond = int((probability > limit).sum())
    suffix = f" (last bar: with the {beyond:,} above)" if beyond else ""
    _dress(lower, "", f"predicted probability{suffix}", "encounters")
    return figure


def roc(target: Target, probability: Floats) -> Figure:
    """ROC curve with its area."""
    hits, false = _cumulated(target, probability)
    auroc = Scores(target, probability).auroc(np.ones(len(target)))
    figure = _figure()
    axes = figure.subplots()
    axes.plot([0, 1], [0, 1], color=_GREY, linestyle="--", linewidth=1, label="chance 0.500")
    axes.plot(
        false / false[-1], hits / hits[-1], color=_BLUE, linewidth=1.8, label=f"AUROC {auroc:.3f}"
    )
    _dress(axes, "ROC curve", "false positive rate", "true positive rate (recall)")
    _unit(axes)
    _legend(axes, "lower right")
    return figure


def precision_recall(target: Target, probability: Floats) -> Figure:
    """Precision-recall curve with its average precision, and the base rate."""
    hits, false = _cumulated(target, probability)
    hits, alerts = hits[1:], (hits + false)[1:]
    recall, precision = hits / hits[-1], hits / alerts
    base = float(target.mean())
    auprc = Scores(target, probability).auprc(np.ones(len(target)))
    # The first few alerts swing between 0 and 1; the axis is made for what comes after them.
    settled = precision[alerts >= max(0.005 * len(target), 1)]
    top = min(max(float(settled.max()), 2 * base) * 1.15, 1.02)

    figure = _figure()
    axes = figure.subplots()
    axes.axhline(base, color=_GREY, linestyle="--", linewidth=1, label=f"base rate {base:.3f}")
    axes.step(
        np.append(0.0, recall),
        np.append(precision[0], precision),
        where="pre",
        color=_BLUE,
        linewidth=1.6,
        label=f"AUPRC {auprc:.3f}",
    )
    _dress(axes, "Precision and recall", "recall", "precision")
    axes.set_xlim(-0.01, 1.01)
    axes.set_ylim(0, top)
    _legend(axes, "upper right")
    return figure


def gain(target: Target, probability: Floats) -> Figure:
    """Share of the readmitted found, by the share of encounters alerted, the riskiest first."""
    ranked = target[np.argsort(-probability, kind="stable")]
    alerted = np.arange(len(target) + 1) / len(target)
    found = np.append(0.0, np.cumsum(ranked, dtype=np.float64)) / ranked.sum(dtype=np.float64)
    base = float(target.mean())

    figure = _figure()
    axes = figure.subplots()
    axes.plot([0, 1], [0, 1], color=_GREY, linestyle="--", linewidth=1, label="chance")
    axes.plot([0, base, 1], [0, 1, 1], color=_GREY, linestyle=":", linewidth=1, label="perfect")
    axes.plot(alerted, found, color=_BLUE, linewidth=1.8, label="model")
    for share, color, marker in ((0.1, _ORANGE, "o"), (0.2, _GREEN, "s")):
        height = float(np.interp(share, alerted, found))
        axes.plot([share, share, 0], [0, height, height], color=color, linewidth=0.8, alpha=0.7)
        axes.plot(
            [share],
            [height],
            color=color,
            marker=marker,
            linestyle="none",
            label=f"top {_percent(share, 0)}: {_percent(height)} found",
        )
    _dress(axes, "Cumulative gain", "encounters alerted (share)", "readmitted found (share)")
    _unit(axes)
    _legend(axes, "lower right")
    return figure


def confusion(target: Target, probability: Floats, threshold: float, title: str) -> Figure:
    """2x2 table of outcome and alert: counts, and percentages of each row.

    Args:
        target: (rows,) 0 or 1.
        probability: (rows,) of class 1.
        threshold: an encounter with this probability or a higher one gets an alert.
        title: what the figure is called, the alert rate for example.
    """
    alert = (probability >= threshold).astype(np.intp)
    counts = np.bincount(2 * target.astype(np.intp) + alert, minlength=4).reshape(2, 2)
    totals = counts.sum(axis=1, keepdims=True)
    shares = np.divide(counts, totals, out=np.zeros((2, 2)), where=totals > 0)
    alerts, positives = int(counts[:, 1].sum()), int(totals[1, 0])
    recall = _percent(counts[1, 1] / positives) if positives else "none to find"
    precision = _percent(counts[1, 1] / alerts) if alerts else "no alert"

    figure = _figure()
    axes = figure.subplots()
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=1.15, aspect="auto")
    for row in range(2):
        for column in range(2):
            share = float(shares[row, column])
            color = "white" if share > 0.6 else _INK
            of_row = f"{_percent(share)} of the row" if totals[row, 0] else "empty row"
            axes.text(
                column,
                row - 0.06,
                f"{counts[row, column]:,}",
                ha="center",
                va="center",
                fontsize=19,
                fontweight="bold",
                color=color,
            )
            axes.text(
                column, row + 0.16, of_row, ha="center", va="center", fontsize=_LABEL, color=color
            )
    _dress(
        axes,
        title,
        f"alert at probability ≥ {threshold:.4f}: precision {precision}, recall {recall}",
        "",
    )
    axes.grid(visible=False)
    for spine in axes.spines.values():
        spine.set_visible(False)
    axes.axhline(0.5, color="white", linewidth=3)
    axes.axvline(0.5, color="white", linewidth=3)
    axes.set_xticks([0, 1], ["no alert", "alert"])
    axes.set_yticks([0, 1], ["not\nreadmitted", "readmitted"])
    axes.tick_params(length=0, labelsize=_LABEL)
    return figure


def shap_summary(
    names: Sequence[str], contributions: Floats, matrix: Floats, top: int = 20
) -> Figure:
    """What moves the log odds: a point an encounter for each of the strongest features.

    Args:
        names: of the features.
        contributions: (rows, features) to the log odds, without the base.
        matrix: (rows, features) the values, NaN where unknown.
        top: how many features, by mean absolute contribution.
    """
    from matplotlib import colormaps
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import ListedColormap

    strength = np.abs(contributions).mean(axis=0)
    shown = np.argsort(-strength, kind="stable")[:top]
    random = np.random.default_rng(0)
    drawn = np.arange(len(matrix))
    if len(drawn) > _MOST_POINTS:
        drawn = np.sort(random.choice(drawn, _MOST_POINTS, replace=False))
    # Without its ends: nearly white and nearly black would pass for paper and ink.
    colors = ListedColormap(colormaps["plasma"](np.linspace(0.03, 0.82, 256)))

    figure = _figure(max(_HEIGHT, 1.1 + 0.25 * len(shown)))
    axes = figure.subplots()
    axes.axvline(0, color=_GREY, linewidth=0.8)
    for place, feature in enumerate(shown):
        share = contributions[drawn, feature]
        height = place + _swarm(share, random)
        rank = _rank(matrix[drawn, feature])
        known = ~np.isnan(rank)
        size = 4 if len(drawn) > 300 else 12
        axes.scatter(share[~known], height[~known], s=size, color=_GREY, alpha=0.6, linewidths=0)
        axes.scatter(
            share[known],
            height[known],
            s=size,
            c=rank[known],
            cmap=colors,
            vmin=0,
            vmax=1,
            alpha=0.8,
            linewidths=0,
        )
    _dress(axes, "What moves the log odds", "contribution to the log odds of readmission", "")
    axes.set_yticks(range(len(shown)), [f"{_name(names[i])}  {strength[i]:.3f}" for i in shown])
    axes.set_ylim(len(shown) - 0.4, -0.6)
    axes.tick_params(axis="y", length=0)
    axes.grid(visible=False, axis="x")
    bar = figure.colorbar(ScalarMappable(cmap=colors), ax=axes, ticks=[0, 1], aspect=40, pad=0.02)
    bar.ax.set_yticklabels(["low", "high"])
    bar.ax.tick_params(length=0, labelsize=_TICK, labelcolor=_INK)
    bar.set_label("rank of the feature's value (grey: unknown)", fontsize=_TICK, color=_INK)
    bar.outline.set_visible(False)
    axes.text(
        -0.005,
        1.008,
        "mean |contribution| ",
        transform=axes.transAxes,
        ha="right",
        va="bottom",
        fontsize=_TICK - 1,
        color=_GREY,
    )
    return figure


def learning_curve(points: Sequence[Mapping[str, Any]]) -> Figure:
    """What more data brought: AUROC (with its interval) and AUPRC by the rows trained on."""
    points = sorted(points, key=lambda point: int(point["rows"]))
    rows = [point["rows"] for point in points]

    def series(name: str) -> list[float]:
        return [float(point[name]) for point in points]

    figure = _figure()
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=[2.2, 1])
    low, high = series("auroc_low"), series("auroc_high")
    upper.plot(
        rows,
        series("train_auroc"),
        color=_ORANGE,
        marker="s",
        markersize=4.5,
        linestyle="--",
        linewidth=1.4,
        label=_last("train", series("train_auroc")),
    )
    upper.fill_between(rows, low, high, color=_BLUE, alpha=0.18, linewidth=0)
    # The band of a single point has no width to be seen.
    upper.vlines(rows, low, high, color=_BLUE, alpha=0.35, linewidth=1)
    last = f" ({low[-1]:.3f}-{high[-1]:.3f})" if points else ""
    upper.plot(
        rows,
        series("auroc"),
        color=_BLUE,
        marker="o",
        markersize=4.5,
        linewidth=1.8,
        label=_last("validation", series("auroc")) + last,
    )
    _dress(upper, "Learning curve (legend: with all data; band: 95 % interval)", "", "AUROC")
    _legend(upper, "best")
    lower.plot(
        rows,
        series("auprc"),
        color=_GREEN,
        marker="D",
        markersize=4,
        linewidth=1.6,
        label=_last("validation", series("auprc")),
    )
    _dress(lower, "", "batches and rows trained on", "AUPRC")
    _legend(lower, "best")
    step = max(-(-len(points) // _MOST_TICKS), 1)
    ticks = points[::-1][::step][::-1]  # the last one always has its tick
    lower.set_xticks(
        [point["rows"] for point in ticks],
        [f"{point['batches']}\n{point['rows']:,}" for point in ticks],
    )
    for axes in (upper, lower):
        axes.margins(x=0.06, y=0.15)
    return figure


def slices(rows: Sequence[Mapping[str, Any]]) -> Figure:
    """AUROC and true positive rate of each slice, beside the largest of its dimension."""
    from matplotlib.ticker import MaxNLocator

    dimensions: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        dimensions.setdefault(str(row["dimension"]), []).append(row)
    lines = len(rows) + len(dimensions)
    figure = _figure(max(_HEIGHT, 1.1 + 0.19 * lines))
    panels = figure.subplots(1, 2, sharey=True)
    panels[0].set_ylim(max(lines, 1) - 0.4, -0.6)
    labels: list[str] = []
    headings = []
    for dimension, members in dimensions.items():
        headings.append(len(labels))
        labels.append(_name(dimension))
        first = len(labels)
        largest = max(members, key=lambda row: int(row["rows"]))
        labels += [f"{_name(row['value'])} ({row['rows']:,})" for row in members]
        for axes, metric in zip(panels, ("auroc", "tpr"), strict=True):
            if largest[metric] is not None:
                axes.vlines(
                    largest[metric],
                    first - 0.45,
                    first + len(members) - 0.55,
                    color=_ORANGE,
                    linewidth=1.1,
                )
            for place, row in enumerate(members, first):
                if row[metric] is not None:
                    judged = bool(row["judged"])
                    axes.plot(
                        [row[metric]],
                        [place],
                        marker="o",
                        markersize=5,
                        linestyle="none",
                        color=_BLUE if judged else _GREY,
                        markerfacecolor=_BLUE if judged else "white",
                    )
    _dress(panels[0], "AUROC by slice", "AUROC", "")
    _dress(panels[1], "Recall by slice", "true positive rate", "")
    panels[0].set_yticks(range(lines), labels)
    names = panels[0].get_yticklabels()
    for place in headings:
        names[place].set_fontweight("bold")
    for axes in panels:
        axes.tick_params(axis="y", length=0)
        axes.margins(x=0.1)
        axes.xaxis.set_major_locator(MaxNLocator(4))
    judged_count = sum(bool(row["judged"]) for row in rows)
    _slice_legend(figure, judged_count, len(rows) - judged_count)
    return figure


def save(figure: Figure, path: Path) -> None:
    """Write a PNG whose bytes depend on the figure alone, not on when or with what it was drawn."""
    figure.savefig(path, format="png", dpi=_DPI, facecolor="white", metadata={"Software": None})


def _figure(height: float = _HEIGHT) -> Figure:
    # Here, not above: it costs half a second that those who only train need not wait for.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    layout = ConstrainedLayoutEngine(w_pad=0.1, h_pad=0.08)
    figure = Figure((_WIDTH, height), dpi=_DPI, layout=layout, facecolor="white")
    FigureCanvasAgg(figure)
    return figure


def _dress(axes: Axes, title: str, x: str, y: str) -> None:
    axes.set_title(_plain(title), loc="left", fontsize=_TITLE, fontweight="bold", color=_INK)
    axes.set_xlabel(x, fontsize=_LABEL, color=_INK)
    axes.set_ylabel(y, fontsize=_LABEL, color=_INK)
    axes.tick_params(labelsize=_TICK, color=_GREY, labelcolor=_INK)
    axes.grid(visible=True, color=_FAINT, linewidth=0.7)
    axes.set_axisbelow(True)
    for side, spine in axes.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color(_GREY)


def _unit(axes: Axes) -> None:
    axes.set_xlim(-0.01, 1.01)
    axes.set_ylim(-0.01, 1.02)


def _legend(axes: Axes, place: _Place) -> None:
    axes.legend(
        loc=place, fontsize=_TICK, frameon=True, framealpha=0.9, edgecolor="none", labelcolor=_INK
    )


def _slice_legend(figure: Figure, judged: int, others: int) -> None:
    from matplotlib.lines import Line2D

    marker: dict[str, Any] = {"marker": "o", "markersize": 5, "linestyle": "none"}
    figure.legend(
        handles=[
            Line2D([], [], color=_BLUE, label=f"judged ({judged})", **marker),
            Line2D(
                [],
                [],
                color=_GREY,
                markerfacecolor="white",
                label=f"too few to judge ({others})",
                **marker,
            ),
            Line2D([], [], color=_ORANGE, linewidth=1.1, label="largest slice"),
        ],
        loc="outside lower center",
        ncols=3,
        fontsize=_TICK,
        frameon=False,
        labelcolor=_INK,
    )


def _cumulated(target: Target, probability: Floats) -> tuple[Floats, Floats]:
    """True and false alerts at each threshold, from none on."""
    order = np.argsort(-probability, kind="stable")
    ends = np.append(np.diff(probability[order]) != 0, True)
    hits = np.cumsum(target[order], dtype=np.float64)
    false = np.arange(1, len(target) + 1) - hits
    return np.append(0.0, hits[ends]), np.append(0.0, false[ends])


def _rank(values: Floats) -> Floats:
    """Values as ranks in 0..1, ties at their middle; NaN stays."""
    ranks = np.full(len(values), np.nan)
    known = ~np.isnan(values)
    _, place, count = np.unique(values[known], return_inverse=True, return_counts=True)
    middle = np.cumsum(count) - count / 2
    if len(middle) > 1:
        ranks[known] = ((middle - middle[0]) / (middle[-1] - middle[0]))[place]
    else:
        ranks[known] = 0.5
    return ranks


def _swarm(values: Floats, random: np.random.Generator) -> Floats:
    """Vertical offsets, the wider the more points lie beside each other."""
    span = float(np.ptp(values)) or 1.0
    cell = np.minimum((values - values.min()) / span * 100, 99).astype(np.intp)
    density = np.bincount(cell, minlength=100).astype(np.float64)
    width = 0.4 * np.sqrt(density / density.max())
    offsets: Floats = random.uniform(-1, 1, len(values)) * width[cell]
    return offsets


def _percent(share: float, digits: int = 1) -> str:
    return f"{100 * share:.{digits}f} %"


def _last(name: str, values: Sequence[float]) -> str:
    return f"{name} {values[-1]:.3f}" if values else name


def _plain(text: object) -> str:
    """Text as it is: a pair of dollars would be read as a formula."""
    return str(text).replace("$", r"\$")


def _name(text: object) -> str:
    """A name short enough to leave room for what it names."""
    name = " ".join(str(text).split())
    return _plain(name if len(name) <= 34 else f"{name[:33]}…")
