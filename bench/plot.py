"""The plot of cost against rows: time and memory."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.ticker import NullFormatter

from bench.figures import JOBS, PEAK_MIB, Figure

_STYLES = {
    "pandas": ("#c0392b", "o"),
    "pipeline": ("#1f4e79", "s"),
    "dbt": ("#2e86c1", "^"),
    "ingest": ("#239b56", "D"),
    "copy": ("#7f8c8d", "v"),
    "dag": ("#7d3c98", "*"),
}


def write_plot(folder: Path, figures: Sequence[Figure]) -> None:
    """Write cost.png and cost.svg, both axes logarithmic: they span three decades."""
    # Without a date and with fixed ids the SVG differs only where the figures do.
    with plt.rc_context({"svg.hashsalt": "bench", "svg.fonttype": "none", "font.size": 9}):
        drawing, (time, memory) = plt.subplots(1, 2, figsize=(11, 4.6), layout="constrained")
        for job in _STYLES:
            points = sorted(
                (figure for figure in figures if figure.job == job), key=lambda point: point.rows
            )
            if points:
                _draw_time(time, job, points)
                # The pipeline's peak is the larger one of ingestion and dbt, which stand there.
                if job != "pipeline":
                    _draw_memory(memory, job, points)
        time.set_title("Time (median; bars: smallest to largest)")
        time.set_ylabel("wall time, seconds")
        memory.set_title("Peak memory of the job's processes, without PostgreSQL")
        memory.set_ylabel("MiB")
        memory.axhline(PEAK_MIB, color="#239b56", linestyle="--", linewidth=1)
        memory.annotate(
            f"target for ingestion: {PEAK_MIB:.0f} MiB",
            (0.99, PEAK_MIB),
            xycoords=("axes fraction", "data"),
            xytext=(0, 3),
            textcoords="offset points",
            ha="right",
            color="#239b56",
        )
        memory.set_ylim(bottom=10)
        for axes in (time, memory):
            axes.set_xscale("log")
            axes.set_yscale("log")
            axes.set_xlabel("rows in the file")
            axes.xaxis.set_major_formatter(lambda rows, _: f"{rows:,.0f}")
            axes.yaxis.set_major_formatter(lambda value, _: f"{value:,g}")
            for axis in (axes.xaxis, axes.yaxis):
                axis.set_minor_formatter(NullFormatter())
            axes.grid(which="major", color="#d5d8dc", linewidth=0.6)
            axes.legend(fontsize=8, frameon=False)
        drawing.savefig(folder / "cost.png", dpi=150)
        drawing.savefig(folder / "cost.svg", metadata={"Date": None})
        plt.close(drawing)


def _draw_time(axes: Axes, job: str, points: Sequence[Figure]) -> None:
    color, marker = _STYLES[job]
    below = [point.wall - point.wall_min for point in points]
    above = [point.wall_max - point.wall for point in points]
    axes.errorbar(
        [point.rows for point in points],
        [point.wall for point in points],
        yerr=[below, above],
        color=color,
        marker=marker,
        capsize=2,
        linewidth=1.4,
        markersize=5,
        label=JOBS[job],
    )


def _draw_memory(axes: Axes, job: str, points: Sequence[Figure]) -> None:
    color, marker = _STYLES[job]
    axes.plot(
        [point.rows for point in points],
        [point.peak_mib for point in points],
        color=color,
        marker=marker,
        linewidth=1.4,
        markersize=5,
        label=JOBS[job],
    )
