"""scripts/deploy.sh where something is missing, lost or refused; and the other overlays."""

from __future__ import annotations

import pytest

from tests.deploy.apiserver import Behaviour, Fault, Object
from tests.deploy.desk import (
    NAMESPACE,
    PLAIN,
    Desk,
    First,
    key_of,
    settled,
)
from tests.deploy.test_deploy import SECRETS, changed

# --- a first run, and a second -----------------------------------------------------------------


def test_a_changed_setting_rolls_out(deployed: Desk) -> None:
    with deployed.edited(
        "infra/k8s/base/kustomization.yaml", "MLFLOW_BUCKET=mlflow", "MLFLOW_BUCKET=other"
    ):
        before = deployed.cluster.list("pods", NAMESPACE, "app.kubernetes.io/name=mlflow")
        run = deployed.deploy(*PLAIN).fine()
        after = deployed.cluster.list("pods", NAMESPACE, "app.kubernetes.io/name=mlflow")
    assert "job init-storage has changed: it is replaced" in run.out
    names = [{pod["metadata"]["name"] for pod in pods} for pods in (before, after)]
    assert not names[0] & names[1]


# --- what the cluster has, or has not


@pytest.mark.parametrize(
    ("verb", "resource"), [("create", "secrets"), ("patch", "statefulsets"), ("delete", "jobs")]
)
def test_missing_rights_are_told_before_anything_changes(
    desk: Desk, verb: str, resource: str
) -> None:
    desk.cluster.faults.append(Fault("forbidden", verb, resource))
    desk.deploy(*PLAIN).failed("[1/9]", f"may not {verb} {resource}", "context 'microk8s'")
    assert not desk.cluster.journal


def test_a_namespace_of_somebody_else_is_left_alone(desk: Desk) -> None:
    desk.cluster.create("namespaces", "", {"metadata": {"name": NAMESPACE}})
    desk.deploy(*PLAIN).failed("did not make", "app.kubernetes.io/part-of")
    assert not desk.changes()


@pytest.mark.parametrize("name", ["postgres-credentials", "ui-credentials"])
def test_a_lost_secret_is_not_made_up_anew(deployed: Desk, name: str) -> None:
    deployed.cluster.delete(("secrets", NAMESPACE, name))
    deployed.deploy(*PLAIN).failed(f"secret {name} is gone", "run this again")
    assert not deployed.changes()


def test_lost_passwords_of_the_exporters_are_made_and_given_to_their_roles(deployed: Desk) -> None:
    before = deployed.secrets()
    deployed.cluster.delete(("secrets", NAMESPACE, "monitoring-credentials"))
    deployed.deploy(*PLAIN).fine()
    settled(deployed.cluster)
    after = deployed.secrets()
    assert {name for name in after if after[name] != before[name]} == {"monitoring-credentials"}
    changes = deployed.changes()
    deleted, made = (
        changes.index(f"{change}/init-storage") for change in ("delete jobs", "patch jobs")
    )
    assert deleted < changes.index("create secrets/monitoring-credentials") < made


def test_the_api_may_wait_for_its_first_model(desk: Desk) -> None:
    """On a new platform Airflow trains it, and Airflow comes after the API."""
    desk.cluster.behaviours["api"] = Behaviour(stuck=True, started=True)
    run = desk.deploy(*PLAIN, DEPLOY_TIMEOUT="8").fine()
    assert run.out.count("the API runs and waits for its first model") == 1


def test_a_failed_job_says_why_and_is_run_again(desk: Desk) -> None:
    log = "".join(f"line {number}\n" for number in range(40)) + "error: wrong password\n"
    desk.cluster.behaviours["init-storage"] = Behaviour(fails=True, log=log)
    run = desk.deploy(*PLAIN)
    run.failed("[6/9] applying", "job/init-storage has failed", "run this again")
    assert "error: wrong password" in run.err
    assert "line 10\n" not in run.err
    # The same again while it fails; then it is mended, though the Job itself has not changed.
    desk.cluster.behaviours.clear()
    desk.cluster.journal.clear()
    desk.deploy(*PLAIN).fine()
    assert desk.changes()[:3].count("delete jobs/init-storage") <= 1
    assert "delete jobs/init-storage" in desk.changes()
    assert "delete jobs/mlflow-migrate" not in desk.changes()


# --- what is not there, or was not meant -------------------------------------------------------


@pytest.mark.parametrize(
    ("missing", "arguments", "word"),
    [
        (["kubectl", "microk8s"], [], "kubectl nor microk8s"),
        (["docker"], [], "docker is not installed"),
        (["helm", "microk8s"], ["--skip-build"], "helm nor microk8s"),
        (["sha256sum"], [], "sha256sum is not installed"),
    ],
)
def test_a_missing_tool_is_named(
    desk: Desk, missing: list[str], arguments: list[str], word: str
) -> None:
    with desk.without(*missing):
        desk.deploy(*arguments).failed("[1/9] tools and context", word)
    assert not desk.changes()


def test_an_engine_that_sleeps_is_told(desk: Desk) -> None:
    desk.deploy(STUB_FAIL="docker info").failed("Docker engine does not answer", "--skip-build")


