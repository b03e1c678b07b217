"""The values for Airflow's Helm chart, as far as they can be judged without the chart."""

from __future__ import annotations

import functools
import json
import os
import re
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from services import airflow
from services.state import Secrets
from settings import PROJECT_ROOT, Settings
from tests.manifests import manifests

FOLDER = PROJECT_ROOT / "infra" / "k8s" / "airflow"
LAYERS = {
    "microk8s": ("values.yaml",),
    "production": ("values.yaml", "values-production.yaml"),
}
# Keys of the contract between deploy.sh, the manifests and these values.
SECRETS = {
    "airflow-credentials": {
        "connection",
        "fernet-key",
        "api-secret-key",
        "jwt-secret",
        "postgres-default",
        "passwords.json",
        "admin-password",
    },
    "airflow-monitoring": {"url", "user", "password", "passwords.json"},
    "mlflow-credentials": {"pipeline-password"},
    "api-credentials": {"prediction-log-key"},
}
# What the chart looks for in a Secret of ours that is given by name alone.
IMPLIED = {
    "fernetKeySecretName": "fernet-key",
    "apiSecretKeySecretName": "api-secret-key",
    "jwtSecretName": "jwt-secret",
}
# Names of chart 1.22.0. Its schema takes any at the top, so a misspelt one would do nothing.
TOP_LEVEL = {
    "airflowVersion",
    "apiSecretKeySecretName",
    "apiServer",
    "config",
    "createUserJob",
    "dagProcessor",
    "data",
    "enableBuiltInSecretEnvVars",
    "enableServiceLinks",
    "env",
    "executor",
    "fernetKeySecretName",
    "images",
    "ingress",
    "jwtSecretName",
    "logs",
    "migrateDatabaseJob",
    "networkPolicies",
    "pgbouncer",
    "postgresql",
    "redis",
    "revisionHistoryLimit",
    "scheduler",
    "securityContexts",
    "statsd",
    "triggerer",
    "volumeMounts",
    "volumes",
    "workers",
}
COMPONENTS = ("scheduler", "apiServer", "dagProcessor", "triggerer", "migrateDatabaseJob")
PASSWORDS = "AIRFLOW__CORE__SIMPLE_AUTH_MANAGER_PASSWORDS_FILE"
# Variables of `make run` that have no place in a cluster, and why.
LOCAL_ONLY = {
    "PYTHONPATH": "set by the image",
    "PATH": "set by the image",
    "DIABETES_DB_HOST": "tasks reach the database through the connection postgres_default",
    "DIABETES_DB_PORT": "the same",
    "DIABETES_DB_USER": "the same",
    "DIABETES_DB_PASSWORD": "the same",
    "DIABETES_DB_NAME": "the same",
    "AIRFLOW_HOME": "set by the chart",
    "AIRFLOW__DATABASE__SQL_ALCHEMY_CONN": "set by the chart from data.metadataSecretName",
    "AIRFLOW__CORE__FERNET_KEY": "set by the chart from fernetKeySecretName",
    "AIRFLOW__API__SECRET_KEY": "set by the chart from apiSecretKeySecretName",
    "AIRFLOW__API_AUTH__JWT_SECRET": "set by the chart from jwtSecretName",
    "AIRFLOW__CORE__EXECUTION_API_SERVER_URL": "set by the chart",
    "AIRFLOW__CORE__LOAD_EXAMPLES": "the chart's default",
    "AIRFLOW__API__HOST": "a pod listens on all its addresses",
    "AIRFLOW__API__PORT": "the chart's default",
    "AIRFLOW__API__BASE_URL": "the UI works below whatever host it is asked by",
    "AIRFLOW__SCHEDULER__SCHEDULER_IDLE_SLEEP_TIME": "Kubernetes takes seconds to start a pod",
    "AIRFLOW__DAG_PROCESSOR__REFRESH_INTERVAL": "an image's DAG files never change",
    "AIRFLOW__COSMOS__DBT_DOCS_PROJECTS": "the image holds no catalog of a database",
}
# Set in a cluster to something else.
DIFFERENT = {
    "AIRFLOW__CORE__EXECUTOR",
    "AIRFLOW__CORE__PARALLELISM",
    "AIRFLOW__CORE__DAGS_FOLDER",
    PASSWORDS,
    "AIRFLOW__CORE__SIMPLE_AUTH_MANAGER_USERS",
    "AIRFLOW_CONN_POSTGRES_DEFAULT",
    "DIABETES_STATE_DIR",
    "DIABETES_DBT_MANIFEST",
    "DIABETES_PREDICTION_LOG_KEY",
    "MLFLOW_TRACKING_URI",
}


