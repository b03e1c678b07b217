"""scripts/restore.sh end to end: whatever happens, what writes to the databases comes back."""

from __future__ import annotations

import json
import re

import pytest

from tests.deploy.apiserver import Behaviour, Fault, Request
from tests.deploy.desk import NAMESPACE, Desk, First, Saved, settled

WRITERS = {
    ("deployments", "mlflow"): 2,
    ("statefulsets", "api"): 1,
    ("deployments", "airflow-api-server"): 1,
    ("deployments", "airflow-dag-processor"): 1,
    ("deployments", "airflow-scheduler"): 1,
    ("deployments", "airflow-triggerer"): 1,
}
"""How many there are before, and have to be after: two of MLflow, which no manifest says."""
STAMP = "20260131T031700Z"


@pytest.fixture(scope="module")
def saved(laid_out: Desk, first: First) -> Saved:
    laid_out.load(first.saved)
    key = ("deployments", NAMESPACE, "mlflow")
    mlflow = laid_out.cluster.get("deployments", "mlflow", NAMESPACE)
    mlflow["spec"]["replicas"] = WRITERS["deployments", "mlflow"]
    laid_out.cluster.update(key, mlflow)
    settled(laid_out.cluster)
    return laid_out.save()


@pytest.fixture
def deployed(laid_out: Desk, saved: Saved) -> Desk:
    laid_out.load(saved)
    return laid_out


def replicas(desk: Desk) -> dict[tuple[str, str], int]:
    return {
        (plural, name): desk.cluster.get(plural, name, NAMESPACE)["spec"]["replicas"]
        for plural, name in WRITERS
    }


def as_before(desk: Desk) -> None:
    """The writers are there, and nothing is left of the restore."""
    assert replicas(desk) == WRITERS
    for plural, name in WRITERS:
        noted = desk.cluster.get(plural, name, NAMESPACE)["metadata"].get("annotations", {})
        assert not any("restore" in key for key in noted)
    jobs = {item["metadata"]["name"] for item in desk.cluster.list("jobs", NAMESPACE)}
    assert not jobs & {"postgres-restore", "postgres-backups"}


def test_image_and_settings_are_those_of_the_backups(deployed: Desk) -> None:
    made = []

    def look(request: Request) -> None:
        if (request.verb, request.name) == ("patch", "postgres-restore"):
            made.append(deployed.cluster.get("jobs", request.name, NAMESPACE))

    deployed.cluster.after_change = look
    deployed.run("restore.sh", "--yes").fine()
    cron = deployed.cluster.get("cronjobs", "postgres-backup", NAMESPACE)
    backup = cron["spec"]["jobTemplate"]["spec"]["template"]["spec"]
    restore = made[0]["spec"]["template"]["spec"]
    assert restore["initContainers"][0]["image"] == backup["containers"][0]["image"]
    assert restore["containers"][0]["image"] == backup["initContainers"][0]["image"]
    (settings,) = deployed.cluster.list("configmaps", NAMESPACE, "app.kubernetes.io/name=platform")
    named = set(re.findall(r'"(platform[^"]*)"', json.dumps(restore)))
    assert named == {settings["metadata"]["name"]}


@pytest.mark.parametrize("typed", ["", "no\n"])
def test_it_asks_first(deployed: Desk, typed: str) -> None:
    run = deployed.run("restore.sh", typed=typed).failed("not confirmed; nothing was changed")
    assert "is lost" in run.out
    assert not deployed.changes()


def test_a_restore_that_fails_says_why_and_brings_writers_back(deployed: Desk) -> None:
    log = "pg_restore: error: could not execute query\n"
    deployed.cluster.behaviours["postgres-restore"] = Behaviour(fails=True, log=log)
    run = deployed.run("restore.sh", "--yes").failed("job/postgres-restore has failed")
    assert log in run.err
    as_before(deployed)


def test_writers_come_back_after_a_refused_request(deployed: Desk) -> None:
    deployed.cluster.faults.append(Fault("forbidden", "patch", "statefulsets", "api"))
    deployed.run("restore.sh", "--yes").failed("is forbidden", "run this again")
    deployed.cluster.faults.clear()
    as_before(deployed)


def test_a_list_of_backups_stops_nobody(deployed: Desk) -> None:
    deployed.cluster.behaviours["postgres-backups"] = Behaviour(log=f"{STAMP}  3 databases\n")
    assert STAMP in deployed.run("restore.sh", "--list").fine().out
    as_before(deployed)
    assert {change.split()[1] for change in deployed.changes()} == {"jobs/postgres-backups"}


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["--backup", "yesterday"], "20260131T031700Z"),
        (["--database", "postgres"], "mlflow, diabetes or airflow"),
        (["--database"], "--database needs a value"),
        (["--all"], "unknown argument '--all'"),
    ],
)
def test_bad_arguments(deployed: Desk, arguments: list[str], word: str) -> None:
    run = deployed.run("restore.sh", *arguments)
    assert run.code == 2
    assert word in run.err
    assert not deployed.changes()


def test_without_a_platform_there_is_nothing_to_restore(laid_out: Desk) -> None:
    laid_out.clear()
    laid_out.run("restore.sh", "--yes").failed("not deployed", "scripts/deploy.sh")
    assert not laid_out.changes()
