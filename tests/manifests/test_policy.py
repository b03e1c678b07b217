"""Each check of policy.py says nothing of good objects and names what is broken."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import yaml

from tests.manifests import policy
from tests.manifests.manifests import Object, find
from tests.manifests.policy import Peer

HASHED = "settings-5g5b7cdf9k"
SECRETS = {"store-credentials": ["password"], "page-credentials": ["key.ini"]}
NODE_PORTS = {"page/http": 30602}

_SPEC = """
  automountServiceAccountToken: false
  enableServiceLinks: false
  terminationGracePeriodSeconds: 30
  securityContext:
    runAsNonRoot: true
    runAsUser: 10001
    runAsGroup: 10001
    fsGroup: 10001
    seccompProfile: {type: RuntimeDefault}
  volumes:
    - name: tmp
      emptyDir: {sizeLimit: 16Mi}
"""
_CONTAINER = """
name: main
image: registry.example:5000/ours/thing:1.0
imagePullPolicy: IfNotPresent
securityContext:
  allowPrivilegeEscalation: false
  readOnlyRootFilesystem: true
  capabilities: {drop: [ALL]}
resources:
  requests: {cpu: 100m, memory: 64Mi}
  limits: {cpu: "1", memory: 128Mi}
volumeMounts:
  - {name: tmp, mountPath: /scratch}
