"""Charts of the page. No meaning is in a colour alone: a sign, a shape or a text says it too."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import altair as alt
import pandas as pd

from ui.words import Words

# Blue and vermilion of Okabe and Ito, darkened to 4.5 to 1 on white; told apart by any eye.
LOWERS = "#0063a0"
RAISES = "#b34700"
_INK = "#1b1f24"
_RULE = "#767f8c"

_PERCENT = "format(datum.value * 100, '.0f') + '\N{NBSP}%'"

Rows = Sequence[Mapping[str, Any]]
Chart = alt.LayerChart


def reasons(found: Rows, words: Words) -> Chart:
    """What moved an estimate: a bar a feature, its label above it, its factor beside it."""
    frame = pd.DataFrame(
        {
            "rank": range(len(found)),
            "label": [_short(str(reason["label"]), _written(reason, words)) for reason in found],
            "share": [float(reason["contribution"]) for reason in found],
            "effect": [words(str(reason["effect"])) for reason in found],
            "factor": [_factor(reason, words) for reason in found],
        }
    )
    # Room for the factor at the end of the longest bar, on either side.
    lowest, highest = min(0.0, *frame["share"]), max(0.0, *frame["share"])
    room = 0.35 * (highest - lowest) or 1.0
    scale = alt.Scale(domain=[lowest - room, highest + room], nice=False)
    x = alt.X("share:Q", axis=None, scale=scale)
    y = alt.Y("rank:O", axis=None)
    colour = alt.Color(
        "effect:N",
        scale=alt.Scale(domain=[words("raises"), words("lowers")], range=[RAISES, LOWERS]),
        legend=None,
    )
    base = alt.Chart(frame)
    tip = [alt.Tooltip("label:N", title=""), alt.Tooltip("factor:N", title="")]
    bars = base.mark_bar(height=13, yOffset=9).encode(x=x, y=y, color=colour, tooltip=tip)
    labels = base.mark_text(align="left", dy=-7).encode(
        x=alt.value(0), y=y, text="label:N", color=alt.value(_INK), size=alt.value(12.5)
    )
    right = base.transform_filter("datum.share >= 0").mark_text(align="left", dx=5, dy=9)
    left = base.transform_filter("datum.share < 0").mark_text(align="right", dx=-5, dy=9)
    factors = [
        side.encode(x=x, y=y, text="factor:N", color=alt.value(_INK), size=alt.value(12))
        for side in (left, right)
    ]
    # Where a bar starts; a line from top to bottom would go through the labels.
    starts = (
        base.transform_calculate(zero="0")
        .mark_tick(color=_RULE, size=19, thickness=1.5, yOffset=9)
        .encode(x=alt.X("zero:Q", axis=None, scale=scale), y=y)
    )
    return _plain([bars, starts, labels, *factors], 38 * len(frame) + 6)


def risks(counts: Sequence[int], words: Words) -> Chart:
    """Encounters by risk, in steps of equal width from 0 to 1."""
    step = 1 / len(counts)
    # What is empty at the upper end would only press the rest together.
    shown = max((index + 1 for index, count in enumerate(counts) if count), default=1)
    frame = pd.DataFrame(
        {
            "low": [step * index for index in range(shown)],
            "high": [step * (index + 1) for index in range(shown)],
            "count": list(counts[:shown]),
        }
    )
    base = alt.Chart(frame)
    bars = base.mark_bar(color=LOWERS, stroke="white", strokeWidth=1).encode(
        x=alt.X(
            "low:Q",
            bin="binned",
            title=words("axis.risk"),
            axis=alt.Axis(labelExpr=_PERCENT, tickMinStep=step, grid=False),
        ),
        x2="high:Q",
        y=alt.Y("count:Q", title=words("axis.stays"), axis=alt.Axis(tickMinStep=1)),
    )
    return _plain([bars], 240)


def calibration(points: Rows, words: Words) -> Chart:
    """Share readmitted by predicted risk, with intervals, beside the line of a perfect model."""
    columns = ("predicted", "observed", "low", "high")
    frame = pd.DataFrame([{name: point.get(name) for name in columns} for point in points])
    end = max(float(frame.max().max()), 0.05) * 1.05
    scale = alt.Scale(domain=[0, end], nice=False)
    axis = alt.Axis(labelExpr=_PERCENT, tickCount=6)
    x = alt.X("predicted:Q", title=words("axis.predicted"), scale=scale, axis=axis)
    y = alt.Y("observed:Q", title=words("axis.observed"), scale=scale, axis=axis)
    line = (
        alt.Chart(pd.DataFrame({"predicted": [0, end], "observed": [0, end]}))
        .mark_line(color=_RULE, strokeDash=[4, 4])
        .encode(x=x, y=y)
    )
    base = alt.Chart(frame)
    intervals = base.mark_rule(color=LOWERS, strokeWidth=2).encode(
        x=x, y=alt.Y("low:Q", scale=scale), y2="high:Q"
    )
    tip = [
        alt.Tooltip("predicted:Q", title=words("axis.predicted"), format=".1%"),
        alt.Tooltip("observed:Q", title=words("axis.observed"), format=".1%"),
    ]
    dots = base.mark_point(color=LOWERS, filled=True, size=70, opacity=1).encode(
        x=x, y=y, tooltip=tip
    )
    return _plain([line, intervals, dots], 300)


def slices(groups: Rows, words: Words) -> Chart:
    """Share of the readmissions that were found in each group; hollow where it can't be judged."""
    frame = pd.DataFrame(
        {
            "group": [
                f"{words('dimension.' + group['dimension'])}: "
                f"{words.slice(group['dimension'], group['value'])}"
                for group in groups
            ],
            "recall": [group.get("tpr") for group in groups],
            "judged": [bool(group.get("judged")) for group in groups],
        }
    )
    base = alt.Chart(frame)
    x = alt.X(
        "recall:Q",
        title=words("axis.recall"),
        axis=alt.Axis(labelExpr=_PERCENT, tickCount=5),
        scale=alt.Scale(domain=[0, 1.08 * (float(frame["recall"].max()) or 1.0)], nice=False),
    )
    y = alt.Y(
        "group:N",
        # Said once more: where layers meet, Vega-Lite forgets the order of the rows.
        sort=list(frame["group"]),
        title=None,
        axis=alt.Axis(labelLimit=190, grid=True, ticks=False),
    )
    tip = [alt.Tooltip("group:N", title=""), alt.Tooltip("recall:Q", title="", format=".1%")]
    dots = [
        base.transform_filter(f"datum.judged === {judged}")
        .mark_point(color=LOWERS, filled=filled, size=90, opacity=1, strokeWidth=2)
        .encode(x=x, y=y, tooltip=tip)
        for judged, filled in (("true", True), ("false", False))
    ]
    return _plain([*dots], 26 * len(frame) + 50)


