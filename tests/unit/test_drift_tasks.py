"""The tasks of drift: with which version a check is made, and when it asks for a training."""

from __future__ import annotations

import logging
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from airflow.sdk.exceptions import AirflowFailException, AirflowSkipException

from monitoring import champion, drift, tasks
from monitoring.drift import Check, DriftError, Found

NOTHING = [Found("load", 2000, True, {}), Found("predictions", 10, False, {})]
DRIFTED = [Found("load", 2000, True, {"age_midpoint": 0.9, "a1c_level": 0.3})]


@pytest.fixture(autouse=True)
def connection(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tasks, "connection_dsn", lambda *names: " ".join(names))


@pytest.mark.parametrize(
    ("found", "retrain", "asked"),
    [
        (NOTHING, False, False),
        (NOTHING, True, False),
        (DRIFTED, False, False),
        (DRIFTED, True, True),
    ],
)
def test_it_asks_for_a_training_where_something_drifted_and_it_is_to(
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    found: list[Found],
    retrain: bool,
    asked: bool,
) -> None:
    monkeypatch.setattr(drift, "found", lambda *_: found)
    with caplog.at_level(logging.INFO, "monitoring.tasks"):
        assert tasks.decide("postgres_default", "check", retrain) is asked
    told = [
        "window load: nothing has drifted",
        "window predictions: 10 rows are too few to tell",
    ]
    if found is DRIFTED:
        told = [
            "DRIFT: age_midpoint of window load has a PSI of 0.900",
            "DRIFT: a1c_level of window load has a PSI of 0.300",
        ]
        if not retrain:
            told.append("not training anew: the Param `retrain` is off")
    assert caplog.messages == told


def test_a_check_that_is_not_there_fails_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*_: object) -> list[Found]:
        raise DriftError("monitoring.drift_checks holds no check c")

    monkeypatch.setattr(drift, "found", missing)
    with pytest.raises(AirflowFailException, match="holds no check c"):
        tasks.decide("postgres_default", "c", True)


@pytest.mark.parametrize(("before", "version"), [(None, "champion"), ("7", "7")])
def test_a_check_is_made_with_the_champion_and_again_with_the_version_of_then(
    monkeypatch: pytest.MonkeyPatch, before: str | None, version: str
) -> None:
    seen: dict[str, Any] = {}

    def fetch(_uri: str, alias: str, _folder: Path) -> str:
        seen["alias"] = alias
        return "the version"

    def prepare(dsn: str, check: Check, found: object) -> dict[str, int]:
        seen.update(dsn=dsn, check=check, champion=found)
        return {"load": 1}

    monkeypatch.setattr(champion, "fetch", fetch)
    monkeypatch.setattr(drift, "prepare", prepare)
    monkeypatch.setattr(drift, "version_of", lambda *_: before)
    moment = datetime(2025, 6, 1, tzinfo=UTC)
    params = {"hours": 24, "outcome_days": 90, "retrain": False}
    assert tasks.prepare("postgres_default", "check", moment, params) == {"load": 1}
    assert (seen["alias"], seen["champion"]) == (version, "the version")
    check = seen["check"]
    assert (check.check_id, check.checked_at) == ("check", moment)
    assert (check.hours, check.outcome_days) == (24, 90)


def test_without_a_champion_the_run_is_skipped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(champion, "fetch", lambda *_: None)
    monkeypatch.setattr(drift, "version_of", lambda *_: None)
    with pytest.raises(AirflowSkipException, match="no version champion in the registry"):
        tasks.prepare("postgres_default", "c", datetime(2025, 6, 1, tzinfo=UTC), {})