@pytest.mark.parametrize(
    ("command", "phase"),
    [
        ("docker build --file infra/docker/Dockerfile.api", "[3/9] images: docker build"),
        ("docker push localhost:32000/diabetes-ui", "[3/9] images: docker push"),
        ("microk8s enable registry", "[2/9] MicroK8s addons: microk8s enable registry"),
    ],
)
def test_a_command_that_fails_ends_the_run(desk: Desk, command: str, phase: str) -> None:
    desk.deploy(STUB_FAIL=command).failed(phase, "for the reason above", "un this again")
    assert not desk.changes()


def test_helm_that_fails_ends_the_run(deployed: Desk) -> None:
    failing = f"helm --kube-context microk8s --namespace {NAMESPACE} upgrade"
    run = deployed.deploy("--skip-build", IMAGE_TAG="two", STUB_FAIL=failing)
    run.failed("[7/9] Airflow: helm could not install release airflow")
    assert "[8/9]" not in run.out


def test_the_cluster_must_be_meant(desk: Desk) -> None:
    desk.server.write_kubeconfig(desk.folder / "elsewhere", "other", "microk8s")
    elsewhere = {"KUBECONFIG": str(desk.folder / "elsewhere")}
    refused = desk.deploy(*PLAIN, **elsewhere)
    refused.failed("current context is 'other'", "--context other")
    desk.deploy(*PLAIN, "--context", "nowhere").failed("no context 'nowhere'")
    assert not desk.changes()


def test_a_cluster_that_does_not_answer(desk: Desk) -> None:
    config = (desk.folder / "kubeconfig").read_text()
    (desk.folder / "gone").write_text(config.replace(desk.server.url, "http://127.0.0.1:9"))
    desk.deploy(*PLAIN, KUBECONFIG=str(desk.folder / "gone")).failed("does not answer", "refused")


def test_a_dry_run_changes_nothing(desk: Desk, first: First) -> None:
    run = desk.deploy("--dry-run").fine()
    assert "all of it would be created" in run.out
    assert not desk.changes()
    desk.load(first.saved)
    before = desk.cluster.versions()
    assert "nothing would change" in desk.deploy("--dry-run").fine().out
    with desk.edited("infra/k8s/base/mlflow.yaml", "--workers=1", "--workers=3"):
        assert "--workers=3" in desk.deploy("--dry-run").fine().out
    assert not changed(before, desk.cluster.versions())
    used = {" ".join(call[:2]) for call in desk.calls}
    assert used <= {"docker info", "docker manifest", "microk8s status", "helm version"}


# --- the other overlays ------------------------------------------------------------------------


def test_seaweedfs_on_a_named_context_with_nothing_but_kubectl(desk: Desk) -> None:
    with desk.without("docker", "helm", "microk8s"):
        desk.deploy("--overlay", "seaweedfs", "--context", "other", *PLAIN).fine()
    store = desk.cluster.get("statefulsets", "minio", NAMESPACE)
    assert "seaweedfs" in store["spec"]["template"]["spec"]["containers"][0]["image"]
    assert not desk.calls
    assert not any(name.startswith("airflow-") for name in desk.secrets())


def test_production_takes_the_secrets_that_are_there(desk: Desk, first: First) -> None:
    command = ("--overlay", "production", "--skip-build")
    registry = {"REGISTRY": "registry.example/team"}
    run = desk.deploy(*command, **registry)
    assert run.code == 1
    for name, keys in SECRETS.items():
        assert f"  {name}: {keys}\n" in run.err
    assert not desk.changes()
    labels = {"app.kubernetes.io/part-of": "diabetes-readmission"}
    space: Object = {"metadata": {"name": NAMESPACE, "labels": labels}}
    desk.cluster.create("namespaces", "", space)
    for name, values in first.secrets.items():
        secret: Object = {"metadata": {"name": name}, "stringData": dict(values)}
        if name == "mlflow-credentials":
            del secret["stringData"]["metrics-password"]
        desk.cluster.create("secrets", NAMESPACE, secret)
    run = desk.deploy(*command, **registry)
    assert run.err.endswith("\n  mlflow-credentials: metrics-password\n")
    desk.cluster.delete(("secrets", NAMESPACE, "mlflow-credentials"))
    whole: Object = {"stringData": first.secrets["mlflow-credentials"]}
    whole["metadata"] = {"name": "mlflow-credentials"}
    desk.cluster.create("secrets", NAMESPACE, whole)
    run = desk.deploy(*command, **registry).fine()
    assert desk.secrets() == first.secrets
    assert {key_of(item) for item in desk.rendered("production")} <= desk.cluster.versions().keys()
    assert not any(call[0] in ("docker", "microk8s") for call in desk.calls)
    image = desk.cluster.get("deployments", "mlflow", NAMESPACE)
    containers = image["spec"]["template"]["spec"]["containers"]
    assert containers[0]["image"].startswith("registry.example/team/diabetes-mlflow:")
    assert "https://mlflow.diabetes.example" in run.out
