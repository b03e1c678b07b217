"""Load tests: what is sent, how many users there are, and how the figures are judged."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

from ingestion.contract import FIELDS, MISSING
from loadtest import __main__ as command
from loadtest import data, measure, memory, run
from loadtest.page import write_page
from loadtest.probe import Look, recovery
from loadtest.run import OBJECTIVES, Load, Objective, history
from loadtest.verdict import RAMP, in_words, missed, silence, users_at
from serving import records
from settings import PROJECT_ROOT, Settings

FOUND: dict[str, Any] = {
    "requests_per_second": 300.0,
    "p95_ms": 100.0,
    "failures": 0,
    "silent_seconds": 0,
}


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
        # By this the prediction log is rid of them, and no outcome is taken for theirs.
        assert (one["encounter_id"], one["patient_nbr"]) == (data.NOBODY, data.NOBODY)
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
        ({"silent_seconds": 5}, []),
        ({"silent_seconds": 6}, ["no answer for 6 s, wanted 5 or less"]),
    ],
)
def test_verdict(change: dict[str, Any], said: list[str]) -> None:
    assert missed({**FOUND, **change}, 250, 150, 0) == said


def test_the_verdict_names_the_seconds() -> None:
    assert in_words([], 60.4) == "PASS over 60 s"
    assert in_words(["this", "that"], 600) == "FAIL over 600 s: this; that"


@pytest.mark.parametrize(
    ("answered", "silent"),
    [
        (range(100, 161), 0),
        ([], 59),
        ([100, 101, 102], 57),
        ([*range(100, 120), *range(129, 161)], 9),
        ([*range(100, 158), 169], 8),
        (range(110, 161), 9),
    ],
)
def test_silence_is_the_longest_stretch_without_an_answer(
    answered: Iterable[int], silent: int
) -> None:
    assert silence(answered, 100.2, 160.3) == silent


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
    "arguments",
    [
        ["--only=ramp,walk"],
        ["--seconds-factor=0"],
        ["--rows=-1"],
        ["--only="],
        ["--candidate=oracle"],
    ],
)
def test_wrong_arguments_of_measure(arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        measure.main(arguments)
    assert ended.value.code == 2


@pytest.mark.parametrize(
    ("last", "misses", "said"),
    [
        (418.0, [], "400 MiB (PSS) after the first minute, 418 at the end (+4.5%)"),
        (421.0, ["memory +5.2%, wanted within 5 %"], "421 at the end"),
        (379.0, ["memory -5.2%, wanted within 5 %"], "379 at the end"),
        (None, [], "was not looked at"),
    ],
)
def test_a_soak_judges_memory(
    last: float | None,
    misses: list[str],
    said: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    look = None if last is None else lambda: 400.0
    monkeypatch.setattr(memory, "of_platform", lambda *_: look)
    monkeypatch.setattr(memory, "growth", lambda *_: (400.0, last))
    monkeypatch.setattr(command, "run", lambda *_: {**FOUND, "missed": []})
    found = command.soak(Settings(), Load("http://127.0.0.1:1"), Objective(), tmp_path)
    assert found["missed"] == misses
    assert said in found["memory"]
    assert json.loads((tmp_path / "summary.json").read_text()) == found


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
        "102,2,,Aggregated,0.000000,10,30,45",
    ]
    (tmp_path / "stats_stats_history.csv").write_text("\n".join([names, *rows]))
    assert history(tmp_path) == [
        {"second": 1, "users": 2, "rps": 250.5, "p50_ms": 10, "p95_ms": 30, "p99_ms": 45}
    ]


def test_recovery_is_the_end_of_the_last_bad_second() -> None:
    good = [Look(100 + tenth / 10, 200, 5) for tenth in range(100)]
    assert recovery(good, 100, 10, 150) == 0
    assert recovery([Look(99, 503, 5), *good], 100, 10, 150) == 0
    assert recovery([*good, Look(102.5, 503, 1)], 100, 10, 150) == 3
    assert recovery([*good, Look(104.2, 0, 1)], 100, 10, 150) == 5
    assert recovery([*good, Look(101.5, 200, 300)], 100, 10, 150) == 2


@pytest.mark.parametrize(
    ("stall", "recovered"),
    [
        (Look(99.8, 200, 12_200), 13),  # sent before the end, answered 12 s after it
        (Look(99.8, 0, 30_000), 30),  # given up
        (Look(100.9, 200, 9_000), 10),
        (Look(99.8, 200, 100), 0),  # no stall
    ],
)
def test_a_stall_lasts_from_its_sending_to_its_answer(stall: Look, recovered: float) -> None:
    # One at a time: while it waits, the probe sends nothing.
    looks = [Look(90 + tenth / 10, 200, 5) for tenth in range(250)]
    kept = [look for look in looks if not stall.at <= look.at < stall.until]
    assert recovery([*kept, stall], 100, 15, 150) == recovered


def test_a_second_that_nobody_looked_at_is_not_good() -> None:
    good = [Look(100 + tenth / 10, 200, 5) for tenth in range(100)]
    assert recovery(good, 100, 15, 150) == 15
    assert recovery([], 100, 15, 150) == 15
    assert recovery([look for look in good if int(look.at) != 104], 100, 10, 150) == 5


def test_growth_of_memory() -> None:
    samples = [(float(second), 400.0 + second / 10) for second in range(0, 600, 5)]
    first, last = memory.growth(samples, 600)
    assert first == pytest.approx(407.25)
    assert last == pytest.approx(456.75)
    # An hour still has a first minute; of a short soak it is a tenth.
    assert memory.growth([(60.0, 1), (360.0, 2), (3600.0, 3)], 3600) == (1, 3)
    assert memory.growth([(0.5, 1), (1.2, 2), (9.5, 3)], 10) == (2, 3)


ABOUT = {
    "date": "2026-01-01",
    "command": "python -m loadtest.measure",
    "seconds_factor": 1.0,
    "load_before": 0.1,
    "was_idle": True,
    "model": "catboost",
    "data": "10 rows",
}
PAGE: dict[str, Any] = {
    "machine": {"cpu": "a CPU", "cores": 2, "system": "Linux"},
    "ramp": {
        **ABOUT,
        "requests": 9_000,
        "failures": 0,
        "steps": measure.over_rounds(
            "users",
            [
                {"users": 1, "rps": 100, "p50_ms": 4, "p95_ms": 6, "p99_ms": 9},
                {"users": 16, "rps": 400, "p50_ms": 30, "p95_ms": 60, "p99_ms": 90},
            ],
        ),
    },
    "paced": {
        **ABOUT,
        "users": 32,
        "requests": 9_000,
        "failures": 0,
        "steps": measure.over_rounds(
            "rate",
            [
                {"rate": 900, "rps": 300, "p50_ms": 60, "p95_ms": 90, "p99_ms": 99},
                {"rate": 50, "rps": 50, "p50_ms": 2, "p95_ms": 3, "p99_ms": 4},
                {"rate": 900, "rps": 390, "p50_ms": 64, "p95_ms": 88, "p99_ms": 98},
                {"rate": 900, "rps": 420, "p50_ms": 50, "p95_ms": 91, "p99_ms": 97},
            ],
        ),
    },
    **{
        part: {**ABOUT, **FOUND, "requests": 90_000, "users": 16}
        for part in ("steady", "explain", "batch", "page")
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
        "shed_seen": 5_010,
        "shed_counted": 5_010,
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
    assert "| 900 | 390 | 300 to 420 | 60 | 90 | 98 |" in page
    assert "Locust on a service with a catboost model" in page
    assert "delete from inference.predictions" in page
    for objective in OBJECTIVES.values():
        assert f">= {objective.least_rps:g} requests/s" in page
    first = (tmp_path / "latency.svg").read_bytes()
    write_page(tmp_path, PAGE)
    assert (tmp_path / "latency.svg").read_bytes() == first


@pytest.mark.parametrize(
    ("part", "change"),
    [
        ("steady", {"requests_per_second": 249.0}),
        ("steady", {"p95_ms": 151.0}),
        ("steady", {"failures": 1}),
        ("steady", {"silent_seconds": 6}),
        ("explain", {"requests_per_second": 1.0}),
        ("batch", {"p95_ms": 5000.0}),
        ("page", {"failures": 1}),
        ("ramp", {"failures": 1}),
        ("paced", {"failures": 1}),
        ("overload", {"shed_counted": 5_011}),
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
    assert (tmp_path / "latency.svg").exists() == (part in ("ramp", "paced"))