def features(found: Rows, words: Words) -> Chart:
    """The features that count most, with the size of their contribution."""
    frame = pd.DataFrame(
        {
            "feature": [words.feature(str(row["feature"])) for row in found],
            "size": [float(row["mean_abs_contribution"]) for row in found],
            "text": [words.number(float(row["mean_abs_contribution"]), 3) for row in found],
        }
    )
    base = alt.Chart(frame)
    end = float(frame["size"].max()) * 1.2
    x = alt.X("size:Q", axis=None, scale=alt.Scale(domain=[0, end]))
    y = alt.Y(
        "feature:N", sort=None, title=None, axis=alt.Axis(labelLimit=210, ticks=False, domain=False)
    )
    bars = base.mark_bar(color=LOWERS, height=12).encode(x=x, y=y)
    numbers = base.mark_text(align="left", dx=4, color=_INK).encode(x=x, y=y, text="text:N")
    return _plain([bars, numbers], 24 * len(frame) + 10)


def _plain(layers: Sequence[alt.Chart], height: int) -> Chart:
    chart: Chart = (
        alt.LayerChart(layer=list(layers))
        .properties(height=height)
        .configure_view(stroke=None)
        .configure_axis(labelColor=_INK, titleColor=_INK, labelFontSize=12, titleFontSize=12)
    )
    return chart


def _factor(reason: Mapping[str, Any], words: Words) -> str:
    odds = reason.get("odds_ratio")
    ratio = math.exp(float(reason["contribution"])) if odds is None else float(odds)
    sign = "\N{BLACK UP-POINTING TRIANGLE}" if ratio >= 1 else "\N{BLACK DOWN-POINTING TRIANGLE}"
    return f"{sign}\N{MULTIPLICATION SIGN}{words.number(ratio, 2)}"


def _written(reason: Mapping[str, Any], words: Words) -> str:
    value = str(reason.get("value", ""))
    try:
        number = float(value)
    except ValueError:
        return value
    return words.number(number, 0 if number.is_integer() else 1)


def _short(label: str, value: str, most: int = 54) -> str:
    # The value is what differs between patients, so the label gives way first.
    value = value if len(value) <= 34 else f"{value[:33].rstrip()}\N{HORIZONTAL ELLIPSIS}"
    room = most - len(value)
    label = label if len(label) <= room else f"{label[: room - 1].rstrip()}\N{HORIZONTAL ELLIPSIS}"
    return f"{label}: {value}"