def merged(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """What Helm makes of two files of values: maps are merged, all else is replaced."""
    result = dict(base)
    for key, value in over.items():
        both_maps = isinstance(value, dict) and isinstance(result.get(key), dict)
        result[key] = merged(result[key], value) if both_maps else value
    return result


@functools.cache
def read(layer: str) -> dict[str, Any]:
    documents = [yaml.safe_load((FOLDER / name).read_text()) for name in LAYERS[layer]]
    return functools.reduce(merged, documents)


@pytest.fixture(params=LAYERS)
def values(request: pytest.FixtureRequest) -> dict[str, Any]:
    return read(request.param)


def nodes(value: Any) -> Iterator[dict[str, Any]]:
    """Every map in a document."""
    if isinstance(value, dict):
        yield value
    for child in value.values() if isinstance(value, dict) else value:
        if isinstance(child, dict | list):
            yield from nodes(child)


def variables(values: dict[str, Any]) -> dict[str, str]:
    """What a task's pod gets: values, and `secret/key` where a Secret is named."""
    found = {"AIRFLOW__CORE__EXECUTOR": str(values["executor"])}
    for section, options in values["config"].items():
        for name, value in options.items():
            found[f"AIRFLOW__{section}__{name}".upper()] = str(value)
    for item in values["env"] + values["workers"]["kubernetes"]["env"]:
        reference = item.get("valueFrom", {}).get("secretKeyRef")
        found[item["name"]] = (
            f"{reference['name']}/{reference['key']}" if reference else item["value"]
        )
    return found


def local(tmp_path: Path) -> dict[str, str]:
    """What `make run` gives to Airflow."""
    chosen = Settings(state_dir=tmp_path)
    return airflow.environment(chosen, Secrets(tmp_path), 5432, 8080, "http://mlflow:5000")


def test_only_known_names_at_the_top(values: dict[str, Any]) -> None:
    assert set(values) <= TOP_LEVEL


def test_secrets_are_those_of_the_contract(values: dict[str, Any]) -> None:
    assert {values[name] for name in IMPLIED} == {"airflow-credentials"}
    assert set(IMPLIED.values()) <= SECRETS["airflow-credentials"]
    assert values["data"]["metadataSecretName"] == "airflow-credentials"
    references = [node["secretKeyRef"] for node in nodes(values) if "secretKeyRef" in node]
    mounted = [
        {"name": node["secret"]["secretName"], "key": item["key"]}
        for node in nodes(values)
        if "secret" in node
        for item in node["secret"]["items"]
    ]
    assert len(references) == 3
    assert len(mounted) == 2
    for reference in references + mounted:
        assert reference["key"] in SECRETS[reference["name"]]


def test_no_value_looks_like_a_secret(values: dict[str, Any]) -> None:
    for name, value in variables(values).items():
        assert not re.search(r"://[^/]*:[^/]*@", value), name
        if re.search(r"PASSWORD$|SECRET|KEY$|CONN", name):
            assert value.split("/")[0] in SECRETS, name


def test_every_pod_is_restricted(values: dict[str, Any]) -> None:
    # Set once at the top, and never overridden below.
    everywhere = [
        node for node in nodes(values) if {"securityContexts", "securityContext"} & {*node}
    ]
    assert everywhere == [values]
    pod, container = values["securityContexts"]["pod"], values["securityContexts"]["containers"]
    assert pod["runAsNonRoot"] is True
    assert pod["runAsUser"] == 50000
    assert pod["seccompProfile"] == {"type": "RuntimeDefault"}
    assert container == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    mounts = {mount["name"]: mount["mountPath"] for mount in values["volumeMounts"]}
    assert mounts == {"tmp": "/tmp", "airflow-home": "/opt/airflow"}  # noqa: S108
    assert all("sizeLimit" in volume["emptyDir"] for volume in values["volumes"])


def test_only_the_scheduler_talks_to_kubernetes(values: dict[str, Any]) -> None:
    tokens = {
        name: values[name]["serviceAccount"]["automountServiceAccountToken"] for name in COMPONENTS
    }
    tokens["worker"] = values["workers"]["kubernetes"]["serviceAccount"][
        "automountServiceAccountToken"
    ]
    assert {name for name, mounted in tokens.items() if mounted} == {"scheduler"}
    assert values["apiServer"]["allowPodLogReading"] is False
    assert values["enableServiceLinks"] is False


def test_every_container_has_requests_and_limits(values: dict[str, Any]) -> None:
    owners = [values[name] for name in COMPONENTS] + [values["workers"]["kubernetes"]]
    owners += [
        values[name]["logGroomerSidecar"]
        for name in COMPONENTS
        if values[name].get("logGroomerSidecar", {}).get("enabled")
    ]
    assert len(owners) == len(COMPONENTS) + 2
    for owner in owners:
        for kind in ("requests", "limits"):
            assert set(owner["resources"][kind]) == {"cpu", "memory"}


def test_a_worker_holds_the_largest_training_task(values: dict[str, Any]) -> None:
    measured = re.search(
        r"largest task held (\d+) MiB",
        (PROJECT_ROOT / "docs" / "benchmarks" / "training" / "results.md").read_text(),
    )
    assert measured
    limit = values["workers"]["kubernetes"]["resources"]["limits"]["memory"]
    assert int(limit.removesuffix("Mi")) >= 1.5 * int(measured[1])


def test_nothing_comes_from_other_registries(values: dict[str, Any]) -> None:
    for part in ("postgresql", "redis", "pgbouncer", "statsd"):
        assert values[part]["enabled"] is False
    assert "repository" not in values["images"]["airflow"]
    assert "gitSync" not in values.get("dags", {})


def test_tasks_get_what_make_run_gives_them(values: dict[str, Any], tmp_path: Path) -> None:
    expected = local(tmp_path)
    given = variables(values)
    assert not set(LOCAL_ONLY) - set(expected), "no longer set by make run"
    assert set(expected) - set(LOCAL_ONLY) <= set(given)
    for name in set(expected) - set(LOCAL_ONLY) - DIFFERENT:
        assert given[name] == expected[name], name


def test_what_the_image_holds_is_where_the_values_say(values: dict[str, Any]) -> None:
    image = (PROJECT_ROOT / "infra" / "docker" / "Dockerfile.airflow").read_text()
    given = variables(values)
    for name in ("AIRFLOW__CORE__DAGS_FOLDER", "DIABETES_STATE_DIR", "DIABETES_DBT_MANIFEST"):
        assert f"{name}={given[name]}" in image
    assert "useradd --uid 50000" in image
    assert f"AIRFLOW_HOME={Path(given[PASSWORDS]).parent} " in image


def test_the_passwords_are_copied_to_where_airflow_looks(
    values: dict[str, Any], tmp_path: Path
) -> None:
    """One file with what is in both Secrets, which only this user may read."""
    *shell, script = values["apiServer"]["args"]
    for mount in values["apiServer"]["extraVolumeMounts"]:
        folder = tmp_path / mount["name"]
        folder.mkdir()
        (folder / "passwords.json").write_text(json.dumps({mount["name"]: 'a "word"'}))
        script = script.replace(f"{mount['mountPath']}/", f"{folder}/")
    target = tmp_path / "made.json"
    script = script.replace(variables(values)[PASSWORDS], str(target))
    script = script.replace("exec airflow ", "exec echo ")
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    done = subprocess.run([*shell, script], env={"PATH": path}, capture_output=True, check=False)
    assert (done.returncode, done.stderr) == (0, b"")
    assert json.loads(target.read_text()) == {
        "passwords": 'a "word"',
        "monitoring-password": 'a "word"',
    }
    assert stat.S_IMODE(target.stat().st_mode) == 0o600


def test_the_exporter_may_only_look(values: dict[str, Any]) -> None:
    users = variables(values)["AIRFLOW__CORE__SIMPLE_AUTH_MANAGER_USERS"]
    assert dict(user.split(":") for user in users.split(",")) == {
        "admin": "admin",
        "metrics": "viewer",
    }


def test_airflow_counts_for_the_exporter_as_make_run_does(values: dict[str, Any]) -> None:
    given = variables(values)
    expected = airflow.statsd_environment(9125)
    expected["AIRFLOW__METRICS__STATSD_HOST"] = "statsd-exporter"
    assert expected.items() <= given.items()
    service = manifests.find(manifests.render("base"), "Service", "statsd-exporter")
    ports = {port["name"]: port for port in service["spec"]["ports"]}
    assert str(ports["statsd"]["port"]) == given[airflow.STATSD_PORT]
    assert ports["statsd"]["protocol"] == "UDP"


def test_tasks_share_a_folder_and_logs(values: dict[str, Any]) -> None:
    worker = values["workers"]["kubernetes"]
    (volume,), (mount,) = worker["extraVolumes"], worker["extraVolumeMounts"]
    assert volume["persistentVolumeClaim"]["claimName"] == "airflow-state"
    assert volume["name"] == mount["name"]
    assert mount["mountPath"] == variables(values)["DIABETES_STATE_DIR"]
    assert values["logs"]["persistence"]["enabled"] is True


def test_the_image_can_run_the_executor(values: dict[str, Any]) -> None:
    assert values["executor"] == "KubernetesExecutor"
    requirements = (PROJECT_ROOT / "requirements" / "airflow.txt").read_text()
    assert re.search(rf"^apache-airflow=={values['airflowVersion']}\b", requirements, re.M)
    assert re.search(r"^apache-airflow-providers-cncf-kubernetes==", requirements, re.M)


def test_production_has_tls_and_no_single_component() -> None:
    values = read("production")
    for name in ("scheduler", "apiServer", "dagProcessor", "triggerer"):
        assert values[name]["replicas"] >= 2
        assert values[name]["podDisruptionBudget"]["enabled"] is True
    for host in values["ingress"]["apiServer"]["hosts"]:
        assert host["tls"]["enabled"] is True
