"""A small Kubernetes API server for the tests: real kubectl talks to it as to a cluster.

It keeps objects in memory and moves them as a cluster's controllers would: Deployments,
StatefulSets and Jobs get pods, claims get bound, a deleted namespace empties itself. What the
deploy scripts rely on is like the real server's: server-side apply with owners and conflicts,
immutable fields, a resourceVersion that moves only when an object changes. What it leaves out:
schemas, ReplicaSets, admission, real containers.

By hand: `python -m tests.deploy.apiserver --kubeconfig FILE`.
"""

from __future__ import annotations

import argparse
import base64
import copy
import hashlib
import json
import re
import signal
import sys
import threading
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, urlsplit

import yaml

Object = dict[str, Any]
Key = tuple[str, str, str]
"""Plural name of the kind, namespace (or nothing), name."""
Steps = tuple[str, ...]
"""Where a field is in an object."""

CONTEXT = "microk8s"
NODE_IP = "192.0.2.10"


@dataclass(frozen=True, slots=True)
class Kind:
    """A kind of objects, as discovery tells of it."""

    group_version: str
    name: str
    plural: str
    short: str = ""
    namespaced: bool = True

    @property
    def group(self) -> str:
        return self.group_version.rpartition("/")[0]

    @property
    def scales(self) -> bool:
        return self.plural in {"deployments", "statefulsets"}

    @property
    def subresources(self) -> tuple[str, ...]:
        more = ("log",) if self.name == "Pod" else ("scale",) if self.scales else ()
        return ("status", *more)


KINDS = {
    kind.plural: kind
    for kind in (
        Kind("v1", "Namespace", "namespaces", "ns", namespaced=False),
        Kind("v1", "Node", "nodes", "no", namespaced=False),
        Kind("v1", "PersistentVolume", "persistentvolumes", "pv", namespaced=False),
        Kind("v1", "PersistentVolumeClaim", "persistentvolumeclaims", "pvc"),
        Kind("v1", "ConfigMap", "configmaps", "cm"),
        Kind("v1", "Secret", "secrets"),
        Kind("v1", "Service", "services", "svc"),
        Kind("v1", "ServiceAccount", "serviceaccounts", "sa"),
        Kind("v1", "Pod", "pods", "po"),
        Kind("v1", "Event", "events", "ev"),
        Kind("v1", "ResourceQuota", "resourcequotas", "quota"),
        Kind("v1", "LimitRange", "limitranges", "limits"),
        Kind("apps/v1", "Deployment", "deployments", "deploy"),
        Kind("apps/v1", "StatefulSet", "statefulsets", "sts"),
        Kind("apps/v1", "ReplicaSet", "replicasets", "rs"),
        Kind("apps/v1", "DaemonSet", "daemonsets", "ds"),
        Kind("batch/v1", "Job", "jobs"),
        Kind("batch/v1", "CronJob", "cronjobs", "cj"),
        Kind("networking.k8s.io/v1", "Ingress", "ingresses", "ing"),
        Kind("networking.k8s.io/v1", "IngressClass", "ingressclasses", namespaced=False),
        Kind("networking.k8s.io/v1", "NetworkPolicy", "networkpolicies", "netpol"),
        Kind("policy/v1", "PodDisruptionBudget", "poddisruptionbudgets", "pdb"),
        Kind("autoscaling/v2", "HorizontalPodAutoscaler", "horizontalpodautoscalers", "hpa"),
        Kind("rbac.authorization.k8s.io/v1", "Role", "roles"),
        Kind("rbac.authorization.k8s.io/v1", "RoleBinding", "rolebindings"),
        Kind("storage.k8s.io/v1", "StorageClass", "storageclasses", "sc", namespaced=False),
        Kind(
            "authorization.k8s.io/v1",
            "SelfSubjectAccessReview",
            "selfsubjectaccessreviews",
            namespaced=False,
        ),
    )
}
_WORKLOADS = ("deployments", "statefulsets", "jobs")
_SET_BY_SERVER = {"uid", "resourceVersion", "generation", "creationTimestamp", "managedFields"}
_STATEFULSET_MUTABLE = (
    "replicas",
    "ordinals",
    "template",
    "updateStrategy",
    "revisionHistoryLimit",
    "persistentVolumeClaimRetentionPolicy",
    "minReadySeconds",
)


class Refused(Exception):  # noqa: N818 - an answer like others
    """An answer that is no success, as the API words it."""

    def __init__(self, code: int, reason: str, message: str, **details: Any) -> None:
        super().__init__(message)
        self.code = code
        self.status = {
            "kind": "Status",
            "apiVersion": "v1",
            "metadata": {},
            "status": "Failure",
            "message": message,
            "reason": reason,
            "details": details,
            "code": code,
        }


@dataclass(frozen=True, slots=True)
class Request:
    """A request that could change something, as the journal keeps it.

    Attributes:
        verb: as in Kubernetes' access rules: create, update, patch, delete.
        changed: whether an object changed, came or went.
        code: of the answer.
    """

    verb: str
    resource: str
    namespace: str
    name: str
    path: str
    code: int
    changed: bool
    dry_run: bool


@dataclass(slots=True)
class Behaviour:
    """How a workload's pods fare.

    Attributes:
        delay: seconds until a pod is ready, or a Job's has ended.
        waiting: reason for which a container never runs, such as ImagePullBackOff.
        container: the one that waits or fails; the first if not named.
        message: what the pod's status says of it.
        fails: a Job's pod ends with exit code 1; another's is never ready.
        stuck: it runs, but is never ready and never ends.
        started: its startup probe has succeeded though.
        log: what its containers have written.
        image: only pods with this image fare so.
    """

    delay: float = 0.0
    waiting: str = ""
    container: str = ""
    message: str = ""
    fails: bool = False
    stuck: bool = False
    started: bool = False
    log: str = ""
    image: str = ""

    @property
    def works(self) -> bool:
        return not (self.waiting or self.fails or self.stuck)


@dataclass(slots=True)
class Fault:
    """What happens to a request instead of an answer.

    Attributes:
        action: forbidden (403), error (500), hang (no answer), close (the connection ends in the
            middle of an answer).
        verb, resource, name: which requests; empty means any.
        times: how many of them; all if negative.
    """

    action: str
    verb: str = ""
    resource: str = ""
    name: str = ""
    times: int = -1

    def meets(self, verb: str, resource: str, name: str) -> bool:
        wanted = (self.verb, verb), (self.resource, resource), (self.name, name)
        return self.times != 0 and all(mine in ("", theirs) for mine, theirs in wanted)


# --- fields ------------------------------------------------------------------------------------


def dig(value: Any, *steps: str, default: Any = None) -> Any:
    """The field at the end of the steps, or the default."""
    for step in steps:
        if not isinstance(value, dict) or step not in value:
            return default
        value = value[step]
    return value


def _put(target: Object, steps: Steps, value: Any) -> None:
    for step in steps[:-1]:
        if not isinstance(target.get(step), dict):
            target[step] = {}
        target = target[step]
    target[steps[-1]] = copy.deepcopy(value)


def _cut(target: Object, steps: Steps) -> None:
    """Remove a field, and what is then left empty around it."""
    inner = target.get(steps[0])
    if len(steps) == 1:
        target.pop(steps[0], None)
    elif isinstance(inner, dict):
        _cut(inner, steps[1:])
        if not inner:
            del target[steps[0]]


def _leaves(value: Object, above: Steps = ()) -> dict[Steps, Any]:
    """Fields that somebody can own; a list counts as one."""
    found: dict[Steps, Any] = {}
    for name, inner in value.items():
        steps = (*above, name)
        if not above and name in {"apiVersion", "kind", "status"}:
            continue
        if above == ("metadata",) and name in _SET_BY_SERVER | {"name", "namespace"}:
            continue
        if isinstance(inner, dict) and inner:
            found |= _leaves(inner, steps)
        elif inner is not None:
            found[steps] = inner
    return found


