"""What the benchmark leaves behind: a table, results.json, results.md and the plot."""

from __future__ import annotations

import json
import os
import platform
import shlex
import subprocess
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

import psutil

from bench.figures import Figure, Sample, Verdict
from bench.files import BaseFile
from bench.jobs import Columns
from settings import PROJECT_ROOT

_SHORT = {
    "copy": "(a)",
    "ingest": "(b)",
    "dbt": "(c)",
    "pipeline": "(b)+(c)",
}
_HEADINGS = (
    "job",
    "scale",
    "rows",
    "rounds",
    "wall s, median (min-max)",
    "CPU s",
    "PostgreSQL CPU s",
    "peak MiB",
    "ratio",
)

_METHOD = """\
- Wall is the median over the rounds, with the smallest and the largest in brackets. (a) and (b) are
  timed inside their process, from connecting to the commit; (c) and (e) are whole commands, with
  the start of Python; (d) runs from the trigger to the end of the run, seen through Airflow's REST
  API twice a second. (b)+(c) adds two whole commands, so it is more than (b) and (c) in this table.
- CPU is user plus system time, the median: of the job's process, for (d) of all Airflow processes.
  PostgreSQL's is that of all server processes meanwhile, its background workers included.
- Peak is the largest resident set of the job's process in any round; for (d) the proportional set
  of all Airflow processes together, looked at every four seconds. PostgreSQL's memory is apart: it
  is set by its configuration (`services/postgres.py`) and the same for all jobs.
- (a) and (b) read the same plain CSV. (a) fills a table with the columns, types and primary key of
  `raw_data.diabetes` in one transaction. (b2) loads the file that is there already.
- (c) runs with a partial parse at hand and without unit tests, as in production; (c2) follows it on
  the same data. (d) starts each run on an emptied data database, so it does the work of (b) and
  the first build of (c), plus a pass of validation. (d0) is the first run after Airflow's start.
- Each job starts after a checkpoint on a fresh database; the jobs of a round take turns.
- Sizes other than 1x are the same file cut off or repeated, each copy with shifted encounter and
  patient ids.
"""


@dataclass(frozen=True, slots=True)
class Context:
    """What one needs to know to read the figures or to take them again."""

    date: str
    command: str
    commit: str
    cpu_model: str
    cores: int
    memory_gib: float
    load_before: float
    system: str
    python: str
    postgresql: str
    data: str
    data_rows: int
    data_bytes: int
    data_sha256: str


@dataclass(frozen=True, slots=True)
class Results:
    """Everything that one run of the benchmark found."""

    about: Context
    notes: Sequence[str]
    samples: Sequence[Sample]
    figures: Sequence[Figure]
    verdicts: Sequence[Verdict]
    columns: Columns


def describe(
    arguments: Sequence[str], postgresql: str, load_before: float, base: BaseFile
) -> Context:
    """Describe this machine, this call and the data."""
    return Context(
        date=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        command=shlex.join(["python", "-m", "bench", *arguments]),
        commit=_commit(),
        cpu_model=cpu_model(),
        cores=usable_cores(),
        memory_gib=round(psutil.virtual_memory().total / (1 << 30), 1),
        load_before=round(load_before, 2),
        system=f"{platform.system()} {platform.release()}",
        python=platform.python_version(),
        postgresql=postgresql,
        data=base.origin,
        data_rows=base.rows,
        data_bytes=base.size,
        data_sha256=base.sha256,
    )


def usable_cores() -> int:
    """Cores that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def cpu_model() -> str:
    """Name of the processor."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _commit() -> str:
    """The commit, marked where the work tree differs from it; empty outside of a clone."""
    commands = (("rev-parse", "--short=12", "HEAD"), ("status", "--porcelain"))
    try:
        head, changes = (
            subprocess.run(
                ["git", *command], cwd=PROJECT_ROOT, capture_output=True, text=True, check=True
            ).stdout.strip()
            for command in commands
        )
    except (OSError, subprocess.CalledProcessError):
        return ""
    return f"{head} with uncommitted changes" if changes else head


