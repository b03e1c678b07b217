"""Load tests: what is sent, how many users there are, and how the figures are judged."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from bench.errors import BenchError
from ingestion.contract import FIELDS, MISSING
from loadtest import __main__ as command
from loadtest import data, measure, run
from loadtest.page import write_page
from loadtest.probe import Look, recovery
from loadtest.run import OBJECTIVES, Objective, history
from loadtest.verdict import RAMP, missed, users_at
from serving import records
from settings import PROJECT_ROOT, Settings

FOUND: dict[str, Any] = {"requests_per_second": 300.0, "p95_ms": 100.0, "failures": 0}


def test_every_field_of_every_encounter_is_as_the_contract_says() -> None:
    sent = data.encounters(500)
    assert len(sent) == 500
    names = [field.name for field in FIELDS if field.name != "readmitted"]
    by_name = {field.name: field for field in FIELDS}
    for one in sent:
        assert list(one) == names
        for name, value in one.items():
            field = by_name[name]
            if field.kind == "count":
                assert field.low <= value <= field.high, name
            elif field.kind == "code":
                assert str(value) in field.values, name
            elif field.values:
                assert value in (*field.values, MISSING), name
    # What the service checks by.
    records.batch_adapter().validate_python({"encounters": sent})


def test_a_seed_gives_the_same_encounters() -> None:
    assert data.encounters(50, 3) == data.encounters(50, 3)
    assert data.encounters(50, 3) != data.encounters(50, 4)


def test_the_file_is_one_encounter_a_line() -> None:
    sent = data.encounters(5)
    text = data.as_text(sent)
    read = json.loads(text)
    assert [dict(zip(read["fields"], row, strict=True)) for row in read["rows"]] == sent
    assert len(text.splitlines()) == 5 + 3


def test_the_clusters_file_is_the_one_that_we_would_write(tmp_path: Path) -> None:
    made = tmp_path / "encounters.json"
    assert command.main([f"--write-encounters={made}"]) == 0
    committed = PROJECT_ROOT / "loadtest" / "encounters.json"
    assert committed.read_text() == made.read_text(), (
        "python -m loadtest --write-encounters loadtest/encounters.json makes it anew"
    )
    assert committed.stat().st_size < 200_000  # kubectl keeps a copy of at most 256 KiB


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        ("steady", [16, 16, 16, 16, 16, 16]),
        ("soak", [16, 16, 16, 16, 16, 16]),
        ("spike", [4, 4, 16, 16, 4, 4]),
        ("ramp", [1, 2, 4, 8, 16, 16]),
    ],
)
def test_shapes(shape: str, expected: list[int]) -> None:
    moments = (0.0, 24.0, 48.0, 72.0, 96.0, 119.9)
    assert [users_at(shape, second, 120, 16) for second in moments] == expected
    assert users_at(shape, 120, 120, 16) is None


@pytest.mark.parametrize("most", [1, 3, 16, 96, 200])
def test_a_ramp_only_goes_up_and_ends_at_the_users_asked_for(most: int) -> None:
    users = [users_at("ramp", second, 100, most) or 0 for second in range(100)]
    assert users == sorted(users)
    assert users[-1] == most
    assert set(users) <= {*RAMP, most}


def test_a_spike_of_one_user_is_that_user() -> None:
    assert users_at("spike", 0, 30, 1) == 1


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({}, []),
        ({"requests_per_second": 250.0, "p95_ms": 150.0}, []),
        ({"requests_per_second": 249.9}, ["250 requests/s, wanted 250 or more"]),
        ({"requests_per_second": 12.0}, ["12 requests/s, wanted 250 or more"]),
        ({"p95_ms": 151.0}, ["p95 151 ms, wanted 150 or less"]),
        ({"failures": 1}, ["1 failures, wanted 0 or fewer"]),
    ],
)
def test_verdict(change: dict[str, Any], said: list[str]) -> None:
    assert missed({**FOUND, **change}, 250, 150, 0) == said


def test_every_scenario_has_an_objective() -> None:
    assert OBJECTIVES.keys() == run.SCENARIOS.keys()
    assert OBJECTIVES["single"] == Objective(250, 150, 0)


@pytest.mark.parametrize(
    "arguments",
    [
        ["--scenario=everything"],
        ["--shape=round"],
        ["--users=0"],
        ["--users=many"],
        ["--seconds=-1"],
        ["--url=api:8000"],
        ["--url="],
        ["--most-p95-ms=fast"],
        ["--unknown"],
    ],
)
def test_wrong_arguments(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        command.main(arguments)
    assert ended.value.code == 2
    assert "error: " in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments", [["--only=ramp,walk"], ["--seconds-factor=0"], ["--rows=-1"], ["--only="]]
)
def test_wrong_arguments_of_measure(arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        measure.main(arguments)
    assert ended.value.code == 2


def test_nobody_answers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "load"
    assert command.main(["--url=http://127.0.0.1:9", f"--out={out}"]) == 1
    assert capsys.readouterr().err == (
        "error: no answer from http://127.0.0.1:9; is it up? make run starts it\n"
    )
    assert not out.exists()


def test_an_address_that_is_set_comes_before_what_runs(tmp_path: Path) -> None:
    usual = Settings(state_dir=tmp_path)
    assert command.running(usual) == "http://127.0.0.1:8000"
    assert command.running(Settings(state_dir=tmp_path, api_url="http://far:80")) == "http://far:80"


def test_history_is_read_without_seconds_that_answered_nothing(tmp_path: Path) -> None:
    names = "Timestamp,User Count,Type,Name,Requests/s,50%,95%,99%"
    rows = [
        "100,1,POST,/v1/predict,9,1,1,1",
        "100,1,,Aggregated,0,N/A,N/A,N/A",
        "101,2,,Aggregated,250.5,10,30,45",
    ]
    (tmp_path / "stats_stats_history.csv").write_text("\n".join([names, *rows]))
    assert history(tmp_path) == [
        {"second": 1, "users": 2, "rps": 250.5, "p50_ms": 10, "p95_ms": 30, "p99_ms": 45}
    ]


def test_recovery_is_the_end_of_the_last_bad_second() -> None:
    good = [Look(100 + tenth / 10, 200, 5) for tenth in range(100)]
    assert recovery(good, 100, 150) == 0
    assert recovery([Look(99, 503, 5), *good], 100, 150) == 0
    assert recovery([*good, Look(102.5, 503, 1)], 100, 150) == 3
    assert recovery([*good, Look(104.2, 0, 1)], 100, 150) == 5
    slow = [Look(101.5, 200, 900)] * 10
    assert recovery([*good, *slow], 100, 150) == 2
    with pytest.raises(BenchError, match="nothing was asked"):
        recovery(good, 200, 150)


def test_growth_of_memory() -> None:
    samples = [(float(second), 400.0 + second / 10) for second in range(0, 600, 5)]
    first, last = measure.growth(samples, 60, 600)
    assert first == pytest.approx(407.25)
    assert last == pytest.approx(456.75)


ABOUT = {
    "date": "2026-01-01",
    "command": "python -m loadtest.measure",
    "seconds_factor": 1.0,
    "load_before": 0.1,
    "was_idle": True,
    "data": "10 rows",
}
PAGE: dict[str, Any] = {
    "machine": {"cpu": "a CPU", "cores": 2, "system": "Linux"},
    "ramp": {
        **ABOUT,
        "failures": 0,
        "steps": [
            {"users": 1, "rps": 100.0, "p50_ms": 4.0, "p95_ms": 6.0, "p99_ms": 9.0},
            {"users": 16, "rps": 400.0, "p50_ms": 30.0, "p95_ms": 60.0, "p99_ms": 90.0},
        ],
    },
    "steady": {
        **ABOUT,
        **FOUND,
        "requests": 90_000,
        "users": 16,
    },
    "overload": {
        **ABOUT,
        "users": 256,
        "most_requests": 128,
        "served": 20_000,
        "served_per_second": 333.0,
        "served_p95_ms": 400.0,
        "shed": 5_000,
        "shed_p95_ms": 100.0,
        "failures": 0,
        "predictions": 19_000,
        "lost": 0,
        "recovered_after_seconds": 1.0,
        "refused_after": 0,
    },
    "soak": {
        **ABOUT,
        "requests": 180_000,
        "failures": 0,
        "first_mib": 400.0,
        "last_mib": 404.0,
        "growth": 0.01,
    },
}


def test_page(tmp_path: Path) -> None:
    write_page(tmp_path, PAGE)
    page = (tmp_path / "results.md").read_text()
    assert "MISSED" not in page
    assert "not idle" not in page
    assert "Most requests/s: 400, with 16 users." in page
    first = (tmp_path / "latency.svg").read_bytes()
    write_page(tmp_path, PAGE)
    assert (tmp_path / "latency.svg").read_bytes() == first


@pytest.mark.parametrize(
    ("part", "change"),
    [
        ("steady", {"requests_per_second": 249.0}),
        ("steady", {"p95_ms": 151.0}),
        ("steady", {"failures": 1}),
        ("overload", {"shed": 0}),
        ("overload", {"failures": 1}),
        ("overload", {"recovered_after_seconds": 6.0}),
        ("overload", {"refused_after": 1}),
        ("overload", {"lost": 1}),
        ("overload", {"predictions": 0}),
        ("soak", {"growth": 0.051}),
        ("soak", {"growth": -0.051}),
        ("soak", {"failures": 1}),
    ],
)
def test_page_says_what_was_missed(part: str, change: dict[str, Any], tmp_path: Path) -> None:
    only = {"machine": PAGE["machine"], part: {**PAGE[part], **change}}
    write_page(tmp_path, only)
    assert (tmp_path / "results.md").read_text().count("**MISSED**") == 1
    assert not (tmp_path / "latency.svg").exists()