def _merge(target: Any, patch: Any, *, by_name: bool) -> Any:
    """A merge patch; with `by_name` also lists of named things, as a strategic one does."""
    if isinstance(target, dict) and isinstance(patch, dict):
        merged = dict(target)
        for name, value in patch.items():
            if value is None:
                merged.pop(name, None)
            elif not name.startswith("$"):
                merged[name] = _merge(merged.get(name), value, by_name=by_name)
        return merged
    named = [
        isinstance(value, list) and value and all(dig(item, "name") for item in value)
        for value in (target, patch)
    ]
    if by_name and all(named):
        kept = {item["name"]: item for item in target}
        for item in patch:
            kept[item["name"]] = _merge(kept.get(item["name"]), item, by_name=True)
        return list(kept.values())
    if isinstance(patch, dict):
        return _merge({}, patch, by_name=by_name)
    return copy.deepcopy(patch)


def _labels_meet(selector: str, labels: Mapping[str, str]) -> bool:
    for term in re.findall(r"[^,(]+(?:\([^)]*\))?", selector):
        listed = re.fullmatch(r"\s*(\S+)\s+(in|notin)\s+\(([^)]*)\)\s*", term)
        if listed:
            values = {value.strip() for value in listed[3].split(",")}
            meets = (labels.get(listed[1]) in values) == (listed[2] == "in")
        elif "!=" in term:
            name, _, value = term.partition("!=")
            meets = labels.get(name.strip()) != value.strip()
        elif "=" in term:
            name, _, value = term.partition("=")
            meets = labels.get(name.strip()) == value.strip("= ")
        else:
            meets = (term.strip("! ") in labels) != term.strip().startswith("!")
        if not meets:
            return False
    return True


def _fields_meet(selector: str, value: Object) -> bool:
    for term in filter(None, selector.split(",")):
        name, sign, wanted = re.fullmatch(r"([^=!]+)(==|!=|=)(.*)", term).groups()  # type: ignore[union-attr]
        if (str(dig(value, *name.split("."), default="")) == wanted) == (sign == "!="):
            return False
    return True


def _now() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:10]


def _condition(kind: str, holds: bool, reason: str, message: str = "") -> Object:
    return {
        "type": kind,
        "status": str(holds),
        "reason": reason,
        "message": message,
        "lastTransitionTime": _now(),
        "lastUpdateTime": _now(),
    }


def _same_but_times(one: Any, other: Any) -> bool:
    def timeless(value: Any) -> Any:
        if isinstance(value, dict):
            return {k: timeless(v) for k, v in value.items() if not k.startswith("last")}
        return [timeless(item) for item in value] if isinstance(value, list) else value

    return bool(timeless(one) == timeless(other))


# --- objects -----------------------------------------------------------------------------------


@dataclass(slots=True)
class _Stored:
    value: Object
    owners: dict[str, set[Steps]]


