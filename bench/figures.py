"""From single measurements to medians, ratios and the verdict on each target."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from statistics import median

JOBS = {
    "copy": "(a) plain COPY",
    "ingest": "(b) ingestion",
    "reload": "(b2) ingestion, same file again",
    "dbt": "(c) dbt build, first",
    "rebuild": "(c2) dbt build, again",
    "pipeline": "(b)+(c) ingestion + dbt build",
    "dag": "(d) DAG end to end",
    "dag_first": "(d0) DAG, first run after start",
    "pandas": "(e) pandas job",
}
"""The jobs and their names for people, in the order of the table."""

BASELINES = {
    "ingest": "copy",
    "reload": "ingest",
    "dbt": "copy",
    "rebuild": "dbt",
    "pipeline": "copy",
    "dag": "pipeline",
    "dag_first": "pipeline",
    "pandas": "pipeline",
}
"""What each job's time is divided by."""

COPY_RATIO = 2.0
PEAK_MIB = 200.0
SPEEDUPS = {1: 4.0, 10: 8.0}
GROWTH = 11.0
ORCHESTRATION_SECONDS = 60.0
ORCHESTRATION_AIM_SECONDS = 30.0


@dataclass(frozen=True, slots=True)
class Sample:
    """One measurement of one job.

    Attributes:
        job: key of `JOBS`.
        rows: rows of the file.
        wall: seconds of the job itself; (a) and (b) take them inside their process.
        command: seconds of the whole command, with the start of its interpreter.
        cpu: CPU seconds of the job's processes.
        postgres_cpu: CPU seconds of PostgreSQL meanwhile.
        peak_mib: peak memory of the job's processes.
    """

    job: str
    rows: int
    wall: float
    command: float
    cpu: float
    postgres_cpu: float
    peak_mib: float


@dataclass(frozen=True, slots=True)
class Figure:
    """What all rounds of a job with so many rows come to: medians, and the largest peak.

    `scale` is the multiple of the base file, 0 for the sizes that only the plot shows. `ratio` is
    the median wall time over that of the job `baseline` at the same rows; None where the baseline
    was not measured.
    """

    job: str
    rows: int
    scale: int
    rounds: int
    wall: float
    wall_min: float
    wall_max: float
    command: float
    cpu: float
    postgres_cpu: float
    peak_mib: float
    baseline: str = ""
    ratio: float | None = None

    @property
    def name(self) -> str:
        """The job, for people."""
        return JOBS[self.job]


@dataclass(frozen=True, slots=True)
class Verdict:
    """A target, what was measured, and whether it is met (None: not measured)."""

    target: str
    measured: str
    met: bool | None

    @property
    def word(self) -> str:
        """The verdict in a word."""
        return {True: "met", False: "MISSED", None: "not measured"}[self.met]


def pipeline(ingest: Sample, dbt: Sample) -> Sample:
    """An ingestion and the dbt build after it as one job.

    Whole commands are added, so that two starts of Python count against us where the sum stands
    beside the pandas job, whose start counts too.
    """
    return Sample(
        job="pipeline",
        rows=ingest.rows,
        wall=ingest.command + dbt.command,
        command=ingest.command + dbt.command,
        cpu=ingest.cpu + dbt.cpu,
        postgres_cpu=ingest.postgres_cpu + dbt.postgres_cpu,
        peak_mib=max(ingest.peak_mib, dbt.peak_mib),
    )


def figures(samples: Iterable[Sample], base_rows: int, scales: Sequence[int]) -> list[Figure]:
    """Summarise samples by job and rows, smallest size first, in the order of `JOBS`.

    Args:
        samples: all measurements.
        base_rows: rows of the file at 1x.
        scales: the multiples that were asked for; 1x always has a name.
    """
    groups: dict[tuple[int, str], list[Sample]] = {}
    for sample in samples:
        groups.setdefault((sample.rows, sample.job), []).append(sample)
    scale_of = {scale * base_rows: scale for scale in {1, *scales}}
    order = list(JOBS)
    found = {
        key: _summarise(groups[key], scale_of.get(key[0], 0))
        for key in sorted(groups, key=lambda key: (key[0], order.index(key[1])))
    }
    return [
        replace(
            figure,
            baseline=BASELINES.get(job, ""),
            ratio=figure.wall / found[baseline].wall
            if (baseline := (rows, BASELINES.get(job, ""))) in found
            else None,
        )
        for (rows, job), figure in found.items()
    ]


