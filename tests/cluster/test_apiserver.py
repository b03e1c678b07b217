"""The tests' API server, asked by real kubectl: it must refuse and notice what a cluster does."""

from __future__ import annotations

import json
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.deploy.apiserver import Behaviour, Fault, Server, running
from tests.manifests.manifests import KUBECTL


class Kubectl:
    """Real kubectl on the tests' server; `manifest` is a Deployment, a StatefulSet and a Job."""

    def __init__(self, server: Server, folder: Path) -> None:
        self.config = folder / "kubeconfig"
        self.cluster = server.cluster
        self.home = folder
        server.write_kubeconfig(self.config)

    def __call__(self, *arguments: str, sent: object = None) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [KUBECTL, "--kubeconfig", self.config, "--namespace", "space", *arguments],
            input=json.dumps(sent) if sent else "",
            env={"HOME": str(self.home)},
            capture_output=True,
            text=True,
            timeout=30,
            check=False,
        )

    def right(self, *arguments: str, sent: object = None) -> str:
        done = self(*arguments, sent=sent)
        assert not done.returncode, done.stderr
        return done.stdout

    def wrong(self, *arguments: str, sent: object = None) -> str:
        done = self(*arguments, sent=sent)
        assert done.returncode, done.stdout
        return done.stderr

    def apply(self, *more: str, sent: object) -> str:
        return self.right("apply", "--server-side", "--field-manager=a", *more, "-f-", sent=sent)


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with running() as started:
        yield started


@pytest.fixture
def kubectl(server: Server, tmp_path_factory: pytest.TempPathFactory) -> Kubectl:
    server.cluster.reset()
    asked = Kubectl(server, tmp_path_factory.getbasetemp())
    asked.right("create", "namespace", "space")
    return asked


def workload(kind: str, name: str, image: str = "one", **spec: Any) -> dict[str, Any]:
    labels = {"app": name}
    pod = {"containers": [{"name": "main", "image": image}]}
    if kind != "Job":
        spec["selector"] = {"matchLabels": labels}
    return {
        "apiVersion": "batch/v1" if kind == "Job" else "apps/v1",
        "kind": kind,
        "metadata": {"name": name, "labels": labels},
        "spec": {"template": {"metadata": {"labels": labels}, "spec": pod}, **spec},
    }


def test_workloads_become_ready(kubectl: Kubectl) -> None:
    claim = {"metadata": {"name": "state"}, "spec": {"accessModes": ["ReadWriteOnce"]}}
    kubectl.apply(sent=workload("Deployment", "web", replicas=2))
    kubectl.apply(sent=workload("StatefulSet", "store", volumeClaimTemplates=[claim]))
    kubectl.apply(sent=workload("Job", "once"))
    kubectl.right("rollout", "status", "deployment/web", "--timeout=5s")
    kubectl.right("rollout", "status", "statefulset/store", "--timeout=5s")
    kubectl.right("wait", "--for=condition=complete", "job/once", "--timeout=5s")
    pods = kubectl.right("get", "pods", "-o", "name").split()
    assert len(pods) == 4
    assert "pod/store-0" in pods
    kubectl.right("wait", "--for=jsonpath={.status.phase}=Bound", "pvc/state-store-0")
    kubectl.right("delete", "statefulset/store", "deployment/web", "--cascade=foreground")
    assert len(kubectl.right("get", "pods", "-o", "name").split()) == 1
    # A claim outlives its StatefulSet.
    assert kubectl.right("get", "pvc", "-o", "name").split() == [
        "persistentvolumeclaim/state-store-0"
    ]
    shown = kubectl.right("get", "namespace", "space", "--no-headers", "--show-labels").split()
    assert shown[1::2] == ["Active", "kubernetes.io/metadata.name=space"]
    kubectl.right("delete", "namespace", "space", "--timeout=5s")
    assert not kubectl.cluster.versions("space")


def test_a_version_moves_only_with_a_change(kubectl: Kubectl) -> None:
    kubectl.apply(sent=workload("Deployment", "web"))
    kubectl.right("rollout", "status", "deployment/web", "--timeout=5s")
    before = kubectl.cluster.versions("space")
    kubectl.apply(sent=workload("Deployment", "web"))
    kubectl.apply("--dry-run=server", sent=workload("Deployment", "web", "two"))
    kubectl.right("create", "--dry-run=server", "secret", "generic", "key")
    assert kubectl.cluster.versions("space") == before
    assert [request.changed for request in kubectl.cluster.journal[-3:]] == [False] * 3
    kubectl.apply(sent=workload("Deployment", "web", "two"))
    kubectl.right("rollout", "status", "deployment/web", "--timeout=5s")
    after = kubectl.cluster.versions("space")
    changed = ("deployments", "space", "web")
    assert before[changed] != after[changed]
    assert kubectl.cluster.journal[-1].changed


def test_apply_takes_back_its_own_fields_and_no_others(kubectl: Kubectl) -> None:
    labels = {"mine": "1", "gone": "1"}
    settings = {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": {"name": "s", "labels": labels},
    }
    kubectl.apply(sent={**settings, "data": {"a": "1", "b": "2"}})
    kubectl.right("annotate", "configmap/s", "other=1")
    del labels["gone"]
    kubectl.apply(sent={**settings, "data": {"a": "3"}})
    found = kubectl.cluster.get("configmaps", "s", "space")
    assert found["data"] == {"a": "3"}
    assert found["metadata"]["labels"] == {"mine": "1"}
    assert found["metadata"]["annotations"] == {"other": "1"}