@dataclass(slots=True)
class Cluster:
    """Objects, who owns which field of them, and what happened to them.

    Attributes:
        journal: every request that could change something.
        behaviours: how the workloads of some names fare; the others work.
        faults: requests that go wrong; the first that meets one counts.
        after_change: called after each request that changed something, before it is answered.
    """

    journal: list[Request] = field(default_factory=list)
    behaviours: dict[str, Behaviour] = field(default_factory=dict)
    faults: list[Fault] = field(default_factory=list)
    after_change: Callable[[Request], None] | None = None
    moved: threading.Condition = field(default_factory=threading.Condition)
    _stored: dict[Key, _Stored] = field(default_factory=dict)
    _history: list[tuple[int, Key, Object | None, Object | None]] = field(default_factory=list)
    _version: int = 100
    _born: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Back to a new cluster: one node, MicroK8s' classes, nothing of ours."""
        with self.moved:
            self.journal.clear()
            self.behaviours.clear()
            self.faults.clear()
            self.after_change = None
            for key in list(self._stored):
                self._remove(key)
            for name in ("default", "kube-system", "kube-public", "kube-node-lease"):
                self.create("namespaces", "", {"metadata": {"name": name}})
            node = {
                "metadata": {"name": "here", "labels": {"kubernetes.io/hostname": "here"}},
                "spec": {},
                "status": {
                    "addresses": [
                        {"type": "InternalIP", "address": NODE_IP},
                        {"type": "Hostname", "address": "here"},
                    ],
                    "conditions": [_condition("Ready", True, "KubeletReady")],
                    "nodeInfo": {"kubeletVersion": "v1.37.0", "architecture": "amd64"},
                },
            }
            self.create("nodes", "", node)
            default = {"storageclass.kubernetes.io/is-default-class": "true"}
            self.create(
                "storageclasses",
                "",
                {
                    "metadata": {"name": "microk8s-hostpath", "annotations": default},
                    "provisioner": "microk8s.io/hostpath",
                },
            )
            for name in ("public", "nginx"):
                controller = {"controller": "k8s.io/ingress-nginx"}
                self.create("ingressclasses", "", {"metadata": {"name": name}, "spec": controller})

    def save(self) -> Mapping[Key, Any]:
        """All that is there, to come back to by `load`."""
        with self.moved:
            return copy.deepcopy(self._stored)

    def load(self, saved: Mapping[Key, Any]) -> None:
        """Bring back what was saved; faults, behaviours and journal are empty then."""
        with self.moved:
            self.reset()
            for key in list(self._stored):
                self._remove(key)
            for key, stored in copy.deepcopy(dict(saved)).items():
                self._stored[key] = stored
                self._history.append((self._version, key, None, stored.value))
            self.moved.notify_all()

    def get(self, plural: str, name: str, namespace: str = "") -> Object:
        """One object; the real server's refusal if it isn't there."""
        with self.moved:
            stored = self._stored.get((plural, namespace, name))
            if not stored:
                kind = KINDS[plural]
                full = f"{plural}.{kind.group}" if kind.group else plural
                message = f'{full} "{name}" not found'
                raise Refused(404, "NotFound", message, name=name, kind=plural, group=kind.group)
            return copy.deepcopy(stored.value)

    def list(
        self, plural: str, namespace: str = "", labels: str = "", fields: str = ""
    ) -> list[Object]:
        """Objects of a kind, of one namespace or of all, by name."""
        with self.moved:
            return [
                copy.deepcopy(stored.value)
                for key, stored in sorted(self._stored.items(), key=lambda item: item[0])
                if key[0] == plural
                and namespace in ("", key[1])
                and meets(stored.value, labels, fields)
            ]

    def versions(self, namespace: str = "") -> dict[Key, str]:
        """Resource version of every object, or of those in a namespace."""
        with self.moved:
            return {
                key: str(stored.value["metadata"]["resourceVersion"])
                for key, stored in self._stored.items()
                if namespace in ("", key[1]) or key == ("namespaces", "", namespace)
            }

    def create(
        self,
        plural: str,
        namespace: str,
        sent: Object,
        *,
        manager: str = "",
        dry_run: bool = False,
    ) -> Object:
        """Add an object."""
        with self.moved:
            kind = KINDS[plural]
            value = copy.deepcopy(sent)
            metadata = value.setdefault("metadata", {})
            if "generateName" in metadata and not metadata.get("name"):
                metadata["name"] = f"{metadata['generateName']}{uuid.uuid4().hex[:5]}"
            name = metadata.get("name", "")
            if kind.namespaced:
                metadata["namespace"] = namespace
                space = self.get("namespaces", namespace)
                if "deletionTimestamp" in space["metadata"]:
                    raise Refused(
                        403,
                        "Forbidden",
                        f'{plural} "{name}" is forbidden: unable to create new content in '
                        f"namespace {namespace} because it is being terminated",
                    )
            key = (plural, namespace if kind.namespaced else "", name)
            if key in self._stored:
                message = f'{plural} "{name}" already exists'
                raise Refused(409, "AlreadyExists", message, name=name, kind=plural)
            metadata.update(uid=str(uuid.uuid4()), generation=1, creationTimestamp=_now())
            value.update(apiVersion=kind.group_version, kind=kind.name)
            owners = {manager: set(_leaves(value))} if manager else {}
            _default(value)
            self._check_ports(key, value)
            if not dry_run:
                self._born[metadata["uid"]] = time.monotonic()
                self._stored[key] = _Stored(value, owners)
                self._moved(key, None, value)
                if kind.name == "Namespace":
                    root = {"metadata": {"name": "kube-root-ca.crt"}, "data": {"ca.crt": "-"}}
                    self.create("configmaps", name, root)
                    self.create("serviceaccounts", name, {"metadata": {"name": "default"}})
            return copy.deepcopy(value)

    def apply(
        self,
        key: Key,
        sent: Object,
        *,
        manager: str,
        force: bool = False,
        dry_run: bool = False,
    ) -> Object:
        """Server-side apply."""
        with self.moved:
            stored = self._stored.get(key)
            if not stored:
                sent = {**sent, "metadata": {**sent.get("metadata", {}), "name": key[2]}}
                return self.create(key[0], key[1], sent, manager=manager, dry_run=dry_run)
            wanted = _leaves(sent)
            owners = copy.deepcopy(stored.owners)
            mine = owners.pop(manager, set())
            clashes = [
                (other, steps)
                for other, owned in owners.items()
                for steps in sorted(owned & wanted.keys())
                if dig(stored.value, *steps) != wanted[steps]
            ]
            if clashes and not force:
                raise _conflict(key, clashes)
            for other, steps in clashes:
                owners[other].discard(steps)
            value = copy.deepcopy(stored.value)
            for steps in mine - wanted.keys():
                if not any(steps in owned for owned in owners.values()):
                    _cut(value, steps)
            for steps, wish in wanted.items():
                if dig(value, *steps) != wish:
                    _put(value, steps, wish)
            owners[manager] = set(wanted)
            return self._replace(key, value, owners, dry_run=dry_run)

    def update(
        self, key: Key, value: Object, *, manager: str = "", dry_run: bool = False
    ) -> Object:
        """Write a whole object; who changes a field owns it from then on."""
        with self.moved:
            self.get(key[0], key[2], key[1])
            stored = self._stored[key]
            before, after = _leaves(stored.value), _leaves(value)
            touched = {s for s in before.keys() | after.keys() if before.get(s) != after.get(s)}
            owners = {name: owned - touched for name, owned in stored.owners.items()}
            if manager:
                owners[manager] = owners.get(manager, set()) | (touched & after.keys())
            owners = {name: owned for name, owned in owners.items() if owned}
            return self._replace(key, copy.deepcopy(value), owners, dry_run=dry_run)

    def delete(self, key: Key, policy: str = "Background", *, dry_run: bool = False) -> Object:
        """Remove an object as the propagation policy says; some only begin to go."""
        with self.moved:
            value = self.get(key[0], key[2], key[1])
            if dry_run:
                return value
            if policy == "Orphan":
                for other, stored in self._stored.items():
                    references = stored.value["metadata"].get("ownerReferences", [])
                    if any(ref["uid"] == value["metadata"]["uid"] for ref in references):
                        orphan = copy.deepcopy(stored.value)
                        del orphan["metadata"]["ownerReferences"]
                        self._replace(other, orphan, stored.owners)
            lingers = key[0] in {"namespaces", "pods", "persistentvolumeclaims"}
            if lingers or (policy == "Foreground" and key[0] in _WORKLOADS):
                if "deletionTimestamp" not in value["metadata"]:
                    value["metadata"]["deletionTimestamp"] = _now()
                    if key[0] == "namespaces":
                        value["status"] = {"phase": "Terminating"}
                    self._replace(key, value, self._stored[key].owners)
            else:
                self._remove(key)
            return value

    def changes_since(
        self, version: int, plural: str, namespace: str, labels: str, fields: str
    ) -> Iterator[tuple[int, str, Object]]:
        """What a watcher of these objects must hear."""
        for number, key, before, after in self._history:
            if number <= version or key[0] != plural or namespace not in ("", key[1]):
                continue
            was = before is not None and meets(before, labels, fields)
            now = after is not None and meets(after, labels, fields)
            if now and after:
                yield number, "MODIFIED" if was else "ADDED", after
            elif was and before:
                gone = copy.deepcopy(before)
                gone["metadata"]["resourceVersion"] = str(number)
                yield number, "DELETED", gone

    @property
    def version(self) -> int:
        return self._version

    def age(self, value: Object) -> float:
        """Seconds since an object came."""
        return time.monotonic() - self._born.get(value["metadata"]["uid"], 0.0)

    def set_status(self, key: Key, status: Object) -> None:
        """Write a status, if it says anything new."""
        value = self._stored[key].value
        if not _same_but_times(value.get("status"), status):
            metadata = dict(value["metadata"])
            new = {**value, "metadata": metadata, "status": status}
            self._replace(key, new, self._stored[key].owners)

    def behaviour(self, value: Object) -> Behaviour:
        """How a workload fares."""
        return self.behaviours.get(value["metadata"]["name"], Behaviour())

    def _replace(
        self, key: Key, value: Object, owners: dict[str, set[Steps]], *, dry_run: bool = False
    ) -> Object:
        stored = self._stored[key]
        for name in _SET_BY_SERVER - {"managedFields"}:
            value["metadata"][name] = stored.value["metadata"][name]
        _default(value)
        _check_immutable(key, stored.value, value)
        self._check_ports(key, value)
        if (value, owners) != (stored.value, stored.owners):
            if value.get("spec") != stored.value.get("spec"):
                value["metadata"]["generation"] += 1
            if not dry_run:
                before, stored.value, stored.owners = stored.value, value, owners
                self._moved(key, before, value)
        return copy.deepcopy(value)

    def _remove(self, key: Key) -> None:
        stored = self._stored.pop(key)
        self._born.pop(stored.value["metadata"]["uid"], None)
        self._moved(key, stored.value, None)

    def _moved(self, key: Key, before: Object | None, after: Object | None) -> None:
        self._version += 1
        if after:
            after["metadata"]["resourceVersion"] = str(self._version)
        self._history.append((self._version, key, before, copy.deepcopy(after)))
        self.moved.notify_all()

    def _check_ports(self, key: Key, value: Object) -> None:
        """Two Services can't have the same port of the node."""
        if key[0] != "services":
            return
        mine = [port.get("nodePort") for port in dig(value, "spec", "ports", default=[])]
        for other, stored in self._stored.items():
            if other[0] == "services" and other != key:
                for port in dig(stored.value, "spec", "ports", default=[]):
                    if port.get("nodePort") and port["nodePort"] in mine:
                        problem = f"Invalid value: {port['nodePort']}: "
                        problem += "provided port is already allocated"
                        raise _invalid(key, "spec.ports[0].nodePort", problem)


def meets(value: Object, labels: str, fields: str) -> bool:
    """Whether an object is among those of a label and a field selector."""
    own = dig(value, "metadata", "labels", default={})
    return _labels_meet(labels, own) and _fields_meet(fields, value)


def _default(value: Object) -> None:
    """What the server fills in."""
    spec, name = value.get("spec"), value["metadata"]["name"]
    match value["kind"]:
        case "Namespace":
            value["metadata"].setdefault("labels", {})["kubernetes.io/metadata.name"] = name
            value.setdefault("status", {"phase": "Active"})
        case "Secret":
            value.setdefault("type", "Opaque")
            for entry, text in value.pop("stringData", {}).items():
                encoded = base64.b64encode(text.encode()).decode()
                value.setdefault("data", {})[entry] = encoded
            for entry, text in (value.get("data") or {}).items():
                try:
                    base64.b64decode(text, validate=True)
                except ValueError as error:
                    message = f'Secret "{name}" data.{entry}: illegal base64 data'
                    raise Refused(400, "BadRequest", message) from error
        case "Deployment" | "StatefulSet" if isinstance(spec, dict):
            spec.setdefault("replicas", 1)
            if value["kind"] == "StatefulSet":
                spec.setdefault("updateStrategy", {"type": "RollingUpdate"})
        case "Job" if isinstance(spec, dict):
            own = {"batch.kubernetes.io/controller-uid": value["metadata"]["uid"]}
            spec.setdefault("selector", {"matchLabels": own})
            about = spec["template"].setdefault("metadata", {})
            about.setdefault("labels", {}).update(own, **{"job-name": name})
        case "Service" if isinstance(spec, dict):
            address = int(_digest(name), 16) % 250 + 2
            spec.setdefault("clusterIP", f"10.152.183.{address}")


