"""scripts/deploy.sh end to end: real kubectl on the tests' cluster, stubs for Docker and Helm."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml

from settings import PROJECT_ROOT
from tests.deploy.apiserver import KINDS, NODE_IP, Behaviour, Fault, Key, Object, Request, running
from tests.deploy.desk import NAMESPACE, Desk, Run, Saved, ended, kill, settled
from tests.deploy.manifests import KUBECTL

PLAIN = ("--skip-build", "--without-airflow")
PLURALS = {kind.name: kind.plural for kind in KINDS.values()}
ORDER = [
    "statefulsets/postgres",
    "statefulsets/minio",
    "jobs/init-storage",
    "jobs/mlflow-migrate",
    "deployments/mlflow",
    "jobs/mlflow-users",
]
SMOKE_TEST = ["patch jobs/smoke-test", "delete jobs/smoke-test"]
# As in the contract of docs/operations.md: production brings the same keys.
SECRETS = {
    "postgres-credentials": "superuser-password mlflow-password diabetes-password airflow-password",
    "storage-credentials": "access-key secret-key",
    "mlflow-credentials": "admin-password flask-secret-key backend-store-uri basic_auth.ini "
    "serving-password pipeline-password metrics-password",
    "api-credentials": "key-hashes operator-key prediction-log-key",
    "ui-credentials": "api-key",
    "grafana-credentials": "admin-user admin-password",
    "monitoring-credentials": "monitoring-password reader-password",
    "airflow-credentials": "connection fernet-key api-secret-key jwt-secret postgres-default "
    "passwords.json admin-password",
    "airflow-monitoring": "url user password passwords.json",
}


@dataclass(frozen=True, slots=True)
class First:
    """The first deployment on an empty cluster, and what it left.

    Attributes:
        objects: what was rendered and applied.
        waited: Jobs and MLflow, and whether all before them was ready when they came.
    """

    run: Run
    objects: list[Object]
    waited: dict[str, bool]
    saved: Saved
    calls: list[list[str]]
    command_lines: str
    journal: list[Request]
    secrets: dict[str, dict[str, str]]


@pytest.fixture(scope="module")
def laid_out(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Desk]:
    with running() as server:
        yield Desk.laid_out(server, tmp_path_factory.mktemp("desk"))


@pytest.fixture(scope="module")
def first(laid_out: Desk) -> First:
    laid_out.clear()
    cluster, waited = laid_out.cluster, dict[str, bool]()

    def look(request: Request) -> None:
        name = f"{request.resource}/{request.name}"
        if name in ORDER[2:] and request.verb == "patch":
            before = [one.split("/") for one in ORDER[: ORDER.index(name)]]
            states = [cluster.get(*one, NAMESPACE)["status"] for one in before]
            waited[name] = all(
                state.get("readyReplicas") or state.get("succeeded") for state in states
            )

    cluster.after_change = look
    for name in ORDER:
        cluster.behaviours[name.partition("/")[2]] = Behaviour(delay=0.3)
    run = laid_out.deploy().fine()
    settled(cluster)
    calls, command_lines = laid_out.calls, laid_out.command_lines
    return First(
        run,
        rendered(laid_out),
        waited,
        laid_out.save(),
        calls,
        command_lines,
        list(cluster.journal),
        laid_out.secrets(),
    )


@pytest.fixture
def desk(laid_out: Desk) -> Desk:
    """A desk with a new cluster."""
    laid_out.clear()
    return laid_out


@pytest.fixture
def deployed(laid_out: Desk, first: First) -> Desk:
    """A desk whose cluster has the platform."""
    laid_out.load(first.saved)
    return laid_out


def rendered(desk: Desk, overlay: str = "microk8s") -> list[Object]:
    """What deploy.sh has applied last."""
    folder = desk.root / ".run" / "deploy" / overlay
    done = subprocess.run([KUBECTL, "kustomize", folder], capture_output=True, check=True)
    return list(yaml.safe_load_all(done.stdout))


def key_of(item: Object) -> Key:
    plural = PLURALS[item["kind"]]
    return plural, NAMESPACE if KINDS[plural].namespaced else "", item["metadata"]["name"]


def changed(before: dict[Key, str], after: dict[Key, str]) -> set[Key]:
    return {key for key in before.keys() | after.keys() if before.get(key) != after.get(key)}


def consistent(secrets: dict[str, dict[str, str]]) -> None:
    """What one Secret derives from another fits."""
    postgres, mlflow = secrets["postgres-credentials"], secrets["mlflow-credentials"]
    uri = f"postgresql+psycopg2://mlflow:{postgres['mlflow-password']}@postgres:5432/mlflow"
    assert mlflow["backend-store-uri"] == uri
    assert f"database_uri = {uri}\n" in mlflow["basic_auth.ini"]
    api, page = secrets["api-credentials"], secrets["ui-credentials"]["api-key"]
    hashes = dict(part.split(":") for part in api["key-hashes"].split(","))
    assert hashes == {
        "page": hashlib.sha256(page.encode()).hexdigest(),
        "operator": hashlib.sha256(api["operator-key"].encode()).hexdigest(),
    }
    if airflow := secrets.get("airflow-credentials"):
        server = "postgres:5432"
        own, data = postgres["airflow-password"], postgres["diabetes-password"]
        assert airflow["connection"] == f"postgresql+psycopg2://airflow:{own}@{server}/airflow"
        assert airflow["postgres-default"] == f"postgres://diabetes:{data}@{server}/diabetes"
        assert json.loads(airflow["passwords.json"]) == {"admin": airflow["admin-password"]}
        watching = secrets["airflow-monitoring"]
        assert json.loads(watching["passwords.json"]) == {watching["user"]: watching["password"]}


# --- a first run, and a second -----------------------------------------------------------------


def test_a_first_run_makes_all_that_is_rendered(deployed: Desk, first: First) -> None:
    assert len(first.objects) > 40
    assert {key_of(item) for item in first.objects} <= deployed.cluster.versions().keys()
    # Another thing that a first run must not do: ask for what it has made already.
    assert all(request.code < 300 for request in first.journal if request.verb != "delete")
    assert "smoke-test" in first.run.out
    assert ("jobs", NAMESPACE, "smoke-test") not in deployed.cluster.versions()


def test_steps_come_in_their_order(first: First) -> None:
    steps = {key_of(item)[::2]: item["metadata"]["labels"]["deploy-step"] for item in first.objects}
    namespace = ("namespaces", NAMESPACE)
    order = [
        steps[request.resource, request.name]
        for request in first.journal
        if request.verb == "patch"
        and (request.resource, request.name) in steps.keys() - {namespace}
    ]
    assert order == sorted(order)
    assert set(order) == {"1-storage", "2-init", "3-mlflow", "4-users", "5-services"}
    names = [f"{request.resource}/{request.name}" for request in first.journal]
    assert names.index("namespaces/diabetes-mlops") < names.index("secrets/postgres-credentials")
    assert names.index("secrets/airflow-credentials") < names.index("statefulsets/postgres")
    assert names.index("statefulsets/api") < names.index("deployments/airflow-scheduler")
    assert names.index("deployments/airflow-scheduler") < names.index("jobs/smoke-test")


def test_each_step_waits_for_the_one_before(first: First) -> None:
    # The two stores come together: only the rest has something to wait for.
    assert first.waited == dict.fromkeys(ORDER[2:], True)


def test_images_are_built_and_pushed_and_used(first: First) -> None:
    pushed = [call[-1] for call in first.calls if call[:2] == ["docker", "push"]]
    assert [re.sub(r"[0-9a-f]{12}$", "", image) for image in pushed] == [
        f"localhost:32000/diabetes-{name}:" for name in ("mlflow", "airflow", "api", "ui")
    ]
    used = set(re.findall(r"localhost:32000/diabetes-[^\"]+", json.dumps(first.objects)))
    assert used == set(pushed) - {pushed[1]}
    (install,) = [call for call in first.calls if call[0] == "helm" and "upgrade" in call]
    repository, tag = pushed[1].rsplit(":", 1)
    assert f"images.airflow.repository={repository},images.airflow.tag={tag}" in install
    enabled = [call[2:] for call in first.calls if call[:2] == ["microk8s", "enable"]]
    addons = ["dns", "hostpath-storage", "registry", "ingress", "metrics-server"]
    assert enabled == [[addon] for addon in addons]


def test_ways_in_are_printed_and_open(deployed: Desk, first: First) -> None:
    for port in (30500, 30901, 30382, 30601, 30602, 30300, 30909):
        assert f"http://{NODE_IP}:{port}\n" in first.run.out
    settings = deployed.cluster.list("configmaps", NAMESPACE, "app.kubernetes.io/name=platform")
    (data,) = (item["data"] for item in settings)
    assert f"{NODE_IP}:30500" in data["MLFLOW_ENTRY_HOSTS"].split(",")
    assert f"http://{NODE_IP}:30500" in data["MLFLOW_ENTRY_ORIGINS"].split(",")
    # The commands that it prints do print the passwords.
    lines = re.findall(r"kubectl .*jsonpath=.*$", first.run.out, re.MULTILINE)
    assert len(lines) == 5
    shown = [
        subprocess.run(
            ["bash", "-c", line],
            env=deployed.environment(),
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for line in lines
    ]
    known = {value for secret in first.secrets.values() for value in secret.values()}
    assert set(shown) <= known - {""}


def test_secrets_have_all_keys_and_are_told_nobody(deployed: Desk, first: First) -> None:
    assert {n: set(values) for n, values in first.secrets.items()} == {
        name: set(keys.split()) for name, keys in SECRETS.items()
    }
    consistent(first.secrets)
    secret = {
        value
        for values in first.secrets.values()
        for key, value in values.items()
        if key not in ("access-key", "admin-user", "url", "user")
    }
    plain = [value for value in secret if re.fullmatch(r"[A-Za-z0-9]{32}", value)]
    assert len(plain) == len(set(plain)) == 19
    assert len(base64.urlsafe_b64decode(first.secrets["airflow-credentials"]["fernet-key"])) == 32
    written = [path.read_text() for path in (deployed.root / ".run").rglob("*") if path.is_file()]
    assert first.command_lines.count("\n") > 30
    told = "\n".join(
        [
            first.run.said,
            json.dumps(first.calls),
            first.command_lines,
            str(first.journal),
            *written,
        ]
    )
    for value in secret:
        assert value not in told
        assert base64.b64encode(value.encode()).decode() not in told


def test_a_second_run_changes_nothing(deployed: Desk, first: First) -> None:
    before = deployed.cluster.versions()
    deployed.deploy().fine()
    settled(deployed.cluster)
    assert deployed.changes() == SMOKE_TEST
    assert not changed(before, deployed.cluster.versions())
    assert deployed.secrets() == first.secrets
    used = [call[:2] for call in deployed.calls]
    for call in (["docker", "build"], ["docker", "push"], ["microk8s", "enable"]):
        assert call not in used
    assert not any("upgrade" in call for call in deployed.calls)


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
    assert {key_of(item) for item in rendered(desk)} <= desk.cluster.versions().keys()


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


@pytest.mark.parametrize(
    ("verb", "resource"), [("create", "secrets"), ("patch", "statefulsets"), ("delete", "jobs")]
)
def test_missing_rights_are_told_before_anything_changes(
    desk: Desk, verb: str, resource: str
) -> None:
    desk.cluster.faults.append(Fault("forbidden", verb, resource))
    desk.deploy(*PLAIN).failed("[1/9]", f"may not {verb} {resource}", "context 'microk8s'")
    assert not desk.cluster.journal


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


# --- what is not there, or was not meant -------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "more", "words"),
    [
        (["--overlay", "nowhere"], {}, ["'nowhere'", "microk8s", "production", "seaweedfs"]),
        (["--overlay"], {}, ["--overlay needs a name"]),
        (["--fast"], {}, ["unknown argument '--fast'"]),
        (["--overlay", "production"], {}, ["REGISTRY is not set"]),
        ([], {"DEPLOY_TIMEOUT": "soon"}, ["DEPLOY_TIMEOUT is 'soon'", "seconds"]),
    ],
)
def test_bad_arguments(
    desk: Desk, arguments: list[str], more: dict[str, str], words: list[str]
) -> None:
    run = desk.deploy(*arguments, **more)
    assert run.code == 2
    assert not run.out
    for word in words:
        assert word in run.err
    assert not desk.calls


def test_help(desk: Desk) -> None:
    for script in ("deploy.sh", "cleanup.sh", "restore.sh"):
        for flag in ("-h", "--help"):
            assert desk.run(script, flag).fine().out.startswith(f"Usage: scripts/{script}")


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
    assert {key_of(item) for item in rendered(desk, "production")} <= desk.cluster.versions().keys()
    assert not any(call[0] in ("docker", "microk8s") for call in desk.calls)
    image = desk.cluster.get("deployments", "mlflow", NAMESPACE)
    containers = image["spec"]["template"]["spec"]["containers"]
    assert containers[0]["image"].startswith("registry.example/team/diabetes-mlflow:")
    assert "https://mlflow.diabetes.example" in run.out


def test_helm_is_told_where_the_cluster_of_microk8s_is(tmp_path: Path) -> None:
    # As docs/operations.md installs it: MicroK8s with its own kubectl, and a Helm beside it.
    for tool in ("bash", "cat", "env", "mktemp", "rm"):
        (tmp_path / tool).symlink_to(shutil.which(tool) or tool)
    for name, body in (("microk8s", 'echo "known to $1"'), ("helm", 'cat "$KUBECONFIG"')):
        (tmp_path / name).write_text(f"#!{tmp_path}/bash\n{body}\n")
        (tmp_path / name).chmod(0o755)
    script = """
        set -euo pipefail
        source scripts/lib/cluster.sh
        find_kubectl
        context=microk8s
        find_helm
        "${HELM[@]}" list
    """
    done = subprocess.run(
        ["bash", "-c", script],
        cwd=PROJECT_ROOT,
        env={"PATH": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "known to config\n", "")