"""
_PROBES = {
    name: {"httpGet": {"path": "/health", "port": "http"}}
    for name in ("startupProbe", "readinessProbe", "livenessProbe")
}


def _about(name: str, step: str = "5-services") -> Object:
    return {
        "name": name,
        "namespace": "diabetes-mlops",
        "labels": {
            "app.kubernetes.io/name": name,
            "app.kubernetes.io/part-of": "diabetes-readmission",
            "deploy-step": step,
        },
    }


def _thing(api: str, kind: str, name: str, **content: Any) -> Object:
    return {"apiVersion": api, "kind": kind, "metadata": _about(name), **content}


def _template(name: str, probes: bool, **container: Any) -> Object:
    spec = yaml.safe_load(_SPEC)
    main = yaml.safe_load(_CONTAINER) | (_PROBES if probes else {"command": ["true"]}) | container
    return {
        "metadata": {"labels": {"app.kubernetes.io/name": name}},
        "spec": spec | {"containers": [main]},
    }


def _selector(name: str) -> Object:
    return {"matchLabels": {"app.kubernetes.io/name": name}}


def _policy(name: str, selector: Object, **rules: Any) -> Object:
    types = [kind for kind in ("Ingress", "Egress") if kind.lower() in rules]
    spec = {"podSelector": selector, "policyTypes": types} | rules
    return _thing("networking.k8s.io/v1", "NetworkPolicy", name, spec=spec)


def good() -> list[Object]:
    """A page that asks a store, with all that belongs to them."""
    ask_store = [{"protocol": "TCP", "port": "sql"}]
    page = _template("page", True, ports=[{"name": "http", "containerPort": 8501}])
    main = page["spec"]["containers"][0]
    main["env"] = [
        {"name": "STORE_HOST", "value": "store"},
        {
            "name": "STORE_PORT",
            "valueFrom": {"configMapKeyRef": {"name": HASHED, "key": "port"}},
        },
        {
            "name": "STORE_PASSWORD",
            "valueFrom": {"secretKeyRef": {"name": "store-credentials", "key": "password"}},
        },
        {"name": "STORE_URL", "value": "sql://page:$(STORE_PASSWORD)@$(STORE_HOST)"},
        {"name": "HOME", "value": "/scratch/home"},
    ]
    main["args"] = ["--store=$(STORE_URL)"]
    main["volumeMounts"].append({"name": "key", "mountPath": "/etc/key", "readOnly": True})
    page["spec"]["volumes"].append(
        {
            "name": "key",
            "secret": {
                "secretName": "page-credentials",
                "items": [{"key": "key.ini", "path": "key.ini"}],
            },
        }
    )
    page["spec"]["initContainers"] = [yaml.safe_load(_CONTAINER) | {"name": "first"}]
    store = _template("store", True, ports=[{"name": "http", "containerPort": 8080}])
    store["spec"]["containers"][0]["ports"].append({"name": "sql", "containerPort": 5432})
    store["spec"]["containers"][0]["volumeMounts"].append({"name": "data", "mountPath": "/data"})
    once = _template("once", False)
    once["spec"]["restartPolicy"] = "Never"
    once["spec"]["volumes"].append({"name": "kept", "persistentVolumeClaim": {"claimName": "kept"}})
    once["spec"]["containers"][0]["volumeMounts"].append({"name": "kept", "mountPath": "/kept"})
    nightly = _template("nightly", False)
    nightly["spec"]["restartPolicy"] = "Never"
    finite = {"backoffLimit": 0, "activeDeadlineSeconds": 60}
    claim = {
        "accessModes": ["ReadWriteOnce"],
        "resources": {"requests": {"storage": "1Gi"}},
    }
    namespace = {
        "apiVersion": "v1",
        "kind": "Namespace",
        "metadata": _about("diabetes-mlops", "1-storage"),
    }
    del namespace["metadata"]["namespace"]
    namespace["metadata"]["labels"] |= {
        f"pod-security.kubernetes.io/{mode}": "restricted" for mode in ("enforce", "audit", "warn")
    }
    return [
        namespace,
        _thing(
            "v1", "ConfigMap", HASHED, data={"port": "5432", "ask": "store.diabetes-mlops:8080"}
        ),
        _thing("v1", "PersistentVolumeClaim", "kept", spec=claim),
        _thing(
            "apps/v1",
            "Deployment",
            "page",
            spec={"selector": _selector("page"), "template": page},
        ),
        _thing(
            "apps/v1",
            "StatefulSet",
            "store",
            spec={
                "replicas": 1,
                "serviceName": "store",
                "selector": _selector("store"),
                "template": store,
                "volumeClaimTemplates": [{"metadata": {"name": "data"}, "spec": claim}],
            },
        ),
        _thing("batch/v1", "Job", "once", spec={"template": once, **finite}),
        _thing(
            "batch/v1",
            "CronJob",
            "nightly",
            spec={
                "schedule": "17 3 * * *",
                "timeZone": "Etc/UTC",
                "concurrencyPolicy": "Forbid",
                "startingDeadlineSeconds": 3600,
                "jobTemplate": {"spec": {"template": nightly, **finite}},
            },
        ),
        _thing(
            "v1",
            "Service",
            "page",
            spec={
                "type": "NodePort",
                "selector": {"app.kubernetes.io/name": "page"},
                "ports": [{"name": "http", "port": 80, "targetPort": "http", "nodePort": 30602}],
            },
        ),
        _thing(
            "v1",
            "Service",
            "store",
            spec={
                "selector": {"app.kubernetes.io/name": "store"},
                "ports": [
                    {"name": "sql", "port": 5432, "targetPort": "sql"},
                    {"name": "http", "port": 8080, "targetPort": 8080},
                ],
            },
        ),
        _thing(
            "networking.k8s.io/v1",
            "Ingress",
            "ways-in",
            spec={
                "tls": [{"hosts": ["page.example"], "secretName": "certificate"}],
                "rules": [
                    {
                        "host": "page.example",
                        "http": {
                            "paths": [
                                {
                                    "path": "/",
                                    "pathType": "Prefix",
                                    "backend": {
                                        "service": {"name": "page", "port": {"name": "http"}}
                                    },
                                }
                            ]
                        },
                    }
                ],
            },
        ),
        _thing(
            "policy/v1",
            "PodDisruptionBudget",
            "page",
            spec={"minAvailable": 1, "selector": _selector("page")},
        ),
        _thing(
            "autoscaling/v2",
            "HorizontalPodAutoscaler",
            "page",
            spec={
                "minReplicas": 2,
                "maxReplicas": 4,
                "scaleTargetRef": {"apiVersion": "apps/v1", "kind": "Deployment", "name": "page"},
            },
        ),
        _policy("default-deny", {}, ingress=[], egress=[]),
        _policy(
            "page",
            _selector("page"),
            ingress=[
                {
                    "from": [
                        {
                            "namespaceSelector": {
                                "matchLabels": {"kubernetes.io/metadata.name": "ingress"}
                            }
                        },
                        {"ipBlock": {"cidr": "0.0.0.0/0", "except": ["10.1.0.0/16"]}},
                    ],
                    "ports": [{"port": "http"}],
                }
            ],
            egress=[{"to": [{"podSelector": _selector("store")}], "ports": ask_store}],
        ),
        _policy(
            "store",
            _selector("store"),
            ingress=[
                {
                    "from": [
                        {
                            "podSelector": {
                                "matchExpressions": [
                                    {
                                        "key": "app.kubernetes.io/name",
                                        "operator": "In",
                                        "values": ["page", "once"],
                                    }
                                ]
                            }
                        }
                    ],
                    "ports": ask_store,
                }
            ],
        ),
    ]


def _references(objects: list[Object]) -> list[str]:
    return policy.references(objects, SECRETS, external={"certificate"})


CHECKS: dict[str, Callable[[list[Object]], list[str]]] = {
    "schema": lambda objects: policy.schema(objects, "1.37"),
    "metadata": policy.metadata,
    "namespace": policy.namespace,
    "confidential": policy.confidential,
    "schedules": policy.schedules,
    "selectors": policy.selectors,
    "ports": policy.ports,
    "node_ports": lambda objects: policy.node_ports(objects, NODE_PORTS),
    "references": _references,
    "unresolved": policy.unresolved,
    "scaling": policy.scaling,
    "restricted": policy.restricted,
    "strict": policy.strict,
    "mounts": policy.mounts,
    "writable": lambda objects: policy.writable(objects, {"main": ["/scratch"], "first": []}),
    "images": policy.images,
    "default_deny": policy.default_deny,
}
GONE = object()

_POD = "Deployment page/spec/template/spec"
_MAIN = f"{_POD}/containers/0"
_ENV = f"{_MAIN}/env"
_CRON = "CronJob nightly/spec"
_DATA = {"v1": "x", "accessModes": []}
BROKEN: list[tuple[str, str, Any, str]] = [
    ("schema", "Deployment page/spec/replica", 2, "'replica' was unexpected"),
    ("schema", f"{_MAIN}/ports/0/containerPort", "8501", "is not of type 'integer'"),
    ("schema", f"{_MAIN}/image", 5, "Deployment page, Kubernetes 1.37: spec.template"),
    ("schema", "Deployment page/spec/selector", GONE, "'selector' is a required property"),
    ("schema", "CronJob nightly/apiVersion", "batch/v1beta1", "Couldn't find schema"),
    ("metadata", "Service store/metadata/namespace", "default", "namespace is not"),
    ("metadata", "Service store/metadata/labels", {}, "no label app.kubernetes.io/name"),
    ("metadata", "Service store/metadata/labels/app.kubernetes.io~1part-of", "x", "part-of is not"),
    ("metadata", "Service store/metadata/labels/deploy-step", "9-last", "deploy-step is '9-last'"),
    (
        "metadata",
        "Deployment page/spec/template/metadata/labels/deploy-step",
        "3-mlflow",
        "deploy-step is in its pod",
    ),
    ("metadata", "Service store/metadata/name", "page", "Service page: 2 times"),
    (
        "namespace",
        "Namespace diabetes-mlops/metadata/labels/pod-security.kubernetes.io~1enforce",
        "baseline",
        "enforce is not restricted",
    ),
    ("namespace", "Namespace diabetes-mlops/metadata/name", "other", "not exactly the Namespace"),
    ("confidential", "Service store/kind", "Secret", "Secrets are made by deploy.sh"),
    ("confidential", f"ConfigMap {HASHED}/data/admin-password", "x", "sounds like a secret"),
    ("confidential", f"ConfigMap {HASHED}/data/ask", "sql://me:pass@store", "with a password"),
    ("confidential", f"ConfigMap {HASHED}/data/ask", "k = aB3" * 9 + "aB3xY" * 6, "generated"),
    ("confidential", f"ConfigMap {HASHED}/data/ask", "0123456789abcdef" * 2, "generated"),
    ("confidential", f"ConfigMap {HASHED}/data/x", "-----BEGIN PRIVATE KEY-----", "private key"),
    ("confidential", f"ConfigMap {HASHED}/binaryData", {"x": "eA=="}, "nobody can look through"),
    (
        "confidential",
        f"{_ENV}/2",
        {"name": "STORE_PASSWORD", "value": "x"},
        "STORE_PASSWORD is written out",
    ),
    ("confidential", f"{_ENV}/0/value", "sql://page:pass@store", "an address with a password"),
    ("confidential", f"{_MAIN}/args/0", "--store=sql://page:pass@store", "an argument holds"),
    ("schedules", f"{_CRON}/schedule", "61 3 * * *", "schedule '61 3 * * *' is none"),
    ("schedules", f"{_CRON}/schedule", "0 17 3 * * *", "is none"),
    ("schedules", f"{_CRON}/timeZone", GONE, "timeZone None is none"),
    (
        "selectors",
        "Deployment page/spec/selector/matchLabels/app.kubernetes.io~1name",
        "pag",
        "does not match its own pods",
    ),
    ("selectors", "Deployment page/spec/selector", {}, "its selector is empty"),
    ("selectors", "StatefulSet store/spec/serviceName", "stores", "Service stores does not exist"),
    (
        "selectors",
        "Service store/spec/selector/app.kubernetes.io~1name",
        "stor",
        "Service store: selects none",
    ),
    (
        "selectors",
        "Job once/spec/template/metadata/labels/app.kubernetes.io~1name",
        "store",
        "selects StatefulSet store, Job once, not exactly one",
    ),
    (
        "selectors",
        "PodDisruptionBudget page/spec/selector/matchLabels/app.kubernetes.io~1name",
        "pages",
        "PodDisruptionBudget page: selects none",
    ),
    (
        "selectors",
        "NetworkPolicy page/spec/podSelector/matchLabels/app.kubernetes.io~1name",
        "pages",
        "NetworkPolicy page: selects no pod",
    ),
    (
        "selectors",
        "NetworkPolicy store/spec/ingress/0/from/0/podSelector/matchExpressions/0/values/1",
        "twice",
        "NetworkPolicy store: names pods twice, which do not exist",
    ),
    ("ports", "Service store/spec/ports/0/targetPort", "mysql", "targetPort mysql is no port"),
    ("ports", "Service store/spec/ports/1/targetPort", 8081, "targetPort 8081 is no port"),
    ("ports", f"{_MAIN}/readinessProbe/httpGet/port", 9, "readinessProbe asks port 9"),
    (
        "ports",
        "Ingress ways-in/spec/rules/0/http/paths/0/backend/service/name",
        "pages",
        "page.example leads to Service pages port http",
    ),
    (
        "ports",
        "Ingress ways-in/spec/rules/0/http/paths/0/backend/service/port",
        {"number": 81},
        "Service page port 81",
    ),
    ("node_ports", "Service page/spec/ports/0/nodePort", 30603, "30603, expected 30602"),
    ("node_ports", "Service page/spec/ports/0/nodePort", 8080, "is not in 30000-32767"),
    ("node_ports", "Service page/spec/ports/0/nodePort", GONE, "is left to chance"),
    ("node_ports", "Service store/spec/ports/0/nodePort", 30602, "30602 is given twice"),
    ("node_ports", "Service store/spec/type", "NodePort", "Service store/sql: its NodePort"),
    ("node_ports", "Service store/spec/type", "LoadBalancer", "opens it to the outside"),
    ("node_ports", "Service page/spec/type", "ClusterIP", "names a NodePort but is a ClusterIP"),
    (
        "references",
        f"{_ENV}/2/valueFrom/secretKeyRef/name",
        "store-secrets",
        "Secret store-secrets does not exist",
    ),
    (
        "references",
        f"{_ENV}/2/valueFrom/secretKeyRef/key",
        "pass",
        "Secret store-credentials has no key pass",
    ),
    (
        "references",
        f"{_ENV}/1/valueFrom/configMapKeyRef/name",
        "settings",
        "ConfigMap settings does not exist",
    ),
    ("references", f"{_ENV}/1/valueFrom/configMapKeyRef/key", "ports", "has no key ports"),
    ("references", f"{_MAIN}/envFrom", [{"configMapRef": {"name": "x"}}], "ConfigMap x does not"),
    ("references", f"{_MAIN}/envFrom", [{"secretRef": {"name": "x"}}], "Secret x does not exist"),
    ("references", f"{_POD}/volumes/1/secret/secretName", "x", "Secret x does not exist"),
    ("references", f"{_POD}/volumes/1/secret/items/0/key", "x", "has no key x"),
    (
        "references",
        f"{_POD}/volumes/0",
        {"name": "tmp", "projected": {"sources": [{"secret": {"name": "x"}}]}},
        "Secret x does not exist",
    ),
    (
        "references",
        f"{_POD}/volumes/0",
        {"name": "tmp", "configMap": {"name": HASHED, "items": [{"key": "x", "path": "x"}]}},
        f"ConfigMap {HASHED} has no key x",
    ),
    ("references", f"{_POD}/imagePullSecrets", [{"name": "pull"}], "Secret pull does not exist"),
    ("references", "Ingress ways-in/spec/tls/0/secretName", "cert", "Secret cert does not exist"),
    (
        "references",
        "PersistentVolumeClaim kept/metadata/name",
        "lost",
        "PersistentVolumeClaim kept does not exist",
    ),
    ("unresolved", f"{_MAIN}/args/0", "--store=$(STORE)", "$(STORE) is unknown"),
    ("unresolved", f"{_ENV}/0/value", "$(STORE_URL)", "STORE_HOST uses $(STORE_URL)"),
    ("unresolved", f"{_ENV}/4/name", "STORE_HOST", "STORE_HOST given twice"),
    ("scaling", "HorizontalPodAutoscaler page/spec/minReplicas", 5, "minReplicas 5 > 4"),
    ("scaling", "HorizontalPodAutoscaler page/spec/minReplicas", 1, "lets no node be drained"),
    (
        "scaling",
        "HorizontalPodAutoscaler page/spec/scaleTargetRef/name",
        "pages",
        "Deployment pages does not exist",
    ),
    ("scaling", "Deployment page/spec/replicas", 2, "each apply would undo the scaling"),
    (
        "scaling",
        "PodDisruptionBudget page/spec/selector/matchLabels/app.kubernetes.io~1name",
        "store",
        "Deployment page: 2 replicas, and no PodDisruptionBudget",
    ),
    ("scaling", "PodDisruptionBudget page/spec/minAvailable", 2, "minAvailable 2 of 2 replicas"),
    ("scaling", "PodDisruptionBudget page/spec/minAvailable", "100%", "no node be drained"),
    ("scaling", "PodDisruptionBudget page/spec/maxUnavailable", 0, "no node be drained"),
    ("restricted", f"{_POD}/hostNetwork", True, "hostNetwork is on"),
    ("restricted", f"{_POD}/hostPID", True, "hostPID is on"),
    ("restricted", f"{_POD}/hostIPC", True, "hostIPC is on"),
    (
        "restricted",
        f"{_POD}/volumes/0",
        {"name": "tmp", "hostPath": {"path": "/"}},
        "volume tmp is hostPath",
    ),
    ("restricted", f"{_POD}/securityContext/sysctls", [{"name": "x"}], "sets sysctls"),
    ("restricted", f"{_POD}/securityContext/runAsNonRoot", GONE, "may run as root"),
    ("restricted", f"{_MAIN}/securityContext/runAsNonRoot", False, "may run as root"),
    ("restricted", f"{_POD}/securityContext/runAsUser", 0, "container first runs as user 0"),
    ("restricted", f"{_MAIN}/securityContext/runAsUser", 0, "container main runs as user 0"),
    ("restricted", f"{_POD}/securityContext/seccompProfile", GONE, "has no seccomp profile"),
    (
        "restricted",
        f"{_MAIN}/securityContext/seccompProfile",
        {"type": "Unconfined"},
        "has no seccomp profile",
    ),
    (
        "restricted",
        f"{_POD}/initContainers/0/securityContext/capabilities",
        GONE,
        "container first does not drop ALL",
    ),
    (
        "restricted",
        f"{_MAIN}/securityContext/capabilities/add",
        ["SYS_ADMIN"],
        "adds capabilities",
    ),
    ("restricted", f"{_MAIN}/securityContext/privileged", True, "is privileged"),
    ("restricted", f"{_MAIN}/securityContext/allowPrivilegeEscalation", GONE, "allows privilege"),
    ("restricted", f"{_MAIN}/securityContext/procMount", "Unmasked", "changes /proc"),
    ("restricted", f"{_MAIN}/securityContext/seLinuxOptions", {"user": "x"}, "changes SELinux"),
    (
        "restricted",
        f"{_POD}/securityContext/appArmorProfile",
        {"type": "Unconfined"},
        "changes AppArmor",
    ),
    (
        "restricted",
        f"{_POD}/securityContext/windowsOptions",
        {"hostProcess": True},
        "a Windows host process",
    ),
    ("restricted", f"{_MAIN}/ports/0/hostPort", 80, "opens a port of the node"),
    ("restricted", f"{_MAIN}/livenessProbe/httpGet/host", "x", "that names a host"),
    (
        "restricted",
        f"{_MAIN}/lifecycle",
        {"preStop": {"httpGet": {"host": "x", "port": 1}}},
        "that names a host",
    ),
    ("strict", f"{_POD}/automountServiceAccountToken", GONE, "automountServiceAccountToken is not"),
    ("strict", f"{_POD}/enableServiceLinks", True, "enableServiceLinks is not false"),
    ("strict", f"{_POD}/terminationGracePeriodSeconds", GONE, "no terminationGracePeriodSeconds"),
    (
        "strict",
        "StatefulSet store/spec/template/spec/securityContext/fsGroup",
        GONE,
        "StatefulSet store: no fsGroup",
    ),
    ("strict", f"{_POD}/volumes/0/emptyDir", {}, "volume tmp has no sizeLimit"),
    ("strict", f"{_MAIN}/securityContext/readOnlyRootFilesystem", GONE, "can write its root"),
    ("strict", f"{_POD}/securityContext/runAsUser", GONE, "has no runAsUser"),
    ("strict", f"{_POD}/securityContext/runAsGroup", GONE, "has no runAsGroup"),
    ("strict", f"{_MAIN}/imagePullPolicy", "Always", "has no imagePullPolicy IfNotPresent"),
    ("strict", f"{_MAIN}/startupProbe", GONE, "main has no startupProbe"),
    ("strict", f"{_MAIN}/readinessProbe", GONE, "main has no readinessProbe"),
    ("strict", f"{_MAIN}/livenessProbe", GONE, "main has no livenessProbe"),
    ("strict", f"{_MAIN}/resources/requests/cpu", GONE, "has no request of cpu"),
    ("strict", f"{_MAIN}/resources/limits/memory", GONE, "has no limit of memory"),
    ("strict", f"{_MAIN}/resources/requests/memory", "1Gi", "1Gi memory, more than its limit"),
    ("strict", "Job once/spec/activeDeadlineSeconds", GONE, "Job once: no activeDeadlineSeconds"),
    ("strict", "Job once/spec/backoffLimit", GONE, "Job once: no backoffLimit"),
    ("strict", f"{_CRON}/concurrencyPolicy", GONE, "two runs may overlap"),
    ("strict", f"{_CRON}/startingDeadlineSeconds", GONE, "no startingDeadlineSeconds"),
    ("strict", f"{_CRON}/jobTemplate/spec/backoffLimit", GONE, "CronJob nightly: no backoffLimit"),
    ("strict", "Job once/spec/template/spec/restartPolicy", GONE, "neither Never nor OnFailure"),
    ("mounts", f"{_MAIN}/volumeMounts/0/name", "temp", "volume temp does not exist"),
    (
        "mounts",
        f"{_POD}/volumes/2",
        {"name": "more", "emptyDir": {}},
        "volume more is mounted nowhere",
    ),
    ("mounts", f"{_MAIN}/volumeMounts/1/mountPath", "/scratch/", "main mounts /scratch twice"),
    ("writable", f"{_MAIN}/volumeMounts/0/mountPath", "/elsewhere", "can't write /scratch"),
    ("writable", f"{_MAIN}/volumeMounts/0/readOnly", True, "can't write /scratch"),
    ("writable", f"{_MAIN}/volumeMounts/1/mountPath", "/scratch/home", "can't write /scratch/home"),
    ("writable", f"{_ENV}/4/value", "/home/page", "can't write /home/page"),
    ("writable", f"{_MAIN}/workingDir", "/work", "can't write /work"),
    ("writable", f"{_MAIN}/name", "other", "nobody has said where container other writes"),
    ("images", f"{_MAIN}/image", "registry:5000/thing", "registry:5000/thing is not pinned"),
    ("images", f"{_POD}/initContainers/0/image", "thing:latest", "thing:latest is not pinned"),
    ("default_deny", "NetworkPolicy default-deny/spec/policyTypes", ["Ingress"], "both ways"),
    ("default_deny", "NetworkPolicy default-deny/spec/egress", [{}], "both ways by default"),
    (
        "default_deny",
        "NetworkPolicy default-deny/spec/podSelector",
        {"matchLabels": {"a": "b"}},
        "both ways by default",
    ),
]


def broken(path: str, value: Any) -> list[Object]:
    """The good objects with one place set, added or (GONE) removed: `Kind name/step/...`."""
    objects = good()
    thing, *steps = path.split("/")
    place: Any = find(objects, *thing.split(" "))
    *way, last = [int(step) if step.isdigit() else step.replace("~1", "/") for step in steps]
    for step in way:
        place = place[step]
    if value is GONE:
        del place[last]
    elif isinstance(place, list) and last == len(place):
        place.append(value)
    else:
        place[last] = value
    return objects


@pytest.mark.parametrize("check", CHECKS)
def test_good_objects_have_no_problem(check: str) -> None:
    assert CHECKS[check](good()) == []


@pytest.mark.parametrize(("check", "path", "value", "words"), BROKEN)
def test_check_complains(check: str, path: str, value: Any, words: str) -> None:
    assert words in "\n".join(CHECKS[check](broken(path, value)))


def test_every_check_is_proved() -> None:
    assert {check for check, *_ in BROKEN} == CHECKS.keys()


def test_wrong_quantity_is_refused() -> None:
    with pytest.raises(ValueError, match="'1 GB' is no quantity"):
        policy.quantity("1 GB")
    assert policy.quantity("250m") == 0.25
    assert policy.quantity("1.5Gi") == 1.5 * 2**30


def test_requests_count_replicas_and_what_starts_first() -> None:
    objects = broken("Deployment page/spec/replicas", 3)
    objects = [find(objects, "Deployment", "page"), find(objects, "StatefulSet", "store")]
    first = objects[0]["spec"]["template"]["spec"]["initContainers"][0]
    first["resources"]["requests"]["memory"] = "100Mi"
    wanted = {"cpu": pytest.approx(0.4), "memory": 3 * 100 * 2**20 + 64 * 2**20}
    assert policy.requests_of(objects) == wanted


def _pods(objects: list[Object]) -> dict[str, Peer]:
    return {pod.owner["metadata"]["name"]: policy.peer_of(pod) for pod in policy.pods_of(objects)}


OUTSIDE = Peer("somebody", address="192.0.2.7")
INGRESS = Peer("controller", {"name": "nginx"}, namespace="ingress")
DNS = Peer("dns", {"k8s-app": "kube-dns"}, namespace="kube-system")


@pytest.mark.parametrize(
    ("source", "target", "port", "holds"),
    [
        ("page", "store", 5432, True),
        ("page", "store", 8080, False),  # a port that no rule names
        ("once", "store", 5432, False),  # let in, not out
        ("nightly", "store", 5432, False),
        ("store", "page", 8501, False),  # inside, though the block of addresses holds all
        ("page", "page", 8501, False),
        (INGRESS, "page", 8501, True),
        (INGRESS, "store", 5432, False),
        (OUTSIDE, "page", 8501, True),
        (OUTSIDE, "store", 5432, False),
        ("page", OUTSIDE, 443, False),
        ("page", DNS, 53, False),
    ],
)
def test_network_policies_are_read_as_kubernetes_does(
    source: str | Peer, target: str | Peer, port: int, holds: bool
) -> None:
    objects = good()
    peers = _pods(objects)
    one, other = (peers[end] if isinstance(end, str) else end for end in (source, target))
    assert policy.allowed(objects, one, other, port) is holds


def test_without_policies_all_is_allowed() -> None:
    peers = _pods(good())
    assert policy.allowed([], peers["nightly"], peers["store"], 8080)


@pytest.mark.parametrize(
    ("path", "value", "holds"),
    [
        ("ingress/0/ports/0/protocol", "UDP", False),
        ("ingress/0/ports/0", {"port": 5000, "endPort": 6000}, True),
        ("ingress/0/ports/0", {"port": 5000}, False),
        ("ingress/0/ports", GONE, True),
        ("ingress/0/from", GONE, True),
        ("ingress/0/from/0/podSelector/matchExpressions/0/operator", "NotIn", False),
        (
            "ingress/0/from/0/podSelector/matchExpressions/0",
            {"key": "app.kubernetes.io/name", "operator": "Exists"},
            True,
        ),
        ("ingress/0/from/0/namespaceSelector", {}, True),
        ("ingress/0/from/0/namespaceSelector", {"matchLabels": {"x": "y"}}, False),
        ("ingress", [], False),
    ],
)
def test_rules_of_a_network_policy(path: str, value: Any, holds: bool) -> None:
    objects = broken(f"NetworkPolicy store/spec/{path}", value)
    peers = _pods(objects)
    assert policy.allowed(objects, peers["page"], peers["store"], 5432) is holds


def test_connections_are_read_from_settings() -> None:
    objects = good()
    assert policy.implied_connections(objects) == {("page", "store", 5432)}
    main = objects[3]["spec"]["template"]["spec"]["containers"][0]
    main["args"] = ["--ask=http://store.diabetes-mlops.svc:8080/x", "--not=bookstore:1"]
    assert ("page", "store", 8080) in policy.implied_connections(objects)
    # A file that is mounted speaks too, here of both ways in which Prometheus finds its targets.
    objects = broken(
        f"ConfigMap {HASHED}/data/scrape", "- names: [store]\n  type: A\n  port: 9999\n"
    )
    objects[3]["spec"]["template"]["spec"]["volumes"].append(
        {"name": "more", "configMap": {"name": HASHED}}
    )
    assert policy.implied_connections(objects) == {
        ("page", "store", 5432),
        ("page", "store", 8080),
        ("page", "store", 9999),
    }


def test_names_in_texts_exist() -> None:
    text = "kubectl logs deployment/page; kubectl get secret/store-credentials job/NAME a/job/x"
    assert policy.unknown_names(text, good(), SECRETS) == []
    text = "kubectl logs deploy/pages && kubectl delete pvc lost secret/other"
    assert policy.unknown_names(text, good(), SECRETS) == [
        "Deployment pages does not exist",
        "PersistentVolumeClaim lost does not exist",
        "Secret other does not exist",
    ]


def test_node_ports_in_texts_are_ours() -> None:
    text = "http://127.0.0.1:30602, 30,999 rows of 130999, and 32000 is the registry"
    assert policy.unknown_node_ports(text, [30602]) == []
    assert policy.unknown_node_ports("see :30603", [30602]) == ["30603 is no NodePort of ours"]
