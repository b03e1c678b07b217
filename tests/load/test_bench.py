"""The benchmark measures, computes and judges; a target can be missed and a job can fail."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import median

import psutil
import pytest

from bench.__main__ import parse
from bench.errors import BenchError
from bench.figures import Figure, Sample, Verdict, figures, judge, pipeline
from bench.files import ID_STEP, BaseFile, base_file, write_rows
from bench.usage import run
from ingestion.contract import SYNTHETIC_ID_FLOOR
from settings import PROJECT_ROOT, Settings

ROWS = 1_000


def sample(job: str, wall: float, scale: int = 1, peak: float = 50.0) -> Sample:
    return Sample(job, scale * ROWS, wall, wall, 1.0, 1.0, peak)


GOOD = {
    ("copy", 1): 1.0,
    ("ingest", 1): 1.5,
    ("pipeline", 1): 10.0,
    ("pandas", 1): 50.0,
    ("dag", 1): 35.0,
    ("copy", 10): 10.0,
    ("ingest", 10): 15.0,
    ("pipeline", 10): 100.0,
    ("pandas", 10): 900.0,
}


def verdicts(walls: dict[tuple[str, int], float], peak: float = 50.0) -> dict[str, Verdict]:
    samples = [sample(job, wall, scale, peak) for (job, scale), wall in walls.items()]
    return {verdict.target: verdict for verdict in judge(figures(samples, ROWS, (1, 10)))}


@pytest.fixture
def temporary(reachable_tmp: Path, tmp_path: Path) -> Iterator[Path]:
    """A TMPDIR of the benchmark's own, in which nothing may stay behind."""
    folder = reachable_tmp / tmp_path.name
    folder.mkdir(mode=0o755)
    yield folder
    assert list(folder.iterdir()) == []
    assert not [
        process.pid
        for process in psutil.process_iter(["cmdline"])
        if any(str(folder) in part for part in process.info["cmdline"] or ())
    ]


def bench(temporary: Path, *arguments: object, **variables: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "bench", *map(str, arguments)],
        cwd=PROJECT_ROOT,
        env={**os.environ, "TMPDIR": str(temporary), **variables},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_quick_run_measures_and_writes_everything(temporary: Path, tmp_path: Path) -> None:
    with bench(temporary, "--quick", "--out", tmp_path) as process:
        out, err = process.communicate(timeout=240)
    assert process.returncode == 0, err
    assert sorted(file.name for file in tmp_path.iterdir()) == [
        "cost.png",
        "cost.svg",
        "results.json",
        "results.md",
    ]
    assert (tmp_path / "cost.png").read_bytes().startswith(b"\x89PNG")
    assert "</svg>" in (tmp_path / "cost.svg").read_text()

    results = json.loads((tmp_path / "results.json").read_text())
    samples, found = results["samples"], {entry["job"]: entry for entry in results["figures"]}
    assert set(found) == {"copy", "ingest", "reload", "dbt", "pipeline", "pandas"}
    for job, figure in found.items():
        walls = [entry["wall"] for entry in samples if entry["job"] == job]
        assert figure["rows"] == 2_000
        assert figure["wall"] == pytest.approx(median(walls))
        assert all(figure[name] > 0 for name in ("wall", "cpu", "postgres_cpu"))
        assert 20 < figure["peak_mib"] < 1_000
        assert figure["command"] >= figure["wall"]
    assert found["ingest"]["ratio"] == pytest.approx(
        found["ingest"]["wall"] / found["copy"]["wall"]
    )
    assert found["pipeline"]["wall"] == pytest.approx(
        found["ingest"]["command"] + found["dbt"]["wall"]
    )
    assert "diabetes_train" in results["clean_data_columns"]["ours"]
    assert "diabetes_train" in results["clean_data_columns"]["pandas"]

    page = (tmp_path / "results.md").read_text()
    for text in (out, page):
        assert "SYNTHETIC" in text
        assert "not measured" in text
        assert "(a) plain COPY" in text
    assert "PostgreSQL | 3.11" in page
    assert str(PROJECT_ROOT) not in page


def test_terminated_run_leaves_nothing_behind(temporary: Path, tmp_path: Path) -> None:
    with bench(temporary, "--quick", "--out", tmp_path) as process:
        assert process.stdout
        for line in process.stdout:
            if "(b) ingestion" in line:
                break
        time.sleep(1)  # now dbt runs
        process.send_signal(signal.SIGTERM)
        _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "nothing is left running" in err
    assert not list(tmp_path.iterdir())


