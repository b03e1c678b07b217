"""scripts/cleanup.sh end to end: real kubectl on the tests' cluster, Helm a stub."""

from __future__ import annotations

import pytest

from tests.deploy.apiserver import Behaviour, Fault, Key
from tests.deploy.desk import NAMESPACE, Desk, settled

KEPT = {"persistentvolumeclaims", "secrets", "namespaces", "serviceaccounts"}
ROOT_CA: Key = ("configmaps", NAMESPACE, "kube-root-ca.crt")


def left(desk: Desk) -> set[Key]:
    settled(desk.cluster)
    return set(desk.cluster.versions(NAMESPACE)) - {ROOT_CA}


def claims(desk: Desk) -> dict[str, str]:
    """Names and identities: a claim that comes anew has lost its data."""
    return {
        item["metadata"]["name"]: item["metadata"]["uid"]
        for item in desk.cluster.list("persistentvolumeclaims", NAMESPACE)
    }


def test_data_and_secrets_stay_and_are_used_again(deployed: Desk) -> None:
    secrets, volumes = deployed.secrets(), claims(deployed)
    assert len(volumes) >= 4
    own = {"metadata": {"name": "somebody-elses"}, "data": {"a": "b"}}
    deployed.cluster.create("configmaps", NAMESPACE, own)
    deployed.cluster.journal.clear()
    run = deployed.run("cleanup.sh").fine()
    somebody_elses: Key = ("configmaps", NAMESPACE, "somebody-elses")
    assert {key[0] for key in left(deployed) - {somebody_elses}} == KEPT
    assert somebody_elses in left(deployed)
    assert deployed.secrets() == secrets
    assert claims(deployed) == volumes
    for name in (*secrets, *volumes):
        assert f"/{name}\n" in run.out
    assert "--purge" in run.out
    # Twice is no harm.
    deployed.cluster.journal.clear()
    assert "Nothing to remove" in deployed.run("cleanup.sh").fine().out
    assert not deployed.changes()
    deployed.deploy("--skip-build").fine()
    assert deployed.secrets() == secrets
    assert claims(deployed) == volumes


@pytest.mark.parametrize("typed", ["", "yes\n", "diabetes\n"])
def test_a_purge_that_is_not_confirmed_removes_nothing(deployed: Desk, typed: str) -> None:
    run = deployed.run("cleanup.sh", "--purge", typed=typed)
    run.failed("not confirmed; nothing was removed")
    assert "for good" in run.out
    assert not deployed.changes()


def test_a_confirmed_purge_leaves_nothing(deployed: Desk) -> None:
    deployed.run("cleanup.sh", "--purge", typed=f"{NAMESPACE}\n").fine()
    assert not deployed.cluster.versions(NAMESPACE)
    deployed.cluster.journal.clear()
    assert "Nothing to remove" in deployed.run("cleanup.sh", "--purge", "--yes").fine().out
    assert not deployed.changes()


def test_a_purge_after_a_cleanup_takes_the_rest(deployed: Desk) -> None:
    others = set(deployed.cluster.versions()) - set(deployed.cluster.versions(NAMESPACE))
    deployed.run("cleanup.sh").fine()
    deployed.run("cleanup.sh", "--purge", "--yes").fine()
    settled(deployed.cluster)
    assert set(deployed.cluster.versions()) == others


def test_a_dry_run_only_tells(deployed: Desk) -> None:
    run = deployed.run("cleanup.sh", "--dry-run").fine()
    for name in ("statefulset.apps/postgres", "deployment.apps/mlflow", "release airflow"):
        assert name in run.out
    assert "persistentvolumeclaim/" in run.out.partition("Would keep")[2]
    assert not deployed.changes()


@pytest.mark.parametrize(
    ("arguments", "code", "word"),
    [
        (["--namespace", "default"], 2, "'default' is not this project's"),
        (["--namespace", "kube-system", "--purge", "--yes"], 2, "'kube-system'"),
        (["--context", "nowhere"], 1, "no context 'nowhere'"),
        (["--overlay", "nowhere"], 2, "'nowhere'"),
        (["everything"], 2, "unknown argument 'everything'"),
    ],
)
def test_what_it_refuses(deployed: Desk, arguments: list[str], code: int, word: str) -> None:
    run = deployed.run("cleanup.sh", *arguments)
    assert run.code == code
    assert word in run.err
    assert not deployed.changes()


def test_the_cluster_must_be_meant(deployed: Desk) -> None:
    deployed.server.write_kubeconfig(deployed.folder / "elsewhere", "other", "microk8s")
    run = deployed.run("cleanup.sh", "--yes", KUBECONFIG=str(deployed.folder / "elsewhere"))
    run.failed("current context is 'other'")
    assert not deployed.changes()


def test_a_namespace_of_somebody_else_is_left_alone(laid_out: Desk) -> None:
    laid_out.clear()
    laid_out.cluster.create("namespaces", "", {"metadata": {"name": NAMESPACE}})
    laid_out.run("cleanup.sh", "--purge", "--yes").failed("app.kubernetes.io/part-of")
    assert not laid_out.changes()


def test_what_cannot_be_removed_is_told(deployed: Desk) -> None:
    deployed.cluster.faults.append(Fault("forbidden", "delete", "statefulsets"))
    run = deployed.run("cleanup.sh").failed("cannot delete resource", "run this again")
    assert run.err.count("error: ") == 1
    # Its pods come back: the StatefulSet wants them.
    deployed.cluster.behaviours["postgres"] = Behaviour(stuck=True)
    deployed.cluster.faults.clear()
    deployed.run("cleanup.sh").fine()
    assert {key[0] for key in left(deployed)} == KEPT


def test_helm_is_needed_where_its_release_is(deployed: Desk) -> None:
    with deployed.without("helm", "microk8s"):
        deployed.run("cleanup.sh").failed("release airflow is there", "install Helm")
    failing = f"helm --kube-context microk8s --namespace {NAMESPACE} uninstall"
    deployed.run("cleanup.sh", STUB_FAIL=failing).failed("helm could not remove release airflow")
    assert not deployed.changes()
