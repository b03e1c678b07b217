"""Measure plain COPY, our ingestion, dbt build, the DAG and a pandas job, and say what it cost.

The exit code tells whether everything could be measured, not whether the targets are met.
"""

from __future__ import annotations

import argparse
import logging
import os
import signal
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from types import FrameType

from bench.dag import measure_dag
from bench.errors import BenchError
from bench.figures import JOBS, Sample, figures, judge
from bench.files import MAX_COPIES, BaseFile, base_file, write_rows
from bench.jobs import Bench, Columns
from bench.report import Results, as_text, describe, write
from bench.server import running_server
from ingestion.errors import IngestionError
from services.airflow import AirflowError
from services.dbt import DbtError
from services.mlflow_server import MlflowError
from services.postgres import PostgresError
from settings import PROJECT_ROOT, settings

PARTS = {
    "copy": ("copy",),
    "ingest": ("ingest", "reload"),
    "dbt": ("dbt", "rebuild"),
    "dag": ("dag",),
    "pandas": ("pandas",),
    "plot": (),
}
"""What --only names, and the jobs that belong to it."""

PLOT_ROWS = (10_000, 30_000, 100_000, 300_000, 1_000_000)
PLOT_JOBS = frozenset({"copy", "ingest", "dbt", "pandas"})
NEAR = 0.05
"""A row count of the plot this near (as a share) to a measured scale is not measured again."""

PANDAS_SLOW_ROWS = 300_000
"""Above this, the pandas job takes minutes and gigabytes: once is enough, and none for the plot."""

QUICK_ROWS = 2_000
IDLE_LOAD = 0.5
CORES = 2
"""The targets are stated for so many."""

log = logging.getLogger("bench")


@dataclass(frozen=True, slots=True)
class Plan:
    """What was asked for."""

    arguments: tuple[str, ...]
    rounds: int
    scales: tuple[int, ...]
    parts: tuple[str, ...]
    skip_slow: bool
    quick: bool
    out: Path

    @property
    def jobs(self) -> frozenset[str]:
        """Keys of `JOBS` that the parts stand for; the plot alone stands for all that it shows."""
        if self.parts == ("plot",):
            return PLOT_JOBS
        return frozenset(job for part in self.parts for job in PARTS[part])

    def sizes(self, base_rows: int) -> list[int]:
        """Row counts of the scales."""
        if self.parts == ("plot",) or self.jobs == {"dag"}:
            return []
        return [scale * base_rows for scale in self.scales]

    def plot_sizes(self, base_rows: int) -> list[int]:
        """Row counts that only the plot shows: the scales stand in for those near to them."""
        if "plot" not in self.parts or self.quick:
            return []
        near = self.sizes(base_rows)
        return [
            rows
            for rows in PLOT_ROWS
            if not any(abs(rows - other) <= NEAR * rows for other in near)
        ]

    def jobs_of_round(self, rows: int, number: int, for_plot: bool) -> frozenset[str]:
        """What to measure in a round of this size."""
        jobs = self.jobs & PLOT_JOBS if for_plot else self.jobs
        if self.quick:
            jobs -= {"rebuild"}
        slow = rows > PANDAS_SLOW_ROWS
        once = slow or for_plot
        if (once and number > 1) or (slow and (self.skip_slow or for_plot)):
            jobs -= {"pandas"}
        return jobs


def parse(argv: Sequence[str]) -> Plan:
    """Read the command line; ends the program with code 2 where it makes no sense."""
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument(
        "--rounds", type=int, default=3, help="measurements of each job (default: %(default)s)"
    )
    parser.add_argument(
        "--scale",
        type=int,
        nargs="+",
        default=[1, 10],
        metavar="N",
        help="multiples of the file to measure at (default: 1 10)",
    )
    parser.add_argument(
        "--only",
        default=",".join(PARTS),
        metavar="PART,...",
        help="measure only these (default: %(default)s)",
    )
    parser.add_argument(
        "--skip-slow",
        action="store_true",
        help=f"no pandas job above {PANDAS_SLOW_ROWS:,} rows",
    )
    parser.add_argument(
        "--quick",
        action="store_true",
        help=f"{QUICK_ROWS:,} synthetic rows, one round, no DAG: does the benchmark work?",
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=PROJECT_ROOT / "docs" / "benchmarks",
        help="folder for results.json, results.md and the plot (default: docs/benchmarks)",
    )
    chosen = parser.parse_args(argv)
    parts = [part.strip() for part in chosen.only.split(",") if part.strip()]
    if unknown := [part for part in parts if part not in PARTS]:
        parser.error(f"--only: unknown {', '.join(unknown)}; known are {', '.join(PARTS)}")
    if chosen.quick:
        parts = [part for part in parts if part != "dag"]
    if not parts:
        parser.error("--only: nothing is left to measure")
    if chosen.rounds < 1:
        parser.error("--rounds: expected 1 or more")
    if not all(1 <= scale <= MAX_COPIES for scale in chosen.scale):
        parser.error(f"--scale: expected numbers from 1 to {MAX_COPIES}")
    return Plan(
        arguments=tuple(argv),
        rounds=1 if chosen.quick else chosen.rounds,
        scales=(1,) if chosen.quick else tuple(sorted(set(chosen.scale))),
        parts=tuple(parts),
        skip_slow=chosen.skip_slow,
        quick=chosen.quick,
        out=chosen.out,
    )