def test_failing_job_ends_with_one(temporary: Path, tmp_path: Path) -> None:
    source = tmp_path / "broken.csv"
    base_file(Settings(), tmp_path, 100)
    text = (tmp_path / "1x.csv").read_text()
    source.write_text(text.replace("Female", "Feline"))
    arguments = ("--only", "copy,ingest", "--scale", 1, "--rounds", 1, "--out", tmp_path / "out")
    with bench(temporary, *arguments, DIABETES_SOURCE=str(source)) as process:
        out, err = process.communicate(timeout=120)
    assert process.returncode == 1
    assert "break the contract" in err
    assert "(a) plain COPY" in out  # what was measured until then is shown
    assert not list((tmp_path / "out").iterdir())


def test_missing_source_ends_with_one(temporary: Path, tmp_path: Path) -> None:
    with bench(temporary, "--out", tmp_path, DIABETES_SOURCE="no/such.zip") as process:
        _, err = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "no such file" in err


def test_figures_are_medians_and_ratios_of_medians() -> None:
    samples = [
        *(sample("copy", wall) for wall in (9.0, 1.0, 2.0)),
        *(sample("ingest", wall, peak=peak) for wall, peak in ((3.0, 60), (3.2, 90), (40.0, 70))),
        sample("ingest", 30.0, scale=10),
    ]
    copy, ingest, large = figures(samples, ROWS, (1, 10))
    assert (copy.wall, copy.wall_min, copy.wall_max, copy.rounds) == (2.0, 1.0, 9.0, 3)
    assert copy.ratio is None
    assert ingest.wall == 3.2
    assert ingest.ratio == pytest.approx(1.6)
    assert ingest.peak_mib == 90  # a peak is the largest, not the median
    assert (large.scale, large.rows, large.ratio) == (10, 10_000, None)


def test_sizes_of_the_plot_have_no_scale() -> None:
    (figure,) = figures([Sample("copy", 300, 1, 1, 1, 1, 1)], ROWS, (1,))
    assert figure.scale == 0
    assert all(verdict.met is None for verdict in judge([figure]))


def test_pipeline_adds_whole_commands() -> None:
    ingest = Sample("ingest", ROWS, 1.0, 1.5, 0.5, 0.4, 60)
    dbt = Sample("dbt", ROWS, 8.0, 8.0, 5.0, 3.0, 160)
    assert pipeline(ingest, dbt) == Sample("pipeline", ROWS, 9.5, 9.5, 5.5, 3.4, 160)


def test_good_numbers_meet_every_target() -> None:
    found = verdicts(GOOD)
    assert len(found) == 8
    assert {verdict.word for verdict in found.values()} == {"met"}


@pytest.mark.parametrize(
    ("change", "peak", "missed"),
    [
        ({("ingest", 1): 2.01}, 50, {"Ingestion at most 2.0x plain COPY of the same bytes, at 1x"}),
        (
            {("ingest", 10): 20.1},
            50,
            {"Ingestion at most 2.0x plain COPY of the same bytes, at 10x"},
        ),
        ({}, 200, {"Ingestion's peak memory under 200 MiB at any row count"}),
        (
            {("pandas", 1): 39.9},
            50,
            {"Ingestion + dbt build at least 4x faster than the pandas job, at 1x"},
        ),
        (
            {("pandas", 10): 799},
            50,
            {"Ingestion + dbt build at least 8x faster than the pandas job, at 10x"},
        ),
        (
            {("pipeline", 10): 110.1},
            50,
            {"Ingestion + dbt build: time grows at most 11x from 1x to 10x"},
        ),
        (
            {("dag", 1): 40.1},
            50,
            {"DAG end to end, aim: at most 30 s over ingestion + dbt build, at 1x"},
        ),
        (
            {("dag", 1): 70.1},
            50,
            {
                "DAG end to end, at most 60 s over ingestion + dbt build, at 1x",
                "DAG end to end, aim: at most 30 s over ingestion + dbt build, at 1x",
            },
        ),
    ],
)
def test_bad_numbers_miss_their_target(
    change: dict[tuple[str, int], float], peak: float, missed: set[str]
) -> None:
    found = verdicts(GOOD | change, peak)
    assert {target for target, verdict in found.items() if verdict.word == "MISSED"} == missed


def test_values_at_the_limit_meet_it() -> None:
    at_limit = {("ingest", 1): 2.0, ("pandas", 1): 40.0, ("pipeline", 10): 110.0, ("dag", 1): 40.0}
    assert {verdict.word for verdict in verdicts(GOOD | at_limit).values()} == {"met"}