def _cells(figure: Figure) -> tuple[str, ...]:
    spread = f" ({figure.wall_min:.2f}-{figure.wall_max:.2f})" if figure.rounds > 1 else ""
    ratio = f"{figure.ratio:.2f}x {_SHORT[figure.baseline]}" if figure.ratio is not None else ""
    return (
        figure.name,
        f"{figure.scale}x" if figure.scale else "",
        f"{figure.rows:,}",
        str(figure.rounds),
        f"{figure.wall:.2f}{spread}",
        f"{figure.cpu:.2f}",
        f"{figure.postgres_cpu:.2f}",
        f"{figure.peak_mib:.0f}",
        ratio,
    )


def as_text(figures: Sequence[Figure], verdicts: Sequence[Verdict]) -> str:
    """The table and the verdicts for a terminal."""
    table = [_HEADINGS, *map(_cells, figures)]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    lines = [
        "  ".join(
            # The name stands left, numbers right.
            cell.rjust(width) if index else cell.ljust(width)
            for index, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in table
    ]
    if verdicts:
        wide = max(len(verdict.target) for verdict in verdicts)
        narrow = max(len("measured"), *(len(verdict.measured) for verdict in verdicts))
        lines += ["", f"{'target':<{wide}}  measured"]
        lines += [
            f"{verdict.target:<{wide}}  {verdict.measured:<{narrow}}  {verdict.word}"
            for verdict in verdicts
        ]
    return "\n".join(lines)


def as_markdown(results: Results, plotted: bool) -> str:
    """results.md."""
    about = results.about
    lines = [
        "# Benchmark",
        "",
        "Written by `make bench`; every number in it comes from one run.",
        "",
        *(f"**{note}**\n" for note in results.notes),
        "| | |",
        "|---|---|",
        f"| date | {about.date} |",
        f"| command | `{about.command}` |",
        f"| commit | {about.commit or 'not a clone'} |",
        f"| machine | {about.cpu_model}, {about.cores} cores, {about.memory_gib} GiB |",
        f"| load average before the start | {about.load_before} |",
        f"| system | {about.system} |",
        f"| Python, PostgreSQL | {about.python}, {about.postgresql} |",
        f"| data at 1x | {about.data}; {about.data_rows:,} rows, {about.data_bytes:,} bytes |",
        f"| SHA-256 | `{about.data_sha256}` |",
        "",
        "## Targets",
        "",
        *_markdown_table(
            ("target", "measured", ""),
            ((verdict.target, verdict.measured, verdict.word) for verdict in results.verdicts),
        ),
        "",
        "The exit code does not depend on the targets.",
        "",
        "## Figures",
        "",
        *_markdown_table(_HEADINGS, map(_cells, results.figures)),
        "",
    ]
    if plotted:
        lines += ["![Cost against rows](cost.svg)", ""]
    lines += ["## How it is measured", "", _METHOD]
    if results.columns:
        lines += ["## What the jobs store in clean_data", ""]
    for side, columns in results.columns.items():
        owner = "Our pipeline" if side == "ours" else "The pandas job"
        shapes = ", ".join(f"`{table}` {len(names)}" for table, names in columns.items())
        lines += [f"{owner}, columns by table: {shapes}.", ""]
        if names := columns.get("diabetes_train"):
            lines += [f"`diabetes_train`: {', '.join(names)}.", ""]
    return "\n".join(lines)


def _markdown_table(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    return [f"| {' | '.join(row)} |" for row in (headings, ["---"] * len(headings), *rows)]


def write(folder: Path, results: Results, plotted: bool) -> None:
    """Write results.json, results.md and, where asked for, the plot."""
    folder.mkdir(parents=True, exist_ok=True)
    content = {
        "context": asdict(results.about),
        "notes": list(results.notes),
        "targets": [asdict(verdict) | {"verdict": verdict.word} for verdict in results.verdicts],
        "figures": [asdict(figure) for figure in results.figures],
        "samples": [asdict(sample) for sample in results.samples],
        "clean_data_columns": results.columns,
    }
    (folder / "results.json").write_text(json.dumps(content, indent=2) + "\n")
    (folder / "results.md").write_text(as_markdown(results, plotted))
    if plotted:
        from bench.plot import write_plot  # its matplotlib would weigh on the children's memory

        write_plot(folder, results.figures)
