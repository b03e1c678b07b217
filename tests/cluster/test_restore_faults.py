"""scripts/restore.sh broken off: what writes to the databases comes back all the same."""

from __future__ import annotations

import signal

import pytest

from tests.deploy.apiserver import Behaviour, Request
from tests.deploy.desk import NAMESPACE, Desk, First, Saved, ended, kill, settled
from tests.deploy.test_restore_script import STAMP, WRITERS, as_before, replicas


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


def test_an_api_without_a_model_holds_up_no_restore(deployed: Desk) -> None:
    deployed.cluster.behaviours["api"] = Behaviour(stuck=True, started=True)
    run = deployed.run("restore.sh", "--yes", DEPLOY_TIMEOUT="4").fine()
    assert "the API runs and waits for its first model" in run.out
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