def test_what_was_not_measured_is_not_judged() -> None:
    found = verdicts({("copy", 1): 1.0})
    assert {verdict.word for verdict in found.values()} == {"not measured"}


def test_repeated_rows_have_ids_of_their_own(tmp_path: Path) -> None:
    base = base_file(Settings(), tmp_path, 200)
    assert base.is_synthetic
    assert base.rows == 200
    write_rows(base, tmp_path / "more.csv", 450)
    write_rows(base, tmp_path / "fewer.csv", 50)

    original = base.path.read_bytes().splitlines(keepends=True)
    more = (tmp_path / "more.csv").read_bytes().splitlines(keepends=True)
    assert (tmp_path / "fewer.csv").read_bytes() == b"".join(original[:51])
    assert more[:201] == original
    assert len(more) == 451
    first = original[1].split(b",", 2)
    again = more[401].split(b",", 2)
    assert [int(id_) for id_ in again[:2]] == [int(id_) + 2 * ID_STEP for id_ in first[:2]]
    assert again[2] == first[2]
    assert len({line.split(b",", 1)[0] for line in more}) == 451


def test_repeating_never_reaches_the_ids_of_synthetic_data(tmp_path: Path) -> None:
    path = tmp_path / "base.csv"
    path.write_bytes(b"encounter_id,patient_nbr,rest\r\n443867222,189502619,x\r\n")
    base = BaseFile(path, 1, path.stat().st_size, "", False, "")
    write_rows(base, tmp_path / "20.csv", 20)
    last = (tmp_path / "20.csv").read_bytes().splitlines()[-1]
    assert int(last.split(b",")[0]) < SYNTHETIC_ID_FLOOR
    with pytest.raises(BenchError, match="21 repetitions"):
        write_rows(base, tmp_path / "21.csv", 21)


def test_usage_is_that_of_the_command() -> None:
    program = "x = bytearray(300 << 20)\nwhile __import__('time').process_time() < 0.5: pass"
    # From a process as small as the benchmark: Linux counts memory from the fork on, and these
    # tests' own may be larger than the command's.
    measuring = (
        "import sys; from bench.usage import run; "
        f"used = run([sys.executable, '-c', {program!r}], {{}}); "
        "print(used.cpu, used.wall, used.peak_mib)"
    )
    said = subprocess.run(
        [sys.executable, "-c", measuring],
        cwd=PROJECT_ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    cpu, wall, peak_mib = map(float, said.stdout.split())
    assert 0.5 <= cpu < 5
    assert wall >= 0.5
    assert 300 < peak_mib < 400


def test_failed_command_says_what_it_printed() -> None:
    with pytest.raises(BenchError, match=r"(?s)exit code 3.*the reason"):
        run([sys.executable, "-c", "print('the reason'); raise SystemExit(3)"], {})


def test_pandas_runs_once_where_it_is_slow_and_never_for_large_plot_sizes() -> None:
    plan = parse(["--rounds", "3"])
    assert "pandas" in plan.jobs_of_round(100_000, 3, for_plot=False)
    assert "pandas" in plan.jobs_of_round(1_017_660, 1, for_plot=False)
    assert "pandas" not in plan.jobs_of_round(1_017_660, 2, for_plot=False)
    assert "pandas" in plan.jobs_of_round(30_000, 1, for_plot=True)
    assert "pandas" not in plan.jobs_of_round(30_000, 2, for_plot=True)
    assert "pandas" not in plan.jobs_of_round(1_000_000, 1, for_plot=True)
    assert "pandas" not in parse(["--skip-slow"]).jobs_of_round(1_017_660, 1, for_plot=False)


def test_scales_stand_in_for_near_sizes_of_the_plot() -> None:
    plan = parse([])
    assert plan.sizes(101_766) == [101_766, 1_017_660]
    assert plan.plot_sizes(101_766) == [10_000, 30_000, 300_000]
    assert parse(["--only", "plot"]).plot_sizes(101_766)[-1] == 1_000_000
    assert parse(["--only", "dag"]).sizes(101_766) == []


@pytest.mark.parametrize(
    "arguments",
    [["--only", "copy,nonsense"], ["--only", ""], ["--scale", "21"], ["--rounds", "0"]],
)
def test_senseless_arguments_are_refused(arguments: list[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        parse(arguments)


def test_figure_names_are_for_people() -> None:
    figure = Figure("copy", 1, 1, 1, 1, 1, 1, 1, 1, 1, 1)
    assert figure.name == "(a) plain COPY"