def _summarise(samples: Sequence[Sample], scale: int) -> Figure:
    walls = [sample.wall for sample in samples]
    return Figure(
        job=samples[0].job,
        rows=samples[0].rows,
        scale=scale,
        rounds=len(samples),
        wall=median(walls),
        wall_min=min(walls),
        wall_max=max(walls),
        command=median(sample.command for sample in samples),
        cpu=median(sample.cpu for sample in samples),
        postgres_cpu=median(sample.postgres_cpu for sample in samples),
        peak_mib=max(sample.peak_mib for sample in samples),
    )


def judge(measured: Iterable[Figure]) -> list[Verdict]:
    """Hold the figures against each target of the benchmark."""
    every = sorted(measured, key=lambda figure: figure.rows)
    at = {(figure.job, figure.scale): figure for figure in every if figure.scale}

    def wall(job: str, scale: int) -> float | None:
        figure = at.get((job, scale))
        return figure.wall if figure else None

    verdicts = []
    scales = sorted({figure.scale for figure in every if figure.scale} | set(SPEEDUPS))
    for scale in scales:
        ours, copy = wall("ingest", scale), wall("copy", scale)
        ratio = ours / copy if ours is not None and copy is not None else None
        verdicts.append(
            Verdict(
                f"Ingestion at most {COPY_RATIO:.1f}x plain COPY of the same bytes, at {scale}x",
                "" if ratio is None else f"{ratio:.2f}x",
                None if ratio is None else ratio <= COPY_RATIO,
            )
        )

    peaks = [figure for figure in every if figure.job in ("ingest", "reload")]
    highest = max(peaks, key=lambda figure: figure.peak_mib, default=None)
    verdicts.append(
        Verdict(
            f"Ingestion's peak memory under {PEAK_MIB:.0f} MiB at any row count",
            f"{highest.peak_mib:.0f} MiB, {peaks[0].rows:,} to {peaks[-1].rows:,} rows"
            if highest
            else "",
            highest.peak_mib < PEAK_MIB if highest else None,
        )
    )

    for scale, limit in SPEEDUPS.items():
        ours, theirs = wall("pipeline", scale), wall("pandas", scale)
        ratio = theirs / ours if ours is not None and theirs is not None else None
        verdicts.append(
            Verdict(
                f"Ingestion + dbt build at least {limit:.0f}x faster than the pandas job, "
                f"at {scale}x",
                "" if ratio is None else f"{ratio:.2f}x",
                None if ratio is None else ratio >= limit,
            )
        )

    small, large = wall("pipeline", 1), wall("pipeline", 10)
    ratio = large / small if small is not None and large is not None else None
    verdicts.append(
        Verdict(
            f"Ingestion + dbt build: time grows at most {GROWTH:.0f}x from 1x to 10x",
            "" if ratio is None else f"{ratio:.2f}x",
            None if ratio is None else ratio <= GROWTH,
        )
    )

    dag, bare = wall("dag", 1), wall("pipeline", 1)
    extra = dag - bare if dag is not None and bare is not None else None
    for word, limit in (
        ("at most", ORCHESTRATION_SECONDS),
        ("aim: at most", ORCHESTRATION_AIM_SECONDS),
    ):
        verdicts.append(
            Verdict(
                f"DAG end to end, {word} {limit:.0f} s over ingestion + dbt build, at 1x",
                "" if extra is None else f"{extra:.1f} s",
                None if extra is None else extra <= limit,
            )
        )
    return verdicts
