"""scripts/restore.sh end to end: whatever happens, what writes to the databases comes back."""

from __future__ import annotations

import json
import re
import signal
from collections.abc import Iterator

import pytest

from tests.deploy.apiserver import Behaviour, Fault, Request, running
from tests.deploy.desk import NAMESPACE, Desk, Saved, ended, kill, settled

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
def laid_out(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Desk]:
    with running() as server:
        yield Desk.laid_out(server, tmp_path_factory.mktemp("desk"))


@pytest.fixture(scope="module")
def saved(laid_out: Desk) -> Saved:
    laid_out.clear()
    laid_out.deploy("--skip-build").fine()
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


def pods_of_writers(desk: Desk) -> list[str]:
    names = [item["metadata"]["name"] for item in desk.cluster.list("pods", NAMESPACE)]
    return [name for name in names if name.startswith(("mlflow-", "api-", "airflow-"))]


def test_writers_are_away_while_it_restores(deployed: Desk) -> None:
    seen: list[tuple[set[int], list[str], list[str]]] = []

    def look(request: Request) -> None:
        if (request.verb, request.name) == ("patch", "postgres-restore"):
            job = deployed.cluster.get("jobs", "postgres-restore", NAMESPACE)
            (fetch,) = job["spec"]["template"]["spec"]["initContainers"]
            still = [name for name in pods_of_writers(deployed) if "mlflow-migrate" not in name]
            still = [name for name in still if "mlflow-users" not in name]
            seen.append((set(replicas(deployed).values()), still, fetch["args"]))

    deployed.cluster.after_change = look
    command = ("--backup", STAMP, "--database", "mlflow", "--database", "diabetes")
    run = deployed.run("restore.sh", *command, typed="yes\n").fine()
    ((numbers, pods, arguments),) = seen
    assert numbers == {0}
    assert pods == []
    chosen = [text.removeprefix("--").split("=") for text in arguments if "=" in text]
    for pair in (["backup", STAMP], ["database", "mlflow"], ["database", "diabetes"]):
        assert pair in chosen
    assert "--database=airflow" not in arguments
    assert f"from backup {STAMP}" in run.out
    as_before(deployed)
    mlflow = deployed.cluster.get("deployments", "mlflow", NAMESPACE)
    assert mlflow["status"]["readyReplicas"] == 2


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


def test_an_api_without_a_model_holds_up_no_restore(deployed: Desk) -> None:
    deployed.cluster.behaviours["api"] = Behaviour(stuck=True, started=True)
    run = deployed.run("restore.sh", "--yes", DEPLOY_TIMEOUT="4").fine()
    assert "the API runs and waits for its first model" in run.out
    as_before(deployed)


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


@pytest.mark.parametrize("whole_group", [True, False])
def test_interrupted_it_brings_writers_back(deployed: Desk, whole_group: bool) -> None:
    deployed.cluster.behaviours["postgres-restore"] = Behaviour(stuck=True)

    def strike(request: Request) -> None:
        if (request.verb, request.name) == ("patch", "postgres-restore"):
            if whole_group:
                kill(process, signal.SIGINT)
            else:
                process.send_signal(signal.SIGTERM)

    deployed.cluster.after_change = strike
    with deployed.start("restore.sh", "--yes") as process:
        run = ended(process)
    assert run.code == 130, run.said
    assert "interrupted: " in run.err
    as_before(deployed)


@pytest.mark.parametrize("then", [("restore.sh", "--yes"), ("deploy.sh", "--skip-build")])
def test_killed_the_next_run_brings_writers_back(deployed: Desk, then: tuple[str, ...]) -> None:
    def strike(request: Request) -> None:
        if (request.verb, request.name) == ("patch", "postgres-restore"):
            kill(process)

    deployed.cluster.after_change = strike
    with deployed.start("restore.sh", "--yes") as process:
        assert ended(process).code == -signal.SIGKILL
    assert set(replicas(deployed).values()) == {0}
    deployed.cluster.after_change = None
    deployed.run(*then).fine()
    if then[0] == "restore.sh":
        as_before(deployed)
    assert all(replicas(deployed).values())


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