class Session:
    """One run of the benchmark: what it measures on and what it has collected.

    Args:
        plan: what was asked for.
        folder: temporary folder.
        base: the file at 1x.
        bench: the jobs.
    """

    def __init__(self, plan: Plan, folder: Path, base: BaseFile, bench: Bench) -> None:
        self._plan = plan
        self._folder = folder
        self._base = base
        self._bench = bench
        self.samples: list[Sample] = []
        self.columns: Columns = {}

    def measure(self) -> None:
        """Measure everything that was asked for."""
        for rows in self._plan.sizes(self._base.rows):
            self._size(rows, for_plot=False)
        if "dag" in self._plan.jobs:
            runs = measure_dag(self._folder, self._base.path, self._base.rows, self._plan.rounds)
            with closing(runs):
                for sample in runs:
                    self._keep(sample)
        for rows in self._plan.plot_sizes(self._base.rows):
            self._size(rows, for_plot=True)

    def _size(self, rows: int, for_plot: bool) -> None:
        csv = self._base.path
        if rows != self._base.rows:
            csv = self._folder / f"{rows}.csv"
            write_rows(self._base, csv, rows)
        for number in range(1, self._plan.rounds + 1):
            jobs = self._plan.jobs_of_round(rows, number, for_plot)
            for sample in self._bench.round(csv, rows, jobs):
                self._keep(sample, f"round {number} of {self._plan.rounds}")
        self.columns = self.columns or self._bench.clean_tables()
        self._bench.discard()
        if csv != self._base.path:
            csv.unlink()

    def _keep(self, sample: Sample, note: str = "") -> None:
        self.samples.append(sample)
        log.info(
            "%9s rows  %-12s %-32s%8.2f s %6.0f MiB",
            f"{sample.rows:,}",
            note,
            JOBS[sample.job],
            sample.wall,
            sample.peak_mib,
        )


def _notes(plan: Plan, base: BaseFile, load: float, cores: int) -> Iterator[str]:
    if base.is_synthetic:
        yield f"The data are {base.origin}."
    if plan.quick:
        yield "Quick mode: it shows that the benchmark works; the targets are not for this size."
    if load > IDLE_LOAD:
        yield f"The machine was not idle: load average {load:.2f} before the start."
    if cores != CORES:
        yield f"The targets are stated for {CORES} cores; this machine has {cores}."


def run(plan: Plan) -> None:
    """Measure, print the table and the verdicts, write the results.

    Raises:
        BenchError, IngestionError, PostgresError, MlflowError, DbtError, AirflowError: something
            could not be measured; what has been is printed, nothing is written.
    """
    if "plot" in plan.parts and find_spec("matplotlib") is None:
        raise BenchError("the plot needs matplotlib; run scripts/setup.sh dev, or leave out plot")
    load = os.getloadavg()[0]
    plan.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="diabetes-bench-") as name:
        folder = Path(name)
        folder.chmod(0o755)  # PostgreSQL runs as another user where we are root
        base = base_file(settings(), folder, QUICK_ROWS if plan.quick else 0)
        log.info("%s rows, %s bytes: %s", f"{base.rows:,}", f"{base.size:,}", base.origin)
        with running_server(folder) as server:
            ((postgresql,),) = server.rows("postgres", "show server_version")
            about = describe(plan.arguments, str(postgresql), load, base)
            notes = tuple(_notes(plan, base, load, about.cores))
            for note in notes:
                log.warning("%s", note)
            session = Session(plan, folder, base, Bench(server, folder))
            try:
                session.measure()
            except BaseException:
                print("\nMeasured until then:\n")
                print(as_text(figures(session.samples, base.rows, plan.scales), ()))
                raise
    found = figures(session.samples, base.rows, plan.scales)
    results = Results(about, notes, session.samples, found, judge(found), session.columns)
    print(f"\n{as_text(found, results.verdicts)}")
    write(plan.out, results, plotted="plot" in plan.parts)
    print(
        "\n" + "\n".join((*notes, f"Written to {plan.out}. Targets do not change the exit code."))
    )


def _interrupt(_signal: int, _frame: FrameType | None) -> None:
    """Leave through every `finally`, and let no second signal cut that short."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    raise KeyboardInterrupt


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark.

    Returns:
        The exit code: 0 when everything was measured, 1 with one message on standard error when
        not, 130 after Ctrl-C.
    """
    plan = parse(sys.argv[1:] if argv is None else argv)
    logging.basicConfig(
        level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S", stream=sys.stdout
    )
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _interrupt)
    try:
        run(plan)
    except (
        BenchError,
        IngestionError,
        PostgresError,
        MlflowError,
        DbtError,
        AirflowError,
    ) as error:
        sys.stderr.write(f"error: {error}\n")
        return 1
    except KeyboardInterrupt:
        sys.stderr.write("\nInterrupted; nothing is left running and nothing was written.\n")
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