def _invalid(key: Key, place: str, problem: str) -> Refused:
    kind = KINDS[key[0]]
    full = f"{kind.name}.{kind.group}" if kind.group else kind.name
    cause = {"reason": "FieldValueInvalid", "message": problem, "field": place}
    return Refused(
        422,
        "Invalid",
        f'{full} "{key[2]}" is invalid: {place}: {problem}',
        name=key[2],
        group=kind.group,
        kind=kind.name,
        causes=[cause],
    )


def _conflict(key: Key, clashes: list[tuple[str, Steps]]) -> Refused:
    using = KINDS[key[0]].group_version
    words = [(f'conflict with "{who}" using {using}', "." + ".".join(s)) for who, s in clashes]
    plural = "s" if len(words) > 1 else ""
    listed = ": ".join(words[0]) if not plural else "\n- ".join(("", *map(": ".join, words)))
    return Refused(
        409,
        "Conflict",
        f"Apply failed with {len(words)} conflict{plural}: {listed}",
        causes=[
            {"reason": "FieldManagerConflict", "message": message, "field": place}
            for message, place in words
        ],
    )


def _check_immutable(key: Key, before: Object, after: Object) -> None:
    old, new = before.get("spec") or {}, after.get("spec") or {}
    match key[0]:
        case "jobs" | "deployments":
            frozen = ("template", "selector", "completions", "completionMode")
            for name in frozen if key[0] == "jobs" else ("selector",):
                if old.get(name) != new.get(name):
                    value = json.dumps(new.get(name))
                    problem = f"Invalid value: {value}: field is immutable"
                    raise _invalid(key, f"spec.{name}", problem)
        case "statefulsets":
            if any(old.get(n) != new.get(n) for n in {*old, *new} - {*_STATEFULSET_MUTABLE}):
                *names, last = (f"'{name}'" for name in _STATEFULSET_MUTABLE)
                problem = "Forbidden: updates to statefulset spec for fields other than "
                problem += f"{', '.join(names)} and {last} are forbidden"
                raise _invalid(key, "spec", problem)
        case "persistentvolumeclaims":
            if any(old.get(name) != new.get(name) for name in {*old, *new} - {"resources"}):
                problem = "Forbidden: spec is immutable after creation except "
                problem += "resources.requests and volumeAttributesClassName for bound claims"
                raise _invalid(key, "spec", problem)
        case "secrets" | "configmaps":
            if before.get("immutable") and before.get("data") != after.get("data"):
                problem = "Forbidden: field is immutable when `immutable` is set"
                raise _invalid(key, "data", problem)


# --- controllers -------------------------------------------------------------------------------


def reconcile(cluster: Cluster) -> None:
    """One round of all controllers."""
    with cluster.moved:
        stored = cluster._stored
        alive = {item.value["metadata"]["uid"] for item in stored.values()}
        for key in list(stored):
            if key not in stored:
                continue
            value = stored[key].value
            references = value["metadata"].get("ownerReferences", [])
            if "deletionTimestamp" in value["metadata"]:
                _go_on_deleting(cluster, key)
            elif references and not any(ref["uid"] in alive for ref in references):
                cluster.delete(key)
            elif key[0] in _WORKLOADS:
                {"deployments": _deployment, "statefulsets": _stateful_set, "jobs": _job}[key[0]](
                    cluster, key
                )
            elif key[0] == "persistentvolumeclaims" and "status" not in value:
                cluster.set_status(key, {"phase": "Bound"})


def _go_on_deleting(cluster: Cluster, key: Key) -> None:
    stored = cluster._stored
    if key[0] == "namespaces":
        within = [other for other in stored if other[1] == key[2]]
        for other in within:
            if "deletionTimestamp" not in stored[other].value["metadata"]:
                cluster.delete(other)
        if within:
            return
    elif key[0] == "persistentvolumeclaims":
        # A claim that a pod mounts stays until the pod is gone.
        for pod in _pods_in(cluster, key[1]):
            for volume in dig(pod, "spec", "volumes", default=[]):
                if dig(volume, "persistentVolumeClaim", "claimName") == key[2]:
                    return
    elif key[0] in _WORKLOADS:
        pods = _pods_of(cluster, key)
        for pod in pods:
            _end_pod(cluster, pod)
        if pods:
            return
    cluster._remove(key)


def _pods_of(cluster: Cluster, key: Key) -> list[Object]:
    uid = cluster._stored[key].value["metadata"]["uid"]
    return [
        pod
        for pod in _pods_in(cluster, key[1])
        if any(ref["uid"] == uid for ref in pod["metadata"].get("ownerReferences", []))
    ]


def _pods_in(cluster: Cluster, namespace: str) -> list[Object]:
    """The pods themselves, not copies: a round looks at them often."""
    return [item.value for key, item in cluster._stored.items() if key[:2] == ("pods", namespace)]


def _end_pod(cluster: Cluster, pod: Object) -> None:
    if "deletionTimestamp" not in pod["metadata"]:
        cluster.delete(("pods", pod["metadata"]["namespace"], pod["metadata"]["name"]))


def _add_pod(cluster: Cluster, key: Key, name: str, labels: Mapping[str, str]) -> None:
    owner = cluster._stored[key].value
    template = copy.deepcopy(owner["spec"]["template"])
    reference = {
        "apiVersion": owner["apiVersion"],
        "kind": owner["kind"],
        "name": key[2],
        "uid": owner["metadata"]["uid"],
        "controller": True,
    }
    metadata = {**template.get("metadata", {}), "name": name, "ownerReferences": [reference]}
    metadata["labels"] = {**metadata.get("labels", {}), **labels}
    spec = {**template["spec"], "nodeName": "here"}
    if key[0] == "statefulsets":
        claims = []
        for claim in owner["spec"].get("volumeClaimTemplates", []):
            full = f"{claim['metadata']['name']}-{name}"
            volume = {"persistentVolumeClaim": {"claimName": full}}
            claims.append({"name": claim["metadata"]["name"], **volume})
            if ("persistentvolumeclaims", key[1], full) not in cluster._stored:
                own = dig(claim, "metadata", "labels", default={})
                wanted = dig(owner, "spec", "selector", "matchLabels", default={})
                made = {"name": full, "labels": {**wanted, **own}}
                value = {"metadata": made, "spec": claim["spec"]}
                cluster.create("persistentvolumeclaims", key[1], value)
        spec["volumes"] = [*spec.get("volumes", []), *claims]
    pod = {"metadata": metadata, "spec": spec, "status": {"phase": "Pending"}}
    cluster.create("pods", key[1], pod)


def _container_states(names: list[str], state: Object, **more: Any) -> list[Object]:
    plain = {"image": "", "imageID": "", "restartCount": 0, "ready": False, "lastState": {}}
    return [{**plain, "name": name, "state": state, **more} for name in names]