def test_owners_of_a_field_conflict(kubectl: Kubectl) -> None:
    kubectl.apply(sent=workload("Deployment", "web", replicas=2))
    kubectl.right("scale", "deployment/web", "--replicas=0")
    command = ("apply", "--server-side", "--field-manager=a", "-f-")
    refused = kubectl.wrong(*command, sent=workload("Deployment", "web", replicas=2))
    assert 'conflict with "kubectl"' in refused
    assert ".spec.replicas" in refused
    kubectl.apply("--force-conflicts", sent=workload("Deployment", "web", replicas=2))
    assert kubectl.cluster.get("deployments", "web", "space")["spec"]["replicas"] == 2


def test_what_is_immutable(kubectl: Kubectl) -> None:
    kubectl.apply(sent=workload("Job", "once"))
    kubectl.apply(sent=workload("StatefulSet", "store", serviceName="a"))
    command = ("apply", "--server-side", "--field-manager=a", "-f-")
    job = kubectl.wrong(*command, sent=workload("Job", "once", "two"))
    assert 'The Job "once" is invalid: spec.template' in job
    assert "field is immutable" in job
    store = kubectl.wrong(*command, sent=workload("StatefulSet", "store", serviceName="b"))
    assert "updates to statefulset spec for fields other than" in store


def test_what_never_gets_ready(kubectl: Kubectl) -> None:
    kubectl.cluster.behaviours |= {
        "web": Behaviour(waiting="CrashLoopBackOff", log="before\nthe end\n"),
        "once": Behaviour(fails=True),
        "store": Behaviour(waiting="ImagePullBackOff", image="one"),
    }
    kubectl.apply(sent=workload("Deployment", "web"))
    kubectl.apply(sent=workload("StatefulSet", "store"))
    kubectl.apply(sent=workload("Job", "once"))
    assert "timed out" in kubectl.wrong("rollout", "status", "deployment/web", "--timeout=300ms")
    kubectl.right("wait", "--for=condition=Failed", "job/once", "--timeout=5s")
    assert "CrashLoopBackOff" in kubectl.right("get", "pods")
    log = ("logs", "deployment/web", "--tail=1")
    assert kubectl.right(*log, "--previous") == "the end\n"
    assert "waiting to start" in kubectl.wrong("logs", "store-0")
    assert "Pod/store-0" in kubectl.right("events")
    # As on a cluster: the mended StatefulSet waits for its stuck pod for ever.
    kubectl.apply(sent=workload("StatefulSet", "store", "two"))
    kubectl.wrong("rollout", "status", "statefulset/store", "--timeout=300ms")
    kubectl.right("delete", "pod", "store-0")
    kubectl.right("rollout", "status", "statefulset/store", "--timeout=5s")


def test_faults(kubectl: Kubectl) -> None:
    faults = kubectl.cluster.faults
    faults.append(Fault("forbidden", "create", "secrets", times=1))
    assert "no" in kubectl("auth", "can-i", "create", "secrets").stdout
    assert "cannot create resource" in kubectl.wrong("create", "secret", "generic", "key")
    kubectl.right("create", "secret", "generic", "key", "--from-literal=a=b")
    assert kubectl.right("get", "secret", "key", "-o", "jsonpath={.data.a}") == "Yg=="
    faults[:] = [Fault("error", "get", "secrets", times=1)]
    assert "Internal error" in kubectl.wrong("get", "secret", "key")
    faults[:] = [Fault("close", "get", "secrets", times=1)]
    assert "EOF" in kubectl.wrong("get", "secret", "key")
    faults[:] = [Fault("hang", "get", "secrets", times=1)]
    kubectl.wrong("get", "secret", "key", "--request-timeout=300ms")
    kubectl.right("get", "secret", "key")


def test_a_watch_hears_what_enters_and_leaves_its_selection(kubectl: Kubectl) -> None:
    command = ["get", "configmaps", "-l", "seen", "--watch", "--output-watch-events"]
    heard: list[str] = []
    more = ("-o", "jsonpath={.type}{'\\n'}", "--request-timeout=2s")
    watcher = threading.Thread(target=lambda: heard.extend(kubectl(*command, *more).stdout.split()))
    watcher.start()
    settings: dict[str, Any] = {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "s"}}
    kubectl.apply(sent=settings)
    kubectl.right("label", "configmap/s", "seen=1")
    kubectl.right("label", "configmap/s", "seen-")
    watcher.join()
    assert heard == ["ADDED", "DELETED"]


@pytest.mark.parametrize(
    ("selector", "names"),
    [
        ("app=one", "one"),
        ("app==one", "one"),
        ("app!=one", "three two"),
        ("app in (one, two)", "one two"),
        ("app notin (one,two)", "three"),
        ("app", "one two"),
        ("!app", "three"),
        ("app,app!=two", "one"),
    ],
)
def test_selectors(kubectl: Kubectl, selector: str, names: str) -> None:
    for name in ("one", "two", "three"):
        labels = {"app": name, "all": "1"} if name != "three" else {"all": "1"}
        metadata = {"name": name, "labels": labels}
        kubectl.cluster.create("secrets", "space", {"metadata": metadata})
    command = (
        "get",
        "secrets",
        "-l",
        f"all,{selector}",
        "-o",
        "jsonpath={.items[*].metadata.name}",
    )
    assert kubectl.right(*command) == names
