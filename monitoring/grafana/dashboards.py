"""`python -m monitoring.grafana.dashboards`: write the four dashboards as Grafana's JSON.

Each begins with a row of figures that turn red where an alert fires, and goes on with what led
there. Needs grafana-foundation-sdk (group dev); Grafana itself needs the JSON only.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from grafana_foundation_sdk.builders import (
    bargauge,
    common,
    heatmap,
    prometheus,
    stat,
    statetimeline,
    timeseries,
)
from grafana_foundation_sdk.builders import dashboard as grafana
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models import common as shown
from grafana_foundation_sdk.models import dashboard as model
from grafana_foundation_sdk.models.heatmap import HeatmapColorMode
from grafana_foundation_sdk.models.prometheus import PromQueryFormat

from monitoring.grafana.panels import BOARDS, Board, Panel

FOLDER = Path(__file__).with_name("dashboards")
SOURCE = model.DataSourceRef(type_val="prometheus", uid="prometheus")
TAG = "diabetes-readmission"
COLUMNS = 24
_FIGURE_HEIGHT, _HEIGHT = 4, 8
_GREEN, _YELLOW, _RED = "green", "yellow", "red"

Place = tuple[int, int, int, int]


def build(board: Board) -> str:
    """A dashboard as Grafana's JSON."""
    made = (
        grafana.Dashboard(board.title)
        .uid(board.uid)
        .description(board.about)
        .tags([TAG])
        .readonly()
        .refresh("30s")
        .time(board.since, "now")
        .timezone("browser")
        .tooltip(model.DashboardCursorSync.CROSSHAIR)
        .link(
            grafana.DashboardLink("Dashboards")
            .type(model.DashboardLinkType.DASHBOARDS)
            .tags([TAG])
            .as_dropdown(False)
            .keep_time(True)
        )
    )
    for number, (panel, place) in enumerate(_placed(board), start=1):
        made = made.with_panel(_panel(panel, number, place))
    return JSONEncoder(sort_keys=True, indent=1).encode(made.build()) + "\n"


def main() -> int:
    """Write all dashboards to dashboards/."""
    FOLDER.mkdir(exist_ok=True)
    for name, board in BOARDS.items():
        (FOLDER / f"{name}.json").write_text(build(board), encoding="utf-8")
    return 0


def _placed(board: Board) -> list[tuple[Panel, Place]]:
    """Panels with their x, y, width and height."""
    placed: list[tuple[Panel, Place]] = []
    x = 0
    for panel in board.panels:
        if panel.kind == "figure":
            placed.append((panel, (x, 0, panel.width, _FIGURE_HEIGHT)))
            x += panel.width
    others = [panel for panel in board.panels if panel.kind != "figure"]
    half = COLUMNS // 2
    for index, panel in enumerate(others):
        row, column = divmod(index, 2)
        placed.append((panel, (column * half, _FIGURE_HEIGHT + row * _HEIGHT, half, _HEIGHT)))
    return placed


def _panel(panel: Panel, number: int, place: Place) -> Any:
    x, y, width, height = place
    made = (
        _KINDS[panel.kind](panel)
        .id(number)
        .title(panel.title)
        .description(panel.about)
        .unit(panel.unit)
        .no_value(panel.empty)
        .datasource(SOURCE)
        .grid_pos(model.GridPos(h=height, w=width, x=x, y=y))
        .thresholds(_thresholds(panel))
    )
    if panel.names:
        words = {
            str(value): model.ValueMappingResult(text=word, index=index)
            for index, (value, word) in enumerate(panel.names.items())
        }
        made = made.mappings([model.ValueMap(options=words)])
    for index, (expression, legend) in enumerate(panel.queries):
        query = (
            prometheus.Dataquery()
            .expr(expression)
            .ref_id(chr(ord("A") + index))
            .datasource(SOURCE)
            .legend_format(legend or panel.title)
        )
        # What is so now: over a range, a series that has ended would go on showing its last value.
        now = panel.kind in {"figure", "bars"}
        query = query.instant() if now else query.range()
        if panel.kind == "heatmap":
            query = query.format(PromQueryFormat.HEATMAP)
        made = made.with_target(query)
    return made