def _move_pod(cluster: Cluster, pod: Object, behaviour: Behaviour, *, of_job: bool) -> bool:
    """Bring a pod to where it should be by now; whether it is ready, or has ended well."""
    first = [item["name"] for item in pod["spec"].get("initContainers", [])]
    main = [item["name"] for item in pod["spec"]["containers"]]
    images = {item["image"] for item in pod["spec"]["containers"]}
    if behaviour.image and behaviour.image not in images:
        behaviour = Behaviour()
    bad = behaviour.container or main[0]
    done = {"terminated": {"exitCode": 0, "reason": "Completed"}}
    failed = {"terminated": {"exitCode": 1, "reason": "Error"}}
    running: Object = {"running": {"startedAt": pod["metadata"]["creationTimestamp"]}}
    early = cluster.age(pod) < behaviour.delay
    good = not early and behaviour.works
    status: Object = {"phase": "Running"}
    at_fault: tuple[Object, Object] = ({}, {})
    if early or behaviour.stuck or good:
        states = _container_states(
            main, running, ready=good and not of_job, started=good or behaviour.started
        )
        firsts = _container_states(first, done, ready=True)
        if good and of_job:
            status["phase"] = "Succeeded"
            states = _container_states(main, done)
    else:
        reason = behaviour.waiting or "CrashLoopBackOff"
        message = behaviour.message
        if not message and reason == "CrashLoopBackOff":
            message = f"back-off 5m0s restarting failed container={bad}"
        at_fault = ({"waiting": {"reason": reason, "message": message}}, {})
        if reason == "CrashLoopBackOff":
            at_fault = (at_fault[0], failed)
        if behaviour.fails and of_job:
            at_fault = (failed, {})
        status["phase"] = "Failed" if behaviour.fails and of_job else "Pending"
        states = _container_states(main, running)
        firsts = _container_states(first, done, ready=True)
        if bad in first:
            after = first[first.index(bad) + 1 :]
            states = _container_states(main, {"waiting": {"reason": "PodInitializing"}})
            firsts = [
                {**item, "state": {"waiting": {"reason": "PodInitializing"}}, "ready": False}
                if item["name"] in after
                else item
                for item in firsts
            ]
        elif reason == "CrashLoopBackOff":
            status["phase"] = "Running" if status["phase"] == "Pending" else status["phase"]
        for item in (*firsts, *states):
            if item["name"] == bad:
                state, last = at_fault
                item.update(state=state, lastState=last, restartCount=3 if last else 0)
                item["ready"] = False
    status["containerStatuses"] = states
    if first:
        status["initContainerStatuses"] = firsts
    ready = good and not of_job
    status["conditions"] = [
        _condition("PodScheduled", True, ""),
        _condition("Ready", ready, "" if ready else "ContainersNotReady"),
    ]
    metadata = pod["metadata"]
    key = ("pods", metadata["namespace"], metadata["name"])
    cluster.set_status(key, status)
    if at_fault[0]:
        _tell(cluster, pod, "Failed" if behaviour.waiting else "BackOff", behaviour)
    return good


def _tell(cluster: Cluster, about: Object, reason: str, behaviour: Behaviour) -> None:
    """An event, once."""
    metadata = about["metadata"]
    name = f"{metadata['name']}.{reason.lower()}"
    if ("events", metadata["namespace"], name) in cluster._stored:
        return
    concerned = {"kind": about["kind"], "apiVersion": about["apiVersion"]}
    concerned |= {part: metadata[part] for part in ("name", "namespace", "uid")}
    event = {
        "metadata": {"name": name},
        "involvedObject": concerned,
        "reason": reason,
        "message": behaviour.message or "Back-off restarting failed container",
        "type": "Warning",
        "count": 1,
        "firstTimestamp": _now(),
        "lastTimestamp": _now(),
        "source": {"component": "kubelet"},
    }
    cluster.create("events", metadata["namespace"], event)


def _deployment(cluster: Cluster, key: Key) -> None:
    value = cluster._stored[key].value
    behaviour, wanted = cluster.behaviour(value), value["spec"]["replicas"]
    revision = _digest(value["spec"]["template"])
    pods = [p for p in _pods_of(cluster, key) if "deletionTimestamp" not in p["metadata"]]
    new = [p for p in pods if p["metadata"]["labels"].get("pod-template-hash") == revision]
    old = [p for p in pods if p not in new]
    ready = sum(_move_pod(cluster, pod, behaviour, of_job=False) for pod in new)
    taken = {pod["metadata"]["name"] for pod in new}
    names = (f"{key[2]}-{revision[:9]}-{number:05d}" for number in range(wanted + len(new)))
    for name in [name for name in names if name not in taken][: max(0, wanted - len(new))]:
        _add_pod(cluster, key, name, {"pod-template-hash": revision})
    for pod in new[wanted:]:
        _end_pod(cluster, pod)
    if ready >= wanted:
        for pod in old:
            _end_pod(cluster, pod)
    ready = min(ready, wanted)
    rolled = ready == wanted and not old
    available = rolled or bool(old)
    cluster.set_status(
        key,
        {
            "observedGeneration": value["metadata"]["generation"],
            "replicas": min(len(new), wanted) + len(old),
            "updatedReplicas": min(len(new), wanted),
            "readyReplicas": ready + len(old),
            "availableReplicas": ready + len(old),
            "unavailableReplicas": wanted - ready,
            "conditions": [
                _condition("Available", available, "MinimumReplicas"),
                _condition("Progressing", True, "NewReplicaSetAvailable" if rolled else "Updated"),
            ],
        },
    )


def _stateful_set(cluster: Cluster, key: Key) -> None:
    value = cluster._stored[key].value
    spec, behaviour = value["spec"], cluster.behaviour(value)
    wanted = spec["replicas"]
    revision = f"{key[2]}-{_digest(spec['template'])}"
    pods = {pod["metadata"]["name"]: pod for pod in _pods_of(cluster, key)}
    names = [f"{key[2]}-{number}" for number in range(wanted)]
    ready, current = 0, 0
    for name in names:
        if name not in pods:
            _add_pod(cluster, key, name, {"controller-revision-hash": revision})
            break
        pod = pods[name]
        if "deletionTimestamp" in pod["metadata"]:
            break
        is_new = pod["metadata"]["labels"]["controller-revision-hash"] == revision
        was_ready = any(
            item["type"] == "Ready" and item["status"] == "True"
            for item in dig(pod, "status", "conditions", default=[])
        )
        if not is_new:
            # As in a real cluster, one that isn't ready blocks its own replacement.
            if was_ready or spec.get("podManagementPolicy") == "Parallel":
                _end_pod(cluster, pod)
            break
        current += 1
        if not _move_pod(cluster, pod, behaviour, of_job=False):
            break
        ready += 1
    for name in set(pods) - set(names):
        _end_pod(cluster, pods[name])
    cluster.set_status(
        key,
        {
            "observedGeneration": value["metadata"]["generation"],
            "replicas": len(pods),
            "readyReplicas": ready,
            "availableReplicas": ready,
            "currentReplicas": current,
            "updatedReplicas": current,
            "currentRevision": revision,
            "updateRevision": revision,
        },
    )


def _job(cluster: Cluster, key: Key) -> None:
    value = cluster._stored[key].value
    spec, behaviour = value["spec"], cluster.behaviour(value)
    conditions = dig(value, "status", "conditions", default=[])
    if conditions:
        lifetime = spec.get("ttlSecondsAfterFinished")
        if lifetime is not None and cluster.age(value) > lifetime + behaviour.delay:
            cluster.delete(key)
        return
    pods = _pods_of(cluster, key)
    if not pods:
        labels = {"batch.kubernetes.io/job-name": key[2]}
        _add_pod(cluster, key, f"{key[2]}-{value['metadata']['uid'][:5]}", labels)
        pods = _pods_of(cluster, key)
    good = _move_pod(cluster, pods[0], behaviour, of_job=True)
    deadline = spec.get("activeDeadlineSeconds")
    status: Object = {"startTime": _now(), "active": 1, "ready": 0}
    if good:
        status = {"startTime": _now(), "succeeded": 1, "completionTime": _now()}
        reason = "CompletionsReached"
        status["conditions"] = [
            _condition("SuccessCriteriaMet", True, reason),
            _condition("Complete", True, reason),
        ]
    elif cluster.age(value) > behaviour.delay and behaviour.fails:
        reason, message = "BackoffLimitExceeded", "Job has reached the specified backoff limit"
        status = {"startTime": _now(), "failed": 1}
        status["conditions"] = [
            _condition("FailureTarget", True, reason, message),
            _condition("Failed", True, reason, message),
        ]
    elif deadline is not None and cluster.age(value) > deadline:
        reason, message = "DeadlineExceeded", "Job was active longer than specified deadline"
        status = {"failed": 1, "conditions": [_condition("Failed", True, reason, message)]}
        _end_pod(cluster, pods[0])
    if dig(value, "status", "startTime"):
        status["startTime"] = value["status"]["startTime"]
    cluster.set_status(key, status)


