"""scripts/deploy.sh broken off, and on a cluster that fails, at many points of a run."""

from __future__ import annotations

import signal
import subprocess
import threading
import time

import pytest

from tests.deploy.apiserver import Behaviour, Fault, Request
from tests.deploy.desk import NAMESPACE, PLAIN, Desk, consistent, ended, key_of, kill

# --- broken off --------------------------------------------------------------------------------


def test_killed_anywhere_the_next_run_goes_on(desk: Desk) -> None:
    """Each run is killed at a point that lies after the one before; the last comes through."""
    points = [
        ("create", "secrets/postgres-credentials"),
        ("create", "secrets/ui-credentials"),
        ("patch", "statefulsets/minio"),
        ("patch", "jobs/init-storage"),
        ("patch", "deployments/mlflow"),
        ("patch", "secrets/sh.helm.release.v1.airflow.v1"),
        ("patch", "jobs/smoke-test"),
    ]
    kept: dict[str, dict[str, str]] = {}
    for verb, name in points:

        def strike(request: Request, point: tuple[str, str] = (verb, name)) -> None:
            if (request.verb, f"{request.resource}/{request.name}") == point:
                kill(process)

        desk.cluster.after_change = strike
        with desk.start("deploy.sh", "--skip-build") as process:
            run = ended(process)
        assert run.code == -signal.SIGKILL, f"never came to {name}:\n{run.said}"
        secrets = desk.secrets()
        assert kept.items() <= secrets.items()
        kept = secrets
    desk.cluster.after_change = None
    desk.deploy("--skip-build").fine()
    assert kept == desk.secrets()
    consistent(desk.secrets())
    assert {key_of(item) for item in desk.rendered()} <= desk.cluster.versions().keys()


@pytest.mark.parametrize(
    ("number", "whole_group", "delay"),
    # As by Ctrl-C, while it waits for MLflow; and as by `kill`, while a request is under way.
    [(signal.SIGINT, True, 1.0), (signal.SIGTERM, False, 0.0)],
)
def test_interrupted(desk: Desk, number: signal.Signals, whole_group: bool, delay: float) -> None:
    desk.cluster.behaviours["mlflow"] = Behaviour(stuck=True)

    def strike(request: Request) -> None:
        if f"{request.resource}/{request.name}" == "deployments/mlflow":
            strike_at = kill if whole_group else subprocess.Popen.send_signal
            threading.Timer(delay, strike_at, (process, number)).start()
            if not delay:
                time.sleep(0.2)

    desk.cluster.after_change = strike
    with desk.start("deploy.sh", *PLAIN) as process:
        run = ended(process)
    run.failed("interrupted: [6/9] applying", "run the same command again", code=130)
    desk.cluster.behaviours.clear()
    desk.cluster.after_change = None
    if whole_group:
        desk.deploy(*PLAIN).fine()


def test_interrupted_helm_leaves_nothing_locked(deployed: Desk) -> None:
    def strike(request: Request) -> None:
        if request.name == "sh.helm.release.v1.airflow.v2":
            process.send_signal(signal.SIGINT)

    deployed.cluster.after_change = strike
    more = {"IMAGE_TAG": "two", "STUB_HELM_SLEEPS": "30"}
    with deployed.start("deploy.sh", "--skip-build", **more) as process:
        run = ended(process)
    run.failed("interrupted: [7/9] Airflow", code=130)
    pending = "owner=helm,status=pending-upgrade"
    assert deployed.cluster.list("secrets", NAMESPACE, pending)
    deployed.cluster.after_change = None
    deployed.deploy("--skip-build", IMAGE_TAG="two").fine()
    assert not deployed.cluster.list("secrets", NAMESPACE, pending)
    scheduler = deployed.cluster.get("deployments", "airflow-scheduler", NAMESPACE)
    assert scheduler["spec"]["template"]["spec"]["containers"][0]["image"].endswith("-airflow:two")


# --- what fails in the cluster -----------------------------------------------------------------


def test_faults_of_the_cluster_end_in_one_message(deployed: Desk) -> None:
    """One after another, each in a later part of the run; at last it comes through."""
    faults = [
        (Fault("error", "get", "nodes", times=1), "nodes' addresses"),
        (Fault("close", "get", "secrets", "api-credentials", times=1), "api-credentials"),
        (Fault("forbidden", "patch", "networkpolicies"), "(kubectl auth can-i --list)"),
        (Fault("hang", "patch", "jobs", "mlflow-migrate", times=1), "job mlflow-migrate"),
        (Fault("error", "patch", "statefulsets", "api", times=1), "step 5-services"),
    ]
    faults[0][0].verb = "list"
    for fault, words in faults:
        deployed.cluster.faults[:] = [fault]
        run = deployed.deploy(*PLAIN, DEPLOY_REQUEST_TIMEOUT="2").failed("error: [", words)
        assert run.err.count("error: [") == 1, run.err
    # While it waits, one that is away for a moment is no reason to give up.
    away = Fault("error", "get", "deployments", "mlflow", times=2)
    deployed.cluster.faults[:] = [away]
    deployed.deploy(*PLAIN).fine()
    assert not away.times


def test_what_never_gets_ready_says_why(deployed: Desk) -> None:
    deployed.cluster.behaviours |= {
        "ui": Behaviour(waiting="ImagePullBackOff", message="no such tag: two"),
        "api": Behaviour(waiting="CrashLoopBackOff", log="starting\nKeyError: 'the last words'\n"),
        "grafana": Behaviour(stuck=True, log="still reading\n"),
    }
    run = deployed.deploy(*PLAIN, IMAGE_TAG="two", DEPLOY_TIMEOUT="2")
    run.failed("[6/9] applying", "not ready after 2 s", "DEPLOY_TIMEOUT")
    assert run.err.count("error: ") == 1
    for words in (
        "--- deployment/ui",
        "container ui waits: ImagePullBackOff no such tag: two",
        "--- statefulset/api",
        "container api waits: CrashLoopBackOff",
        "exit code 1",
        "\nKeyError: 'the last words'\n",
        "--- deployment/grafana",
        "container grafana runs, but is not ready",
        "\nstill reading\n",
    ):
        assert words in run.err
    assert "prometheus" not in run.err


def test_a_smoke_test_that_fails_fails_the_run(deployed: Desk) -> None:
    log = "error: the artifact read back is not the one logged\n"
    deployed.cluster.behaviours["smoke-test"] = Behaviour(fails=True, log=log)
    run = deployed.deploy(*PLAIN)
    run.failed("[8/9] smoke test", "job/smoke-test has failed")
    assert log in run.err
    assert "[9/9]" not in run.out


def test_a_stuck_pod_does_not_block_its_mending(deployed: Desk) -> None:
    """A StatefulSet does not replace a pod that is not ready, even when its template is mended."""
    bad = Behaviour(waiting="ErrImagePull", image="postgres:18.4-bookwurm")
    deployed.cluster.behaviours["postgres"] = bad
    with deployed.edited("infra/k8s/base/kustomization.yaml", "18.4-bookworm", "18.4-bookwurm"):
        run = deployed.deploy(*PLAIN, DEPLOY_TIMEOUT="2")
    assert "ErrImagePull" in run.failed("not ready", "statefulset/postgres").err
    deployed.deploy(*PLAIN, DEPLOY_TIMEOUT="10").fine()
