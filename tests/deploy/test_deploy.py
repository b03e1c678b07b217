"""scripts/deploy.sh end to end: real kubectl on the tests' cluster, stubs for Docker and Helm."""

from __future__ import annotations

import base64
import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from settings import PROJECT_ROOT
from tests.deploy.apiserver import NODE_IP, Key
from tests.deploy.desk import (
    NAMESPACE,
    ORDER,
    Desk,
    First,
    consistent,
    key_of,
    settled,
)

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


def changed(before: dict[Key, str], after: dict[Key, str]) -> set[Key]:
    return {key for key in before.keys() | after.keys() if before.get(key) != after.get(key)}


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


# --- the other overlays ------------------------------------------------------------------------


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