# --- the server --------------------------------------------------------------------------------


class Server:
    """A cluster on a free port of loopback, and the loop of its controllers."""

    def __init__(self, port: int = 0) -> None:
        self.cluster = Cluster()
        self.stopping = threading.Event()
        self._http = _Http(("127.0.0.1", port), _Handler)
        self._http.owner = self
        self._threads = [
            threading.Thread(target=self._http.serve_forever, args=(0.05,), daemon=True),
            threading.Thread(target=self._control, daemon=True),
        ]

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._http.server_address[1]}"

    def start(self) -> None:
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        self.stopping.set()
        with self.cluster.moved:
            self.cluster.moved.notify_all()
        self._http.shutdown()
        self._http.server_close()
        for thread in self._threads:
            thread.join(10)

    def write_kubeconfig(self, path: Path, context: str = CONTEXT, *more: str) -> None:
        """A kubeconfig whose current context is the first one named."""
        names = (context, *more)
        config = {
            "apiVersion": "v1",
            "kind": "Config",
            "current-context": context,
            "clusters": [{"name": "tests", "cluster": {"server": self.url}}],
            "users": [{"name": "deployer", "user": {}}],
            "contexts": [
                {"name": name, "context": {"cluster": "tests", "user": "deployer"}}
                for name in names
            ],
        }
        path.write_text(json.dumps(config))

    def _control(self) -> None:
        version, idle = -1, 0
        while not self.stopping.wait(0.005):
            # Nothing moved: only what takes its time may have got further.
            idle = 0 if self.cluster.version != version else idle + 1
            if idle % 10 == 0:
                version = self.cluster.version
                reconcile(self.cluster)


@contextmanager
def running() -> Iterator[Server]:
    """A server, stopped at the end."""
    server = Server()
    server.start()
    try:
        yield server
    finally:
        server.stop()