def _figure(panel: Panel) -> Any:
    made = (
        stat.Panel()
        .graph_mode(shown.BigValueGraphMode.NONE)
        .color_mode(
            shown.BigValueColorMode.NONE
            if panel.limits == (None, None)
            else shown.BigValueColorMode.BACKGROUND
        )
        .reduce_options(common.ReduceDataOptions().calcs(["lastNotNull"]))
    )
    if any("{{" in legend for _, legend in panel.queries):
        # The label is what one wants to know, the value is but 1.
        return made.text_mode(shown.BigValueTextMode.NAME)
    if len(panel.queries) > 1:
        return made.text_mode(shown.BigValueTextMode.VALUE_AND_NAME)
    return made


def _bars(_panel: Panel) -> Any:
    return (
        bargauge.Panel()
        .orientation(shown.VizOrientation.HORIZONTAL)
        .display_mode(shown.BarGaugeDisplayMode.BASIC)
        .min(0)
        .reduce_options(common.ReduceDataOptions().calcs(["lastNotNull"]))
    )


def _states(_panel: Panel) -> Any:
    return (
        statetimeline.Panel()
        .show_value(shown.VisibilityMode.AUTO)
        .merge_values(True)
        .color_scheme(grafana.FieldColor().mode(model.FieldColorModeId.THRESHOLDS))
        .legend(common.VizLegendOptions().show_legend(False))
    )


def _heatmap(panel: Panel) -> Any:
    return (
        heatmap.Panel()
        .y_axis(heatmap.YAxisConfig().unit(panel.unit))
        .color(
            heatmap.HeatmapColorOptions().mode(HeatmapColorMode.SCHEME).scheme("Blues").steps(32)
        )
    )


def _lines(panel: Panel) -> Any:
    made = (
        timeseries.Panel()
        .line_width(1)
        .fill_opacity(10)
        .show_points(shown.VisibilityMode.AUTO)
        .tooltip(common.VizTooltipOptions().mode(shown.TooltipDisplayMode.MULTI))
        .legend(_legend(panel))
    )
    if panel.unit == "percentunit":
        made = made.axis_soft_min(0)
    elif panel.unit != "short":
        made = made.min(0)
    if panel.limits != (None, None):
        style = common.GraphThresholdsStyleConfig().mode(shown.GraphTresholdsStyleMode.DASHED)
        made = made.thresholds_style(style)
    return made


def _legend(panel: Panel) -> Any:
    legend = common.VizLegendOptions().show_legend(True)
    if sum(text.count("{{") for _, text in panel.queries) > 1:  # many, and long
        return (
            legend.display_mode(shown.LegendDisplayMode.TABLE)
            .placement(shown.LegendPlacement.RIGHT)
            .calcs(["lastNotNull"])
        )
    return legend.display_mode(shown.LegendDisplayMode.LIST).placement(shown.LegendPlacement.BOTTOM)


_KINDS = {
    "figure": _figure,
    "bars": _bars,
    "states": _states,
    "heatmap": _heatmap,
    "lines": _lines,
}


def _thresholds(panel: Panel) -> Any:
    """Green, and yellow and red from the limits on; the other way round where low is bad."""
    yellow, red = panel.limits
    steps: list[tuple[float | None, str]]
    if panel.low:
        steps = [(None, _RED if red is not None else _GREEN)]
        if red is not None:
            steps.append((red, _YELLOW if yellow is not None else _GREEN))
        if yellow is not None:
            steps.append((yellow, _GREEN))
    else:
        steps = [(None, _GREEN)]
        steps += [
            (limit, colour)
            for limit, colour in ((yellow, _YELLOW), (red, _RED))
            if limit is not None
        ]
    return (
        grafana.ThresholdsConfig()
        .mode(model.ThresholdsMode.ABSOLUTE)
        .steps([model.Threshold(value=value, color=colour) for value, colour in steps])
    )


if __name__ == "__main__":
    sys.exit(main())