class _Http(ThreadingHTTPServer):
    daemon_threads = True
    # Threads that hold a watch open end by themselves; nobody waits for them.
    block_on_close = False
    owner: Server

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that went away is no error."""
        if not isinstance(sys.exc_info()[1], ConnectionError):
            super().handle_error(request, client_address)


@dataclass(frozen=True, slots=True)
class _Target:
    """What a path of the API names."""

    plural: str
    namespace: str = ""
    name: str = ""
    subresource: str = ""

    @property
    def key(self) -> Key:
        return (self.plural, self.namespace if KINDS[self.plural].namespaced else "", self.name)


def _target(path: str) -> _Target | None:
    parts = path.strip("/").split("/")
    group_version = parts[1:2] if parts[0] == "api" else ["/".join(parts[1:3])]
    rest = parts[2:] if parts[0] == "api" else parts[3:]
    namespace = ""
    if rest[:1] == ["namespaces"] and len(rest) > 2 and rest[2] not in {"status", "finalize"}:
        namespace, rest = rest[1], rest[2:]
    if not rest or rest[0] not in KINDS or [KINDS[rest[0]].group_version] != group_version:
        return None
    return _Target(rest[0], namespace, *rest[1:3])


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    wbufsize = -1
    disable_nagle_algorithm = True
    server: _Http

    def do_GET(self) -> None:
        self._serve("get")

    def do_POST(self) -> None:
        self._serve("create")

    def do_PUT(self) -> None:
        self._serve("update")

    def do_PATCH(self) -> None:
        self._serve("patch")

    def do_DELETE(self) -> None:
        self._serve("delete")

    def log_message(self, *_: Any) -> None:
        """Nothing: the journal tells what came."""

    @property
    def cluster(self) -> Cluster:
        return self.server.owner.cluster

    def _serve(self, verb: str) -> None:
        url = urlsplit(self.path)
        asked = dict(parse_qsl(url.query, keep_blank_values=True))
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        target = _target(url.path)
        if verb == "get" and target and not target.name:
            verb = "watch" if asked.get("watch") in {"1", "true"} else "list"
        try:
            if target is None:
                self._answer(200, _plain(url.path))
            elif target.plural == "selfsubjectaccessreviews":
                self._answer(201, self._may(_read(body)))
            elif not self._goes_wrong(verb, target):
                if verb == "watch":
                    self._watch(target, asked)
                elif verb in {"get", "list"}:
                    self._read(verb, target, asked)
                else:
                    self._change(verb, target, asked, body)
        except Refused as refused:
            self._answer(refused.code, refused.status)

    def _goes_wrong(self, verb: str, target: _Target) -> bool:
        with self.cluster.moved:
            fault = next(
                (
                    fault
                    for fault in self.cluster.faults
                    if fault.meets(verb, target.plural, target.name)
                ),
                None,
            )
            if not fault:
                return False
            fault.times -= 1
        match fault.action:
            case "forbidden":
                raise Refused(403, "Forbidden", _forbidden(verb, target), kind=target.plural)
            case "error":
                raise Refused(500, "InternalError", "Internal error occurred: a test's")
            case "hang":
                self.server.owner.stopping.wait(60)
            case "close":
                self.wfile.write(b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n{")
                self.wfile.flush()
            case _:
                raise ValueError(fault.action)
        self.close_connection = True
        return True

    def _may(self, review: Object) -> Object:
        """Whether the user may do something: whatever no fault forbids."""
        asked = dig(review, "spec", "resourceAttributes", default={})
        verb, resource, name = (asked.get(part, "") for part in ("verb", "resource", "name"))
        forbidden = any(
            fault.action == "forbidden" and fault.meets(verb, resource, name)
            for fault in self.cluster.faults
        )
        return {**review, "status": {"allowed": not forbidden}}

    def _read(self, verb: str, target: _Target, asked: Mapping[str, str]) -> None:
        if target.subresource == "log":
            self._log(target, asked)
            return
        table = "as=Table" in self.headers.get("Accept", "") and target.plural in _TABLES
        if verb == "get":
            value = self.cluster.get(*(target.key[i] for i in (0, 2, 1)))
            if target.subresource == "scale":
                value = _scale(value)
            self._answer(200, _TABLES[target.plural]([value]) if table else value)
            return
        kind = KINDS[target.plural]
        with self.cluster.moved:
            selectors = asked.get("labelSelector", ""), asked.get("fieldSelector", "")
            items = self.cluster.list(target.plural, target.namespace, *selectors)
            metadata = {"resourceVersion": str(self.cluster.version)}
        found = {
            "kind": f"{kind.name}List",
            "apiVersion": kind.group_version,
            "metadata": metadata,
            "items": items,
        }
        self._answer(200, _TABLES[target.plural](items) if table else found)

    def _log(self, target: _Target, asked: Mapping[str, str]) -> None:
        pod = self.cluster.get("pods", target.name, target.namespace)
        status = pod.get("status", {})
        states = [*status.get("initContainerStatuses", []), *status.get("containerStatuses", [])]
        names = [item["name"] for item in pod["spec"]["containers"]]
        wanted = asked.get("container") or names[0]
        state = next((item for item in states if item["name"] == wanted), None)
        if not state:
            problem = f"container {wanted} is not valid for pod {target.name}"
            raise Refused(400, "BadRequest", problem)
        previous = asked.get("previous") == "true"
        if previous and not state["lastState"]:
            problem = f'previous terminated container "{wanted}" in pod "{target.name}" not found'
            raise Refused(400, "BadRequest", problem)
        if "waiting" in state["state"] and not state["lastState"]:
            reason = state["state"]["waiting"]["reason"]
            problem = f'container "{wanted}" in pod "{target.name}" is waiting to start: {reason}'
            raise Refused(400, "BadRequest", problem)
        owners = pod["metadata"].get("ownerReferences", [{"name": ""}])
        behaviour = self.cluster.behaviours.get(owners[0]["name"], Behaviour())
        text = behaviour.log or f"{target.name}/{wanted} says nothing of note\n"
        lines = text.splitlines(keepends=True)
        tail = int(asked.get("tailLines", len(lines)))
        shown = "".join(lines[len(lines) - min(tail, len(lines)) :])
        self._send(200, shown.encode(), "text/plain")

    def _change(self, verb: str, target: _Target, asked: Mapping[str, str], body: bytes) -> None:
        sent = _read(body)
        dry_run = bool(asked.get("dryRun") or dig(sent, "dryRun"))
        code = 201 if verb == "create" else 200
        answer: Object = {}
        refused = None
        with self.cluster.moved:
            before = self.cluster.version
            try:
                answer = self._changed(verb, target, asked, sent, dry_run=dry_run)
            except Refused as error:
                refused, code = error, error.code
            changed = self.cluster.version != before
            name = target.name or dig(answer, "metadata", "name") or ""
            name = name or dig(sent, "metadata", "name", default="")
            request = Request(
                verb, target.plural, target.namespace, name, self.path, code, changed, dry_run
            )
            self.cluster.journal.append(request)
            then = self.cluster.after_change if changed else None
        if then:
            then(request)
        if refused:
            raise refused
        self._answer(code, answer)

    def _changed(
        self,
        verb: str,
        target: _Target,
        asked: Mapping[str, str],
        sent: Object,
        *,
        dry_run: bool,
    ) -> Object:
        cluster, key, manager = self.cluster, target.key, asked.get("fieldManager", "")
        manager = manager or self.headers.get("User-Agent", "unknown").partition("/")[0]
        kind = self.headers.get("Content-Type", "")
        if verb == "create":
            return cluster.create(*key[:2], sent, manager=manager, dry_run=dry_run)
        if verb == "delete":
            policy = dig(sent, "propagationPolicy", default="Background")
            return cluster.delete(key, policy, dry_run=dry_run)
        if "apply-patch" in kind:
            force = asked.get("force") == "true"
            return cluster.apply(key, sent, manager=manager, force=force, dry_run=dry_run)
        value = cluster.get(key[0], key[2], key[1])
        if target.subresource == "scale":
            value["spec"]["replicas"] = sent["spec"]["replicas"]
            return _scale(cluster.update(key, value, manager=manager, dry_run=dry_run))
        if verb == "update":
            stale = dig(sent, "metadata", "resourceVersion") not in (
                None,
                value["metadata"]["resourceVersion"],
            )
            if stale:
                message = f'Operation cannot be fulfilled on {key[0]} "{key[2]}": the object '
                message += "has been modified; please apply your changes to the latest version"
                raise Refused(409, "Conflict", message)
            merged = {**sent, "status": value["status"]} if "status" in value else sent
        elif "merge-patch" in kind:
            merged = _merge(value, sent, by_name="strategic" in kind)
        else:
            raise Refused(415, "UnsupportedMediaType", f"no patch of the type {kind}")
        return cluster.update(key, merged, manager=manager, dry_run=dry_run)

    def _watch(self, target: _Target, asked: Mapping[str, str]) -> None:
        cluster, stopping = self.cluster, self.server.owner.stopping
        selectors = asked.get("labelSelector", ""), asked.get("fieldSelector", "")
        until = time.monotonic() + float(asked.get("timeoutSeconds") or 600)
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        version = int(asked.get("resourceVersion") or 0)
        first: list[Object] = []
        with cluster.moved:
            if not version or asked.get("sendInitialEvents") == "true":
                version = cluster.version
                found = cluster.list(target.plural, target.namespace, *selectors)
                first = [{"type": "ADDED", "object": value} for value in found]
        if asked.get("sendInitialEvents") == "true":
            ended = {"k8s.io/initial-events-end": "true"}
            kind = KINDS[target.plural]
            mark = {"kind": kind.name, "apiVersion": kind.group_version}
            metadata = {"resourceVersion": str(version), "annotations": ended}
            first.append({"type": "BOOKMARK", "object": {**mark, "metadata": metadata}})
        self._chunk(first)
        while not stopping.is_set() and time.monotonic() < until:
            with cluster.moved:
                if cluster.version <= version:
                    cluster.moved.wait(0.5)
                news = list(
                    cluster.changes_since(version, target.plural, target.namespace, *selectors)
                )
                version = cluster.version
            self._chunk([{"type": kind, "object": value} for _, kind, value in news])
        self.wfile.write(b"0\r\n\r\n")

    def _chunk(self, events: list[Object]) -> None:
        for event in events:
            line = json.dumps(event).encode() + b"\n"
            self.wfile.write(b"%x\r\n%s\r\n" % (len(line), line))
        self.wfile.flush()

    def _answer(self, code: int, value: Object | str) -> None:
        if isinstance(value, str):
            self._send(code, value.encode(), "text/plain")
        else:
            self._send(code, json.dumps(value).encode(), "application/json")

    def _send(self, code: int, body: bytes, kind: str) -> None:
        self.send_response(code)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


_META = {
    1: "name",
    2: "generateName",
    3: "namespace",
    11: {"labels": str},
    12: {"annotations": str},
}
_PROTOBUF: Mapping[str, Object] = {
    "Namespace": {1: ("metadata", _META)},
    "Secret": {1: ("metadata", _META), 2: {"data": bytes}, 3: "type", 4: {"stringData": str}},
    "ConfigMap": {1: ("metadata", _META), 2: {"data": str}},
    "SelfSubjectAccessReview": {
        2: (
            "spec",
            {1: ("resourceAttributes", {1: "namespace", 2: "verb", 5: "resource", 7: "name"})},
        )
    },
}
"""Numbers of the fields of what kubectl sends as protobuf."""


def _read(body: bytes) -> Object:
    """A request's body: JSON, YAML, or of a few kinds protobuf."""
    if not body.startswith(b"k8s\0"):
        value: Object = (
            yaml.safe_load(body) if body[:1] not in (b"{", b"") else json.loads(body or b"{}")
        )
        return value
    envelope = dict(_wire(body[4:]))
    name = dict(_wire(envelope[1]))[2].decode()
    if name not in _PROTOBUF:
        message = f"a {name} as protobuf is more than this server reads: create it from a file"
        raise Refused(415, "UnsupportedMediaType", message)
    return _message(envelope[2], _PROTOBUF[name])


def _message(data: bytes, fields: Mapping[int, Any]) -> Object:
    found: Object = {}
    for number, value in _wire(data):
        match fields.get(number):
            case str(name) if value:
                found[name] = value.decode()
            case (name, inner):
                found[name] = _message(value, inner)
            case {**entries}:
                ((name, kind),) = entries.items()
                entry = dict(_wire(value))
                raw = entry.get(2, b"")
                text = raw.decode() if kind is str else base64.b64encode(raw).decode()
                found.setdefault(name, {})[entry[1].decode()] = text
    return found


def _wire(data: bytes) -> Iterator[tuple[int, bytes]]:
    """Fields of a protobuf message that hold bytes, by number; numbers are passed over."""

    def varint() -> int:
        nonlocal place
        value = shift = 0
        while True:
            byte = data[place]
            place += 1
            value |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                return value

    place = 0
    while place < len(data):
        tag = varint()
        length = varint()
        if tag & 7 == 2:
            yield tag >> 3, data[place : place + length]
            place += length


def _scale(value: Object) -> Object:
    names = ("name", "namespace", "uid", "resourceVersion", "creationTimestamp")
    chosen = dig(value, "spec", "selector", "matchLabels", default={})
    return {
        "kind": "Scale",
        "apiVersion": "autoscaling/v1",
        "metadata": {name: value["metadata"][name] for name in names},
        "spec": {"replicas": value["spec"]["replicas"]},
        "status": {
            "replicas": dig(value, "status", "replicas", default=0),
            "selector": ",".join(f"{name}={text}" for name, text in chosen.items()),
        },
    }


def _pods_table(pods: list[Object]) -> Object:
    rows = []
    for pod in pods:
        states = dig(pod, "status", "containerStatuses", default=[])
        every = [*dig(pod, "status", "initContainerStatuses", default=[]), *states]
        reasons = [
            dig(item, "state", "waiting", "reason") or dig(item, "state", "terminated", "reason")
            for item in states
        ]
        status = next(filter(None, reasons), dig(pod, "status", "phase", default="Unknown"))
        status = "Terminating" if "deletionTimestamp" in pod["metadata"] else status
        ready = f"{sum(item['ready'] for item in states)}/{len(pod['spec']['containers'])}"
        restarts = sum(item["restartCount"] for item in every)
        rows.append([pod["metadata"]["name"], ready, status, restarts, "1s"])
    return _table(("Name", "Ready", "Status", "Restarts", "Age"), rows, pods)


def _namespaces_table(spaces: list[Object]) -> Object:
    rows = [[item["metadata"]["name"], item["status"]["phase"], "1s"] for item in spaces]
    return _table(("Name", "Status", "Age"), rows, spaces)


def _table(names: tuple[str, ...], rows: list[list[Any]], objects: list[Object]) -> Object:
    plain = {"type": "string", "format": "", "description": "", "priority": 0}
    return {
        "kind": "Table",
        "apiVersion": "meta.k8s.io/v1",
        "metadata": {},
        "columnDefinitions": [{"name": name, **plain} for name in names],
        "rows": [
            {"cells": cells, "object": item} for cells, item in zip(rows, objects, strict=True)
        ],
    }


_TABLES = {"pods": _pods_table, "namespaces": _namespaces_table}
"""Kinds that the server itself prints; of the others kubectl shows name and age."""


def _forbidden(verb: str, target: _Target) -> str:
    kind = KINDS[target.plural]
    name = f'{target.plural} "{target.name}"' if target.name else target.plural
    where = f' in the namespace "{target.namespace}"' if target.namespace else ""
    return (
        f'{name} is forbidden: User "deployer" cannot {verb} resource "{target.plural}" '
        f'in API group "{kind.group}"{where or " at the cluster scope"}'
    )


def _plain(path: str) -> Object | str:
    """What the server says of itself: health, version, discovery, OpenAPI."""
    versions = sorted({kind.group_version for kind in KINDS.values()})
    if path in {"/readyz", "/livez", "/healthz"}:
        return "ok"
    if path == "/version":
        numbers = {"major": "1", "minor": "37", "gitVersion": "v1.37.0"}
        return {**numbers, "goVersion": "go", "platform": "linux/amd64"}
    if path == "/api":
        return {"kind": "APIVersions", "versions": ["v1"], "serverAddressByClientCIDRs": []}
    if path == "/apis":
        groups = []
        for full in versions[:]:
            if "/" in full:
                entry = {"groupVersion": full, "version": full.partition("/")[2]}
                group = {"name": full.partition("/")[0], "versions": [entry]}
                groups.append({**group, "preferredVersion": entry})
        return {"kind": "APIGroupList", "apiVersion": "v1", "groups": groups}
    full = re.sub(r"^/apis?/", "", path)
    if full in versions:
        return _discovery(full)
    prefix = "/openapi/v3"
    paths = {f"api{'s' * ('/' in version)}/{version}": version for version in versions}
    if path == prefix:
        urls = {name: {"serverRelativeURL": f"{prefix}/{name}?hash=1"} for name in paths}
        return {"paths": urls}
    if path.removeprefix(f"{prefix}/") in paths:
        return _openapi(paths[path.removeprefix(f"{prefix}/")])
    raise Refused(404, "NotFound", f"the server could not find the requested resource ({path})")


def _discovery(group_version: str) -> Object:
    verbs = ["create", "delete", "deletecollection", "get", "list", "patch", "update", "watch"]
    resources = []
    for kind in KINDS.values():
        if kind.group_version != group_version:
            continue
        plain = {"namespaced": kind.namespaced, "singularName": kind.name.lower()}
        short = [kind.short] if kind.short else []
        inside = ["all"] if kind.plural in {*_WORKLOADS, "pods", "services", "cronjobs"} else []
        resources.append(
            {
                **plain,
                "name": kind.plural,
                "kind": kind.name,
                "verbs": ["create"] if kind.plural.endswith("reviews") else verbs,
                "shortNames": short,
                "categories": inside,
            }
        )
        for name in kind.subresources:
            more = {"name": f"{kind.plural}/{name}", "kind": kind.name, "verbs": verbs}
            if name == "scale":
                more |= {"group": "autoscaling", "version": "v1", "kind": "Scale"}
            resources.append({**plain, **more})
    header = {"kind": "APIResourceList", "apiVersion": "v1"}
    return {**header, "groupVersion": group_version, "resources": resources}


def _openapi(group_version: str) -> Object:
    """Enough for kubectl to see that the server itself checks fields, so that it need not."""
    paths = {}
    parameters = [{"name": n, "in": "query"} for n in ("dryRun", "fieldManager", "fieldValidation")]
    for kind in KINDS.values():
        if kind.group_version == group_version:
            names = {"group": kind.group, "version": group_version.split("/")[-1]}
            exact = {"x-kubernetes-group-version-kind": {**names, "kind": kind.name}}
            operation = {"parameters": parameters, "responses": {}, **exact}
            root = "/apis" if kind.group else "/api"
            inside = "/namespaces/{namespace}" if kind.namespaced else ""
            path = f"{root}/{group_version}{inside}/{kind.plural}/{{name}}"
            paths[path] = {"patch": operation, "put": operation}
    header = {"openapi": "3.0.0", "info": {"title": "tests", "version": "1"}}
    return {**header, "paths": paths, "components": {}}


def main() -> None:
    """Run one in the foreground."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kubeconfig", type=Path, required=True, help="file to write")
    parser.add_argument("--port", type=int, default=0, help="0: a free one")
    parser.add_argument("--context", default=CONTEXT, help="its current context")
    parser.add_argument("--waiting", action="append", default=[], metavar="WORKLOAD=REASON")
    parser.add_argument("--fails", action="append", default=[], metavar="WORKLOAD")
    parser.add_argument("--stuck", action="append", default=[], metavar="WORKLOAD")
    parser.add_argument(
        "--fault", action="append", default=[], metavar="ACTION:VERB:RESOURCE:TIMES"
    )
    given = parser.parse_args()
    server = Server(given.port)
    cluster = server.cluster
    log = "first line of its log\nlast line of its log\n"
    for text in given.waiting:
        name, _, reason = text.partition("=")
        cluster.behaviours[name] = Behaviour(waiting=reason, message=f"a test's {reason}", log=log)
    for name in given.fails:
        cluster.behaviours[name] = Behaviour(fails=True, log=log)
    for name in given.stuck:
        cluster.behaviours[name] = Behaviour(stuck=True, log=log)
    for text in given.fault:
        action, verb, resource, times = text.split(":")
        cluster.faults.append(Fault(action, verb, resource, times=int(times or -1)))
    server.write_kubeconfig(given.kubeconfig, given.context)
    ended = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: ended.set())
    server.start()
    sys.stdout.write(f"{server.url}\n")
    sys.stdout.flush()
    ended.wait()
    seen = Counter((r.verb, r.resource, r.code, r.changed, r.dry_run) for r in cluster.journal)
    for (verb, resource, code, changed, dry_run), count in sorted(seen.items()):
        more = f"{' changed' * changed}{' dry-run' * dry_run}"
        sys.stdout.write(f"{count} {verb} {resource} {code}{more}\n")
    server.stop()


if __name__ == "__main__":
    main()
